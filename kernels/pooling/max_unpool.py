"""max_unpool2d: pooled values back where they stood, zero everywhere else.

y[n,c,o] = x[n,c,p,q] for the window (p, q) with i[n,c,p,q] = o, 0 where there is none; o counts the
pixels of the result row by row, and so do the indices. Where overlapping windows name one pixel the
last of them counts, as in torch on one CPU thread (on a GPU torch leaves it open): results are the
same in every run.

x, i: (N, C, P, Q) NHWC in memory, i of int64 -> y: (N, C, H, W) NHWC.

Torch scatters. Here the op also knows the pooling that made the indices, so that it can gather: an
element of the pooled image is named only by windows that cover it. The image is cut into cells of
one stride in each direction; all pixels of a cell have the same few candidates (one, where windows
do not overlap), which a program reads once and compares with each pixel's own position. No atomics,
and nothing is zeroed beforehand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.aten import Arguments, Builder
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, counted
from ..contract.spec import Layout, TensorSpec, as_layout
from ..tile.finish import put
from ..tile.geometry import Image, tile_launch
from ..tile.space import output_tile
from . import max_pool_indices, pool_window
from .pool_window import MaxPool2d, output_size
from .tiles import Tiles

MOST_HELD = 9
"""Candidates kept in registers: those of a 3x3 window with stride 1."""


@dataclass(frozen=True)
class MaxUnpool2d(Attributes):
    """The result's height and width; those of the image that was pooled, and how it was."""

    size: tuple[int, int] = (1, 1)
    image: tuple[int, int] = (1, 1)
    pool: MaxPool2d = field(default_factory=MaxPool2d)

    @property
    def candidates(self) -> tuple[int, int]:
        """How many windows may cover one pixel, by direction."""
        windows = zip(self.pool.kernel, self.pool.stride, self.pool.dilation, strict=True)
        down, across = (dilation * (taps - 1) // stride + 1 for taps, stride, dilation in windows)
        return down, across

    @property
    def cells(self) -> tuple[int, int]:
        """Cells of one stride that hold all pixels of the result, by direction of the image."""
        # A larger result goes on below the image, with rows as wide as the image's.
        height = -(-math.prod(self.size) // self.image[1])
        sizes = zip((height, self.image[1]), self.pool.padding, self.pool.stride, strict=True)
        down, across = ((size - 1 + before) // stride + 1 for size, before, stride in sizes)
        return down, across


def infer(attributes: MaxUnpool2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, C, P, Q) twice gives (N, C, *size)."""
    if len(inputs) != 2 or inputs[0].rank != 4 or inputs[0].shape != inputs[1].shape:
        raise InvalidInputError(
            "max_unpool2d: expected values and indices of one shape (N,C,P,Q), got "
            + " and ".join(map(str, inputs))
        )
    x, where = inputs
    if where.dtype is not torch.int64:
        raise InvalidInputError(f"max_unpool2d: expected int64 indices, got {where}")
    pool, windows = attributes.pool, x.shape[2:]
    geometry = (attributes.image, pool.kernel, pool.stride, pool.padding, pool.dilation)
    made = tuple(output_size(*axis, pool.ceil_mode) for axis in zip(*geometry, strict=True))
    if made != windows:
        raise InvalidInputError(
            f"max_unpool2d: pooling {attributes.image} gives {made} windows, x has {windows}"
        )
    if math.prod(attributes.size) < math.prod(attributes.image):
        raise InvalidInputError(
            f"max_unpool2d: the result {attributes.size} has fewer pixels than the image "
            f"{attributes.image} that the indices count; pass output_size={attributes.image}"
        )
    return (TensorSpec((*x.shape[:2], *attributes.size), x.dtype, Layout.NHWC, x.batch),)


def reference(attributes: MaxUnpool2d, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """By the last window that names each pixel: torch's own scatter leaves that to chance."""
    n, c, p, q = x.shape
    named = indices.flatten(2)
    windows = torch.arange(p * q, device=x.device).expand_as(named)
    last = named.new_full((n, c, math.prod(attributes.size)), -1)
    last = last.scatter_reduce(2, named, windows, "amax")
    values = x.flatten(2).gather(2, last.clamp_min(0))
    return torch.where(last >= 0, values, 0.0).view(n, c, *attributes.size)


class CellAxis(NamedTuple):
    """The cells of one dimension: how many, the windows that may name a pixel of each, the cell's
    pixels, and those of the first cell that lie before the image."""

    cells: int
    candidates: int
    stride: int
    padding: int


class Cells(NamedTuple):
    """Cells by their row and column; the pixels of a row of the image, and of the result."""

    height: CellAxis
    width: CellAxis
    row_pixels: int
    pixels: int


@triton.jit
def candidate(
    x, i, image, cell_h, cell_w, k, columns, row_mask, column_mask,
    CELLS: tl.constexpr, VALUES: tl.constexpr, INDICES: tl.constexpr,
):  # fmt: skip
    """The value of the k-th window that may name a cell's pixels, and the pixel that it names; -1
    where there is no such window."""
    p = cell_h - (CELLS.height.candidates - 1) + k // CELLS.width.candidates
    q = cell_w - (CELLS.width.candidates - 1) + k % CELLS.width.candidates
    inside = (p.to(tl.uint32, bitcast=True) < VALUES.H) & (q.to(tl.uint32, bitcast=True) < VALUES.W)
    mask = (inside & row_mask)[:, None] & column_mask[None, :]
    row = (image * VALUES.H + p) * VALUES.W + q
    named = tl.load(i + (row * INDICES.row_stride)[:, None] + columns[None, :], mask=mask, other=-1)
    value = tl.load(x + (row * VALUES.row_stride)[:, None] + columns[None, :], mask=mask, other=0.0)
    return named.to(tl.int32), value.to(tl.float32)


@triton.jit
def max_unpool_kernel(
    x, i, y, extras, m,
    CELLS: tl.constexpr, VALUES: tl.constexpr, INDICES: tl.constexpr, HELD: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    HEIGHT: tl.constexpr = CELLS.height
    WIDTH: tl.constexpr = CELLS.width
    COUNT: tl.constexpr = HEIGHT.candidates * WIDTH.candidates
    # m counts cells.
    index, columns, live, column_mask = output_tile(m, OUTPUT, TILE)
    image = index // (HEIGHT.cells * WIDTH.cells)
    cell_h = (index // WIDTH.cells % HEIGHT.cells).to(tl.int32)
    cell_w = (index % WIDTH.cells).to(tl.int32)
    x += VALUES.offset
    i += INDICES.offset
    # Row-major order: where two windows name one pixel the later one overwrites the earlier.
    named = ()
    values = ()
    if HELD:
        for k in tl.static_range(COUNT):
            place, value = candidate(
                x, i, image, cell_h, cell_w, k, columns, live, column_mask, CELLS, VALUES, INDICES
            )
            named = named + (place,)  # type: ignore[assignment]
            values = values + (value,)  # type: ignore[assignment]
    for pixel in range(HEIGHT.stride * WIDTH.stride):
        h = cell_h * HEIGHT.stride - HEIGHT.padding + pixel // WIDTH.stride
        w = cell_w * WIDTH.stride - WIDTH.padding + pixel % WIDTH.stride
        here = h * CELLS.row_pixels + w
        acc = tl.zeros((M, N), tl.float32)
        if HELD:
            for k in tl.static_range(COUNT):
                acc = tl.where(named[k] == here[:, None], values[k], acc)
        else:
            for k in range(COUNT):
                place, value = candidate(
                    x, i, image, cell_h, cell_w, k, columns, live, column_mask,
                    CELLS, VALUES, INDICES,
                )  # fmt: skip
                acc = tl.where(place == here[:, None], value, acc)
        row_mask = live & (h >= 0) & (w >= 0) & (w < CELLS.row_pixels) & (here < CELLS.pixels)
        rows = image * CELLS.pixels + here
        put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def candidates(problem: Problem) -> int:
    """How many windows may name one pixel."""
    return math.prod(problem.attributes.expect(MaxUnpool2d).candidates)


def cell_rows(problem: Problem) -> int:
    """Cells of all images."""
    return problem.output.shape[0] * math.prod(problem.attributes.expect(MaxUnpool2d).cells)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes = problem.attributes.expect(MaxUnpool2d)
    pool, (x, where) = attributes.pool, problem.inputs
    height, width = (
        CellAxis(*of_axis)
        for of_axis in zip(
            attributes.cells, attributes.candidates, pool.stride, pool.padding, strict=True
        )
    )
    cells = Cells(height, width, attributes.image[1], math.prod(attributes.size))
    launch = tile_launch(
        problem, tile, max_unpool_kernel,
        constexprs={
            "CELLS": cells, "VALUES": Image.of(x), "INDICES": Image.of(where),
            "HELD": candidates(problem) <= MOST_HELD,
        },
        rows=cell_rows(problem),
    )  # fmt: skip
    return (launch,)


# Eight elements per thread where windows do not overlap, else two: each costs a value and an index
# per candidate.
TILES = Tiles(
    (128, 256, 512, 1024),
    (16, 32, 64),
    usual=lambda problem: 1024 if candidates(problem) == 1 else 256,
    held=lambda problem: candidates(problem) if candidates(problem) <= MOST_HELD else 0,
    most=36,
    rows=cell_rows,
)


@counted
def cost(problem: Problem) -> int:
    """One comparison per pixel and candidate."""
    return candidates(problem) * problem.output.spec.numel


def _pooled(g: Builder, value: Any) -> tuple[MaxPool2d, TensorSpec, TensorSpec] | None:
    """The pooling whose indices a value is, what it read and what it made; views between count."""
    while (made := g.maker(value)) is not None:
        name, attributes, inputs = made
        if name == max_pool_indices.NAME:
            return attributes.expect(MaxPool2d), g.spec(inputs[0]), g.spec(value)
        if name != "reshape":
            return None
        value = inputs[0]
    return None


def _capture(g: Builder, a: Arguments) -> Any:
    x, found = g.spec(a.self), _pooled(g, a.indices)
    if found is None:
        return g.refuse("its indices must come straight from a max pooling of this module")
    pool, image, windows = found
    height, width = image.shape[2:]
    if windows.shape[2:] != x.shape[2:]:
        if 1 not in windows.shape[2:] or windows.shape[2:] != x.shape[:1:-1]:
            return g.refuse(f"its indices were reshaped from {windows}")
        # A sequence: pooled as an image of one row, unpooled as one of one column.
        height, width = width, height
        sides = ("kernel", "stride", "padding", "dilation")
        pool = replace(pool, **{side: getattr(pool, side)[::-1] for side in sides})
    rows, columns = a.output_size
    attributes = MaxUnpool2d((int(rows), int(columns)), (height, width), pool)
    return g.apply("max_unpool2d", (a.self, a.indices), attributes)


def prepare(attributes: MaxUnpool2d, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Indices as the pooling of some image makes them."""
    x, drawn = tensors
    generator = torch.Generator().manual_seed(int(drawn.abs().sum()))
    image = torch.rand((*x.shape[:2], *attributes.image), generator=generator)
    _, indices = pool_window.reference(F.max_pool2d_with_indices, attributes.pool, image)
    return x, as_layout(indices.to(drawn.device), Layout.NHWC)


OP = Op(
    "max_unpool2d", MaxUnpool2d, infer, reference, launches, cost,
    **TILES.space, prepare=prepare, aten={"aten.max_unpool2d.default": _capture},
    batched="unpooling",
)  # fmt: skip
