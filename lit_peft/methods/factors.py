"""LoRA factors of a module: read from adapters that have such, and attached as a plain LoRA."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.active import set_aside
from lit_peft.core.addition import Addition, Delta
from lit_peft.core.attach import detach
from lit_peft.core.buffers import moving_buffers, put_back
from lit_peft.core.combination import Factors
from lit_peft.core.layers import find_layer_ops
from lit_peft.core.registry import Adapter, registry
from lit_peft.core.targets import Site, find_parameters, make_site
from lit_peft.methods.adalora import AdaLoRADelta
from lit_peft.methods.lora import LoRA, LoRADelta


def read_factors(module: nn.Module, names: list[str], live: bool) -> dict[str, dict[str, Factors]]:
    """Path -> {adapter: its factors in float32}, in the order of the module and of the names.

    Args:
        module: The module.
        names: The adapters.
        live: Whether ranks that are masked or zero are left out.
    """
    adapters = registry(module).adapters  # type: ignore[union-attr]
    for name in names:
        if not adapters[name].sites:
            raise ValueError(_refusal(adapters[name], "it adds nothing to a layer."))
    sites: dict[str, dict[str, Factors]] = {}
    for path, layer in module.named_modules():
        for name in names:
            if path in adapters[name].sites:
                addition: Any = layer.peft[name]
                if why := _why_not(addition):
                    raise ValueError(_refusal(adapters[name], why))
                sites.setdefault(path, {})[name] = _factors(path, name, addition, live)
    return sites


def _why_not(addition: Addition) -> str | None:
    """Why an addition cannot be combined; None where its change is `s B A` and nothing else."""
    if not isinstance(addition, Delta):
        return addition.not_mergeable
    if addition.scales:
        return "it rescales the weight, so that its change is not its own."
    for cls in (LoRADelta, AdaLoRADelta):
        own = [getattr(type(addition), key, None) is getattr(cls, key, None) for key in ("weight", "change", "bias")]
        if isinstance(addition, cls) and all(own):
            return None
    return "its change is not LoRA's, s B A."


def _refusal(adapter: Adapter, why: str) -> str:
    method = adapter.spec.get("class_path", "addition").rpartition(".")[2]
    return f"Adapter {adapter.name!r} is a {method} and no LoRA to combine: {why}"


def _factors(path: str, name: str, delta: Any, live: bool) -> Factors:
    A, B = (f.detach().to(torch.promote_types(f.dtype, torch.float32)) for f in delta.factors())
    if A.is_meta or B.is_meta:
        raise ValueError(f"Adapter {name!r} is on the meta device and has no values to combine yet ({path}).")
    if not (A.isfinite().all() and B.isfinite().all()):
        raise ValueError(f"Adapter {name!r} holds nan or inf at {path}: its training diverged.")
    if live and hasattr(delta, "live"):
        left = delta.live()
        left[:1] |= ~left.any()  # there is no rank 0
        A, B = A[left], B[:, left]
    return Factors(A, B, delta.scaling)


# ----------------------------------------------------------------------------------------------- attaching


def attach_factors(
    module: nn.Module, name: str, factors: Mapping[str, Factors], base: Mapping[str, Tensor], like: Sequence[Adapter]
) -> Adapter:
    """Attaches a LoRA with these factors, and makes it the only active adapter.

    Args:
        module: What adapters are attached to already.
        name: Name of the new one.
        factors: Path of a layer -> what it gets there; `A`: [r, in], `B`: [out, r].
        base: Base parameter that trains, or buffer that moved, with the adapters that it is made of -> value.
        like: The adapters that it is made of. Where they agree it has their dtype, dropout and rates.

    Raises:
        ValueError: When a factor is not finite in that dtype, or the module takes no adapter of this name.
    """
    deltas: list[Any] = [module.get_submodule(p).peft[old.name] for old in like for p in old.sites]  # type: ignore[index]
    dtypes = {delta.lora_A.dtype for delta in deltas}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    rounded = {path: Factors(f.A.to(dtype), f.B.to(dtype), f.scaling) for path, f in factors.items()}
    for path, f in rounded.items():
        if not (f.A.isfinite().all() and f.B.isfinite().all() and math.isfinite(f.scaling)):
            raise ValueError(f"{path}: the factors of adapter {name!r} are too large for {dtype}; lower the weights.")
    trained = {key for adapter in like for key in adapter.base}
    values = {key: value.detach().clone() for key, value in base.items()}
    sites = [make_site(path, module.get_submodule(path)) for path in factors]
    method: Any = LoRA(name=name, **_arguments(module, like, factors, trained))
    # The places are those given: names may mean more from another root.
    method.sites = lambda module, avoid: sites
    method.trains = trained.__contains__
    with set_aside(module):
        adapter: Adapter = method.attach(module, dtype)
        try:
            with torch.no_grad():
                for site in sites:
                    delta: Any = site.layer.peft[name]  # type: ignore[index]
                    delta.lora_A.copy_(rounded[site.path].A)
                    delta.lora_B.copy_(rounded[site.path].B)
                for key in trained:
                    module.get_parameter(key).copy_(values[key])
            put_back(module, values.keys() - trained, values)
            moved = values.keys() - trained - moving_buffers(module, [adapter])
            registry(module).moved |= moved  # type: ignore[union-attr]
        except Exception:
            detach(module, name)
            raise
    adapter.prepared = True
    return adapter


def _arguments(
    module: nn.Module, like: Sequence[Adapter], factors: Mapping[str, Factors], base: set[str]
) -> dict[str, Any]:
    """Arguments of a LoRA that has the same ranks, scalings and base parameters at the same layers."""
    ranks = {path: len(f.A) for path, f in factors.items()}
    alphas = {path: f.scaling * len(f.A) for path, f in factors.items()}
    r, alpha = _most(ranks.values()), _most(alphas.values())
    scales = {key: scale for adapter in reversed(like) for key, scale in adapter.scales.items()}
    bias, also = _bias_and_head(module, like, set(factors), base)
    own = find_parameters(module, getattr(module, "train_also", ())).names  # which every method trains there
    also -= own - scales.keys()
    words = _exactly(sorted(also), [make_site(key, module) for key, _ in module.named_parameters()])
    named = ((path, layer) for path, layer in module.named_modules() if ".peft." not in f".{path}.")
    layers = [make_site(path, layer) for path, layer in named if find_layer_ops(layer) is not None]
    exact = _exactly(factors, layers)
    return {
        **_agreed(like),
        "r": r,
        "alpha": alpha,
        "bias": bias,
        "rank_pattern": {exact[path]: value for path, value in ranks.items() if value != r},
        "alpha_pattern": {exact[path]: value for path, value in alphas.items() if value != alpha},
        "target_modules": _targets(layers, list(factors)),
        "train_also": {words[key]: scales.get(key, 1.0) for key in words} if scales else list(words.values()),
        "update_norm_stats": any(adapter.update_norm_stats for adapter in like),
    }


def _most(values: Iterable[Any]) -> Any:
    """The most common of the values."""
    return Counter(values).most_common(1)[0][0]


def _agreed(like: Sequence[Adapter]) -> dict[str, Any]:
    """Arguments that only matter in training: those of the adapters where all have the same, else LoRA's default."""
    defaults = {
        key: LoRA.parameters()[key].default for key in ("dropout", "loraplus_ratio", "layer_decay", "adapter_dtype")
    }
    found = {
        key: [adapter.spec.get("init_args", {}).get(key, default) for adapter in like]
        for key, default in defaults.items()
    }
    return {
        key: values[0] if values.count(values[0]) == len(values) else defaults[key] for key, values in found.items()
    }


