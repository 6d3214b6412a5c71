"""Sampling at given places: y[n, c, i] = Σ weight · x[n, c, pixel], the pixels around place i.

x (N, C, H, W), grid (N, P·Q, 2) of places (across, down) between -1 and 1 -> y (N, C, P, Q), summed
in fp32; places and weights are fp32. Where the image ends there is zero, its border goes on, or it
is reflected. A place that is no number is outside of an image with zeros around it, and the first
pixel of others, as torch has it on a GPU (NaN on a CPU); bicubic samples of it are NaN. Source:
Jaderberg et al., Spatial Transformer Networks, 2015; bicubic filter with A = -0.75 as in torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.aten import Arguments, Builder
from ..contract.elementary import round_half_even
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, counted
from ..contract.spec import Layout, TensorSpec
from ..movement.rearrangement import Reshape
from ..tile.finish import put
from ..tile.geometry import Matrix, tile_launch
from ..tile.space import output_tile
from .tiles import Tiles

MODES = ("bilinear", "nearest", "bicubic")
BORDERS = ("zeros", "border", "reflection")
TAPS = {"nearest": 1, "bilinear": 2, "bicubic": 4}
"""Pixels that count in each direction."""
OUTSIDE = tl.constexpr(-100.0)
FARTHEST = tl.constexpr(1e9)


@dataclass(frozen=True)
class GridSample(Attributes):
    """size: the result's (P, Q); corners: -1 and 1 are the middles of the outermost pixels, not the
    edges of the image."""

    size: tuple[int, int] = (1, 1)
    mode: str = "bilinear"
    border: str = "zeros"
    corners: bool = False


def infer(attributes: GridSample, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    x, grid = inputs
    p, q = attributes.size
    if x.rank != 4 or grid.shape != (x.shape[0], p * q, 2) or grid.batch != x.batch:
        raise InvalidInputError(
            f"grid_sample: expected x (N, C, H, W) and a grid (N, {p}*{q}, 2), got {x} and {grid}"
        )
    if attributes.mode not in MODES or attributes.border not in BORDERS:
        raise InvalidInputError(
            f"grid_sample: expected a mode of {', '.join(MODES)} and a border of "
            f"{', '.join(BORDERS)}, got {attributes}"
        )
    return (TensorSpec((*x.shape[:2], p, q), x.dtype, Layout.NHWC, x.batch),)


def _inside(place: torch.Tensor, size: int, attributes: GridSample) -> torch.Tensor:
    """Places of pixels, those outside of the image moved into it where it goes on."""
    if attributes.border == "reflection":
        low, span = (0.0, size - 1.0) if attributes.corners else (-0.5, float(size))
        distance = (place - low).abs()
        turns = torch.floor(distance / span) if span else torch.zeros_like(place)
        rest = distance - turns * span
        place = torch.where(turns * 0.5 == torch.floor(turns * 0.5), rest, span - rest) + low
    if attributes.border == "zeros":
        return place
    return place.nan_to_num(0.0, size - 1.0, 0.0).clamp(0.0, size - 1.0)


def _known(place: torch.Tensor) -> torch.Tensor:
    """Places, outside of the image where they are none."""
    return torch.where(place.abs() < FARTHEST.value, place, OUTSIDE.value)


def _taps(
    grid: torch.Tensor, size: int, attributes: GridSample
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pixels and their weights along one dimension, for coordinates between -1 and 1."""
    raw = (grid + 1.0) * 0.5 * (size - 1) if attributes.corners else ((grid + 1.0) * size - 1) * 0.5
    place = raw if attributes.mode == "bicubic" else _known(_inside(raw, size, attributes))
    if attributes.mode == "nearest":
        return [(place.round(), torch.ones_like(place))]
    low = place.floor()
    t = place - low
    if attributes.mode == "bilinear":
        return [(low, 1.0 - t), (low + 1.0, t)]
    weights = (
        ((-0.75 * (t + 1.0) + 3.75) * (t + 1.0) - 6.0) * (t + 1.0) + 3.0,
        (1.25 * t - 2.25) * t * t + 1.0,
        (1.25 * (1.0 - t) - 2.25) * (1.0 - t) * (1.0 - t) + 1.0,
        ((-0.75 * (2.0 - t) + 3.75) * (2.0 - t) - 6.0) * (2.0 - t) + 3.0,
    )
    pixels = (_known(_inside(low - 1.0 + at, size, attributes)) for at in range(4))
    return list(zip(pixels, weights, strict=True))


