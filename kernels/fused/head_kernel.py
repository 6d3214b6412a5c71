"""The kernel of `head.py`: pixels averaged into the operand of the first of a chain of products."""

from __future__ import annotations

import triton
import triton.language as tl

from ..normalisation.statistics import normalized


@triton.jit
def averaged(
    x_tile,
    mask,
    PIXELS: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """fp32 [BLOCK_M, BLOCK_K]: averages over an image's pixels; BLOCK_PIXELS reads in flight."""
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, PIXELS, BLOCK_PIXELS):
        for at in tl.static_range(BLOCK_PIXELS):
            live = mask
            if PIXELS % BLOCK_PIXELS != 0:
                live = mask & (start + at < PIXELS)
            value = tl.load(x_tile + (start + at) * PITCH, mask=live, other=0.0)
            total += value.to(tl.float32)
    # As in pool_conv.py: keeps the compiler from converting every pixel to the operand's layout.
    return tl.sum(tl.join(total, tl.zeros((BLOCK_M, BLOCK_K), tl.float32)), axis=2) / PIXELS


@triton.jit
def linked(t, w, columns, DEPTH: tl.constexpr, BLOCK_DEPTH: tl.constexpr, K, PRECISION):
    """t · wᵀ with the whole depth at once."""
    depth = tl.arange(0, BLOCK_DEPTH)
    mask = (columns < K)[:, None] & (depth < DEPTH)[None, :]
    tile = tl.load(w + (columns * DEPTH)[:, None] + depth[None, :], mask=mask, other=0.0)
    return tl.dot(t, tile.T, input_precision=PRECISION)


@triton.jit
def staged(acc, rows, columns, row_mask, K: tl.constexpr, STAGES: tl.constexpr, extras):
    """A link's result after its stages, zero in the columns past its width."""
    column_mask = columns < K
    acc = STAGES(acc, rows, columns, row_mask, column_mask, extras)
    return tl.where(column_mask[None, :], acc, 0.0)


@triton.jit
def classify(
    x,
    w1,
    w2,
    w3,
    y,
    extras,
    rows,
    row_mask,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    AVERAGE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LINK1: tl.constexpr,
    LINK2: tl.constexpr,
    LINK3: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """The head of the samples in `rows`, stored; absent links are None."""
    depth = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_1)
    x_tile = x + X_OFFSET + (rows * (PIXELS * X_PITCH))[:, None] + depth[None, :]
    w_tile = w1 + (columns * C)[:, None] + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_1), tl.float32)
    for start in range(0, C, BLOCK_K):
        channels = start + depth
        exists = (channels < C)[None, :]
        if AVERAGE:
            a = averaged(
                x_tile + start, row_mask[:, None] & exists, PIXELS, X_PITCH,
                BLOCK_M, BLOCK_K, BLOCK_PIXELS,
            ).to(x.dtype.element_ty)  # fmt: skip
        else:
            a = tl.load(x_tile + start, mask=row_mask[:, None] & exists, other=0.0)
        b = tl.load(w_tile + start, mask=(columns < K1)[:, None] & exists, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    acc = staged(acc, rows, columns, row_mask, K1, LINK1, extras)
    if LINK2 is not None:
        columns = tl.arange(0, BLOCK_2)
        acc = linked(acc.to(x.dtype.element_ty), w2, columns, K1, BLOCK_1, K2, PRECISION)
        acc = staged(acc, rows, columns, row_mask, K2, LINK2, extras)
    if LINK3 is not None:
        columns = tl.arange(0, BLOCK_3)
        acc = linked(acc.to(x.dtype.element_ty), w3, columns, K2, BLOCK_2, K3, PRECISION)
        acc = staged(acc, rows, columns, row_mask, K3, LINK3, extras)
    K: tl.constexpr = K1 if LINK2 is None else K2 if LINK3 is None else K3
    column_mask = columns < K
    if SOFTMAX != "":
        acc = tl.where(column_mask[None, :], acc, float("-inf"))
        peak = tl.max(acc, axis=1)[:, None]
        total = tl.sum(tl.exp(acc - peak), axis=1)[:, None]
        acc = normalized(acc, peak, total, SOFTMAX == "log_softmax")
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def head_kernel(
    x,
    w1,
    w2,
    w3,
    y,
    extras,
    m,
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    AVERAGE: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LINK1: tl.constexpr,
    LINK2: tl.constexpr,
    LINK3: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    classify(
        x, w1, w2, w3, y, extras, rows, row_mask, C, PIXELS, K1, K2, K3,
        X_PITCH, X_OFFSET, Y_PITCH, Y_OFFSET, AVERAGE, SOFTMAX, LINK1, LINK2, LINK3, EPILOGUE,
        PRECISION, BLOCK_1, BLOCK_2, BLOCK_3, BLOCK_M, BLOCK_K, BLOCK_PIXELS,
    )  # fmt: skip
