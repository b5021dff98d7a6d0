"""Operations for which torch has no fast kernel on a GPU; elsewhere they are the same in plain torch."""

import functools
import importlib.util
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
STAND_IN: Any = None
"""What is called in the place of the Triton kernels, on every device, while `lit_peft.planning` measures a step."""


def scale_features(z: Tensor, v: Tensor, norm: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`f z + (1 - f) bias` over the last dimension, `f` being `v / norm`; rounded once, differentiable but for `norm`.

    That is `z` scaled, but for a bias that it holds. torch's kernel for a vector that is broadcast over rows reaches
    half of a GPU's bandwidth, and its backward pass writes `dy * z` before it sums it.

    Args:
        z: [..., n].
        v: [n], in any dtype.
        norm: [n] in float32, or None for ones. Where it is zero, `v` should be.
        bias: [n], or None for zeros.

    Returns:
        [..., n] in the dtype of `z`.
    """
    return ScaleFeatures.apply(z, v, norm, bias) if in_triton(z) is not None else scale(z, v, norm, bias)


def scale(z: Tensor, v: Tensor, norm: Tensor | None, bias: Tensor | None) -> Tensor:
    """`scale_features` as a node's forward pass has it; on a GPU, outside autograd."""
    if (fast := in_triton(z)) is not None:
        return fast.scale(z, v, norm, bias)
    f = _factor(v, norm)
    scaled = f.to(z.dtype)
    return z * scaled if bias is None else torch.addcmul((bias * (1 - f)).to(z.dtype), z, scaled)


def scale_backward(
    dy: Tensor, z: Tensor, v: Tensor, norm: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `scale`: of `z` in its dtype, of `v` and `bias`, [n], in at least float32."""
    if (fast := in_triton(dy)) is not None:
        return fast.scale_backward(dy, z, v, norm, bias)
    f, wide = _factor(v, norm), torch.promote_types(z.dtype, torch.float32)
    rows, z_rows = (t.reshape(-1, t.shape[-1]).to(wide) for t in (dy, z))
    of_f = (rows * (z_rows if bias is None else z_rows - bias)).sum(0)
    return dy * f.to(dy.dtype), _factor(of_f, norm), None if bias is None else (1 - f) * rows.sum(0)


def _factor(v: Tensor, norm: Tensor | None) -> Tensor:
    return v if norm is None else v / norm.clamp_min(torch.finfo(norm.dtype).tiny)


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
    if len(A) <= 128 and (fast := in_triton(W)) is not None:
        return fast.row_norms(W, A, B, s)
    with torch.no_grad():
        A, B = A.float(), B.float()
        cross = (W @ A.to(W.dtype).t()).float()
        change = torch.addmm(cross, B, A @ A.t(), beta=2 * s, alpha=s * s)
        own = wide_norms(W).float()
        return torch.addcmul((change * B).sum(1), own, own).clamp_min(0).sqrt()


def wide_norms(W: Tensor) -> Tensor:
    """`|W|` of each row, [out], in float32 at least."""
    return torch.linalg.vector_norm(W, dim=1, dtype=torch.promote_types(W.dtype, torch.float32))


def on_gpu(tensor: Tensor) -> bool:
    """Whether kernels that a CPU has not run on a tensor: it is on a GPU, or a step is measured as if it were."""
    return STAND_IN is not None or tensor.device.type != "cpu"


def in_triton(tensor: Tensor) -> Any:
    """The kernels that are written in Triton; None where there are none for a tensor."""
    if STAND_IN is not None:
        return STAND_IN
    if not (tensor.is_cuda and HAS_TRITON) or torch.compiler.is_compiling():
        return None
    return _triton_kernels()


@functools.cache
def _triton_kernels() -> ModuleType:
    from lit_peft.core import triton_kernels

    return triton_kernels


class ScaleFeatures(torch.autograd.Function):
    """`scale_features` as one node that passes over memory once each way; keeps `z` and the vectors."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, v: Tensor, norm: Tensor | None, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(z, v, norm, bias)
        return scale(z, v, norm, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        z, v, norm, bias = ctx.saved_tensors
        dz, dv, dbias = scale_backward(grads[0], z, v, norm, bias)
        return dz, dv.to(v.dtype), None, dbias if dbias is None else dbias.to(bias.dtype)
