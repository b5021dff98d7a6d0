"""A model with its adapters folded in, as a folder that plain transformers loads."""

import errno
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lit_peft.core.buffers import holds
from lit_peft.core.files import umask
from lit_peft.core.hf_peft import Root, find_models, find_root, has_form, is_inside
from lit_peft.core.merge import Into, check_mergeable, merge, merged_into, unmerge
from lit_peft.core.quantize import quantizer_of, recognise, stored_as
from lit_peft.core.registry import registry
from lit_peft.core.swap import MERGED_KEY, CastsParameters, holds_numbers
from lit_peft.methods.base import Method
from lit_peft.methods.registry import method_class
from lit_peft.saving.left_alone import left_alone
from lit_peft.saving.new_folder import new_folder


def save_merged(
    module: nn.Module, folder: str | os.PathLike[str], tokenizer: Any = None, *, into: Into | None = None
) -> Path:
    """Writes the transformers model in a module with its active adapters folded in; nothing of ours is in the folder.

    `AutoModelForSequenceClassification.from_pretrained(folder)` and the like load it, and `pipeline` where there is a
    tokenizer. What training changed outside of the transformers model, a head of one's own, is not in it.

    Args:
        module: A model with adapters, or merged, or with neither, as a base that was quantised, or a LightningModule
            that holds one. Afterwards it is as it was.
        folder: A new folder; there whole, or not at all.
        tokenizer: Its tokenizer, which is written beside it; null: none is.
        into: Of a quantised base, see `lit_peft.merge`: dequantized gives the folder of a float model, which needs no
            bitsandbytes; requantized one of codes, which transformers loads in as many bits.

    Returns:
        The folder.

    Raises:
        ValueError: When the module holds no transformers model, or several; when its adapters cannot be folded, see
            `lit_peft.merge`, or were folded into something else; when it is quantised as transformers cannot read it.
        FileExistsError: When the folder is there and not empty.
    """
    root = find_model(module)
    is_merged = MERGED_KEY in module.__dict__ or registry(module) is None
    if not is_merged:
        check_foldable(module, into)
    elif into is not None and into != merged_into(module):
        raise ValueError(
            f"into is {into!r}, but {type(module).__name__} is as it was merged, or has no adapter: leave it out."
        )
    with new_folder(folder) as part, nullcontext() if is_merged else _merged(module, into):
        write_model(root.model, part, tokenizer)
    return Path(folder)


@contextmanager
def _merged(module: nn.Module, into: Into | None) -> Iterator[None]:
    merge(module, into=into)
    try:
        yield
    finally:
        unmerge(module)


def find_model(module: nn.Module) -> Root:
    """The transformers model in a module, with the path that it has there.

    Raises:
        ValueError: When there is none, when there are several, or when nothing that was trained lies in it.
    """
    names = changed(module)
    root = find_root(module, names)
    if not hasattr(root.model, "save_pretrained"):
        raise ValueError(
            f"{type(module).__name__} holds no transformers model, so that there is no folder to write it as. In "
            "Python: lit_peft.merge(module), then torch.save(module.state_dict(), FILE)."
        )
    elsewhere = left_out(module, root)
    if several := [path for path in find_models(module) if any(is_inside(name, [path]) for name in elsewhere)]:
        raise ValueError(
            f"{type(module).__name__} holds several models that were trained, {root.path} and {', '.join(several)}: "
            f"a folder is of one. In Python: lit_peft.merge(module), then save_merged(module.{root.path}, FOLDER)."
        )
    if names and len(elsewhere) == len(names):
        raise ValueError(
            f"Nothing that was trained lies in the {type(root.model).__name__} at {root.path!r}: its folder would be "
            "that of the base. In Python: lit_peft.merge(module), then torch.save(module.state_dict(), FILE)."
        )
    return root


def left_out(module: nn.Module, root: Root) -> list[str]:
    """Names of what is adapted or trained outside of the transformers model, and so not in its folder."""
    return [name for name in changed(module) if root.path and not is_inside(name, [root.path])]


def changed(module: nn.Module) -> list[str]:
    """Names of what is adapted or trained."""
    state = registry(module)
    return [name for a in state.adapters.values() for name in (*a.sites, *a.base)] if state is not None else []


def check_foldable(module: nn.Module, into: Into | None = None) -> None:
    """Raises ValueError, naming the method and a way out, where the active adapters cannot be folded."""
    state = registry(module)
    for adapter in state.adapters.values() if state is not None else ():
        layers: Iterator[Any] = map(module.get_submodule, adapter.sites)
        for addition in (layer.peft[adapter.name] for layer in layers):
            if adapter.name in state.active and addition.not_mergeable is not None:  # type: ignore[union-attr]
                raise ValueError(not_foldable(method_class(adapter.spec["class_path"]), addition.not_mergeable))
    check_mergeable(module, into)


def not_foldable(method: type[Method], why: str) -> str:
    """What is told of a method whose additions no weight can hold."""
    way_out = ", or `lit-peft export` it for Hugging Face PEFT" if has_form(method) else ""
    return (
        f"{method.__name__} cannot be merged: {why} Keep its adapter beside the base, which `lit-peft predict` and "
        f"lit_peft.load do{way_out}."
    )


