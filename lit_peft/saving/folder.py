"""Adapter folders in HF PEFT's layout: `save` writes one that HF PEFT opens, `load` reads ours and theirs.

A method takes part through four members and no base class; `LoRA` has them all:

    hf_peft       the entries of adapter_config.json that name it: {"peft_type": "LORA"}
    hf_options    the further entries that it reads, with HF PEFT's defaults
    to_hf_peft(sites) -> (entries, tensors)
                  its own entries, and its tensors by their name in the model ("encoder.q.lora_A.weight"). Tensors
                  are views of the addition's own, since `load` writes through them; views in a list stand side by
                  side in one tensor.
    from_hf_peft(options, paths) -> arguments
                  class method: the constructor arguments that these entries mean for layers at these paths

A method that HF PEFT has for some layers alone says at which, `hf_has(site, addition)`; others are written as below.

A method whose additions shrink or that masks them has a fifth:

    exported(sites) -> (method, sites)
                  what is written in its place: additions without what is pruned, and the method that builds such.
                  Their masks (buffers of booleans) go into the header of the tensor file, beside our own record.

A method that adds nothing (BitFit, LinearProbe) needs none of them. HF PEFT must adapt some layer, so the folder
holds a LoRA of rank 1 whose factors are zero, beside the base parameters that train.

A method that lacks the four is written in the same files for `load` alone: `peft_type` is LIT_PEFT, which HF PEFT
does not know, and tensors are named by their place here, "encoder.q.peft.gate".
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core import hf_peft
from lit_peft.core.active import running, set_aside
from lit_peft.core.addition import Addition
from lit_peft.core.attach import check_attachable, detach
from lit_peft.core.buffers import moving_buffers
from lit_peft.core.checkpoint import CheckpointMismatch
from lit_peft.core.files import pack_mask, unpack_mask, write_folder
from lit_peft.core.hf_peft import find_root, is_inside
from lit_peft.core.quantize import Quantize, parse
from lit_peft.core.records import compare_halves
from lit_peft.core.registry import Adapter, registry
from lit_peft.core.swap import buffers_beside, check_unmerged
from lit_peft.core.targets import Site, make_site
from lit_peft.methods.base import Method
from lit_peft.methods.lora import LoRA
from lit_peft.methods.registry import available, method_class
from lit_peft.saving.checkpoint_file import AS_TRAINED, asked_for, load_checkpoint
from lit_peft.saving.folder_record import check_attached, check_base, differs, make_record, open_folder
from lit_peft.saving.folder_tensors import fill_additions, fill_base
from lit_peft.training import seam

# ---------------------------------------------------------------------------------------------------- save


def save(
    module: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    metrics: Mapping[str, float] | None = None,
) -> Path:
    """Writes one adapter as `adapter_config.json` and `adapter_model.safetensors`, which HF PEFT opens.

    Names in it are relative to the transformers model inside `module`; buffers of that model which moved in training
    are in it, those outside of it are not. What `load` wants beyond HF PEFT's own entries (method, arguments,
    fingerprint of the base) stands in the metadata of the tensor file.

    Args:
        module: What the method was attached to: a model, or a LightningModule that holds one.
        folder: Where to; files of these names are replaced. Where parameters are sharded, every rank calls this.
        name: Name of the adapter on the module.
        metrics: Scores to keep with it, which `lit-peft inspect` shows.

    Returns:
        The folder.

    Raises:
        ValueError: When there is no such adapter, it is merged, or HF PEFT has no form for what it is or trains.
    """
    adapter = _adapter(module, name)
    with running(module, name):
        return _write(module, Path(folder), adapter, metrics or {})


def _write(module: nn.Module, folder: Path, adapter: Adapter, metrics: Mapping[str, float]) -> Path:
    """Writes an adapter that runs alone, so that the base holds what belongs to it."""
    moving = sorted(moving_buffers(module, [adapter]))
    root = find_root(module, [*adapter.sites, *adapter.base, *moving])
    model, pairs = root.model, root.pairs(adapter)
    method: Any = method_class(adapter.spec["class_path"])(**adapter.spec["init_args"])
    base = [root.inside(parameter) for parameter in adapter.base]
    entry = make_record(module, root, adapter)

    whole = hf_peft.trained_whole(model, {id(model.get_parameter(parameter)) for parameter in base})
    if whole == [""]:
        raise ValueError(
            f"{type(method).__name__} trains every parameter of {type(model).__name__}: there is no adapter to save. "
            "The trainer's checkpoint holds the model."
        )
    # Statistics that moved beside nothing that trains: HF PEFT keeps them with their layer.
    beside = buffers_beside(model, base)
    owners = {name.rpartition(".")[0]: None for name in map(root.inside, moving) if name not in beside}
    whole += [path for path in owners if not is_inside(path, whole)]
    task = hf_peft.task_type(model, [site.path for site, _ in pairs])
    saved = hf_peft.modules_to_save(model, [*whole, *hf_peft.HEADS.get(task, ())])
    if not pairs:
        method, pairs = _no_change(model, saved)
    form, spec = hf_peft.form_of(method, pairs), adapter.spec
    if hasattr(form, "exported"):
        form, pairs = form.exported(pairs)
        spec = spec if form is method else form.spec()
    paths = [] if form is hf_peft.OwnForm else [site.path for site, _ in pairs]
    if clash := [path for path in paths if is_inside(path, saved)]:
        raise ValueError(
            f"{clash[0]} is adapted, but HF PEFT would train it whole: it goes by endings, and {', '.join(whole)} is "
            f"trained whole. Add {clash[0]} to train_also or to exclude_modules."
        )

    entries, changes = form.to_hf_peft(pairs)
    tensors = {key: torch.cat(value, -1) if isinstance(value, list) else value for key, value in changes.items()}
    supports_bias = None if form is hf_peft.OwnForm else "bias" in entries
    of_base, kept = _of_base(model, base, entry["moved"], saved, paths, supports_bias)
    tensors |= kept
    config = {
        "base_model_name_or_path": getattr(getattr(model, "config", None), "_name_or_path", None) or None,
        "inference_mode": True,
        "modules_to_save": hf_peft.named_to_save(model, whole) or None,
        "target_modules": hf_peft.target_modules(model, paths, saved),
        "task_type": task,
        **form.hf_peft,
        **entries,
        **of_base,
    }
    if hf_peft.PROMPT in tensors:
        del config["target_modules"]
    own = entry | {"methods": {adapter.name: spec}, "metrics": {key: float(value) for key, value in metrics.items()}}
    if hasattr(form, "exported"):
        own["masks"] = {key: pack_mask(mask) for key, mask in _masks(pairs).items()}
    return write_folder(folder, config, {hf_peft.prefix(key, tensors) + key: t for key, t in tensors.items()}, own)


def _masks(pairs: list[tuple[Site, Addition]]) -> dict[str, Tensor]:
    """The additions' buffers of booleans, by their name in the model."""
    named = ((f"{site.path}.{name}", buffer) for site, addition in pairs for name, buffer in addition.named_buffers())
    return {name: buffer for name, buffer in named if buffer.dtype == torch.bool}


