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

import triton
import triton.language as tl


@triton.jit
def stacked_rows(
    first,
    m,
    GEOMETRY: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The output row (pixel of the whole batch) of every row of the operand, and which exist."""
    P: tl.constexpr = GEOMETRY[3]
    Q: tl.constexpr = GEOMETRY[4]
    bands: tl.constexpr = (P + TILE_ROWS - 1) // TILE_ROWS
    lane = tl.arange(0, TILE_ROWS * BLOCK_M)
    index = first + lane % BLOCK_M
    if WIDE:
        index = index.to(tl.int64)
    p = (index // Q % bands) * TILE_ROWS + lane // BLOCK_M
    rows = (index // (bands * Q) * P + p) * Q + index % Q
    return rows, (index < m) & (p < P)


@triton.jit
def input_corner(
    first,
    m,
    GEOMETRY: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Of the first output row of every column: the offset of its window's corner in x, and the
    corner's row and column in the image. Columns past the end have no row inside any image."""
    H: tl.constexpr = GEOMETRY[0]
    WIDTH: tl.constexpr = GEOMETRY[1]
    Q: tl.constexpr = GEOMETRY[4]
    PITCH: tl.constexpr = GEOMETRY[13]
    OFFSET: tl.constexpr = GEOMETRY[14]
    bands: tl.constexpr = (GEOMETRY[3] + TILE_ROWS - 1) // TILE_ROWS
    index = first + tl.arange(0, BLOCK_M)
    live = index < m
    if WIDE:
        index = index.to(tl.int64)
    top = (index // Q % bands).to(tl.int32) * (TILE_ROWS * GEOMETRY[7]) - GEOMETRY[9]
    left = (index % Q).to(tl.int32) * GEOMETRY[8] - GEOMETRY[10]
    pixel = (index // (bands * Q) * H + top) * WIDTH + left
    return pixel * PITCH + OFFSET, tl.where(live, top, -1048576), left


@triton.jit
def depthwise_tile(
    x,
    w,
    corner,
    top,
    left,
    channels,
    channel_mask,
    GEOMETRY: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The depthwise convolution of a band by one channel block, fp32, rows stacked.

    w: packed (R·S, C) in fp32.
    """
    H: tl.constexpr = GEOMETRY[0]
    WIDTH: tl.constexpr = GEOMETRY[1]
    C: tl.constexpr = GEOMETRY[2]
    R: tl.constexpr = GEOMETRY[5]
    S: tl.constexpr = GEOMETRY[6]
    STRIDE: tl.constexpr = GEOMETRY[7]
    DILATION_H: tl.constexpr = GEOMETRY[11]
    DILATION_W: tl.constexpr = GEOMETRY[12]
    PITCH: tl.constexpr = GEOMETRY[13]
    base = x + corner[:, None] + channels[None, :]
    sums = ()
    for j in tl.static_range(TILE_ROWS):
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_K), tl.float32),)
    # Walk the input rows of the band; row i feeds output row j by tap (i - j*stride) / dilation.
    for i in tl.static_range((TILE_ROWS - 1) * STRIDE + (R - 1) * DILATION_H + 1):
        row_inside = (top + i).to(tl.uint32, bitcast=True) < H
        for s in tl.static_range(S):
            inside = row_inside & ((left + s * DILATION_W).to(tl.uint32, bitcast=True) < WIDTH)
            mask = inside[:, None]
            if C % BLOCK_K != 0:
                mask = mask & channel_mask[None, :]
            address = base + (i * WIDTH + s * DILATION_W) * PITCH
            value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for j in tl.static_range(TILE_ROWS):
                if (
                    (i - j * STRIDE >= 0)
                    and ((i - j * STRIDE) % DILATION_H == 0)
                    and ((i - j * STRIDE) // DILATION_H < R)
                ):
                    tap = (i - j * STRIDE) // DILATION_H * S + s
                    weight = tl.load(w + (tap * C + channels), mask=channel_mask, other=0.0)
                    updated = updated + (sums[j] + value * weight[None, :],)
                else:
                    updated = updated + (sums[j],)
            sums = updated
    if TILE_ROWS == 1:
        return sums[0]
    which = tl.arange(0, TILE_ROWS)[:, None, None]
    stack = tl.reshape(sums[0], (1, BLOCK_M, BLOCK_K))
    stack = tl.broadcast_to(stack, (TILE_ROWS, BLOCK_M, BLOCK_K))
    for j in tl.static_range(1, TILE_ROWS):
        stack = tl.where(which == j, tl.reshape(sums[j], (1, BLOCK_M, BLOCK_K)), stack)
    return tl.reshape(stack, (TILE_ROWS * BLOCK_M, BLOCK_K))


@triton.jit
def load_weights(
    w,
    columns,
    column_mask,
    depth,
    depth_mask,
    DEPTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of a packed (columns, DEPTH) weight; BLOCK: how many of its depth are in `depth`."""
    mask = column_mask[:, None]
    if DEPTH % BLOCK != 0:
        mask = mask & depth_mask[None, :]
    return tl.load(w + (columns * DEPTH)[:, None] + depth[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(
    pointer, values, rows, row_mask, columns, column_mask, PITCH: tl.constexpr, OFFSET: tl.constexpr
):
    """Stores a tile of an output whose rows lie PITCH apart."""
    address = pointer + OFFSET + (rows * PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, values.to(pointer.dtype.element_ty), mask=mask)


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
    GEOMETRY: tl.constexpr,
    K: tl.constexpr,
    LAST: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    Z_PITCH: tl.constexpr,
    Z_OFFSET: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PROJECT: tl.constexpr,
    EXPAND: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_LAST: tl.constexpr,
):
    C: tl.constexpr = GEOMETRY[2]
    column_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // column_tiles * BLOCK_M
    columns = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < K
    rows, row_mask = stacked_rows(first, m, GEOMETRY, WIDE, TILE_ROWS, BLOCK_M)
    corner, top, left = input_corner(first, m, GEOMETRY, WIDE, TILE_ROWS, BLOCK_M)
    acc = tl.zeros((TILE_ROWS * BLOCK_M, BLOCK_N), tl.float32)
    for start in tl.range(0, C, BLOCK_K, num_stages=1):
        channels = start + tl.arange(0, BLOCK_K)
        channel_mask = channels < C
        b = load_weights(w2, columns, column_mask, channels, channel_mask, C, BLOCK_K)
        t = depthwise_tile(
            x, w1, corner, top, left, channels, channel_mask, GEOMETRY, TILE_ROWS, BLOCK_M, BLOCK_K
        )
        t = DEPTHWISE(t, rows, channels, row_mask, channel_mask, extras)
        if C % BLOCK_K != 0:
            # Channels past the end must stay zero whatever the stages made of them.
            t = tl.where(channel_mask[None, :], t, 0.0)
        acc = tl.dot(t.to(x.dtype.element_ty), b.T, acc, input_precision=PRECISION)
    acc = PROJECT(acc, rows, columns, row_mask, column_mask, extras)
    if KEEP:
        store_tile(y, acc, rows, row_mask, columns, column_mask, Y_PITCH, Y_OFFSET)
    if EXPAND is not None:
        if K % BLOCK_N != 0:
            acc = tl.where(column_mask[None, :], acc, 0.0)
        narrow = acc.to(x.dtype.element_ty)
        for start in tl.range(0, LAST, BLOCK_LAST, num_stages=1):
            wide = start + tl.arange(0, BLOCK_LAST)
            wide_mask = wide < LAST
            b = load_weights(w3, wide, wide_mask, columns, column_mask, K, BLOCK_N)
            product = tl.dot(narrow, b.T, input_precision=PRECISION)
            product = EXPAND(product, rows, wide, row_mask, wide_mask, extras)
            store_tile(z, product, rows, row_mask, wide, wide_mask, Z_PITCH, Z_OFFSET)


@triton.jit
def resident_kernel(
    x,
    w1,
    w2,
    y,
    extras,
    m,
    GEOMETRY: tl.constexpr,
    K: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    DEPTHWISE: tl.constexpr,
    PROJECT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr,
):
    # A program owns SPAN output channels of its pixels.
    C: tl.constexpr = GEOMETRY[2]
    blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    spans: tl.constexpr = (K + SPAN - 1) // SPAN
    program = tl.program_id(0)
    first = program // spans * BLOCK_M
    rows, row_mask = stacked_rows(first, m, GEOMETRY, WIDE, TILE_ROWS, BLOCK_M)
    corner, top, left = input_corner(first, m, GEOMETRY, WIDE, TILE_ROWS, BLOCK_M)
    operands = ()
    for block in tl.static_range(blocks):
        channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
        channel_mask = channels < C
        t = depthwise_tile(
            x, w1, corner, top, left, channels, channel_mask, GEOMETRY, TILE_ROWS, BLOCK_M, BLOCK_K
        )
        t = DEPTHWISE(t, rows, channels, row_mask, channel_mask, extras)
        if C % BLOCK_K != 0:
            t = tl.where(channel_mask[None, :], t, 0.0)
        operands = operands + (t.to(x.dtype.element_ty),)
    for start in range(0, SPAN, BLOCK_N):
        columns = program % spans * SPAN + start + tl.arange(0, BLOCK_N)
        column_mask = columns < K
        acc = tl.zeros((TILE_ROWS * BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.static_range(blocks):
            channels = block * BLOCK_K + tl.arange(0, BLOCK_K)
            b = load_weights(w2, columns, column_mask, channels, channels < C, C, BLOCK_K)
            acc = tl.dot(operands[block], b.T, acc, input_precision=PRECISION)
        acc = PROJECT(acc, rows, columns, row_mask, column_mask, extras)
        store_tile(y, acc, rows, row_mask, columns, column_mask, Y_PITCH, Y_OFFSET)