# ------------------------------------------------------------------------------------------- writing, reading


def write_model(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Writes a merged model of transformers, and its tokenizer, into a folder that is there."""
    try:
        with _in_base_dtype(model), _told_as_quantised(model), _without_reading_codes(model):
            model.save_pretrained(folder)  # type: ignore[operator]
        if tokenizer is not None:
            if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:  # how it was called last
                backend.no_truncation()
                backend.no_padding()
            tokenizer.save_pretrained(folder)
        for file in folder.rglob("*"):  # weights come readable to their owner alone
            if file.is_file():
                file.chmod(0o666 & ~umask())
    except SafetensorError as error:  # of a full disk, too
        number = next((n for n in (errno.ENOSPC, errno.EDQUOT) if f"os error {n}" in str(error)), errno.EIO)
        raise OSError(number, os.strerror(number), str(folder)) from error


@contextmanager
def _in_base_dtype(model: nn.Module) -> Iterator[None]:
    """Gives what trained the dtype that its layer computes in, bfloat16 for instance, for as long as it is written."""
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, CastsParameters)]
    own: list[tuple[Any, Tensor]] = []
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            if holds_numbers(parameter) and parameter.dtype != layer.base_dtype:
                own.append((parameter, parameter.data))
                parameter.data = parameter.data.to(layer.base_dtype)
    try:
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


@contextmanager
def _told_as_quantised(model: nn.Module) -> Iterator[None]:
    """Has the configuration of a model with quantised layers say which, for as long as it is written.

    What transformers has left there need not: it names no layer that it found no weight for, and made a new one.

    Raises:
        ValueError: When transformers has no words for it.
    """
    config: Any = model.config
    own = getattr(config, "quantization_config", None)
    kinds = stored_as(model)
    if not kinds or (own is not None and quantizer_of(model.get_submodule(next(iter(kinds)))) is None):
        yield
        return
    from transformers.quantizers import AutoHfQuantizer

    told: Any = _reading_config(model, kinds)
    loader = model.__dict__.get("hf_quantizer")
    config.quantization_config = told
    # Some codes are written as several tensors, which is for it to do.
    model.__dict__["hf_quantizer"] = AutoHfQuantizer.from_config(told, pre_quantized=True)
    try:
        yield
    finally:
        del config.quantization_config, model.__dict__["hf_quantizer"]
        if own is not None:
            config.quantization_config = own
        if loader is not None:
            model.__dict__["hf_quantizer"] = loader


@contextmanager
def _without_reading_codes(model: nn.Module) -> Iterator[None]:
    """Takes what transformers did as it read codes from a folder out of what it wants to undo as it writes.

    It knows no way back there, and needs none: a state dict holds the codes, or floats, under the names of a folder.
    """
    own: list[Any] | None = model.__dict__.get("_weight_conversions")
    if own is None:
        yield
        return
    model.__dict__["_weight_conversions"] = [
        conversion
        for conversion in own
        if not any(getattr(step, "hf_quantizer", None) is not None for step in getattr(conversion, "operations", ()))
    ]
    try:
        yield
    finally:
        model.__dict__["_weight_conversions"] = own


def _reading_config(model: nn.Module, kinds: Mapping[str, str]) -> Any:
    """The transformers config of a model's quantised layers, whose paths and kinds these are."""
    found = [quantizer_of(model.get_submodule(path)) for path in kinds]
    quantizer = found[0]
    alike = quantizer is not None and all(type(q) is type(quantizer) and vars(q) == vars(quantizer) for q in found)
    config = quantizer.reading_config(left_alone(model, kinds)) if quantizer is not None and alike else None
    if config is None:
        stored = " and ".join(sorted(set(kinds.values())))
        raise ValueError(
            f"{type(model).__name__} cannot be written as it is quantised, {stored}: "
            "transformers has no words for that. Merge it into 'dequantized'."
        )
    return config


def read_again(model: nn.Module, folder: Path) -> nn.Module:
    """The model that transformers makes of a folder, in evaluation mode.

    Args:
        model: The merged one that was written.
        folder: Where it is.

    Raises:
        ValueError: When it is of another class, or a tensor of it differs.
    """
    import transformers

    cls: Any = getattr(transformers, type(model).__name__, type(model))
    attention = getattr(model.config, "_attn_implementation", None)
    place: dict[str, Any] = {"device_map": {"": "cpu"}} if stored_as(model) else {}  # else, the first GPU
    with torch.device("cpu"):
        again = cls.from_pretrained(folder, local_files_only=True, attn_implementation=attention, **place).eval()
    if type(again).__name__ != type(model).__name__ or again.config.architectures != [type(again).__name__]:
        raise ValueError(f"it is a {type(again).__name__}, not a {type(model).__name__}.")
    with _in_base_dtype(model):
        written, read = model.state_dict(), again.state_dict()
        for key in sorted(written.keys() | read.keys()):
            ours, theirs = written.get(key), read.get(key)
            if ours is None or theirs is None or ours.dtype != theirs.dtype or not holds(ours, theirs):
                raise ValueError(f"{key} is not what it was before.")
    recognise(again)  # it computes as ours does, whatever kernels bitsandbytes has for this machine
    return again