def _adapter(module: nn.Module, name: str) -> Adapter:
    check_unmerged(module)
    state = registry(module)
    if state is None or name not in state.adapters:
        raise ValueError(
            f"{type(module).__name__} has no adapter {name!r}; it has {sorted(state.adapters) if state else 'none'}. "
            "Pass the module that the method was attached to."
        )
    return state.adapters[name]


def _no_change(model: nn.Module, saved: list[str]) -> tuple[LoRA, list[tuple[Site, Addition]]]:
    """A LoRA at one layer that changes nothing, in place of a method that adds nothing."""
    path = hf_peft.first_linear(model, saved)
    site = make_site(path, model.get_submodule(path))
    method = LoRA(r=1, alpha=1, dropout=0.0)
    delta = method.build(site)
    nn.init.zeros_(delta.lora_A)
    return method, [(site, delta)]


def _of_base(
    model: nn.Module, base: list[str], moved: list[str], saved: list[str], paths: list[str], supports_bias: bool | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a folder holds of the base: entries of the config, and tensors under HF PEFT's names.

    Args:
        model: The model.
        base: Its parameters that train.
        moved: Its buffers that moved beside none of them.
        saved: Modules that are saved whole; HF PEFT wants all of their tensors, whether they train or not.
        paths: Layers that are adapted. HF PEFT wraps them, which moves their biases.
        supports_bias: Whether the method's form has an entry `bias`; None for our own, which takes any parameter.

    Raises:
        ValueError: For a parameter that trains alone and is no bias.
    """
    states = {path: model.get_submodule(path).state_dict(keep_vars=True) for path in saved}
    kept = {f"{path}.{k}": v for path, state in states.items() for k, v in state.items() if ".peft." not in f".{k}"}
    covered = {id(value) for value in kept.values()}
    entries: dict[str, Any] = {"ensure_weight_tying": True} if len(covered) < len(kept) else {}
    if alone := [name for name in base if id(model.get_parameter(name)) not in covered]:
        wrong = [name for name in alone if name.rpartition(".")[2] != "bias" or not supports_bias]
        if wrong and supports_bias is not None:
            raise ValueError(
                f"{wrong[0]} trains alone, and HF PEFT keeps only whole modules{' and biases' * supports_bias}: name "
                f"{wrong[0].rpartition('.')[0]} in train_also. The trainer's checkpoint keeps it as it is."
            )
        if supports_bias:
            entries["bias"] = "lora_only" if {f"{path}.bias" for path in paths}.issuperset(alone) else "all"
        kept |= {name: model.get_parameter(name) for name in alone}
        kept |= {name: model.get_buffer(name) for name in buffers_beside(model, alone)}
    kept |= {name: model.get_buffer(name) for name in moved}
    for owner in paths:
        for name in [name for name in kept if name.rpartition(".")[0] == owner]:
            kept[f"{owner}.base_layer{name.removeprefix(owner)}"] = kept.pop(name)
    return entries, kept


# ---------------------------------------------------------------------------------------------------- load


def load(
    module: nn.Module, path: str | os.PathLike[str], name: str = "default", *, quantize: Quantize = AS_TRAINED
) -> Adapter:
    """Attaches a saved adapter: of a folder of ours, of one that HF PEFT wrote, or of a run's checkpoint.

    In float32 the outputs are bit for bit those at `save`. A folder or checkpoint of ours says which method made it
    and is refused on another base; a folder of HF PEFT's becomes the method that has its equation, at the layers
    that its tensors name. Nothing in a folder is ever unpickled, and of a checkpoint only tensors and plain values.
    To train on, give the trainer the same method, `LoRA(**adapter.spec["init_args"])`.

    Args:
        module: A model, or a LightningModule that holds one, with the weights that the adapter was trained on; for
            a checkpoint, the module that was trained. One that builds its layers in `configure_model` does so now.
        path: The folder of an adapter, or the file of a checkpoint.
        name: Name that the adapter gets on the module; several in one checkpoint keep their names. It runs alone then:
            `set_active` lets others run again, or several together.
        quantize: How to quantise the base, as a method's `quantize`; null: not at all, it is taken as it is. By default
            as in training. An adapter runs on a base that is stored otherwise too, with a warning.

    Returns:
        The registry's record: sites, base parameters that train; of several adapters the first.

    Raises:
        FileNotFoundError: When a file is missing.
        CheckpointMismatch: When the folder is damaged, contradicts itself, belongs to another base or holds what no
            method here has. The module is then as it was, but for a base that was quantised for it already.
        ValueError: When the module cannot take an adapter of this name.
    """
    if Path(path).is_dir() or not (Path(path).is_file() or Path(path).suffix == ".ckpt"):
        read = open_folder(path)
        seam.build(module)
        check_attachable(module, name)
        try:
            with set_aside(module):
                adapter = _load_folder(module, *read, name, quantize)
        except CheckpointMismatch as error:
            raise CheckpointMismatch(f"{path}: {error}") from error
        adapter.source = str(Path(path).resolve())
        return adapter
    seam.build(module)
    check_unmerged(module)
    adapter = load_checkpoint(module, path, name, quantize)
    seam.adapt(module)
    return adapter


def attach(module: nn.Module, method: Method) -> Adapter:
    """Attaches a method to any module, in place, as `method.attach(module)` does; `detach` takes it off again."""
    return method.attach(module)


def _load_folder(
    module: nn.Module,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    mine: dict[str, Any] | None,
    name: str,
    quantize: Quantize,
) -> Adapter:
    root = find_root(module, fits=None if mine is None else lambda root: differs(mine, module, root) is None)
    if mine is not None:
        check_base(mine, module, root)
    reader = None if mine is not None else _reader(config)
    base, changes = hf_peft.split(root.model, config, tensors)
    hf_peft.check_sizes(config, changes)
    paths = hf_peft.site_paths(root.model, changes)
    if mine is not None:
        (spec,) = mine["methods"].values()
        trains, head, arguments = mine["base"], mine["head"], spec["init_args"]
    else:
        spec = {"class_path": reader}
        trains, head = hf_peft.trained_names(root.model, config, base)
        arguments = {"train_also": head} if hf_peft.PROMPT in changes else {"target_modules": paths, "train_also": head}
    if quantize != AS_TRAINED:
        arguments = {**arguments, "quantize": parse(quantize)}
    parameters = dict(root.model.named_parameters(remove_duplicate=False))
    if missing := [key for key in trains if key not in base or key not in parameters]:
        raise CheckpointMismatch(f"The folder holds no {missing[0]}, which its adapter trains.")
    for key, tensor in (changes | {key: base[key] for key in trains}).items():  # a buffer may hold inf, as a mask does
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise CheckpointMismatch(f"{key} holds nan or inf: its training diverged, or the folder is damaged.")
    cls: Any = method_class(spec["class_path"])
    form: Any = (
        hf_peft.OwnForm if mine is not None and config.get("peft_type") == hf_peft.OwnForm.hf_peft["peft_type"] else cls
    )
    read = {}
    # A prompt of ours may have more to it than HF PEFT knows.
    reads = hasattr(form, "from_hf_peft") and (mine is None or hf_peft.PROMPT not in changes)
    with asked_for(cls, "The folder"):
        recorded = cls(**arguments) if mine is not None else None
        if reads:
            known = {**form.hf_options, **form.hf_peft}
            read = form.from_hf_peft(hf_peft.read_options(config, known, cls.__name__), paths)
        method = cls(**arguments | read | {"name": name})
    spec = method.spec() if mine is None else spec | {"init_args": arguments | {"name": name}}

    # The places are those of the folder: what the arguments say of them may mean others from this root.
    canonical = {id(p): key for key, p in module.named_parameters()}
    names = {canonical[id(parameters[key])] for key in trains}
    scales = (mine or {}).get("scales", {})
    method.train_also = {f"re:{re.escape(root.outside(key))}": scales.get(key, 1.0) for key in head}
    method.trains = names.__contains__
    if paths and hasattr(form, "to_hf_peft"):
        sites = [make_site(root.outside(path), root.model.get_submodule(path)) for path in paths]
        method.sites = lambda module, avoid: sites
    with asked_for(cls, "The folder"):
        adapter: Adapter = method.attach(module)
    adapter.spec, adapter.prepared = spec, True
    try:
        if mine is not None:
            check_attached(mine, module, root)
        if more := set(adapter.base) - names:
            raise CheckpointMismatch(f"The folder holds no {min(more)}, which this module's train_also names.")
        if recorded is not None and reads:
            entries = recorded.to_hf_peft(root.pairs(adapter))[0]
            # Which biases train stands in `base`; how weights are stored is of the base, quantised here or not.
            compare_halves(config, entries, [key for key in entries if key not in ("bias", "fan_in_fan_out")])
        maps: Any = hf_peft.OwnForm if form is hf_peft.OwnForm else method
        with asked_for(cls, "The folder"):
            own = maps.to_hf_peft(root.pairs(adapter))[1] if adapter.sites else {}
        fill_additions(own, changes)
        if mine is not None and hasattr(form, "exported"):
            masks, packed = _masks(root.pairs(adapter)), mine.get("masks", {})
            if odd := sorted(masks.keys() ^ packed.keys()):
                raise CheckpointMismatch(f"The record {'lacks' if odd[0] in masks else 'holds'} the mask {odd[0]}.")
            for key, mask in masks.items():
                mask.copy_(unpack_mask(packed[key], mask.shape))
        moved = set((mine or {}).get("moved", ()))
        moving = {root.inside(key) for key in moving_buffers(module, [adapter])} | moved
        if (moved or adapter.update_norm_stats) and (lost := moving - base.keys()):
            raise CheckpointMismatch(f"The folder holds no {min(lost)}, which its adapter moves in training.")
        fill_base(root.model, trains, base, moving)
        registry(module).moved |= {root.outside(key) for key in moved}  # type: ignore[union-attr]
    except BaseException:
        detach(module, name)
        raise
    return adapter


def _reader(config: Mapping[str, Any]) -> str:
    """Class path of the method that has the equation of HF PEFT's config; the one that asks for most of it."""
    if "peft_type" not in config:
        raise CheckpointMismatch("adapter_config.json names no peft_type: neither HF PEFT nor lit-peft wrote it.")
    forms = {entry.class_path: getattr(entry.load(), "hf_peft", {}) for entry in available().values()}
    fitting = {path: form for path, form in forms.items() if form and form.items() <= dict(config).items()}
    if not fitting:
        known = sorted({form["peft_type"] for form in forms.values() if form})
        raise CheckpointMismatch(f"peft_type {config['peft_type']!r} has no method here; known: {', '.join(known)}.")
    return max(fitting, key=lambda path: len(fitting[path]))
