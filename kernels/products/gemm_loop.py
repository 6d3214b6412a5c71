"""The loop of a plain matrix product: the sums of one tile, by pointers or through descriptors."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def places(
    row_tile,
    column_tile,
    m,
    K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """rows [BLOCK_M], columns [BLOCK_N] of a tile, and which of them there are."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < m
    column_mask = columns < K
    if WIDE:
        rows = rows.to(tl.int64)
    return rows, columns, row_mask, column_mask


@triton.jit
def add_products(
    acc,
    x,
    w,
    row_tile,
    column_tile,
    rows,
    columns,
    row_mask,
    column_mask,
    first,
    stop,
    extras,
    C: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    PROLOGUE: tl.constexpr,
    FINITE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
):
    """acc [BLOCK_M, BLOCK_N] with the products of the steps from `first` to `stop` added.

    FINITE: what the prologue makes of channels outside the tensor is finite. TMA: x and w are
    descriptors, whose boxes need neither addresses nor masks.
    """
    depth = tl.arange(0, BLOCK_K)
    if not TMA:
        x_tile = x + X_OFFSET + (rows * X_PITCH)[:, None] + depth[None, :]
        w_tile = w + (columns * C)[:, None] + depth[None, :]
    for step in range(first, stop):
        start = step * BLOCK_K
        if TMA:
            a = x.load([row_tile * BLOCK_M, start])
            b = w.load([column_tile * BLOCK_N, start])
        elif C % BLOCK_K == 0:
            a = tl.load(x_tile + start, mask=row_mask[:, None], other=0.0)
            b = tl.load(w_tile + start, mask=column_mask[:, None], other=0.0)
        else:
            inside = (depth + start < C)[None, :]
            a = tl.load(x_tile + start, mask=row_mask[:, None] & inside, other=0.0)
            b = tl.load(w_tile + start, mask=column_mask[:, None] & inside, other=0.0)
        if PROLOGUE is not None:
            channels = depth + start
            in_channels = channels < C
            value = PROLOGUE(a.to(tl.float32), rows, channels, row_mask, in_channels, extras)
            # Channels outside the tensor meet weights of zero: they only must be finite. Rows need
            # not: a row of the product depends on no other row of x, and those are not stored.
            # (Selecting by both costs 209 of 543 instructions at 128x64x64 with 4 warps.)
            if C % BLOCK_K != 0 and not FINITE:
                value = tl.where(in_channels[None, :], value, 0.0)
            a = value.to(a.dtype)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc
