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
    if _uses_triton(z):
        return ScaleFeatures.apply(z, v, shift)
    v = v.to(z.dtype)
    return z * v if shift is None else torch.addcmul(shift.to(z.dtype), z, v)


@torch.no_grad()
def row_norms(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """`|W + s B A|` of each row, without a matrix of that size; no gradient.

    |W + s B A|^2 = |W|^2 + 2 s rowsum((W A^T) * B) + s^2 rowsum((B A A^T) * B); on a GPU, rows are added up tile by
    tile in one kernel.

    Args:
        W: [out, in].
        A: [r, in].
        B: [out, r].
        s: Factor of their product.

    Returns:
        [out], float32.
    """
    if _uses_triton(W) and len(A) <= 128:
        from lit_peft.core import triton_kernels

        return triton_kernels.row_norms(W, A, B, s)
    A, B = A.float(), B.float()
    cross = (W @ A.to(W.dtype).t()).float()
    change = torch.addmm(cross, B, A @ A.t(), beta=2 * s, alpha=s * s)
    own = torch.linalg.vector_norm(W, dim=1, dtype=torch.float32)
    return torch.addcmul((change * B).sum(1), own, own).clamp_min(0).sqrt()


def _uses_triton(tensor: Tensor) -> bool:
    return tensor.is_cuda and HAS_TRITON and not torch.compiler.is_compiling()


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
        dtype: torch.dtype | None = ctx.shift_dtype
        dz, dv, dshift = triton_kernels.scale_backward(grads[0].reshape(z.shape), z, v, dtype is not None)
        return dz.view(ctx.shape), dv.to(v.dtype), None if dshift is None else dshift.to(dtype)
