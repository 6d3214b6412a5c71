"""The parts of `separable`: a depthwise convolution whose result is the operand of a 1x1 product.

The depthwise part computes bands of some output rows of BLOCK_M pixel columns by BLOCK_K channels
at a time (`convolution/depthwise.py`) and stacks the rows into one operand, as `space.bands` counts
them. Two ways to go on:

- the tile engine multiplies every channel block at once and adds into the accumulator of all its
  output channels: many channels in, few out. A further 1x1 product may follow, whose operand is the
  finished tile;
- `resident_kernel` keeps all channel blocks as operands (in shared memory) and then walks over the
  output channels with their weights copied asynchronously: few channels in, many out, and nothing
  is computed twice. The engine's loop makes an operand for one tile of channels: that is why this
  is a kernel of its own.

What keeps the machine code clean (sm_90, 3x3, 256 channels, 64 pixels, 4 warps):
- the rows are stacked by broadcast and select. One product per row instead costs 44 barriers per
  channel block, because the compiler then moves the operand's layout conversion up to every load;
  `tl.join` costs 26 on sm_80. Stacked it is 2 (3 on sm_80), with 128-bit loads throughout;
- no pipelining behind the engine: with two stages every tap goes through shared memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ...contract import programmatic_launch
from ...convolution.depthwise import band_corner, band_sums
from ...tile.finish import put, write
from ...tile.geometry import Output
from ...tile.space import pixel_index
from ..links import load_weights


class Depthwise(NamedTuple):
    """What the source knows: the stages behind the filter, and which of `extras` its weight is,
    packed (R·S, C) in fp32."""

    stages: Any
    weight: int


class Expansion(NamedTuple):
    """What the finish knows: whether y is stored, and the product behind it. z: its output, None
    where there is none; weight, result: which of `extras` w3 and z are; step: columns at a time."""

    keep: bool
    z: Output | None
    weight: int
    result: int
    step: int


@triton.jit
def corner(
    first, stop, image, p, q, live,
    SOURCE: tl.constexpr, SPACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of every column of the bands the offset of its window's corner in x, and the corner's row and
    column in the image; and the output pixel of every row of the tile, and which exist."""
    IMAGE: tl.constexpr = SOURCE.image
    _, _, _, _, pixel, top, left = band_corner(first, stop, IMAGE, SOURCE.window, SPACE, TILE)
    rows = pixel_index(first, image, p, q, SPACE, TILE)
    return pixel * IMAGE.row_stride + IMAGE.offset, top, left, rows, live


@triton.jit
def filtered(x, at, step, start, extras, SOURCE: tl.constexpr, TILE: tl.constexpr):
    """A block of channels of t, its rows stacked."""
    offset, top, left, rows, live = at
    IMAGE: tl.constexpr = SOURCE.image
    COLUMNS: tl.constexpr = offset.shape[0]
    K: tl.constexpr = TILE.K
    HEIGHT: tl.constexpr = TILE.M // COLUMNS
    channels = start + tl.arange(0, K)
    exists = channels < IMAGE.C
    base = x + offset[:, None] + channels[None, :]
    sums = band_sums(
        base, extras[SOURCE.detail.weight], top, left, channels, exists,
        IMAGE, SOURCE.window, IMAGE.C, HEIGHT, COLUMNS, K,
    )  # fmt: skip
    t = sums[0]
    if HEIGHT > 1:
        which = tl.arange(0, HEIGHT)[:, None, None]
        stack = tl.broadcast_to(tl.reshape(t, (1, COLUMNS, K)), (HEIGHT, COLUMNS, K))
        for j in tl.static_range(1, HEIGHT):
            stack = tl.where(which == j, tl.reshape(sums[j], (1, COLUMNS, K)), stack)
        t = tl.reshape(stack, (TILE.M, K))
    t = SOURCE.detail.stages(t, rows, channels, live, exists, extras)
    if IMAGE.C % K != 0:
        # Channels past the end must stay zero whatever the stages made of them.
        t = tl.where(exists[None, :], t, 0.0)
    return t.to(x.dtype.element_ty)


@triton.jit
def expand(
    acc, y, workspace, semaphores, tile, split, first, stop, rows, live, columns, column_mask,
    extras, SPACE: tl.constexpr, FINISH: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Stores y if it is kept, and its product with w3, if there is one."""
    EXPANSION: tl.constexpr = FINISH.detail
    Z: tl.constexpr = EXPANSION.z
    acc = OUTPUT.epilogue(acc, rows, columns, live, column_mask, extras)
    if EXPANSION.keep:
        write(acc, y, rows, live, columns, column_mask, OUTPUT)
    if Z is not None:
        N: tl.constexpr = TILE.N
        STEP: tl.constexpr = EXPANSION.step
        if OUTPUT.K % N != 0:
            acc = tl.where(column_mask[None, :], acc, 0.0)
        narrow = acc.to(y.dtype.element_ty)
        w3, z = extras[EXPANSION.weight], extras[EXPANSION.result]
        for start in tl.range(0, Z.K, STEP, num_stages=1):
            wide = start + tl.arange(0, STEP)
            b = load_weights(w3, wide, wide < Z.K, columns, column_mask, OUTPUT.K, N)
            product = tl.dot(narrow, b.T, input_precision=TILE.precision)
            put(product, z, rows, live, wide, wide < Z.K, extras, Z)


@triton.jit
def resident_kernel(
    x, w, y, extras, m, SPACE: tl.constexpr, SOURCE: tl.constexpr, SPAN: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # A program owns SPAN output channels of its pixels.
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    C: tl.constexpr = SOURCE.depth
    blocks: tl.constexpr = (C + TILE.K - 1) // TILE.K
    spans: tl.constexpr = (OUTPUT.K + SPAN - 1) // SPAN
    program = tl.program_id(0)
    first = program // spans * SPACE.per_tile
    image, p, q, live = SPACE.place(first, m, SPACE, TILE)
    rows = pixel_index(first, image, p, q, SPACE, TILE)
    at = SOURCE.begin(first, m, image, p, q, live, SOURCE, SPACE, TILE)
    programmatic_launch.grid_dependency_wait(PDL)
    operands = ()
    for block in tl.static_range(blocks):
        operands = operands + (SOURCE.load(x, at, 0, block * TILE.K, extras, SOURCE, TILE),)
    for start in range(0, SPAN, BLOCK_N):
        columns = program % spans * SPAN + start + tl.arange(0, BLOCK_N)
        column_mask = columns < OUTPUT.K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.static_range(blocks):
            channels = block * TILE.K + tl.arange(0, TILE.K)
            b = load_weights(w, columns, column_mask, channels, channels < C, C, TILE.K)
            acc = tl.dot(operands[block], b.T, acc, input_precision=TILE.precision)
        put(acc, y, rows, live, columns, column_mask, extras, OUTPUT)
