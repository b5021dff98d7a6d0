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
    dy, z, v, dz, sums, rows, n, SHIFTED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    factor = tl.load(v + column, mask=inside, other=0.0).to(tl.float32)
    dv = tl.zeros((ROWS, COLUMNS), tl.float32)  # summed over rows once, at the end
    dshift = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(TALL):
        row = ((tl.program_id(0) * TALL + i) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * n + column[None, :]
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        dv += grad * tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        if SHIFTED:
            dshift += grad
        tl.store(dz + at, (grad * factor[None, :]).to(dz.dtype.element_ty), mask=mask)
    place = tl.program_id(0) * n + column
    tl.store(sums + place, tl.sum(dv, axis=0), mask=inside)
    if SHIFTED:
        tl.store(sums + tl.num_programs(0) * n + place, tl.sum(dshift, axis=0), mask=inside)


@triton.jit
def _row_norms(  # type: ignore[no-untyped-def]
    W, A, B, norms, out, n, r, s, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, R)
    b = tl.load(B + row[:, None] * r + rank[None, :], mask=(row < out)[:, None] & (rank < r)[None, :], other=0.0)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        a = tl.load(
            A + rank[:, None] * n + column[None, :], mask=(rank < r)[:, None] & (column < n)[None, :], other=0.0
        )
        at = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
        w = tl.load(W + at, mask=(row < out)[:, None] & (column < n)[None, :], other=0.0).to(tl.float32)
        w += s * tl.dot(b, a)
        square += w * w
    tl.store(norms + row, tl.sqrt(tl.sum(square, axis=1)), mask=row < out)


def scale(z: Tensor, v: Tensor, shift: Tensor | None) -> Tensor:
    """`z * v + shift`; `z`: [rows, n] contiguous, `v` and `shift`: [n]."""
    (rows, n), y = z.shape, torch.empty_like(z)
    grid: Any = (triton.cdiv(rows, ROWS), triton.cdiv(n, COLUMNS))
    with torch.cuda.device(z.device):
        _scale[grid](z, v, v if shift is None else shift, y, rows, n, shift is not None, ROWS, COLUMNS, num_warps=8)
    return y


def scale_backward(dy: Tensor, z: Tensor, v: Tensor, shifted: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `scale` with respect to `z`, [rows, n], and to `v` and `shift`, [n] in float32."""
    dy = dy.contiguous()
    (rows, n), dz = z.shape, torch.empty_like(z)
    down = triton.cdiv(rows, ROWS * TALL)
    sums = torch.empty(1 + shifted, down, n, dtype=torch.float32, device=z.device)
    grid: Any = (down, triton.cdiv(n, COLUMNS))
    with torch.cuda.device(z.device):
        _scale_backward[grid](dy, z, v, dz, sums, rows, n, shifted, ROWS, COLUMNS, TALL, num_warps=8)
    total = sums.sum(1)
    return dz, total[0], total[1] if shifted else None


def row_norms(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """`|W + s B A|` of each row, [out] in float32; `W`: [out, in] of any strides, `A`: [r, in], `B`: [out, r]."""
    (out, n), r = W.shape, len(A)
    norms = torch.empty(out, dtype=torch.float32, device=W.device)
    A, B = A.to(W.dtype).contiguous(), B.to(W.dtype).contiguous()
    grid: Any = (triton.cdiv(out, 16),)
    with torch.cuda.device(W.device):
        _row_norms[grid](W, A, B, norms, out, n, r, s, *W.stride(), 16, 128, max(16, triton.next_power_of_2(r)))
    return norms
