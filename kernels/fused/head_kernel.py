"""The kernel of `head.py`: pixels averaged into the operand of the first of a chain of products."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..normalisation.statistics import normalized
from ..tile.geometry import Image, Output
from .links import load_weights, store_tile


class HeadLink(NamedTuple):
    """K columns in a tile of `block`, the stages behind them, and where the weight is among the
    extras."""

    K: int
    block: int
    stages: Any
    weight: int


class Classifier(NamedTuple):
    """A head of `length` links. image: whose pixels are averaged, PIXELS at a time, or one pixel; M
    samples and K of the first product's inputs at a time."""

    image: Image
    average: bool
    links: tuple[HeadLink, ...]
    length: int
    softmax: str
    output: Output
    M: int
    K: int
    PIXELS: int
    precision: str


@triton.jit
def averaged(x_tile, mask, HEAD: tl.constexpr):
    """fp32 [M, K]: averages over an image's pixels; PIXELS reads in flight."""
    BLOCK_M: tl.constexpr = HEAD.M
    BLOCK_K: tl.constexpr = HEAD.K
    BLOCK_PIXELS: tl.constexpr = HEAD.PIXELS
    pixels: tl.constexpr = HEAD.image.H * HEAD.image.W
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, pixels, BLOCK_PIXELS):
        for at in tl.static_range(BLOCK_PIXELS):
            live = mask
            if pixels % BLOCK_PIXELS != 0:
                live = mask & (start + at < pixels)
            value = tl.load(x_tile + (start + at) * HEAD.image.row_stride, mask=live, other=0.0)
            total += value.to(tl.float32)
    # As in pool_conv.py: keeps the compiler from converting every pixel to the operand's layout.
    return tl.sum(tl.join(total, tl.zeros((BLOCK_M, BLOCK_K), tl.float32)), axis=2) / pixels


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
    acc = tl.dot(t, b.T, input_precision=HEAD.precision)
    return staged(acc, rows, columns, row_mask, extras, LINK)


@triton.jit
def classify(x, y, extras, rows, row_mask, HEAD: tl.constexpr):
    """The head of the samples in `rows`, stored."""
    BLOCK_M: tl.constexpr = HEAD.M
    BLOCK_K: tl.constexpr = HEAD.K
    BLOCK_1: tl.constexpr = HEAD.links[0].block
    COUNT: tl.constexpr = HEAD.length
    C: tl.constexpr = HEAD.image.C
    depth = tl.arange(0, BLOCK_K)
    columns = tl.arange(0, BLOCK_1)
    first = rows * (HEAD.image.H * HEAD.image.W * HEAD.image.row_stride)
    x_tile = x + HEAD.image.offset + first[:, None] + depth[None, :]
    w_tile = extras[HEAD.links[0].weight] + (columns * C)[:, None] + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_1), tl.float32)
    for start in range(0, C, BLOCK_K):
        exists = (start + depth < C)[None, :]
        if HEAD.average:
            a = averaged(x_tile + start, row_mask[:, None] & exists, HEAD).to(x.dtype.element_ty)
        else:
            a = tl.load(x_tile + start, mask=row_mask[:, None] & exists, other=0.0)
        mask = (columns < HEAD.links[0].K)[:, None] & exists
        b = tl.load(w_tile + start, mask=mask, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=HEAD.precision)
    acc = staged(acc, rows, columns, row_mask, extras, HEAD.links[0])
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
    acc = HEAD.output.epilogue(acc, rows, columns, row_mask, column_mask, extras)
    store_tile(y, acc, rows, columns, row_mask, column_mask, HEAD.output)


@triton.jit
def head_kernel(x, y, extras, m, HEAD: tl.constexpr, WIDE: tl.constexpr):
    rows = tl.program_id(0) * HEAD.M + tl.arange(0, HEAD.M)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    classify(x, y, extras, rows, row_mask, HEAD)
