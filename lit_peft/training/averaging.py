"""Lightning's WeightAveraging beside a method: averages what trains, from a copy that has the adapters."""

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lit_peft.core.addition import Addition
from lit_peft.core.buffers import base_buffers, moved_buffers
from lit_peft.core.checkpoint import fixed_keys
from lit_peft.core.registry import registry
from lit_peft.core.swap import Swapped, swap_class


class AveragedAdapters(Swapped):
    """An AveragedModel that leaves the frozen base alone.

    Averaged with itself at every step it would drift by rounding, and integers (token positions, 4-bit weights)
    have no average at all.
    """

    def update_parameters(self, model: nn.Module) -> None:
        """Averages the adapters' tensors and the base's buffers of `model` into this copy's; integers are taken over.

        Which buffers move is not asked at every step: what is equal stays, bit for bit.
        """
        average: Any = self
        whole, fixed = average.module, fixed_keys(model)
        keys = sorted(fixed | (base_buffers(model).keys() & base_buffers(whole).keys()))
        mine, theirs = ([attrgetter(key)(root) for key in keys] for root in (whole, model))
        before = {i: mine[i].clone() for i, key in enumerate(keys) if key not in fixed and mine[i].is_floating_point()}
        average.module = _holder(mine)
        try:
            super().update_parameters(_holder(theirs))  # type: ignore[misc]
        finally:
            average.module = whole
        for i, was in before.items():
            mine[i].copy_(torch.where(theirs[i].to(was.device) == was, was, mine[i]))
        for old, new in zip(mine, theirs, strict=True):
            if not old.is_floating_point():
                old.copy_(new)
        for child in whole.modules():
            if isinstance(child, Addition):
                child.after_averaging()


def _holder(tensors: Iterable[Tensor]) -> nn.Module:
    """A module of nothing but these parameters and buffers, integers left out."""
    holder = nn.Module()
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, nn.Parameter):
            holder.register_parameter(f"p{i}", tensor)
        elif tensor.is_floating_point():
            holder.register_buffer(f"b{i}", tensor)
    return holder


def is_a(thing: object, name: str) -> bool:
    """Whether an object's class, or one that it derives from, has this name.

    By name, because Lightning comes as two packages of the same classes, `lightning` and `pytorch_lightning`.
    """
    return any(cls.__name__ == name for cls in type(thing).__mro__)


def copy_again(trainer: Any, module: Any) -> None:
    """Lets each WeightAveraging of the trainer make its copy now; that of its own setup had no adapters yet."""
    for callback in trainer.callbacks:
        if not is_a(callback, "WeightAveraging") or isinstance(callback._average_model, AveragedAdapters | None):
            continue
        module.__dict__["_lit_peft_early"] = True  # it calls configure_model, which runs already
        callback.setup(trainer, module, trainer.state.fn)
        module.__dict__["_lit_peft_early"] = False
        swap_class(callback._average_model, AveragedAdapters)


def take_average(checkpoint: dict[str, Any], trainer: Any) -> None:
    """Puts the average into a checkpoint of weights alone, for which Lightning does not ask its callbacks.

    It would hold the current weights otherwise, chosen by the scores of the averaged ones.
    """
    for callback in trainer.callbacks:
        average: Any = getattr(callback, "_average_model", None)
        if isinstance(average, AveragedAdapters) and "current_model_state" not in checkpoint:
            checkpoint["state_dict"] = average.module.state_dict()  # type: ignore[attr-defined]


def averaged_moved(trainer: Any) -> set[str]:
    """Names of the buffers that have moved in the trainer's averaged copies: they lag behind, and go back later."""
    copies = [getattr(callback, "_average_model", None) for callback in trainer.callbacks]
    roots: list[Any] = [average.module for average in copies if isinstance(average, AveragedAdapters)]  # type: ignore[attr-defined]
    return {name for root in roots for name in moved_buffers(root, registry(root).originals)}  # type: ignore[union-attr]


def leave_base_out(checkpoint: dict[str, Any], keep: set[str]) -> None:
    """Leaves the frozen base out of the averaged state and, where there is one, of the current state."""
    for name in ("state_dict", "current_model_state"):
        if name in checkpoint:
            checkpoint[name] = {key: value for key, value in checkpoint[name].items() if key in keep}


def put_base_in(checkpoint: dict[str, Any], module: nn.Module, fitting: bool) -> None:
    """Completes what WeightAveraging is about to load, strictly, with the tensors that the file has left out.

    Where nothing is to be trained, the current state becomes the averaged one: a callback that has seen a fit
    would otherwise test the weights that were not averaged.
    """
    if "current_model_state" in checkpoint and "state_dict" in checkpoint:
        own, averaged = module.state_dict(), checkpoint["state_dict"]
        checkpoint["current_model_state"] = {**own, **(checkpoint["current_model_state"] if fitting else averaged)}
        checkpoint["state_dict"] = {**own, **averaged}
