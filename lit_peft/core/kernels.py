"""Operations for which torch has no fast kernel on a GPU; elsewhere they are the same in plain torch."""

import importlib.util
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None


def scale_features(z: Tensor, v: Tensor, shift: Tensor | None = None) -> Tensor:
    """`z * v + shift` over the last dimension, rounded once; differentiable in all three.

    torch's kernel for a vector that is broadcast over rows reaches half of a GPU's bandwidth, and its backward pass
    writes `dy * z` before it sums it.

    Args:
        z: [..., n].
        v: [n], in any dtype.
        shift: [n], or None for zero.

    Returns:
        [..., n] in the dtype of `z`.
    """
    if z.is_cuda and HAS_TRITON and not torch.compiler.is_compiling():
        return ScaleFeatures.apply(z, v, shift)
    v = v.to(z.dtype)
    return z * v if shift is None else torch.addcmul(shift.to(z.dtype), z, v)


class ScaleFeatures(torch.autograd.Function):
    """`scale_features` as one node that passes over memory once each way; keeps `z` and `v`."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, shift: Tensor | None) -> Tensor:
        from lit_peft.core import triton_kernels

        rows = z.reshape(-1, z.shape[-1])
        ctx.save_for_backward(rows, v)
        ctx.shape, ctx.shift_dtype = z.shape, None if shift is None else shift.dtype
        return triton_kernels.scale(rows, v, shift).view(z.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lit_peft.core import triton_kernels

        z, v = ctx.saved_tensors
        dz, dv, dshift = triton_kernels.scale_backward(grads[0].reshape(z.shape), z, v)
        return dz.view(ctx.shape), dv.to(v.dtype), dshift.to(ctx.shift_dtype) if ctx.shift_dtype is not None else None
