"""The Triton side of `kernels`; imported on a GPU alone."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, TALL = 16, 256, 16
"""A block is 16 x 256; a program of the backward pass goes down 16 of them and sums as it goes."""


@triton.jit
def _scale(z, v, shift, y, rows, n, SHIFTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = column < n
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * n + column[None, :]
    factor = tl.load(v + column, mask=inside, other=0.0).to(tl.float32)
    result = tl.load(z + at, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
    if SHIFTED:
        result += tl.load(shift + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _scale_backward(  # type: ignore[no-untyped-def]
    dy, z, v, dz, sums, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    factor = tl.load(v + column, mask=inside, other=0.0).to(tl.float32)
    dv = tl.zeros((COLUMNS,), tl.float32)
    dshift = tl.zeros((COLUMNS,), tl.float32)
    for i in range(TALL):
        row = ((tl.program_id(0) * TALL + i) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * n + column[None, :]
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        dv += tl.sum(grad * tl.load(z + at, mask=mask, other=0.0).to(tl.float32), axis=0)
        dshift += tl.sum(grad, axis=0)
        tl.store(dz + at, (grad * factor[None, :]).to(dz.dtype.element_ty), mask=mask)
    place = tl.program_id(0) * n + column
    tl.store(sums + place, dv, mask=inside)
    tl.store(sums + tl.num_programs(0) * n + place, dshift, mask=inside)


def scale(z: Tensor, v: Tensor, shift: Tensor | None) -> Tensor:
    """`z * v + shift`; `z`: [rows, n] contiguous, `v` and `shift`: [n]."""
    (rows, n), y = z.shape, torch.empty_like(z)
    grid: Any = (triton.cdiv(rows, ROWS), triton.cdiv(n, COLUMNS))
    with torch.cuda.device(z.device):
        _scale[grid](z, v, v if shift is None else shift, y, rows, n, shift is not None, ROWS, COLUMNS, num_warps=8)
    return y


def scale_backward(dy: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `scale` with respect to `z`, [rows, n], and to `v` and `shift`, [n] in float32."""
    dy = dy.contiguous()
    (rows, n), dz = z.shape, torch.empty_like(z)
    down = triton.cdiv(rows, ROWS * TALL)
    sums = torch.empty(2, down, n, dtype=torch.float32, device=z.device)
    grid: Any = (down, triton.cdiv(n, COLUMNS))
    with torch.cuda.device(z.device):
        _scale_backward[grid](dy, z, v, dz, sums, rows, n, ROWS, COLUMNS, TALL, num_warps=8)
    dv, dshift = sums.sum(1).unbind()
    return dz, dv, dshift
