"""Gradient checkpointing of transformers models: block inputs are kept, on the device or on the host, and nothing else.

The blocks are computed again in the backward pass, with the random numbers of the forward pass, so that gradients are
bit for bit what they are without. Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(model: nn.Module, offload: bool = False) -> None:
    """Makes the blocks of a transformers model keep their inputs alone, in training; evaluation is as before.

    It may be called again, to change `offload`; the model's own way to switch it off undoes it. Neither
    embeddings nor their outputs need a gradient, since it is non-reentrant. Adapters may come before or after.

    Args:
        model: A transformers model, or a module that holds one.
        offload: Whether the inputs of blocks wait in host memory, see `Offload`.

    Raises:
        ValueError: When the model has no blocks that can be computed again.
    """
    blocks: list[Any] = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    able = all(getattr(module, "supports_gradient_checkpointing", True) for module in model.modules())
    if not blocks or not able:
        raise ValueError(
            f"{type(model).__name__} does not support gradient checkpointing, which needs a transformers model made of "
            "blocks; leave gradient_checkpointing out."
        )
    run = Offload() if offload else functools.partial(checkpoint, use_reentrant=False)
    for block in blocks:
        block.gradient_checkpointing, block._gradient_checkpointing_func = True, run


class Offload:
    """Checkpoints a block, `offload(block, hidden, ...)`, and lets its hidden states wait in pinned host memory.

    They are the first argument. What else a block is given, masks, positions and what an encoder has returned, is
    shared between blocks and stays where it is, as do hidden states that need no gradient. A side stream copies them to
    the host while the block is computed, and back while the block after it is computed again; so the device
    holds those of two blocks at a time. Pinned memory is torch's, which keeps it for the next step.

    On a CPU, whose memory is the host's, it says so once and checkpoints.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._last: Callable[[], _Input | None] = _none
        self._has_said = False

    def __reduce__(self) -> Any:
        return type(self), ()  # for copies and pickles: what waits belongs to a graph here

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What the block returns; where hidden states are given to it by name, nothing waits on the host."""
        hidden: Any = args[0] if args else None
        if not self._takes(hidden):
            return checkpoint(block, *args, use_reentrant=False, **kwargs)
        place = hidden.data_ptr()  # not `hidden` itself, which the hooks would keep
        with saved_tensors_hooks(lambda x: self._put(x) if x.data_ptr() == place else x, _get):
            # Non-reentrant checkpoint saves its arguments as a node does, and has hooks of its own for all within.
            return checkpoint(block, *args, use_reentrant=False, **kwargs)

    def _takes(self, hidden: Any) -> bool:
        if not (torch.is_tensor(hidden) and hidden.is_floating_point() and hidden.requires_grad):
            return False
        if _is_on_host(hidden) and not self._has_said:
            self._has_said = True
            rank_zero_warn("gradient_checkpointing: offload moves nothing on a CPU, whose memory is the host's.")
        return not _is_on_host(hidden)

    def _put(self, x: Tensor) -> "_Input":
        if (last := self._last()) is not None:
            last.leave()  # the block that it belongs to has been computed, and the copy was made meanwhile
        if x.device not in self._streams:
            self._streams[x.device] = torch.get_device_module(x.device).Stream(x.device)
        waiting = _Input(x.detach(), self._streams[x.device], self._last)
        self._last = weakref.ref(waiting)
        return waiting


class _Input:
    """Hidden states on the host; on the device too, until the next block begins, and shortly before they are needed.

    Device memory is taken on the stream that computes, which waits for copies before it uses or frees it: it is then
    the same memory as all other activations'. Neither stream makes the other wait for what has not been asked for.
    """

    def __init__(self, x: Tensor, side: Any, previous: Callable[[], "_Input | None"]) -> None:
        self.kind, self.side, self.previous = torch.get_device_module(x.device), side, previous
        self.device = x.device
        self.on_device: Tensor | None = None  # so that one that could not be made leaves nothing to give back
        self.on_host = _pinned_like(x)
        self._copy(self.on_host, x)
        self.on_device = x

    def _copy(self, to: Tensor, x: Tensor) -> None:
        self.side.wait_stream(self.kind.current_stream(self.device))
        with self.kind.stream(self.side):
            to.copy_(x, non_blocking=True)
        self.ready = self.side.record_event()

    def leave(self) -> None:
        """Gives the device's memory back."""
        self.kind.current_stream(self.device).wait_event(self.ready)
        self.on_device = None

    def fetch(self) -> None:
        """Begins to copy to the device."""
        if self.on_device is None:
            self.on_device = torch.empty_like(self.on_host, device=self.device)
            self._copy(self.on_device, self.on_host)

    def take(self) -> Tensor:
        """The hidden states, on the device; begins to fetch those of the block before."""
        self.fetch()
        x = self.on_device
        self.leave()
        if (previous := self.previous()) is not None:
            previous.fetch()
        assert x is not None
        return x

    def __del__(self) -> None:
        if self.on_device is not None:
            self.leave()


def _get(saved: Any) -> Any:
    return saved.take() if isinstance(saved, _Input) else saved


def _none() -> None:
    return None


def _is_on_host(x: Tensor) -> bool:
    return x.device.type == "cpu"


def _pinned_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, device="cpu", pin_memory=True)
