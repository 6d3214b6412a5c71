"""The kernels of `separable`: a depthwise convolution whose result is the operand of a 1x1 product.

The depthwise part computes TILE_ROWS output rows of BLOCK_M pixel columns by BLOCK_K channels at a
time, each input row read once for all the output rows it feeds, and stacks them into one
[TILE_ROWS * BLOCK_M, BLOCK_K] operand: row j * BLOCK_M + i of the operand is column i, row j of the
band. Two ways to go on:

- `accumulate_kernel` multiplies every channel block at once and adds into the accumulator of all
  its output channels: many channels in, few out. A further 1x1 product may follow, whose operand is
  the finished tile.
- `resident_kernel` keeps all channel blocks as operands (in shared memory) and then walks over the
  output channels with their weights copied asynchronously: few channels in, many out, and nothing
  is computed twice.

What keeps the machine code clean (sm_90, 3x3, 256 channels, 64 pixels, 4 warps):
- the rows are stacked by broadcast and select. One product per row instead costs 44 barriers per
  channel block, because the compiler then moves the operand's layout conversion up to every load;
  `tl.join` costs 26 on sm_80. Stacked it is 2 (3 on sm_80), with 128-bit loads throughout;
- no pipelining in `accumulate_kernel`: with two stages every tap goes through shared memory.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..links import load_weights, store_tile


class SeparableTile(NamedTuple):
    """ROWS rows of M pixel columns, N output channels and K channels of t at a time.

    SPAN: output channels of a program, 0 where N are all it has. LAST: columns of the expansion
    in a step.
    """

    ROWS: int
    M: int
    K: int
    N: int
    SPAN: int
    LAST: int
    precision: str
    wide: bool


@triton.jit
def stacked_rows(first, m, Y: tl.constexpr, TILE: tl.constexpr):
    """The output row (pixel of the whole batch) of every row of the operand, and which exist."""
    bands: tl.constexpr = (Y.P + TILE.ROWS - 1) // TILE.ROWS
    lane = tl.arange(0, TILE.ROWS * TILE.M)
    index = first + lane % TILE.M
    if TILE.wide:
        index = index.to(tl.int64)
    p = (index // Y.Q % bands) * TILE.ROWS + lane // TILE.M
    rows = (index // (bands * Y.Q) * Y.P + p) * Y.Q + index % Y.Q
    return rows, (index < m) & (p < Y.P)


@triton.jit
def input_corner(
    first, m, IMAGE: tl.constexpr, WINDOW: tl.constexpr, Y: tl.constexpr, TILE: tl.constexpr
):
    """Of the first output row of every column: the offset of its window's corner in x, and the
    corner's row and column in the image. Columns past the end have no row inside any image."""
    bands: tl.constexpr = (Y.P + TILE.ROWS - 1) // TILE.ROWS
    index = first + tl.arange(0, TILE.M)
    live = index < m
    if TILE.wide:
        index = index.to(tl.int64)
    top = (index // Y.Q % bands).to(tl.int32) * (TILE.ROWS * WINDOW.stride_h) - WINDOW.top
    left = (index % Y.Q).to(tl.int32) * WINDOW.stride_w - WINDOW.left
    pixel = (index // (bands * Y.Q) * IMAGE.H + top) * IMAGE.W + left
    return pixel * IMAGE.row_stride + IMAGE.offset, tl.where(live, top, -1048576), left


@triton.jit
def depthwise_tile(
    x, w, corner, top, left, channels, channel_mask,
    IMAGE: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The depthwise convolution of a band by one channel block, fp32, rows stacked.

    w: packed (R·S, C) in fp32.
    """
    ROWS: tl.constexpr = TILE.ROWS
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_K: tl.constexpr = TILE.K
    S: tl.constexpr = WINDOW.S
    STRIDE: tl.constexpr = WINDOW.stride_h
    DILATION: tl.constexpr = WINDOW.dilation_h
    base = x + corner[:, None] + channels[None, :]
    sums = ()
    for j in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
    # Walk the input rows of the band; row i feeds output row j by tap (i - j*stride) / dilation.
    for i in tl.static_range((ROWS - 1) * STRIDE + (WINDOW.R - 1) * DILATION + 1):
        row_inside = (top + i).to(tl.uint32, bitcast=True) < IMAGE.H
        for s in tl.static_range(S):
            column = s * WINDOW.dilation_w
            inside = row_inside & ((left + column).to(tl.uint32, bitcast=True) < IMAGE.W)
            mask = inside[:, None]
            if IMAGE.C % BLOCK_K != 0:
                mask = mask & channel_mask[None, :]
            address = base + (i * IMAGE.W + column) * IMAGE.row_stride
            value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for j in tl.static_range(ROWS):
                if (
                    (i - j * STRIDE >= 0)
                    and ((i - j * STRIDE) % DILATION == 0)
                    and ((i - j * STRIDE) // DILATION < WINDOW.R)
                ):
                    tap = (i - j * STRIDE) // DILATION * S + s
                    weight = tl.load(w + (tap * IMAGE.C + channels), mask=channel_mask, other=0.0)
                    updated = updated + (sums[j] + value * weight[None, :],)
                else:
                    updated = updated + (sums[j],)
            sums = updated
    if ROWS == 1:
        return sums[0]
    which = tl.arange(0, ROWS)[:, None, None]
    stack = tl.reshape(sums[0], (1, BLOCK_M, BLOCK_K))
    stack = tl.broadcast_to(stack, (ROWS, BLOCK_M, BLOCK_K))
    for j in tl.static_range(1, ROWS):
        stack = tl.where(which == j, tl.reshape(sums[j], (1, BLOCK_M, BLOCK_K)), stack)
    return tl.reshape(stack, (ROWS * BLOCK_M, BLOCK_K))


@triton.jit
def operand_tile(
    x, w, corner, top, left, rows, row_mask, channels, extras,
    IMAGE: tl.constexpr, WINDOW: tl.constexpr, DEPTHWISE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A channel block of t as the operand of a product."""
    channel_mask = channels < IMAGE.C
    t = depthwise_tile(x, w, corner, top, left, channels, channel_mask, IMAGE, WINDOW, TILE)
    t = DEPTHWISE(t, rows, channels, row_mask, channel_mask, extras)
    if IMAGE.C % TILE.K != 0:
        # Channels past the end must stay zero whatever the stages made of them.
        t = tl.where(channel_mask[None, :], t, 0.0)
    return t.to(x.dtype.element_ty)


@triton.jit
def accumulate_kernel(
    x,
    w1,
    w2,
    w3,
    y,
    z,
    extras,
    m,
    IMAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    Y: tl.constexpr,
    Z: tl.constexpr,
    KEEP: tl.constexpr,
    TILE: tl.constexpr,
):
    BLOCK_N: tl.constexpr = TILE.N
    column_tiles: tl.constexpr = (Y.K + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // column_tiles * TILE.M
    columns = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < Y.K
    rows, row_mask = stacked_rows(first, m, Y, TILE)
    corner, top, left = input_corner(first, m, IMAGE, WINDOW, Y, TILE)
    acc = tl.zeros((TILE.ROWS * TILE.M, BLOCK_N), tl.float32)
    for start in tl.range(0, IMAGE.C, TILE.K, num_stages=1):
        channels = start + tl.arange(0, TILE.K)
        b = load_weights(w2, columns, column_mask, channels, channels < IMAGE.C, IMAGE.C, TILE.K)
        t = operand_tile(
            x, w1, corner, top, left, rows, row_mask, channels, extras,
            IMAGE, WINDOW, DEPTHWISE, TILE,
        )  # fmt: skip
        acc = tl.dot(t, b.T, acc, input_precision=TILE.precision)
    acc = Y.epilogue(acc, rows, columns, row_mask, column_mask, extras)
    if KEEP:
        store_tile(y, acc, rows, columns, row_mask, column_mask, Y)
    if Z is not None:
        if Y.K % BLOCK_N != 0:
            acc = tl.where(column_mask[None, :], acc, 0.0)
        narrow = acc.to(x.dtype.element_ty)
        for start in tl.range(0, Z.K, TILE.LAST, num_stages=1):
            wide = start + tl.arange(0, TILE.LAST)
            wide_mask = wide < Z.K
            b = load_weights(w3, wide, wide_mask, columns, column_mask, Y.K, BLOCK_N)
            product = tl.dot(narrow, b.T, input_precision=TILE.precision)
            product = Z.epilogue(product, rows, wide, row_mask, wide_mask, extras)
            store_tile(z, product, rows, wide, row_mask, wide_mask, Z)


@triton.jit
def resident_kernel(
    x,
    w1,
    w2,
    y,
    extras,
    m,
    IMAGE: tl.constexpr,
    WINDOW: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    Y: tl.constexpr,
    TILE: tl.constexpr,
):
    # A program owns SPAN output channels of its pixels.
    SPAN: tl.constexpr = TILE.SPAN
    BLOCK_N: tl.constexpr = TILE.N
    blocks: tl.constexpr = (IMAGE.C + TILE.K - 1) // TILE.K
    spans: tl.constexpr = (Y.K + SPAN - 1) // SPAN
    program = tl.program_id(0)
    first = program // spans * TILE.M
    rows, row_mask = stacked_rows(first, m, Y, TILE)
    corner, top, left = input_corner(first, m, IMAGE, WINDOW, Y, TILE)
    operands = ()
    for block in tl.static_range(blocks):
        t = operand_tile(
            x, w1, corner, top, left, rows, row_mask, block * TILE.K + tl.arange(0, TILE.K),
            extras, IMAGE, WINDOW, DEPTHWISE, TILE,
        )  # fmt: skip
        operands = operands + (t,)
    for start in range(0, SPAN, BLOCK_N):
        columns = program % spans * SPAN + start + tl.arange(0, BLOCK_N)
        column_mask = columns < Y.K
        acc = tl.zeros((TILE.ROWS * TILE.M, BLOCK_N), tl.float32)
        for block in tl.static_range(blocks):
            channels = block * TILE.K + tl.arange(0, TILE.K)
            b = load_weights(
                w2, columns, column_mask, channels, channels < IMAGE.C, IMAGE.C, TILE.K
            )
            acc = tl.dot(operands[block], b.T, acc, input_precision=TILE.precision)
        acc = Y.epilogue(acc, rows, columns, row_mask, column_mask, extras)
        store_tile(y, acc, rows, columns, row_mask, column_mask, Y)
