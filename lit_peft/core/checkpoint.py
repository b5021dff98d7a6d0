"""What a checkpoint of an adapted module holds, and whether one fits: adapters and trained parameters only."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lit_peft import __version__
from lit_peft.core.buffers import base_buffers, moved_buffers, moving_buffers, put_back
from lit_peft.core.fingerprint import compare_fingerprints
from lit_peft.core.records import FORMAT_VERSION, CheckpointMismatch
from lit_peft.core.registry import Registry, registry
from lit_peft.core.sharded import whole
from lit_peft.core.swap import FrozenStatistics

RATES = ("train_also", "layer_decay", "loraplus_ratio", "unfreeze_every")
"""Arguments of a method that say how fast and from when on parameters train, which does not change what the weights
mean; `train_also` by its scales, while its patterns say what trains."""


def fixed_keys(module: nn.Module) -> set[str]:
    """State-dict keys that every checkpoint of the active adapters holds, whatever has moved so far.

    Additions, base parameters that they train, and buffers that are there to move: beside a parameter that trains (a
    BatchNorm's running statistics), in every normalisation layer under `update_norm_stats`, and in modules that have
    no parameter of their own (a moving average, a queue).
    """
    state = _require(module)
    adapters = [state.adapters[name] for name in state.active]
    kept = {name for adapter in adapters for name in adapter.base} | moving_buffers(module, adapters)
    for path, child in module.named_modules():
        if not child._parameters and not isinstance(child, FrozenStatistics):
            saved = child._buffers.keys() - child._non_persistent_buffers_set
            kept.update(f"{path}.{name}".lstrip(".") for name in saved)
    return {key for key in module.state_dict() if key in kept or adapter_of(key) in state.active}


def adapter_of(key: str) -> str | None:
    """Name of the adapter that a state-dict key belongs to; None for one of the base."""
    _, mark, rest = f".{key}".partition(".peft.")
    return rest.partition(".")[0] if mark else None


def adapter_keys(module: nn.Module) -> set[str]:
    """State-dict keys that a checkpoint must hold now: the fixed ones, and those of base buffers that have moved.

    A buffer that was seen to have moved stays among them, also where it is back at its first value. Reads every
    saved buffer of the base; where some are sharded, every rank calls.
    """
    state = _require(module)
    state.moved |= moved_buffers(module, state.originals)
    return fixed_keys(module) | (state.moved & base_buffers(module).keys())


def record(module: nn.Module, keys: set[str]) -> dict[str, Any]:
    """The entry that goes with an adapter's tensors.

    Format and release; methods and arguments of the active adapters, and their weights where these are not 1; the
    buffers that moved beyond the fixed keys; and the fingerprint of the frozen base, as it was when the first adapter
    came, without what goes with the adapters.

    Args:
        module: The adapted module.
        keys: Its `adapter_keys`, which cost a look at every buffer.
    """
    state = _require(module)
    return {
        "format_version": FORMAT_VERSION,
        "version": __version__,
        "methods": {name: state.adapters[name].spec for name in state.active},
        "weights": dict(state.weights),
        "head": state.head,
        "aside": {
            name: {key: whole(tensor).cpu() for key, tensor in state.aside[name].items()}
            for name in state.active
            if name in state.aside
        },
        "moved": sorted(keys - fixed_keys(module)),
        "fingerprint": {name: digest for name, digest in state.fingerprint.items() if name not in keys},
    }


def take_moved(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Before the tensors of a checkpoint are loaded: buffers that it leaves out had not moved, and are put back.

    Args:
        module: The adapted module.
        saved: The checkpoint's record.
    """
    state = _require(module)
    state.moved = set(saved.get("moved", ()))
    put_back(module, base_buffers(module).keys() - fixed_keys(module) - state.moved, state.originals)


def check_record(
    module: nn.Module,
    saved: Mapping[str, Any],
    keys: Iterable[str] | None,
    may_change: Mapping[str, frozenset[str]],
    *,
    resumes: bool = False,
    folder: str = "FOLDER",
) -> None:
    """Compares a checkpoint with the module it is about to be loaded into, before anything is changed.

    Args:
        module: The adapted module.
        saved: The checkpoint's own record, well formed.
        keys: Keys of the tensors in it; None where they are loaded already, and no longer known.
        may_change: Adapter name -> arguments that may differ.
        resumes: Whether a fit goes on from the checkpoint. Rates must then be the same too: they are part of the
            optimizer's state, which would not fit other groups, or put the old rates in the place of new ones.
        folder: The adapter folder of the run, which is told to whoever wants another storage of the base.

    Raises:
        CheckpointMismatch: Naming the first thing that does not fit.
    """
    state = _require(module)
    _compare_methods(saved["methods"], state, may_change, resumes, folder)
    difference = compare_fingerprints(saved["fingerprint"], state.fingerprint)
    if difference is not None:
        raise CheckpointMismatch(f"This checkpoint belongs to another base model: {difference}.")
    fixed, moved = fixed_keys(module), set(saved.get("moved", ()))
    found = fixed | moved if keys is None else set(keys)
    missing = sorted((fixed | moved) - found)
    unknown = sorted(found - fixed - (moved & base_buffers(module).keys()))
    if missing or unknown:
        parts = [
            f"{len(names)} {what} ({names[0]}{', …' if names[1:] else ''})"
            for names, what in ((missing, "missing"), (unknown, "unknown"))
            if names
        ]
        raise CheckpointMismatch(f"The checkpoint's tensors do not fit this module: {' and '.join(parts)}.")


def differing(
    old: Mapping[str, Any], new: Mapping[str, Any], may_change: frozenset[str], *, rates: bool
) -> Iterator[str]:
    """Names of the arguments of a method that differ and must not; learning rates count only with `rates`."""
    for argument in sorted({*old, *new} - may_change):
        was, now = old.get(argument), new.get(argument)
        if not rates and argument in RATES:
            was, now = (_patterns(v) if argument == "train_also" else None for v in (was, now))
        if was != now:
            yield argument


def _patterns(train_also: Any) -> Any:
    return list(train_also or ()) if isinstance(train_also, Iterable | None) else train_also


def _compare_methods(
    saved: Mapping[str, Any], state: Registry, may_change: Mapping[str, frozenset[str]], resumes: bool, folder: str
) -> None:
    if set(saved) != set(state.active):
        raise CheckpointMismatch(
            f"The checkpoint holds the adapters {sorted(saved)}, the module {sorted(state.active)}."
        )
    for name, old in saved.items():
        new = state.adapters[name].spec
        if old["class_path"] != new["class_path"]:
            raise CheckpointMismatch(f"The checkpoint was made with {old['class_path']}, not {new['class_path']}.")
        was, now, allowed = old["init_args"], new["init_args"], may_change.get(name, frozenset())
        weights = set(differing(was, now, allowed, rates=False))
        for argument in differing(was, now, allowed, rates=resumes):
            hint = "" if argument in weights else " A fit that resumes goes on at the rates it began with."
            if argument == "quantize" and not resumes:
                hint = (
                    f" For another one, give the run's adapter and no checkpoint: --adapter {folder}; in Python, "
                    f"lit_peft.load(model, {folder!r}, quantize=...)."
                )
            made, asked = _told_apart(argument, was.get(argument), now.get(argument))
            raise CheckpointMismatch(
                f"The checkpoint was made with {new['class_path'].rpartition('.')[2]}({made}), not {asked}.{hint}"
            )


def _told_apart(argument: str, was: Any, now: Any) -> tuple[str, str]:
    """An argument with its value, and the other value; of two `quantize`, no more than the options that differ."""
    if argument == "quantize":
        modes = [value.get("mode") if isinstance(value, Mapping) else value for value in (was, now)]
        if modes[0] != modes[1]:  # the options of one are none of the other
            was, now = modes
        elif isinstance(was, Mapping) and isinstance(now, Mapping):
            keys = sorted(key for key in {*was, *now} if was.get(key) != now.get(key))
            old, new = (", ".join(f"{argument}.{key}={value.get(key)!r}" for key in keys) for value in (was, now))
            return old, new if keys[1:] else repr(now.get(keys[0]))
    return f"{argument}={was!r}", repr(now)


def _require(module: nn.Module) -> Registry:
    state = registry(module)
    if state is None:
        raise ValueError(f"{type(module).__name__} has no adapter attached.")
    return state


def check_tensors(module: nn.Module, tensors: Mapping[str, Tensor], where: str, *, buffers: bool = True) -> None:
    """Makes sure that tensors can be loaded into their places.

    Args:
        module: The adapted module.
        tensors: Those of the checkpoint; what has no place is not looked at.
        where: The file.
        buffers: Whether buffers of the base must have their shapes, too: a module may give them others as it loads.

    Raises:
        CheckpointMismatch: Naming one of another shape or kind, or a parameter that holds nan or inf.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    places = module.state_dict(keep_vars=True)
    for key, tensor in tensors.items():
        place = places.get(key)
        if not isinstance(place, Tensor) or is_lazy(place) or not (buffers or key in parameters or adapter_of(key)):
            continue
        if place.shape != tensor.shape:
            raise CheckpointMismatch(
                f"{where}: {key} has shape {list(tensor.shape)}, and {list(place.shape)} in the module."
            )
        if _kind(tensor) != _kind(place):
            raise CheckpointMismatch(f"{where}: {key} is of {tensor.dtype}, and {place.dtype} in the module.")
        # A buffer may hold inf, as a mask does.
        if key in parameters and tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise CheckpointMismatch(
                f"{where}: {key} holds nan or inf: its training diverged, or the file is damaged. Use another "
                "checkpoint of the run."
            )


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype is torch.bool, tensor.layout
