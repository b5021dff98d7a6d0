"""The Triton side of `kernels`; imported on a GPU alone."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, TALL = 16, 256, 16
"""A block is 16 x 256; a program of the backward pass goes down 16 of them and sums as it goes."""

DENSE_TILE = 2048
"""Weights that a warp makes dense, 64 a thread: of tiles from 1024 to 16,384 and 1 to 16 warps the quickest."""

_HERE = nullcontext()

_COMPILED: dict[tuple[Any, ...], Any] = {}
"""Kernels that `_launch` has launched before."""


@triton.jit
def _factor(v, norm, column, inside):  # type: ignore[no-untyped-def]
    factor = tl.load(v + column, mask=inside, other=0.0).to(tl.float32)
    if norm is not None:
        factor = factor / tl.maximum(tl.load(norm + column, mask=inside, other=1.0), 1.1754944e-38)
    return factor


@triton.jit
def _scale(  # type: ignore[no-untyped-def]
    z, v, norm, bias, y, rows, n, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    inside = column < n
    mask = (row < rows)[:, None] & inside[None, :]
    at = row[:, None] * n + column[None, :]
    factor = _factor(v, norm, column, inside)
    result = tl.load(z + at, mask=mask, other=0.0).to(tl.float32) * factor[None, :]
    if bias is not None:
        result += ((1 - factor) * tl.load(bias + column, mask=inside, other=0.0).to(tl.float32))[None, :]
    tl.store(y + at, result.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _scale_backward(  # type: ignore[no-untyped-def]
    dy, z, v, norm, bias, dz, sums, rows, n,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TALL: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < n
    factor = _factor(v, norm, column, inside)
    dfactor = tl.zeros((ROWS, COLUMNS), tl.float32)  # summed over rows once, at the end
    dshift = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in range(TALL):
        row = ((tl.program_id(0) * TALL + i) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & inside[None, :]
        at = row[:, None] * n + column[None, :]
        grad = tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
        dfactor += grad * tl.load(z + at, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            dshift += grad
        tl.store(dz + at, (grad * factor[None, :]).to(dz.dtype.element_ty), mask=mask)
    place = tl.program_id(0) * n + column
    dv = tl.sum(dfactor, axis=0)
    if bias is not None:
        shift = tl.sum(dshift, axis=0)
        dv -= shift * tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(sums + tl.num_programs(0) * n + place, (1 - factor) * shift, mask=inside)
    if norm is not None:
        dv = dv / tl.maximum(tl.load(norm + column, mask=inside, other=1.0), 1.1754944e-38)
    tl.store(sums + place, dv, mask=inside)


@triton.jit
def _row_norms(  # type: ignore[no-untyped-def]
    W, A, B, norms, out, n, r, s, row_stride, column_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, R: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rank = tl.arange(0, R)
    b = tl.load(B + row[:, None] * r + rank[None, :], mask=(row < out)[:, None] & (rank < r)[None, :], other=0.0)
    b = b.to(W.dtype.element_ty)
    square = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, n, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        a = tl.load(
            A + rank[:, None] * n + column[None, :], mask=(rank < r)[:, None] & (column < n)[None, :], other=0.0
        )
        a = a.to(W.dtype.element_ty)
        at = row[:, None].to(tl.int64) * row_stride + column[None, :].to(tl.int64) * column_stride
        w = tl.load(W + at, mask=(row < out)[:, None] & (column < n)[None, :], other=0.0).to(tl.float32)
        w += s * tl.dot(b, a)
        square += w * w
    tl.store(norms + row, tl.sqrt(tl.sum(square, axis=1)), mask=row < out)


# Of these single values are read, for which it does not matter how they are aligned.
_GATHERED = ["table", "absmax", "scale_codes", "scale_table", "offset"]


@triton.jit(do_not_specialize=["wide", "whole", "skipped"], do_not_specialize_on_alignment=_GATHERED)
def _dense_4bit(  # type: ignore[no-untyped-def]
    codes, table, absmax, scale_codes, scale_table, offset, W, n, wide, whole, skipped,
    BLOCK: tl.constexpr, NESTED_BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0).to(tl.int64) * BLOCKS  # in 64 bits, as the places of a large matrix are; the rest fits 32
    row = tl.arange(0, BLOCKS)
    left = n - first * BLOCK
    there = row * BLOCK < left
    made = tl.program_id(0) * BLOCKS + row  # blocks of W; of codes there are `whole` a row, of which W has `wide`
    block = made // wide * whole + skipped + made % wide
    if scale_codes is None:
        scale = tl.load(absmax + block, mask=there, other=0.0)
    else:
        scale_code = tl.load(scale_codes + block, mask=there, other=0).to(tl.int32)
        scale = tl.load(scale_table + scale_code) * tl.load(absmax + block // NESTED_BLOCK, mask=there, other=0.0)
        scale += tl.load(offset)
    at = tl.arange(0, BLOCK // 2)[None, :]
    there_too = row[:, None] * BLOCK + 2 * at < left
    two = tl.load(codes + block.to(tl.int64)[:, None] * (BLOCK // 2) + at, mask=there_too, other=0).to(tl.int32)
    high = tl.load(table + (two >> 4)) * scale[:, None]
    low = tl.load(table + (two & 15)) * scale[:, None]
    at = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(W + first * BLOCK + at, tl.interleave(high, low).to(W.dtype.element_ty), mask=at < left)


def _blocks(n: int, size: int) -> int:  # triton.cdiv is traced by its compiler, and slow to call
    return -(-n // size)


def _on(device: torch.device) -> AbstractContextManager[Any]:  # torch.cuda.device costs microseconds, needed or not
    return _HERE if device.index == torch.cuda.current_device() else torch.cuda.device(device)


def _launch(kernel: Any, key: tuple[Any, ...], grid: tuple[int, int, int], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`, in half of the host's time from the second time on.

    Triton looks at all arguments of each launch for whether it must compile the kernel anew; this at `key` alone.

    Args:
        kernel: The kernel.
        key: All that Triton would compile the kernel anew for: devices, dtypes, constants, what `_specialises` tells of
            numbers, and whether pointers are multiples of 16, unless the kernel does not care.
        grid: How many programs.
        args: Those of the kernel, by position.
        options: Those of compiling, the same for each `key`.
    """
    key = (kernel, *key)
    compiled = _COMPILED.get(key)
    if compiled is not None:
        compiled[grid](*args)
    elif (compiled := kernel[grid](*args, **options)) is not None:  # which Triton's interpreter returns
        _COMPILED[key] = compiled


