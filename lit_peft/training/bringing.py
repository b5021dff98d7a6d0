"""Which adapters a trainer's methods bring to a module, and which of them run and train there."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_peft.core.active import hold, run_saved, set_active, set_aside
from lit_peft.core.checkpoint import RATES
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
    fitting, active = trainer.state.fn == "fit", () if state is None else state.active
    known = {method.name: method.names_on(module) for method in wanted}
    names = [name for own in known.values() for name in own]
    new = [method for method in wanted if not known[method.name]]
    alone = bool(new) or (fitting and not set(names) <= set(active))
    others = [name for name in active if name not in names]
    said = ", ".join([*names, *(method.name for method in new)])
    if alone and others:
        rank_zero_info(
            f"Adapter {', '.join(others)} is set aside: {said} runs alone. To train on top of it, "
            f"attach the method before the fit, {type(wanted[-1]).__name__}(...).attach(module)."
        )
    elif not set(names) <= set(active):
        rank_zero_info(
            f"Adapter {said} does not run here: {', '.join(active) or 'the base'} does, as set_active chose."
        )
    with set_aside(module) if alone else nullcontext():
        if alone and state is not None:
            set_active(module, names)
        for method in wanted:
            if method in new:
                method.attach(module, _dtype(trainer))
                names += method.names_on(module)
            elif state is not None:
                _check_same(method, [state.adapters[name] for name in known[method.name]])
                if fitting:
                    _take_rates(module, method, state.adapters[method.name])
        state = registry(module)
        assert state is not None
        if alone and set(names) != set(state.active):  # what was loaded has set the others aside
            set_active(module, names)
    if fitting and state.frozen != (frozen := set(state.active).difference(names)):
        hold(module, frozen)


def activate_saved(module: Any, saved: Mapping[str, Any], fitting: bool) -> None:
    """Lets the adapters of a checkpoint run as they did, if they are what this trainer is about.

    Args:
        module: The adapted module, whose tensors are about to be loaded.
        saved: The checkpoint's record.
        fitting: Whether a fit goes on from it, which its methods alone train in.
    """
    state = registry(module)
    if state is None:
        return
    names, wanted = set(saved["methods"]), {method.name for method in methods_of(module)}
    if wanted <= names <= state.adapters.keys():
        run_saved(module, saved)
        if fitting and wanted != names:
            hold(module, names - wanted)


def _check_same(method: "Method", adapters: list[Adapter]) -> None:
    """Raises ValueError when a method comes to a module that another one was attached to under its name."""
    if not all(map(method.is_same, adapters)):
        old = adapters[0].spec
        arguments = ", ".join(f"{key}={value!r}" for key, value in old["init_args"].items())
        raise ValueError(
            f"This module has an adapter {method.name!r} already, another than {method!r}: "
            f"{old['class_path'].rpartition('.')[2]}({arguments}). Detach it, or give the new one another `name`."
        )


def _take_rates(module: Any, method: "Method", adapter: Adapter) -> None:
    """Lets a fit train at the rates of its own method; a folder's patterns may be meant from another root."""
    given, arguments = method.arguments(), adapter.spec["init_args"]
    if arguments["train_also"] != given["train_also"]:
        adapter.scales = rates.find_scales(module, method.train_also)
    arguments |= {argument: given[argument] for argument in RATES if argument in given}


def _dtype(trainer: pl.Trainer) -> torch.dtype | None:
    """bf16-true casts all parameters after `configure_model`; attaching in bfloat16 keeps one dtype."""
    return torch.bfloat16 if trainer.strategy.precision_plugin.precision == "bf16-true" else None