def _bias_and_head(module: nn.Module, like: Sequence[Adapter], paths: set[str], base: set[str]) -> tuple[str, set[str]]:
    """LoRA's `bias`, and the parameters that `train_also` must name for these to train and no others."""
    head = {key for adapter in like for key in adapter.head}
    parameters = [key for key, _ in module.named_parameters() if ".peft." not in f".{key}"]
    biases = {key for key in parameters if key.rpartition(".")[2] == "bias"}
    kinds = {"none": set[str](), "lora_only": biases & {f"{path}.bias".lstrip(".") for path in paths}, "all": biases}
    for bias, names in kinds.items():
        if head | names == base:
            return bias, head
    return "none", set(base)  # biases of some layers, which no word means


def _targets(layers: list[Site], paths: list[str]) -> list[str]:
    """Words that mean exactly these layers: the last parts of their paths, or else whole paths."""
    leaves = sorted({path.rpartition(".")[2] for path in paths})
    if {s.path for s in layers if any(s.answers_to(leaf) for leaf in leaves)} == set(paths):
        return leaves
    return list(_exactly(paths, layers).values())


def _exactly(names: Iterable[str], among: list[Site]) -> dict[str, str]:
    """Each of the names -> a word that means it alone of these: itself, or where it is a role or an ending an `re:`."""
    return {
        name: name if [s.path for s in among if s.answers_to(name)] == [name] else f"re:{re.escape(name)}"
        for name in names
    }
