"""Which adapters a trainer's methods bring to a module, and which of them run and train there."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_peft.core.active import freeze, set_active
from lit_peft.core.checkpoint import RATES, differing
from lit_peft.core.registry import Adapter, registry
from lit_peft.training import rates

if TYPE_CHECKING:
    from lit_peft.methods.base import Method


def methods(trainer: pl.Trainer) -> list["Method"]:
    """The methods among a trainer's callbacks."""
    from lit_peft.methods.base import Method

    return [callback for callback in trainer.callbacks if isinstance(callback, Method)]  # type: ignore[attr-defined]


def methods_of(module: Any) -> list["Method"]:
    """The methods of the module's trainer; none while it has no trainer, as a copy of it has not."""
    return [] if module._trainer is None else methods(module._trainer)


def bring(module: Any, trainer: pl.Trainer) -> None:
    """Attaches the methods of a trainer that the module has not yet, and lets them run and, in a fit, train.

    Where one of them is new, or did not run and is to train, they alone run from here on. Where they run beside other
    adapters, as `attach` or `set_active` has put them, a fit leaves those frozen.
    """
    state, wanted = registry(module), methods(trainer)
    if not wanted:
        return
    names, fitting = [method.name for method in wanted], trainer.state.fn == "fit"
    active = () if state is None else state.active
    known = [name for name in names if state is not None and name in state.adapters]
    alone = len(known) < len(names) or (fitting and not set(names) <= set(active))
    if state is not None and alone:
        if others := [name for name in active if name not in names]:
            rank_zero_info(
                f"Adapter {', '.join(others)} is set aside: {', '.join(names)} runs alone. To train on top of it, "
                f"attach the method before the fit, {type(wanted[-1]).__name__}(...).attach(module)."
            )
        set_active(module, known)
    for method in wanted:
        if method.name not in known:
            method.attach(module, _dtype(trainer))
        elif state is not None:
            _check_same(method, state.adapters[method.name])
            _take_rates(module, method, state.adapters[method.name])
    state = registry(module)
    assert state is not None
    if alone:
        set_active(module, names)  # a folder that was loaded has set the others aside
    if fitting and state.frozen != (frozen := set(state.active).difference(names)):
        state.frozen = frozen
        freeze(module)


def activate_saved(module: Any, saved: Mapping[str, Any] | None) -> None:
    """Lets the adapters of a checkpoint run that is about to be loaded, if they are what this trainer is about."""
    state = registry(module)
    if state is None or saved is None:
        return
    names, wanted = set(saved["methods"]), {method.name for method in methods_of(module)}
    if names != set(state.active) and wanted <= names <= state.adapters.keys():
        set_active(module, {name: saved.get("weights", {}).get(name, 1.0) for name in saved["methods"]})


def _check_same(method: "Method", adapter: Adapter) -> None:
    """Raises ValueError when a method comes to a module that another one was attached to under its name."""
    old, new = adapter.spec, method.spec()
    if old["class_path"] != new["class_path"] or any(
        differing(old["init_args"], new["init_args"], method.may_change, rates=False)
    ):
        arguments = ", ".join(f"{key}={value!r}" for key, value in old["init_args"].items())
        raise ValueError(
            f"This module has an adapter {method.name!r} already, another than {method!r}: "
            f"{old['class_path'].rpartition('.')[2]}({arguments}). Detach it, or give the new one another `name`."
        )


def _take_rates(module: Any, method: "Method", adapter: Adapter) -> None:
    """Lets the next fit train at the rates of its own method; a folder's patterns may be meant from another root."""
    given, arguments = method.arguments(), adapter.spec["init_args"]
    if arguments["train_also"] != given["train_also"]:
        adapter.scales = rates.find_scales(module, method.train_also)
    arguments |= {argument: given[argument] for argument in RATES if argument in given}


def _dtype(trainer: pl.Trainer) -> torch.dtype | None:
    """bf16-true casts all parameters after `configure_model`; attaching in bfloat16 keeps one dtype."""
    return torch.bfloat16 if trainer.strategy.precision_plugin.precision == "bf16-true" else None
