"""max_pool2d_with_indices: the maximum of an image's windows, and where it stands.

y[n,c,p,q] = max over the taps (r, s) inside the image of x[n,c,h,w], h = p·sh − ph + r·dh and
w = q·sw − pw + s·dw; i[n,c,p,q] = h·W + w of that element. As in torch the first of equal values
counts, the last NaN, and of a window that holds −inf only its first pixel.

x: (N, C, H, W) NHWC in memory -> y and i: (N, C, P, Q) NHWC; i is int64, as the module returns it.

Kernels that move elements do so through fp32, which is exact for whole numbers up to 2^24: larger
images are refused. A program holds a tile of (window, channel) pairs and reads every window's
elements once.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.op import Config, Launch, Op, Problem, Target, TensorSpec
from ..movement.arguments import pooling
from ..tile.finish import put
from ..tile.geometry import Image, tile_launch
from ..tile.space import output_tile
from .pool import cost
from .pool_kernel import FAR_OUTSIDE, image_windows, in_image
from .pool_window import MaxPool2d, reference, windows
from .pool_window import infer as infer_window
from .tiles import MOST_UNROLLED_TAPS, Tiles, unrolled_taps

NAME = "max_pool2d_with_indices"
MOST_PIXELS = 2**24


def infer(attributes: MaxPool2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The values' spec by the rule of pooling, and the same with int64."""
    (values,) = infer_window(NAME, attributes, inputs)
    pixels = math.prod(inputs[0].shape[2:])
    if pixels > MOST_PIXELS:
        raise InvalidInputError(
            f"{NAME}: {inputs[0]} has {pixels} pixels; indices up to {MOST_PIXELS} are exact"
        )
    return values, values.with_(dtype=torch.int64)


@triton.jit
def later_tap(
    best, where, base, safe_top, top, left, column_mask, tap, WINDOWS: tl.constexpr
):  # fmt: skip
    """The largest value so far and its place, after one more tap in row-major order."""
    HEIGHT: tl.constexpr = WINDOWS.height
    WIDTH: tl.constexpr = WINDOWS.width
    r = tap // WIDTH.taps * HEIGHT.dilation
    s = tap % WIDTH.taps * WIDTH.dilation
    mask = in_image(safe_top + r, left + s, WINDOWS)[:, None] & column_mask[None, :]
    offset = (r * WIDTH.size + s) * WINDOWS.row_stride
    value = tl.load(base + offset, mask=mask, other=float("-inf")).to(tl.float32)
    # Only a larger value wins, so the first of equals stays; every NaN wins, so the last one does.
    better = (value > best) | (value != value)
    best = tl.where(better, value, best)
    return best, tl.where(better, ((top + r) * WIDTH.size + left + s)[:, None], where)


@triton.jit
def first_inside(start, AXIS: tl.constexpr):
    """The first tap of a window that does not lie before the image."""
    return start + (tl.maximum(-start, 0) + AXIS.dilation - 1) // AXIS.dilation * AXIS.dilation


@triton.jit
def max_pool_indices_kernel(
    x, y, i, extras, m,
    WINDOWS: tl.constexpr, INDICES: tl.constexpr, UNROLL: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    TAPS: tl.constexpr = WINDOWS.height.taps * WINDOWS.width.taps
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    top, left, corner = image_windows(rows, WINDOWS)
    base = x + WINDOWS.offset + (corner * WINDOWS.row_stride)[:, None]
    base = base + columns[None, :]
    # Rows past the end get a position that no tap brings inside the image: one mask serves both.
    safe_top = tl.where(row_mask, top, FAR_OUTSIDE)
    # The first pixel of the window: what a window without a larger value than -inf points at.
    first = first_inside(top, WINDOWS.height) * WINDOWS.width.size
    first = first + first_inside(left, WINDOWS.width)
    best = tl.full((M, N), float("-inf"), tl.float32)
    where = tl.broadcast_to(first[:, None], (M, N))
    if UNROLL:
        for tap in tl.static_range(TAPS):
            best, where = later_tap(
                best, where, base, safe_top, top, left, column_mask, tap, WINDOWS
            )
    else:
        for tap in range(TAPS):
            best, where = later_tap(
                best, where, base, safe_top, top, left, column_mask, tap, WINDOWS
            )
    mask = row_mask[:, None] & column_mask[None, :]
    target = i + INDICES.offset + (rows * INDICES.row_stride)[:, None] + columns[None, :]
    tl.store(target, where.to(tl.int64), mask=mask)
    put(best, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    launch = tile_launch(
        problem, tile, max_pool_indices_kernel,
        constexprs={
            "WINDOWS": windows(problem), "INDICES": Image.of(problem.outputs[1]),
            "UNROLL": windows(problem).taps <= MOST_UNROLLED_TAPS,
        },
    )  # fmt: skip
    return (launch,)


# Each result costs a value, an index and, unrolled, its loads.
TILES = Tiles(
    (256, 512, 1024),
    (16, 32, 64),
    usual=lambda problem: 512 if windows(problem).taps <= 9 else 256,
    held=unrolled_taps,
    most=100,
)


OP = Op(
    NAME, MaxPool2d, infer, partial(reference, F.max_pool2d_with_indices), launches, cost,
    **TILES.space,
    aten={
        f"aten.max_pool{dims}d_with_indices.default": pooling(NAME, MaxPool2d, indices=True)
        for dims in (1, 2)
    },
    batched="pooling", integers=True,
)  # fmt: skip
