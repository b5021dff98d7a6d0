"""Tensors that are made again in the backward pass, from what is kept for it anyway.

The input of an adapted layer is often what a frozen normalisation has returned, which keeps its own input: a node that
needs the returned tensor in its backward pass can have it for one pass over memory, and need not keep it. So it does in
checkpointed blocks, where memory was chosen over time. Elsewhere no normalisation runs twice, which would be 2 to 3 %
of a step of a Llama of 8 B; there only what a gated product has returned, the widest tensor, is made again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from lit_peft.core.swap import BorrowsForward, Swapped, restore_class, swap_class

_NORMS = {
    "torch.nn.modules.normalization.LayerNorm",
    "torch.nn.modules.normalization.RMSNorm",
    "liger_kernel.transformers.layer_norm.LigerLayerNorm",
    "liger_kernel.transformers.rms_norm.LigerRMSNorm",
}
"""Those that keep their input. Transformers' own, in several operations, keep copies of it in float32 instead."""


class Recipe:
    """How a tensor can be made again: by a function, as it was called, under the autocast of then.

    What was made is there for all nodes of one backward pass that ask for it, and let go of with the last of those that
    may, or, where some never ask, as that pass reaches the node which made the tensor in the first place.
    """

    def __init__(self, make: Callable[..., Tensor], y: Tensor) -> None:
        self.make = make
        self.made: Tensor | None = None
        self.version = y._version
        self._users = self._left = 0
        kind = y.device.type
        self._autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def watch(self, y: Tensor) -> None:
        """For one more node: lets go of what was made before the gradient of `y`, the tensor itself, goes on."""
        if not self._users:
            y.grad_fn.register_prehook(self._let_go)  # type: ignore[union-attr]
        self._users += 1

    def _let_go(self, grads: Any) -> None:
        self.made = None

    def again(self, sources: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
        """The tensor, in `dtype`, from what it was made of."""
        if self.made is None or self.made.dtype != dtype:
            kind, low, is_on = self._autocast
            with torch.no_grad(), torch.autocast(kind, low, enabled=is_on, cache_enabled=False):
                self.made, self._left = self.make(*sources).to(dtype), self._users
        made = self.made
        self._left -= 1
        if not self._left:
            self.made = None
        return made


class Remade(NamedTuple):
    """What a node keeps in the place of a tensor: how to make it, and, saved for backward, what from."""

    recipe: Recipe
    sources: tuple[Tensor, ...]


def remakable(y: Tensor, make: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """Notes on `y`, which is `make(*sources)`, how nodes that are given it can make it again; returns it.

    Args:
        y: The tensor; nothing is noted where it takes no part in a backward pass, or is being compiled.
        make: Gives the same bits each time.
        sources: What the backward pass of `y` keeps.
    """
    if not torch.compiler.is_compiling() and y.grad_fn is not None:
        y._lit_peft_remade = Remade(Recipe(make, y), sources)  # type: ignore[attr-defined]
    return y


def remade(x: Tensor) -> Remade | None:
    """How `x` can be made again in the backward pass; None where it must be kept.

    It is not noted, has been written to since, or was detached in place, so that nothing would let go of what is made.
    """
    found: Remade | None = getattr(x, "_lit_peft_remade", None)
    if found is None or found.recipe.version != x._version or x.grad_fn is None:
        return None
    found.recipe.watch(x)
    return found


def is_checkpointed() -> bool:
    """Whether this is inside what torch's non-reentrant `checkpoint` computes twice, the first time or the second.

    It must be told the same in both, which have to keep as many tensors.
    """
    hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and hooks[0].__module__ == checkpoint.__name__


class NotesInput(Swapped):
    """A normalisation that notes on what it returns how to make it again, in blocks that are checkpointed.

    Unless it trains or a hook may change it. In `__call__`, since its forward may have been bound to the instance.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        y = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if torch.compiler.is_compiling() or not is_checkpointed():
            return y
        layer: Any = self
        is_plain = not (layer._forward_hooks or layer._forward_pre_hooks or layer._modules or kwargs)
        trains = any(p is not None and p.requires_grad for p in layer._parameters.values())
        return remakable(y, layer.forward, *args) if is_plain and len(args) == 1 and not trains else y


def note_inputs(module: nn.Module) -> None:
    """Lets the normalisations of a module note their inputs where an addition in it can use that; else not."""
    layers = list(module.modules())
    is_used = any(getattr(layer, "remakes_input", False) for layer in layers)
    for layer in layers:
        if is_used and _keeps_input(layer):
            swap_class(layer, NotesInput)
        else:
            restore_class(layer, NotesInput)


def _keeps_input(layer: nn.Module) -> bool:
    forward = layer.borrowed if isinstance(layer, BorrowsForward) else vars(layer).get("forward", type(layer).forward)
    function = getattr(forward, "__func__", forward)
    return f"{function.__module__}.{function.__qualname__}".removesuffix(".forward") in _NORMS
