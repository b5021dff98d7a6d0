"""Discriminative learning rates: which parameter trains at what share of the rate, and the optimizer's groups.

A pretrained base parameter trains at `lr * scale * layer_decay ** depth`, the scale from `train_also`. A tensor of an
adapter trains at what `Method.param_groups` says of it, `lr` by default; neither scale nor decay touches it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from torch import nn

from lit_peft.core.registry import Adapter, registry
from lit_peft.core.targets import find_parameters
from lit_peft.training.averaging import is_a

if TYPE_CHECKING:
    from lit_peft.methods.base import Method


def check_patterns(value: str | Sequence[str] | Mapping[str, float]) -> list[str] | dict[str, float]:
    """What `train_also` keeps: a list of patterns, or {pattern: scale}.

    Raises:
        ValueError: For what is no pattern, and for a scale that is no number above 0.
    """
    if isinstance(value, str):
        return [value]
    if not all(isinstance(pattern, str) for pattern in value):
        raise ValueError(f"train_also takes patterns, [a, b], or patterns and scales, {{a: 1, b: 0.1}}; not {value!r}.")
    if not isinstance(value, Mapping):
        return list(value)
    for pattern, scale in value.items():
        if not (_is_number(scale) and 0 < scale < math.inf):
            raise ValueError(
                f"train_also[{pattern!r}] must be a number above 0, the scale of its learning rate, not {scale!r}."
            )
    return {pattern: float(scale) for pattern, scale in value.items()}


def check_layer_decay(value: float) -> float:
    """Raises ValueError unless 0 < value <= 1."""
    if not (_is_number(value) and 0 < value <= 1):
        raise ValueError(f"layer_decay must be a number above 0 and at most 1, not {value!r}.")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def find_scales(module: nn.Module, patterns: Sequence[str] | Mapping[str, float]) -> dict[str, float]:
    """Base parameter -> scale of its rate, where that is not 1; the first pattern that matches a parameter counts."""
    if not isinstance(patterns, Mapping):
        return {}
    scales: dict[str, float] = {}
    for pattern, scale in patterns.items():
        for name in find_parameters(module, [pattern]).names:
            scales.setdefault(name, scale)
    return {name: scale for name, scale in scales.items() if scale != 1}


def layer_depths(names: Iterable[str], fresh: Iterable[str] = ()) -> dict[str, int]:
    """Base parameter -> number of blocks above it, by which its rate decays.

    Of n blocks, block k has depth n - 1 - k; what stands before the first one (embeddings) n; what stands after
    block k and in no block (a stack's last norm) that of block k, so 0 after the last.

    Args:
        names: Names of all parameters of the base in the module's order. A block is a path up to and including its
            first number: "encoder.layer.3", "layer2.0".
        fresh: Those that are not pretrained; their depth is 0, and they make no blocks.
    """
    fresh = set(fresh)
    begun: dict[str, int] = {}
    reached: dict[str, int] = {}
    for name in names:
        parts = name.split(".")
        first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if name in fresh:
            continue
        if first is None:
            reached[name] = len(begun)
        else:
            reached[name] = begun.setdefault(".".join(parts[: first + 1]), len(begun) + 1)
    return {name: len(begun) - count for name, count in reached.items()} | dict.fromkeys(fresh, 0)


def base_depths(module: nn.Module) -> dict[str, int]:
    """The same for the base parameters of a module; what its own `train_also` names is not pretrained."""
    names = [name for name, _ in module.named_parameters() if ".peft." not in f".{name}"]
    return layer_depths(names, find_parameters(module, getattr(module, "train_also", ())).names)


def base_factors(module: nn.Module) -> dict[str, float]:
    """Base parameter that trains -> share of the rate, `scale * layer_decay ** depth`.

    Where several adapters train one parameter, the first of them that asks for another rate than `lr` counts.
    """
    state = registry(module)
    factors: dict[str, float] = {}
    if state is None:
        return factors
    depths = base_depths(module)
    for adapter in state.training():
        decay = adapter.spec.get("init_args", {}).get("layer_decay", 1.0)
        for name in adapter.base:
            factor = adapter.scales.get(name, 1.0) * decay ** depths[name]
            if factors.get(name, 1.0) == 1.0:
                factors[name] = factor
    return factors


def param_groups(module: nn.Module, lr: float) -> list[dict[str, Any]]:
    """The optimizer's groups for everything that trains on an adapted module, each parameter once.

    Tensors of each adapter as its method's `param_groups` splits them; then base parameters, a group for each rate
    that `train_also` and `layer_decay` ask for. No trainer is needed. In `configure_optimizers`:

        return torch.optim.AdamW(lit_peft.param_groups(self, lr=1e-3))

    Howard and Ruder 2018, "Universal Language Model Fine-tuning for Text Classification", section 3.2.

    Args:
        module: The module that methods are attached to; without any, all that trains makes one group.
        lr: The rate that scales refer to.

    Returns:
        Dicts with `params`, a list of parameters, and `lr`. A group of another rate than `lr` has a `name` besides,
        unique among them, under which LearningRateMonitor shows it.

    Raises:
        CheckpointMismatch: When an adapter's method is not there: its module was never imported.
    """
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    state, left = registry(module), dict(parameters)
    groups: list[dict[str, Any]] = []
    for adapter in state.adapters.values() if state is not None else ():
        own = [(name, p) for name, p in left.items() if f".peft.{adapter.name}." in f".{name}"]
        if own:
            made = _method(module, adapter).param_groups(own, lr)
            groups += [_named(group, lr, f"{adapter.name}_x{group['lr'] / (lr or 1):.4g}") for group in made]
        for name, _ in own:
            del left[name]
    factors, by_factor = base_factors(module), dict[float, list[str]]()
    for name in left:
        by_factor.setdefault(factors.get(name, 1.0), []).append(name)
    for factor, names in by_factor.items():
        groups.append(_named({"params": names, "lr": lr * factor}, lr, f"base_x{factor:.4g}"))
    taken: set[str] = set()
    for group in groups:
        group["params"] = [parameters[name] for name in group["params"]]
        if "name" in group:
            stem, number = group["name"], 1
            while group["name"] in taken:
                number += 1
                group["name"] = f"{stem}_{number}"
            taken.add(group["name"])
    return groups


def _named(group: dict[str, Any], lr: float, name: str) -> dict[str, Any]:
    return dict(group) if group["lr"] == lr else {"name": name, **group}


def methods_on(module: nn.Module) -> list["Method"]:
    """The methods of the adapters that a module has, whether or not they are among its trainer's callbacks."""
    state = registry(module)
    return [_method(module, adapter) for adapter in state.adapters.values()] if state is not None else []


def _method(module: nn.Module, adapter: Adapter) -> "Method":
    """The method of an adapter: the trainer's own, which may have planned by its sites, or one made from the record."""
    from lit_peft.methods.registry import method_class
    from lit_peft.training.bringing import methods_of

    for method in methods_of(module) if hasattr(module, "_trainer") else ():
        if method.name == adapter.name:
            return method
    return method_class(adapter.spec["class_path"])(**adapter.spec["init_args"])


def finds_rate(trainer: pl.Trainer) -> bool:
    """Whether a LearningRateFinder sets the rates of this trainer's optimizers."""
    return any(is_a(callback, "LearningRateFinder") for callback in trainer.callbacks)  # type: ignore[attr-defined]


FREE = ("params", "name", "lr", "initial_lr", "max_lr", "min_lr", "foreach", "fused", "capturable", "differentiable")
"""Keys of a group that a fit which resumes may change: how the optimizer computes, and what a schedule makes of it."""


def settings(trainer: pl.Trainer) -> list[dict[str, Any]]:
    """What a restored optimizer takes from its checkpoint, whatever it was built with, of each parameter group.

    Of a rate that a schedule moves it is the one to begin with; None where the optimizer has none of its own.
    """
    found = []
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            rate = group.get("initial_lr", group.get("lr"))
            plain = {k: tuple(v) if isinstance(v, list) else v for k, v in group.items() if k not in FREE}
            kept = {k: v for k, v in plain.items() if isinstance(v, bool | int | float | tuple)}
            kind: dict[str, Any] = {
                "optimizer": _class_name(type(optimizer)),
                "learning rate": None if rate is None else float(rate),
            }
            found.append(kind | kept)
    return found


def _class_name(cls: type) -> str:
    """Name of an optimizer's class, with its package where that is not torch: bitsandbytes has an AdamW too."""
    package = cls.__module__.partition(".")[0]
    return cls.__name__ if package == "torch" else f"{package}'s {cls.__name__}"


def check_settings(was: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a resumed fit whose optimizers are built otherwise than when the run began.

    The optimizer's state, which is restored, holds these settings too, so that the new ones would be passed over.

    Raises:
        ValueError: For the first one that differs.
    """
    rest = "A fit that resumes goes on with the optimizer that it began with: leave the change out."
    if len(was) != len(now):
        raise ValueError(f"The optimizers have {len(now)} groups, and had {len(was)} when this run began. {rest}")
    for old, new in zip(was, now, strict=True):
        for key in {**new, **old}:
            if old.get(key) != new.get(key):
                what = "The optimizer" if key == "optimizer" else f"The optimizer's {key}"
                raise ValueError(f"{what} is {new.get(key)}, and was {old.get(key)} when this run began. {rest}")


def check_rates(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Makes sure that the optimizers have the rates that the methods ask for, up to one factor an optimizer.

    Raises:
        ValueError: When they do not, as with Adam(self.parameters()), or a schedule that gives all groups one rate.
    """
    wanted = {id(p): float(group["lr"]) for group in param_groups(module, 1.0) for p in group["params"]}
    if set(wanted.values()) <= {1.0}:
        return
    for optimizer in trainer.optimizers:
        found: dict[float, set[float]] = {}
        for group in optimizer.param_groups:
            rate = float(group.get("initial_lr", group.get("lr")) or 0.0)
            for p in group["params"]:
                found.setdefault(wanted.get(id(p), 1.0), set()).add(rate)
        units = [rate / share for share, rates in found.items() for rate in rates]
        # One rate for all may be what was asked for, a tenth of `lr` say; who made the groups tells.
        one = len(found) == 1 and 1.0 not in found and not any("name" in group for group in optimizer.param_groups)
        if units and (one or not math.isclose(min(units), max(units), rel_tol=1e-6)):
            finder = finds_rate(trainer)
            raise ValueError(
                f"{_who(module)} asks for several learning rates, which {type(optimizer).__name__} does not have: "
                "build it from lit_peft.param_groups(self, lr=…) in configure_optimizers, with a schedule that scales "
                f"all groups alike{', and without LearningRateFinder, which gives all of them one rate' * finder}."
            )


def _who(module: nn.Module) -> str:
    state = registry(module)
    assert state is not None
    return ", ".join(a.spec["class_path"].rpartition(".")[2] for a in state.adapters.values())
