"""Adaptive pooling: the output's size is given, the windows follow from it.

y[n,c,p,q] = mean or max of x[n,c,h,w] over floor(p·H/P) <= h < ceil((p+1)·H/P), and w likewise, and
of volumes d likewise; sequences are images of one row. NaN wins a maximum.

x: (N, C, H, W) or (N, C, D, H, W), channels innermost in memory -> y: (N, C, P, Q) or
(N, C, O, P, Q) likewise; fp32 accumulation. Windows overlap and differ in size where P does not
divide H. Two algorithms:
- `taps`: small windows and volumes, by the kernel of `pool.py`: a tile of outputs goes through the
  largest window's taps;
- `region`: large windows of images, global pooling above all: a program takes few outputs (on a GPU
  one, that is one image by a block of channels), reads each one's pixels a block at a time, and
  reduces the blocks at the end.
Pooling a volume to one voxel is a reduction (`reduce.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.aten import Arguments, Builder, Capture
from ..contract.op import Config, Launch, Op, Problem, Target, config, either, power_of_two
from ..contract.spec import Layout, TensorSpec
from ..movement.arguments import adaptive_size, as_image, as_rank_of
from ..normalisation.reduce import Reduce
from ..tile.finish import combine, put
from ..tile.geometry import tile_launch
from ..tile.space import output_tile
from . import pool
from .pool_kernel import span
from .pool_window import (
    AdaptivePool,
    AdaptivePool2d,
    AdaptivePool3d,
    MaxPool2d,
    reduction,
    reference,
    windows,
)
from .tiles import MOST_UNROLLED_TAPS, channel_block


def infer(
    name: str, attributes: AdaptivePool, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    shape, pixels = ("(N,C,H,W)", "pixels") if "2d" in name else ("(N,C,D,H,W)", "voxels")
    if x.rank != len(attributes.size) + 2:
        raise InvalidInputError(f"{name}: expected x {shape}, got {x}")
    if min(*attributes.size, *x.shape[2:]) < 1:
        raise InvalidInputError(f"{name}: cannot pool {x} to {attributes.size}; both need {pixels}")
    return (TensorSpec((*x.shape[:2], *attributes.size), x.dtype, Layout.NHWC, x.batch),)


@triton.jit
def region_kernel(
    x, y, extras, m,
    WINDOWS: tl.constexpr, MAXIMUM: tl.constexpr, BLOCK_PIXELS: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    HEIGHT: tl.constexpr = WINDOWS.height
    WIDTH: tl.constexpr = WINDOWS.width
    EMPTY: tl.constexpr = float("-inf") if MAXIMUM else 0.0
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    top, height = span((rows // WIDTH.outputs % HEIGHT.outputs).to(tl.int32), HEIGHT)
    left, width = span((rows % WIDTH.outputs).to(tl.int32), WIDTH)
    corner = (rows // (HEIGHT.outputs * WIDTH.outputs) * HEIGHT.size + top) * WIDTH.size + left
    base = x + WINDOWS.offset + (corner * WINDOWS.row_stride)[:, None, None]
    base = base + columns[None, None, :]
    count = (height * width)[:, None]
    acc = tl.full((M, BLOCK_PIXELS, N), EMPTY, tl.float32)
    for start in range(0, HEIGHT.taps * WIDTH.taps, BLOCK_PIXELS):
        pixel = (start + tl.arange(0, BLOCK_PIXELS))[None, :]
        if WIDTH.outputs == 1:
            # Windows as wide as the image are contiguous.
            offset = pixel * WINDOWS.row_stride
        else:
            offset = pixel // width[:, None] * WIDTH.size + pixel % width[:, None]
            offset = offset * WINDOWS.row_stride
        inside = row_mask[:, None] & (pixel < count)
        mask = inside[:, :, None] & column_mask[None, None, :]
        value = tl.load(base + offset[:, :, None], mask=mask, other=EMPTY).to(tl.float32)
        acc = combine(acc, value, MAXIMUM)
    if MAXIMUM:
        # tl.max may drop NaN: it is looked for separately.
        is_nan = acc != acc
        poisoned = tl.max(is_nan.to(tl.int32), axis=1) > 0
        largest = tl.max(tl.where(is_nan, EMPTY, acc), axis=1)
        result = tl.where(poisoned, float("nan"), largest)
    else:
        result = tl.sum(acc, axis=1) / count.to(tl.float32)
    put(result, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def uses_region(problem: Problem) -> bool:
    """Whether the second algorithm computes the problem."""
    is_image = problem.output.spec.rank == 4
    return is_image and windows(problem).taps > MOST_UNROLLED_TAPS


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    if not uses_region(problem):
        return pool.launches(problem, tile, target)
    constexprs = {
        "WINDOWS": windows(problem), "MAXIMUM": reduction(problem).maximum,
        "BLOCK_PIXELS": tile["BLOCK_PIXELS"],
    }  # fmt: skip
    return (tile_launch(problem, tile, region_kernel, constexprs=constexprs),)


def _configs(problem: Problem, target: Target) -> Iterator[Config]:
    """2048 to 16384 inputs at a time for one result."""
    for elements in (2048, 4096, 8192, 16384):
        for columns in (16, 32, 64, 128):
            yield _region(elements, columns)


def _region(elements: int, columns: int) -> Config:
    """A tile of one output row, with 32 inputs per thread."""
    warps = elements // 1024
    pixels = elements // columns
    return config(warps, 1, BLOCK_ROWS=1, BLOCK_PIXELS=pixels, BLOCK_COLUMNS=columns)


def _default(problem: Problem, target: Target) -> Config:
    """Channel blocks of 64, but narrower ones where few outputs would leave the GPU idle."""
    n, c, p, q = problem.output.shape
    pixels = power_of_two(windows(problem).taps)
    if target.name == "interpreter":
        columns = min(power_of_two(c), 1024)
        block_pixels = min(pixels, (1 << 20) // columns)
        rows = min(power_of_two(n * p * q), (1 << 20) // (columns * block_pixels))
        return config(1, 1, BLOCK_ROWS=rows, BLOCK_PIXELS=block_pixels, BLOCK_COLUMNS=columns)
    columns = channel_block(c)
    # 16 halves are one 32-byte sector, the least that memory delivers.
    while columns > 16 and n * p * q * -(-c // columns) < pool.ENOUGH_PROGRAMS:
        columns //= 2
    # Where programs stay few, each must keep more reads in flight.
    most = 4096 if n * p * q * -(-c // columns) >= pool.ENOUGH_PROGRAMS // 4 else 16384
    return _region(max(1024, min(most, pixels * columns)), columns)


def _capture(name: str, reduction: str = "", indices: bool = False) -> Capture:
    """The capture of adaptive poolings of images and volumes, and of sequences as images of one
    row. reduction: the op that a volume of one pixel is. With `indices` the call has a second
    result, which is computed apart for its readers, where all windows of an image are alike."""

    def capture(g: Builder, a: Arguments) -> Any:
        size = adaptive_size(g, a)
        if reduction and size == (1, 1, 1):
            y = g.apply(reduction, (a.self,), Reduce((2, 3, 4), keepdim=True))
        elif len(size) == 3:
            y = g.apply(name, (a.self,), AdaptivePool3d(size))
        else:
            x = as_image(g, a.self)
            y = as_rank_of(g, g.apply(name, (x,), AdaptivePool2d(size)), a.self)
            image = g.spec(x).shape[2:]
            if indices and image[0] % size[0] == image[1] % size[1] == 0:
                window = (image[0] // size[0], image[1] // size[1])
                largest = g.apply("max_pool2d_with_indices", (x,), MaxPool2d(window, window))
                return y, as_rank_of(g, g.output(largest, 1), a.self)
        return (y, None) if indices else y

    return capture


def _op(
    name: str, function: Any, make: type[AdaptivePool], calls: Sequence[str], *capture: Any
) -> Op:
    """calls: the poolings of aten that become it, in the way that `_capture` knows by `capture`."""
    return Op(
        name, make, partial(infer, name), partial(reference, function), launches, pool.cost,
        **either(uses_region, {"configs": _configs, "default": _default}, vars(pool)),
        aten={f"aten.{call}.default": _capture(name, *capture) for call in calls},
        batched="pooling",
    )  # fmt: skip


AVERAGES = ("adaptive_avg_pool1d", "adaptive_avg_pool2d")
MAXIMA = ("adaptive_max_pool1d", "adaptive_max_pool2d")
OPS = (
    _op("adaptive_avg_pool2d", F.adaptive_avg_pool2d, AdaptivePool2d, AVERAGES),
    _op("adaptive_max_pool2d", F.adaptive_max_pool2d, AdaptivePool2d, MAXIMA, "", True),
    _op("adaptive_avg_pool3d", F.adaptive_avg_pool3d, AdaptivePool3d,
        ("adaptive_avg_pool3d",), "mean"),
    _op("adaptive_max_pool3d", F.adaptive_max_pool3d, AdaptivePool3d,
        ("adaptive_max_pool3d",), "amax", True),
)  # fmt: skip
