"""Where the left operand of an implicit matrix product comes from.

The terms of a sum are taken in steps: `taps` times `depth` of them, K at a time. `begin(first,
stop, image, p, q, live, ...)` finds what the rows of a tile start from, by its units and by what
`space.py` makes of them; `load(x, at, tap, start, ...)` makes the operand tile [M, K] of one step,
zero where the image, the filter or the rows end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from ..contract.spec import Operand
from .geometry import Image, Window

if TYPE_CHECKING:
    from .conv_geometry import Conv2d

WIDEST_GATHER = 16
"""Channels from which a block of one tap's channels fills the inner dimension of a product."""


class Source(NamedTuple):
    """An image, what each pixel sees of it, and how the operand is made of that.

    before: stages applied to the image as it is read; detail: what only one `load` knows of.
    """

    image: Image
    window: Window
    begin: Any
    load: Any
    taps: int
    depth: int
    before: Any = None
    detail: Any = None


def runs_by_tap(channels: int, taps: int) -> bool:
    """Whether a block of one tap's channels fills the inner dimension of a matrix product.

    A single tap with few channels is already one short block.
    """
    return channels >= WIDEST_GATHER or taps == 1


def of_convolution(conv: Conv2d, x: Operand, w: tuple[int, ...], before: Any = None) -> Source:
    """What a convolution with a filter (K, C, R, S) reads: a tap's channels in blocks, or (tap,
    channel) pairs one by one where those are few; `before` can only be applied to blocks."""
    _, c, r, s = w
    convolved = by_tap(conv, x, w, before)
    if before is not None or runs_by_tap(c, r * s):
        return convolved
    return convolved._replace(load=gather, taps=1, depth=r * s * c)


def by_tap(conv: Conv2d, x: Operand, w: tuple[int, ...], before: Any = None) -> Source:
    """As `of_convolution`, a tap's channels in blocks however few they are."""
    _, c, r, s = w
    image = Image.of(x)._replace(C=c)
    return Source(image, Window.of((r, s), conv), corner, tap, r * s, c, before)


@triton.jit
def inside(top, left, IMAGE: tl.constexpr):
    """Whether a position is a pixel of the image."""
    return (top.to(tl.uint32, bitcast=True) < IMAGE.H) & (
        left.to(tl.uint32, bitcast=True) < IMAGE.W
    )


@triton.jit
def corner(
    first, stop, image, p, q, live,
    SOURCE: tl.constexpr, SPACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The index of the first pixel that each row sees, its height and its place in the row."""
    top = p * SOURCE.window.stride_h - SOURCE.window.top
    left = q * SOURCE.window.stride_w - SOURCE.window.left
    pixel = (image * SOURCE.image.H + top) * SOURCE.image.W + left
    # Rows that do not exist get a position that no tap brings inside: one mask serves both.
    return pixel, tl.where(live, top, -1048576), left


@triton.jit
def tap(x, at, step, start, extras, SOURCE: tl.constexpr, TILE: tl.constexpr):
    """A block of channels of one tap."""
    pixel, top, left = at
    C: tl.constexpr = SOURCE.image.C
    r = step // SOURCE.window.S * SOURCE.window.dilation_h
    s = step % SOURCE.window.S * SOURCE.window.dilation_w
    depth = tl.arange(0, TILE.K)
    channels = start + depth
    there = inside(top + r, left + s, SOURCE.image)
    mask = there[:, None]
    if C % TILE.K != 0:
        mask = mask & (channels < C)[None, :]
    x_step = x + SOURCE.image.offset + ((r * SOURCE.image.W + s) * SOURCE.image.row_stride + start)
    x_tile = (pixel * SOURCE.image.row_stride)[:, None] + depth[None, :]
    a = tl.load(x_step + x_tile, mask=mask, other=0.0)
    if SOURCE.before is not None:
        # The border is zero after these stages, not before them.
        value = SOURCE.before(a.to(tl.float32), pixel, channels, there, channels < C, extras)
        a = tl.where(there[:, None] & (channels < C)[None, :], value, 0.0).to(a.dtype)
    return a


@triton.jit
def gather(x, at, step, start, extras, SOURCE: tl.constexpr, TILE: tl.constexpr):
    """(tap, channel) pairs from `start` on."""
    pixel, top, left = at
    C: tl.constexpr = SOURCE.image.C
    index = start + tl.arange(0, TILE.K)
    r = index // C // SOURCE.window.S * SOURCE.window.dilation_h
    s = index // C % SOURCE.window.S * SOURCE.window.dilation_w
    there = inside(top[:, None] + r[None, :], left[:, None] + s[None, :], SOURCE.image)
    mask = there & (index < SOURCE.depth)[None, :]
    offset = (r * SOURCE.image.W + s) * SOURCE.image.row_stride + index % C
    x_tile = (pixel * SOURCE.image.row_stride)[:, None] + offset[None, :]
    return tl.load(x + SOURCE.image.offset + x_tile, mask=mask, other=0.0)