def reference(attributes: GridSample, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """By torch's formulas, with places and weights in fp32 whatever the dtype of x."""
    y = x if x.dtype is torch.float64 else x.float()
    n, c, h, w = x.shape
    total = torch.zeros((n, c, grid.shape[1]), dtype=y.dtype, device=x.device)
    for row, down in _taps(grid[..., 1].float(), h, attributes):
        for column, across in _taps(grid[..., 0].float(), w, attributes):
            there = (row >= 0) & (row < h) & (column >= 0) & (column < w)
            pixel = torch.where(there, row * w + column, 0.0).long()
            taken = y.flatten(2).gather(2, pixel[:, None].expand(-1, c, -1))
            share = (down * across)[:, None].to(y.dtype)
            total = total + torch.where(there[:, None], taken, 0.0) * share
    return total.reshape(n, c, *attributes.size).to(x.dtype)


@triton.jit
def inside(place, SIZE: tl.constexpr, BORDER: tl.constexpr, CORNERS: tl.constexpr):
    if BORDER == "reflection":
        low: tl.constexpr = 0.0 if CORNERS else -0.5
        span: tl.constexpr = SIZE - 1.0 if CORNERS else SIZE * 1.0
        distance = tl.abs(place - low)
        turns = tl.floor(distance / span) if span > 0.0 else distance * 0.0
        rest = distance - turns * span
        place = tl.where(turns * 0.5 == tl.floor(turns * 0.5), rest, span - rest) + low
    if BORDER != "zeros":
        place = tl.where(place == place, place, 0.0)
        place = tl.minimum(tl.maximum(place, 0.0), SIZE - 1.0)
    return place


@triton.jit
def known(place):
    return tl.where(tl.abs(place) < FARTHEST, place, OUTSIDE)


@triton.jit
def place_of(
    coordinate, SIZE: tl.constexpr, MODE: tl.constexpr, BORDER: tl.constexpr, CORNERS: tl.constexpr
):
    """The first pixel that counts, and how far behind it, of its neighbour's distance, a place
    is."""
    if CORNERS:
        place = (coordinate + 1.0) * 0.5 * (SIZE - 1)
    else:
        place = ((coordinate + 1.0) * SIZE - 1.0) * 0.5
    if MODE != "bicubic":
        place = known(inside(place, SIZE, BORDER, CORNERS))
    low = round_half_even(place) if MODE == "nearest" else tl.floor(place)
    return low, place - low


@triton.jit
def tap_of(
    low, t, AT: tl.constexpr, SIZE: tl.constexpr, MODE: tl.constexpr, BORDER: tl.constexpr,
    CORNERS: tl.constexpr,
):  # fmt: skip
    """A pixel, whether there is one, and its weight."""
    pixel = low + AT
    if MODE == "nearest":
        weight = t * 0.0 + 1.0
    elif MODE == "bilinear":
        weight = t if AT == 1 else 1.0 - t
    else:
        pixel = known(inside(low + (AT - 1.0), SIZE, BORDER, CORNERS))
        d = tl.abs(t + (1.0 - AT))
        if AT == 1 or AT == 2:
            weight = (1.25 * d - 2.25) * d * d + 1.0
        else:
            weight = ((-0.75 * d + 3.75) * d - 6.0) * d + 3.0
    index = pixel.to(tl.int32)
    return index, (index >= 0) & (index < SIZE), weight


@triton.jit
def grid_sample_kernel(
    x, grid, y, extras, m,
    H: tl.constexpr, WIDTH: tl.constexpr, PIXELS: tl.constexpr,
    TAPS: tl.constexpr, MODE: tl.constexpr, BORDER: tl.constexpr, CORNERS: tl.constexpr,
    IMAGE: tl.constexpr, GRID: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    place = grid + GRID.offset + rows * GRID.row_stride
    across = tl.load(place, mask=row_mask, other=0.0).to(tl.float32)
    down = tl.load(place + 1, mask=row_mask, other=0.0).to(tl.float32)
    top, below = place_of(down, H, MODE, BORDER, CORNERS)
    left, behind = place_of(across, WIDTH, MODE, BORDER, CORNERS)
    image = rows // PIXELS * H
    acc = tl.zeros((M, N), tl.float32)
    for i in tl.static_range(TAPS):
        row, is_row, share = tap_of(top, below, i, H, MODE, BORDER, CORNERS)
        for j in tl.static_range(TAPS):
            column, is_column, weight = tap_of(left, behind, j, WIDTH, MODE, BORDER, CORNERS)
            pixel = (image + row) * WIDTH + column
            address = x + IMAGE.offset + (pixel * IMAGE.row_stride)[:, None] + columns[None, :]
            mask = (row_mask & is_row & is_column)[:, None] & column_mask[None, :]
            value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
            acc += value * (share * weight)[:, None]
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes, (x, grid) = problem.attributes.expect(GridSample), problem.inputs
    constexprs = {
        "H": x.shape[2], "WIDTH": x.shape[3], "PIXELS": grid.shape[1],
        "TAPS": TAPS[attributes.mode], "MODE": attributes.mode, "BORDER": attributes.border,
        "CORNERS": attributes.corners, "IMAGE": Matrix.of(x), "GRID": Matrix.of(grid),
    }  # fmt: skip
    return (tile_launch(problem, tile, grid_sample_kernel, constexprs=constexprs),)


# By default 4 results per thread.
TILES = Tiles((256, 512, 1024), (16, 32, 64, 128), usual=lambda problem: 512)


@counted
def cost(problem: Problem) -> int:
    """A multiplication and an addition per pixel that an output looks at."""
    return 2 * TAPS[problem.attributes.expect(GridSample).mode] ** 2 * problem.output.spec.numel


def _capture(g: Builder, a: Arguments) -> Any:
    x, grid = a.input, a.grid
    if g.spec(x).rank != 4:
        return g.refuse(
            f"sampling of volumes: expected an image (N, C, H, W), got {g.spec(x)}; weigh the 8 "
            "voxels around each place, which torch.gather gives"
        )
    n, p, q, _ = g.spec(grid).shape
    flat = g.apply("reshape", (grid,), Reshape((n, p * q, 2)))
    attributes = GridSample(
        (p, q), MODES[a.interpolation_mode], BORDERS[a.padding_mode], bool(a.align_corners)
    )
    return g.apply("grid_sample", (x, flat), attributes)


OP = Op(
    "grid_sample", GridSample, infer, reference, launches, cost,
    **TILES.space,
    aten={"aten.grid_sampler.default": _capture, "aten.grid_sampler_2d.default": _capture},
)  # fmt: skip
