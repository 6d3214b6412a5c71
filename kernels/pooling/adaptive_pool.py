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

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.op import (
    Builder,
    Capture,
    Config,
    Domain,
    Launch,
    Op,
    Problem,
    Target,
    config,
    power_of_two,
)
from ..contract.spec import Layout, TensorSpec
from ..movement.arguments import as_image, as_sequence
from ..normalisation.reduce import Reduce
from ..tile.geometry import tile_launch
from . import pool
from .pool_kernel import combine, span
from .pool_window import AdaptivePool, AdaptivePool2d, AdaptivePool3d, reduction, windows
from .tiles import MOST_UNROLLED_TAPS, channel_block, output_tile, store


def infer(
    name: str, attributes: AdaptivePool, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """(N, C, *size)."""
    (x,) = inputs
    shape, pixels = ("(N,C,H,W)", "pixels") if "2d" in name else ("(N,C,D,H,W)", "voxels")
    if x.rank != len(attributes.size) + 2:
        raise InvalidInputError(f"{name}: expected x {shape}, got {x}")
    if min(*attributes.size, *x.shape[2:]) < 1:
        raise InvalidInputError(f"{name}: cannot pool {x} to {attributes.size}; both need {pixels}")
    return (TensorSpec((*x.shape[:2], *attributes.size), x.dtype, Layout.NHWC, x.batch),)


def reference(function: Any, attributes: AdaptivePool, x: torch.Tensor) -> torch.Tensor:
    """By the function of torch."""
    result: torch.Tensor = function(x, attributes.size)
    return result


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
    store(y, result, rows, columns, row_mask, column_mask, extras, OUTPUT)


def uses_region(problem: Problem) -> bool:
    """Whether the second algorithm computes the problem."""
    is_image = problem.output.spec.rank == 4
    return is_image and windows(problem).taps > MOST_UNROLLED_TAPS


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the algorithm's kernel."""
    if not uses_region(problem):
        return pool.launches(problem, tile, target)
    constexprs = {
        "WINDOWS": windows(problem), "MAXIMUM": reduction(problem).maximum,
        "BLOCK_PIXELS": tile["BLOCK_PIXELS"],
    }  # fmt: skip
    return (tile_launch(problem, tile, region_kernel, constexprs=constexprs),)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Those of `pool.py`; region: 2048 to 16384 inputs at a time for one result."""
    if not uses_region(problem):
        yield from pool.configs(problem, target)
        return
    for elements in (2048, 4096, 8192, 16384):
        for columns in (16, 32, 64, 128):
            yield _region(elements, columns)


def _region(elements: int, columns: int) -> Config:
    """A tile of one output row, with 32 inputs per thread."""
    warps = elements // 1024
    pixels = elements // columns
    return config(warps, 1, BLOCK_ROWS=1, BLOCK_PIXELS=pixels, BLOCK_COLUMNS=columns)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return None if uses_region(problem) else pool.legal(problem, tile, target)


def default(problem: Problem, target: Target) -> Config:
    """Channel blocks of 64, but narrower ones where few outputs would leave the GPU idle."""
    if not uses_region(problem):
        return pool.default(problem, target)
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


def _size(g: Builder, x: Any, size: Any) -> tuple[int, int]:
    height, width = g.spec(x).shape[2:]
    values = [size] if isinstance(size, int) else list(size)
    p, q = values[0], values[-1]
    return (height if p is None else int(p), width if q is None else int(q))


def _capture_avg(g: Builder, x: Any, size: Any) -> Any:
    if g.spec(x).rank != 4:
        return g.refuse("unbatched pooling; pass a batch dimension")
    return g.apply("adaptive_avg_pool2d", (x,), AdaptivePool2d(_size(g, x, size)))


def _capture_max(g: Builder, x: Any, size: Any) -> Any:
    """The values, and nothing for the indices: whoever uses those is not supported."""
    if g.spec(x).rank != 4:
        return g.refuse("unbatched pooling; pass a batch dimension")
    return g.apply("adaptive_max_pool2d", (x,), AdaptivePool2d(_size(g, x, size))), None


def _capture_3d(name: str, reduction: str, indices: bool) -> Capture:
    """With `indices` the call has a second result, for whose readers there is no kernel."""

    def capture(g: Builder, x: Any, size: Any) -> Any:
        spec = g.spec(x)
        if spec.rank != 5:
            return g.refuse("unbatched pooling; pass a batch dimension")
        wanted = [size] * 3 if isinstance(size, int) else list(size)
        d, h, w = (spec.shape[at + 2] if new is None else new for at, new in enumerate(wanted))
        if (d, h, w) == (1, 1, 1):
            y = g.apply(reduction, (x,), Reduce((2, 3, 4), keepdim=True))
        else:
            y = g.apply(name, (x,), AdaptivePool3d((d, h, w)))
        return (y, None) if indices else y

    return capture


def _capture_1d(name: str, indices: bool) -> Capture:
    """As the image of one row."""

    def capture(g: Builder, x: Any, size: Any) -> Any:
        if g.spec(x).rank != 3:
            return g.refuse("unbatched pooling; pass a batch dimension")
        length = size if isinstance(size, int) else size[0]
        attributes = AdaptivePool2d((1, int(length)))
        y = as_sequence(g, g.apply(name, (as_image(g, x),), attributes))
        return (y, None) if indices else y

    return capture


def _build(draw: Mapping[str, Any]) -> tuple[AdaptivePool2d, tuple[TensorSpec, ...]] | None:
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    return AdaptivePool2d(draw["size"]), (x,)


DOMAIN = Domain(
    ranges={
        "N": (1, 2, 3),
        "C": (1, 3, 8, 16, 33),
        "image": ((1, 1), (2, 3), (7, 7), (13, 9), (16, 16), (30, 22)),
        "size": ((1, 1), (1, 3), (2, 2), (3, 2), (6, 6), (7, 7), (9, 13)),
    },
    build=_build,
    interesting=(
        {"N": 1, "C": 33, "image": (7, 7), "size": (1, 1)},
        {"N": 2, "C": 64, "image": (56, 40), "size": (1, 1)},
        {"N": 1, "C": 8, "image": (13, 13), "size": (6, 6)},
        {"N": 1, "C": 8, "image": (1, 1), "size": (7, 7)},
        {"N": 2, "C": 3, "image": (23, 19), "size": (3, 1)},
        {"N": 2, "C": 3, "image": (23, 19), "size": (1, 3)},
        # Windows of different sizes, which overlap.
        {"N": 2, "C": 8, "image": (8, 11), "size": (5, 4)},
    ),
)


def _build_3d(draw: Mapping[str, Any]) -> tuple[AdaptivePool3d, tuple[TensorSpec, ...]] | None:
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    return AdaptivePool3d(draw["size"]), (x,)


DOMAIN_3D = Domain(
    ranges={
        "N": (1, 2, 3),
        "C": (1, 3, 8, 33),
        "image": ((1, 1, 1), (2, 3, 5), (4, 7, 6), (5, 4, 9)),
        "size": ((1, 1, 1), (1, 2, 3), (2, 2, 2), (4, 3, 5), (3, 6, 2)),
    },
    build=_build_3d,
    interesting=(
        {"N": 1, "C": 33, "image": (4, 13, 12), "size": (2, 2, 2)},
        {"N": 2, "C": 8, "image": (1, 1, 1), "size": (2, 3, 4)},
    ),
)


def _op(name: str, function: Any, make: type[AdaptivePool], aten: Mapping[str, Capture]) -> Op:
    return Op(
        name=name,
        attributes=make,
        infer=partial(infer, name),
        reference=partial(reference, function),
        launches=launches,
        configs=configs,
        default=default,
        legal=legal,
        cost=pool.cost,
        domain=DOMAIN if make is AdaptivePool2d else DOMAIN_3D,
        aten=aten,
    )


OPS = (
    _op(
        "adaptive_avg_pool2d",
        F.adaptive_avg_pool2d,
        AdaptivePool2d,
        {
            "aten.adaptive_avg_pool1d.default": _capture_1d("adaptive_avg_pool2d", False),
            "aten.adaptive_avg_pool2d.default": _capture_avg,
        },
    ),
    _op(
        "adaptive_max_pool2d",
        F.adaptive_max_pool2d,
        AdaptivePool2d,
        {
            "aten.adaptive_max_pool1d.default": _capture_1d("adaptive_max_pool2d", True),
            "aten.adaptive_max_pool2d.default": _capture_max,
        },
    ),
    _op(
        "adaptive_avg_pool3d",
        F.adaptive_avg_pool3d,
        AdaptivePool3d,
        {"aten.adaptive_avg_pool3d.default": _capture_3d("adaptive_avg_pool3d", "mean", False)},
    ),
    _op(
        "adaptive_max_pool3d",
        F.adaptive_max_pool3d,
        AdaptivePool3d,
        {"aten.adaptive_max_pool3d.default": _capture_3d("adaptive_max_pool3d", "amax", True)},
    ),
)
