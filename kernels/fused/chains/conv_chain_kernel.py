"""The kernel of `conv_chain`: one program owns BLOCK_M pixels and all their channels."""

from __future__ import annotations

import triton
import triton.language as tl

from ...tile import taps


@triton.jit
def conv_chain_kernel(
    x,
    w1,
    w2,
    w3,
    s,
    ws,
    y,
    z,
    extras,
    m,
    GEOMETRY: tl.constexpr,
    SHORTCUT: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDE_CHANNELS: tl.constexpr,
    NARROW: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    Z_PITCH: tl.constexpr,
    Z_OFFSET: tl.constexpr,
    FRONT: tl.constexpr,
    EXPAND: tl.constexpr,
    REDUCE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MIDDLE: tl.constexpr,
    BLOCK_NARROW: tl.constexpr,
    BLOCK_SHORTCUT: tl.constexpr,
    INNER_STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    inner = tl.arange(0, BLOCK_MIDDLE)
    inner_mask = inner < MIDDLE
    if FRONT is None:
        tile = x + X_OFFSET + (rows * X_PITCH)[:, None] + inner[None, :]
        t = tl.load(tile, mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_MIDDLE), tl.float32)
        acc = taps.add_convolution(
            acc, x, w1, rows, row_mask, inner, inner_mask, GEOMETRY, PRECISION, BLOCK_K
        )
        acc = FRONT(acc, rows, inner, row_mask, inner_mask, extras)
        # Channels past MIDDLE must stay zero whatever the stages made of them.
        t = tl.where(inner_mask[None, :], acc, 0.0).to(x.dtype.element_ty)
    if SHORTCUT is not None:
        beside = tl.arange(0, BLOCK_SHORTCUT)
        beside_mask = beside < SHORTCUT[2]
        if SHORTCUT[2] <= BLOCK_SHORTCUT:
            # All channels in one tile: it stays, like t, where every step of the loop reads it.
            s_tile = taps.load_pixels(s, rows, row_mask, beside, beside_mask, SHORTCUT)
    narrow = tl.arange(0, BLOCK_NARROW)
    narrow_mask = narrow < NARROW
    total = tl.zeros((BLOCK_M, BLOCK_NARROW), tl.float32)
    for begin in tl.range(0, WIDE_CHANNELS, BLOCK_N, num_stages=INNER_STAGES):
        columns = begin + tl.arange(0, BLOCK_N)
        column_mask = columns < WIDE_CHANNELS
        w2_tile = w2 + (columns * MIDDLE)[:, None] + inner[None, :]
        w2_mask = column_mask[:, None] & inner_mask[None, :]
        product = tl.dot(
            t, tl.load(w2_tile, mask=w2_mask, other=0.0).T, input_precision=PRECISION
        )
        if SHORTCUT is not None:
            if SHORTCUT[2] <= BLOCK_SHORTCUT:
                ws_tile = ws + (columns * SHORTCUT[2])[:, None] + beside[None, :]
                ws_mask = column_mask[:, None] & beside_mask[None, :]
                b = tl.load(ws_tile, mask=ws_mask, other=0.0)
                product = tl.dot(s_tile, b.T, product, input_precision=PRECISION)
            else:
                product = taps.add_convolution(
                    product, s, ws, rows, row_mask, columns, column_mask, SHORTCUT, PRECISION,
                    BLOCK_SHORTCUT,
                )  # fmt: skip
        product = EXPAND(product, rows, columns, row_mask, column_mask, extras)
        wide = product.to(y.dtype.element_ty)
        address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
        tl.store(address, wide, mask=row_mask[:, None] & column_mask[None, :])
        if REDUCE is not None:
            if WIDE_CHANNELS % BLOCK_N != 0:
                wide = tl.where(column_mask[None, :], wide, 0.0).to(y.dtype.element_ty)
            w3_tile = w3 + (narrow * WIDE_CHANNELS)[:, None] + columns[None, :]
            w3_mask = narrow_mask[:, None] & column_mask[None, :]
            b = tl.load(w3_tile, mask=w3_mask, other=0.0)
            total = tl.dot(wide, b.T, total, input_precision=PRECISION)
    if REDUCE is not None:
        total = REDUCE(total, rows, narrow, row_mask, narrow_mask, extras)
        address = z + Z_OFFSET + (rows * Z_PITCH)[:, None] + narrow[None, :]
        mask = row_mask[:, None] & narrow_mask[None, :]
        tl.store(address, total.to(z.dtype.element_ty), mask=mask)
