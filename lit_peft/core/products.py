"""Products of matrices, in few kernels and few calls of torch, whose microseconds a step may wait for."""

import functools

import torch
from torch import Tensor

from lit_peft.core import kernels


def as_rows(x: Tensor) -> Tensor:
    """`x`, [..., n], as a matrix [rows, n]; a view of a contiguous one."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def add_matmul(y: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """`beta y + alpha a b`, in place of `y`, [n, m], whose values do not matter where beta is 0; returns it.

    `addmm_` does the same, and torch's `FlopCounterMode` does not count it.
    """
    return torch.addmm(y, a, b, alpha=alpha, beta=beta, out=y)


def scaled_matmul(a: Tensor, b: Tensor, s: float) -> Tensor:
    """`s a b`."""
    return add_matmul(a.new_empty(a.shape[0], b.shape[1]), a, b, alpha=s, beta=0)


def matmul_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """`a b` in float32, if that is `dtype`, where a GPU sums 16-bit factors in it; else in the dtype of `a`."""
    if dtype == torch.float32 and a.dtype.itemsize == 2 and _returns_sums(a):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b)


def _returns_sums(a: Tensor) -> bool:
    """Whether products of 16-bit tensors like `a` can be had in the float32 that they are summed in."""
    if kernels.STAND_IN is not None:
        return True
    if not a.is_cuda or torch.version.hip is not None:
        return False
    if a.dtype == torch.float16:
        return not torch.backends.cuda.matmul.allow_fp16_accumulation
    return _has_bfloat16(a.device)


@functools.cache
def _has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU has units for bfloat16; older ones emulate it, but for this."""
    return torch.cuda.get_device_capability(device) >= (8, 0)
