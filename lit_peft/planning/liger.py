"""Liger's kernels, and other Triton kernels, in a step on fake tensors: what calls them runs, they do not.

What is kept, allocated and written in place is decided by the Python around a kernel, which runs as it is. A launch
allocates nothing, and is all there is to leave out; Liger's losses ask for values besides.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

HALVES = (torch.bfloat16, torch.float16)
_LOSS, _FUSED = "cross_entropy", "fused_linear_cross_entropy"


def without_launches() -> Iterator[tuple[Any, str, Callable[..., Any]]]:
    """(Where a function of Triton or Liger is, its name, what is called in its place), as far as they are imported."""
    if (triton := sys.modules.get("triton")) is not None:
        yield triton.KernelInterface, "__getitem__", lambda kernel, grid: _launch
    for loss in (_LOSS, _FUSED):
        if (home := sys.modules.get(f"liger_kernel.ops.{loss}")) is not None:
            forward, backward = (_answered(getattr(home, f"{loss}_{way}")) for way in ("forward", "backward"))
            yield home, f"{loss}_forward", _summed_in_place(forward) if loss == _FUSED else forward
            yield home, f"{loss}_backward", backward


def _launch(*args: Any, **kwargs: Any) -> None:
    """Takes the place of a kernel."""


class _Answers(TorchDispatchMode):
    """Answers what a loss asks of values: that there are tokens to score, and that it is the last node, if a scalar."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        if func is torch.ops.aten.equal.default:
            return args[0].shape == args[1].shape
        return func(*args, **(kwargs or {}))


def _answered(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with _Answers():
            return function(*args, **kwargs)

    return run


def _summed_in_place(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The fused loss with the gradient of its weight as a GPU makes it, from Ampere on.

    There the chunks of logits in half precision are added to it by their product itself; on a CPU, where fake tensors
    are, Liger makes each addend first, in float32 and as large as the weight.
    """
    signature = inspect.signature(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        x, weight = given["_input"], given["weight"]

        def asked(name: str, tensor: Tensor) -> bool:  # in a backward pass that makes the logits anew
            return tensor.requires_grad if given.get(name) is None else given[name]

        half = weight.dtype in HALVES or torch.is_autocast_enabled("cpu")
        if not (half and asked("compute_gradients", x) and asked("weight_requires_grad", weight)):
            return forward(**given)
        total = torch.zeros_like(weight, dtype=given.get("accum_dtype"))
        given.pop("weight_requires_grad", None)
        *rest, _, of_bias = forward(**{**given, "weight": weight.detach()})
        return *rest, total.to(weight.dtype), of_bias

    return run