def _specialises(n: int) -> tuple[bool, bool, bool]:
    """What Triton compiles a kernel anew for of a number."""
    return n % 16 == 0, n == 1, n >= 1 << 31


def scale(z: Tensor, v: Tensor, norm: Tensor | None, bias: Tensor | None) -> Tensor:
    """`f z + (1 - f) bias`, `f = v / norm`; `z`: [..., n], the others [n] or None."""
    z, n = z.contiguous(), z.shape[-1]
    y, rows = torch.empty_like(z), z.numel() // max(n, 1)
    grid: Any = (_blocks(rows, ROWS), _blocks(n, COLUMNS))
    with _on(z.device):
        _scale[grid](z, v, norm, bias, y, rows, n, ROWS, COLUMNS, num_warps=8)
    return y


def scale_backward(
    dy: Tensor, z: Tensor, v: Tensor, norm: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `scale` with respect to `z`, [..., n], and to `v` and `bias`, [n] in float32."""
    dy, z, n = dy.contiguous(), z.contiguous(), z.shape[-1]
    dz, rows = torch.empty_like(z), z.numel() // max(n, 1)
    down = _blocks(rows, ROWS * TALL)
    sums = torch.empty((down, n) if bias is None else (2, down, n), dtype=torch.float32, device=z.device)
    grid: Any = (down, _blocks(n, COLUMNS))
    with _on(z.device):
        _scale_backward[grid](dy, z, v, norm, bias, dz, sums, rows, n, ROWS, COLUMNS, TALL, num_warps=8)
    dv, dbias = (sums.sum(0), None) if bias is None else sums.sum(1)
    return dz, dv, dbias


def row_norms(W: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """`|W + s B A|` of each row, [out] in float32; `W`: [out, in] of any strides, `A`: [r, in], `B`: [out, r]."""
    (out, n), r = W.shape, len(A)
    norms = torch.empty(out, dtype=torch.float32, device=W.device)
    A, B = A.contiguous(), B.contiguous()
    grid: Any = (_blocks(out, 16),)
    with _on(W.device):
        _row_norms[grid](W, A, B, norms, out, n, r, s, *W.stride(), 16, 128, max(16, 1 << (r - 1).bit_length()))
    return norms


def dense_4bit(codes: Tensor, state: Any, dtype: torch.dtype, columns: slice) -> Tensor:
    """The weight, `state.shape`, that 4-bit codes stand for, bit for bit as bitsandbytes' kernels make it.

    Those take three passes where the scales are quantised too: one for these, one for their offset, one for the weight.

    Args:
        codes: Two a byte, the first one in its upper half; contiguous.
        state: bitsandbytes' state of them, on the same device.
        dtype: Of the result.
        columns: Which of them; where these are not all, whole blocks, of rows that are whole blocks.
    """
    (out, n_in), size = state.shape, state.blocksize
    start, stop, _ = columns.indices(n_in)
    wide, whole = stop - start, n_in
    W = torch.empty((out, wide), dtype=dtype, device=codes.device)
    absmax, nested, n, inner = state.absmax, (None, None, None), out * wide, 1
    if state.nested:
        two = state.state2
        nested, absmax, inner = (absmax, two.code, state.offset), two.absmax, two.blocksize
    if wide == n_in:  # all are one row, since rows may be no whole blocks
        wide = whole = n
    blocks, device = max(1, DENSE_TILE // size), codes.device
    key = (device.index, dtype, absmax.dtype, size, inner, state.nested, codes.data_ptr() % 16 == 0, *_specialises(n))
    with _on(device):
        _launch(
            _dense_4bit, key, (_blocks(n, blocks * size), 1, 1),
            codes.view(torch.uint8), state.code, absmax, *nested, W, n, _blocks(wide, size), _blocks(whole, size),
            start // size, size, inner, blocks, num_warps=_blocks(size, DENSE_TILE), enable_fp_fusion=False,
        )  # fmt: skip
    return W
