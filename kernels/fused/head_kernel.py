"""The kernel of `head.py`: pixels averaged into the operand of the first of a chain of products."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..normalisation.statistics import normalized
from ..tile.finish import put
from ..tile.geometry import Output, Tile
from ..tile.product import add_product
from ..tile.source import Source, inside
from .links import load_weights


class HeadLink(NamedTuple):
    """K columns in a tile of `block`, the stages behind them, and where the weight is among the
    extras."""

    K: int
    block: int
    stages: Any
    weight: int


class Classifier(NamedTuple):
    """A head of `length` links. source: a pixel, or `averaged` ones; tile: of the first product."""

    source: Source
    tile: Tile
    links: tuple[HeadLink, ...]
    length: int
    softmax: str
    output: Output


@triton.jit
def averaged(x, at, step, start, extras, SOURCE: tl.constexpr, TILE: tl.constexpr):
    """A block of channels of an image's average; `detail` reads of pixels in flight."""
    pixel, top, left = at
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_K: tl.constexpr = TILE.K
    BLOCK_PIXELS: tl.constexpr = SOURCE.detail
    IMAGE: tl.constexpr = SOURCE.image
    pixels: tl.constexpr = IMAGE.H * IMAGE.W
    depth = tl.arange(0, BLOCK_K)
    x_tile = x + IMAGE.offset + (pixel * IMAGE.row_stride)[:, None] + depth[None, :] + start
    mask = inside(top, left, IMAGE)[:, None] & (start + depth < IMAGE.C)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, pixels, BLOCK_PIXELS):
        for number in tl.static_range(BLOCK_PIXELS):
            live = mask
            if pixels % BLOCK_PIXELS != 0:
                live = mask & (first + number < pixels)
            value = tl.load(x_tile + (first + number) * IMAGE.row_stride, mask=live, other=0.0)
            total += value.to(tl.float32)
    # As in pool_conv.py: keeps the compiler from converting every pixel to the operand's layout.
    mean = tl.sum(tl.join(total, tl.zeros((BLOCK_M, BLOCK_K), tl.float32)), axis=2) / pixels
    return mean.to(x.dtype.element_ty)


@triton.jit
def staged(acc, rows, columns, row_mask, extras, LINK: tl.constexpr):
    """A link's result after its stages, zero in the columns past its width."""
    column_mask = columns < LINK.K
    acc = LINK.stages(acc, rows, columns, row_mask, column_mask, extras)
    return tl.where(column_mask[None, :], acc, 0.0)


@triton.jit
def linked(acc, x, rows, row_mask, extras, HEAD: tl.constexpr, NUMBER: tl.constexpr):
    """The result of a link with the whole depth at once, from that of the link before it."""
    LINK: tl.constexpr = HEAD.links[NUMBER]
    BEFORE: tl.constexpr = HEAD.links[NUMBER - 1]
    BLOCK: tl.constexpr = LINK.block
    BLOCK_DEPTH: tl.constexpr = BEFORE.block
    # Rounded before the weights are loaded, which takes 14 registers less on sm_90.
    t = acc.to(x.dtype.element_ty)
    columns = tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_DEPTH)
    b = load_weights(
        extras[LINK.weight], columns, columns < LINK.K, depth, depth < BEFORE.K, BEFORE.K,
        BLOCK_DEPTH,
    )  # fmt: skip
    acc = tl.dot(t, b.T, input_precision=HEAD.tile.precision)
    return staged(acc, rows, columns, row_mask, extras, LINK)


@triton.jit
def classify(x, y, extras, rows, row_mask, m, HEAD: tl.constexpr):
    """The head of the samples in `rows`, stored."""
    BLOCK_M: tl.constexpr = HEAD.tile.M
    BLOCK_N: tl.constexpr = HEAD.tile.N
    COUNT: tl.constexpr = HEAD.length
    FIRST: tl.constexpr = HEAD.links[0]
    origin = tl.zeros((BLOCK_M,), tl.int32)
    at = HEAD.source.begin(0, 0, rows, origin, origin, row_mask, HEAD.source, None, HEAD.tile)
    columns = tl.arange(0, BLOCK_N)
    acc = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, extras[FIRST.weight], at, columns,
        columns < FIRST.K, m, 0, extras, HEAD.source, HEAD.tile, 1,
    )  # fmt: skip
    acc = staged(acc, rows, columns, row_mask, extras, FIRST)
    for number in tl.static_range(1, COUNT):
        acc = linked(acc, x, rows, row_mask, extras, HEAD, number)
    LAST: tl.constexpr = HEAD.links[COUNT - 1].block
    columns = tl.arange(0, LAST)
    column_mask = columns < HEAD.output.K
    if HEAD.softmax != "":
        acc = tl.where(column_mask[None, :], acc, float("-inf"))
        peak = tl.max(acc, axis=1)[:, None]
        total = tl.sum(tl.exp(acc - peak), axis=1)[:, None]
        acc = normalized(acc, peak, total, HEAD.softmax == "log_softmax")
    put(acc, y, rows, row_mask, columns, column_mask, extras, HEAD.output)


@triton.jit
def head_kernel(x, y, extras, m, HEAD: tl.constexpr, WIDE: tl.constexpr):
    rows = tl.program_id(0) * HEAD.tile.M + tl.arange(0, HEAD.tile.M)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    classify(x, y, extras, rows, row_mask, m, HEAD)
