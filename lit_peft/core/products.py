"""Products of matrices, each in one kernel and in few calls of torch, whose microseconds a step may wait for."""

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
    is_wider = dtype == torch.float32 and a.dtype.itemsize == 2
    if is_wider and (a.is_cuda or kernels.STAND_IN is not None):
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b)
