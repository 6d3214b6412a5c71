"""Resizing of images by cubic filters and by filters that are as wide as the step between outputs
(antialiasing), which `upsample` does not need.

Output p looks at position s = (p + 1/2)·step − 1/2 of the input, or s = p·step where corners are
aligned, and adds up inputs with the weights of a filter f around it, in every dimension:

    cubic          f over the four pixels around s, a = −3/4; beyond the border its pixels repeat
    antialiased    f(d / max(step, 1)) over all pixels of the image where it is not zero, divided by
                   the sum of the weights, around (p + 1/2)·step; a triangle ("linear"), or cubic
                   with a = −1/2. A dimension that keeps its size is left alone.

The cubic filter is Keys' (1981, "Cubic convolution interpolation for digital image processing").
x: (N, C, H, W) NHWC -> y: (N, C, *size) NHWC. Positions and weights are computed in fp32 for every
dtype, as torch does on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.op import Arguments, Attributes, Builder, Config, Launch, Op, Problem, counted
from ..contract.spec import Layout, TensorSpec
from ..contract.targets import Target
from ..tile.finish import put
from ..tile.geometry import Image, tile_launch
from ..tile.space import output_tile
from .tiles import Tiles
from .upsample import Axis, are_steps, pixels_per_output, size_and_steps

CUBIC, LINEAR_WIDE, CUBIC_WIDE = "cubic", "antialiased-linear", "antialiased-cubic"
REACH = {CUBIC: 2.0, LINEAR_WIDE: 1.0, CUBIC_WIDE: 2.0}
"""Half of the width of each filter, in steps of at least one pixel."""


@dataclass(frozen=True)
class Resample(Attributes):
    """size: of the output's image; steps: input pixels from one output to the next, fp32 values;
    filter: one of `REACH`; corners: whether corner pixels lie on corner pixels."""

    size: tuple[int, ...] = (1, 1)
    steps: tuple[float, ...] = (1.0, 1.0)
    filter: str = CUBIC
    corners: bool = False


def infer(attributes: Resample, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    if x.rank != 4 or min(*attributes.size, *x.shape[2:]) < 1:
        raise InvalidInputError(f"resample: cannot resize {x} to {attributes.size}; expected "
                                "x (N, C, H, W) and pixels in both")  # fmt: skip
    if attributes.filter not in REACH or not are_steps(attributes.steps, attributes.size):
        raise InvalidInputError(
            f"resample: expected a filter of {', '.join(REACH)} and steps to pixels below "
            f"2^24, got {attributes}"
        )
    return (TensorSpec((*x.shape[:2], *attributes.size), x.dtype, Layout.NHWC, x.batch),)


def _filter(distance: torch.Tensor, kind: str) -> torch.Tensor:
    d = distance.abs()
    if kind == LINEAR_WIDE:
        return (1 - d).clamp(min=0)
    a = -0.75 if kind == CUBIC else -0.5
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d < 1, near, torch.where(d < 2, far, 0))


def window(
    attributes: Resample, dim: int, size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every output along a dimension: (outputs, taps) pixels, weights, and which are there."""
    kind, outputs, step = attributes.filter, attributes.size[dim], attributes.steps[dim]
    index, offset = torch.arange(outputs, dtype=torch.float32), 0 if attributes.corners else 0.5
    tap = torch.arange(taps(attributes, (size, size))[dim])
    if kind == CUBIC:
        centre = (index + offset) * step - offset
        pixels = centre.floor().long()[:, None] - 1 + tap
        weights = _filter(pixels - centre[:, None], kind)
        return pixels.clamp(0, size - 1), weights, torch.ones_like(pixels, dtype=torch.bool)
    if outputs == size:
        pixels = index.long()[:, None]
        return pixels, torch.ones(outputs, 1), torch.ones(outputs, 1, dtype=torch.bool)
    width = max(step, 1.0)
    middle, support = (index + 0.5) * step, REACH[kind] * width
    start = (middle - support + 0.5).long().clamp(min=0)
    stop = (middle + support + 0.5).long().clamp(max=size)
    pixels = start[:, None] + tap
    exists = pixels < stop[:, None]
    weights = _filter((pixels + 0.5 - middle[:, None]) / width, kind) * exists
    return pixels.clamp(max=size - 1), weights / weights.sum(1, keepdim=True), exists


def reference(attributes: Resample, x: torch.Tensor) -> torch.Tensor:
    """By torch's formulas, with positions and weights in fp32 whatever the dtype of x."""
    y = x if x.dtype is torch.float64 else x.float()
    for dim in (1, 0):
        at = dim + 2
        pixels, weights, exists = window(attributes, dim, x.shape[at])
        column = (-1, *(1 for _ in range(at + 1, x.dim())))
        total = torch.zeros((), dtype=y.dtype, device=x.device)
        for tap in range(pixels.shape[1]):
            taken = y.index_select(at, pixels[:, tap].to(x.device))
            part = taken * weights[:, tap].to(y).view(column)
            total = total + torch.where(exists[:, tap].to(x.device).view(column), part, 0)
        y = total
    return y.to(x.dtype)


def taps(attributes: Resample, image: tuple[int, ...]) -> tuple[int, int]:
    """Pixels that an output may look at, downwards and sideways."""

    def along(size: int, outputs: int, step: float) -> int:
        if attributes.filter == CUBIC:
            return 4
        reach = REACH[attributes.filter] * max(step, 1.0)
        return 1 if size == outputs else min(size, 2 * math.ceil(reach) + 1)

    vertical, horizontal = map(along, image, attributes.size, attributes.steps)
    return vertical, horizontal


@triton.jit
def weight_of(distance, CUBIC: tl.constexpr, A: tl.constexpr):
    """The filter at a distance from its centre, in steps."""
    d = tl.abs(distance)
    if CUBIC:
        near = ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0
        far = ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A
        result = tl.where(d < 1.0, near, tl.where(d < 2.0, far, 0.0))
    else:
        result = tl.maximum(1.0 - d, 0.0)
    return result


@triton.jit
def window_of(
    index, AXIS: tl.constexpr, FILTER: tl.constexpr, CORNERS: tl.constexpr, REACH: tl.constexpr
):
    """The first pixel that an output looks at, the one behind its last, and the filter's centre
    relative to the first."""
    at = index.to(tl.float32)
    if FILTER == "cubic":
        centre = at * AXIS.step if CORNERS else (at + 0.5) * AXIS.step - 0.5
        start = tl.floor(centre).to(tl.int32) - 1
        stop = start + 4
    elif AXIS.size == AXIS.outputs:
        start = index
        stop = index + 1
        centre = at
    else:
        support: tl.constexpr = REACH * max(AXIS.step, 1.0)
        middle = (at + 0.5) * AXIS.step
        start = tl.maximum((middle - support + 0.5).to(tl.int32), 0)
        stop = tl.minimum((middle + support + 0.5).to(tl.int32), AXIS.size)
        centre = middle - 0.5
    return start, stop, centre - start.to(tl.float32)


@triton.jit
def share_of(tap, start, stop, centre, AXIS: tl.constexpr, FILTER: tl.constexpr):
    """The weight of a tap before normalisation, and whether it is one."""
    if FILTER == "cubic":
        weight = weight_of(tap - centre, True, -0.75)
    elif AXIS.size == AXIS.outputs:
        weight = tl.where(stop > start, 1.0, 0.0)
    else:
        width: tl.constexpr = max(AXIS.step, 1.0)
        weight = weight_of((tap - centre) / width, FILTER == "antialiased-cubic", -0.5)
    exists = start + tap < stop
    return tl.where(exists, weight, 0.0), exists


@triton.jit
def resample_kernel(
    x, y, extras, m, IMAGE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, FILTER: tl.constexpr, CORNERS: tl.constexpr,
    REACH: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    p, q = (rows // OUTPUT.Q % OUTPUT.P).to(tl.int32), (rows % OUTPUT.Q).to(tl.int32)
    top, bottom, middle = window_of(p, HEIGHT, FILTER, CORNERS, REACH)
    left, right, centre = window_of(q, WIDTH, FILTER, CORNERS, REACH)
    total_h = tl.zeros((M,), tl.float32)
    total_w = tl.zeros((M,), tl.float32)
    if FILTER != "cubic":
        for tap in range(TAPS_H):
            total_h += share_of(tap, top, bottom, middle, HEIGHT, FILTER)[0]
        for tap in range(TAPS_W):
            total_w += share_of(tap, left, right, centre, WIDTH, FILTER)[0]
    else:
        total_h += 1.0
        total_w += 1.0
    image = rows // (OUTPUT.P * OUTPUT.Q) * IMAGE.H
    base = x + IMAGE.offset + columns[None, :]
    acc = tl.zeros((M, N), tl.float32)
    for i in range(TAPS_H):
        share, is_row = share_of(i, top, bottom, middle, HEIGHT, FILTER)
        # Beyond the border, where only cubic filters reach, its pixels repeat.
        line = (image + tl.minimum(tl.maximum(top + i, 0), IMAGE.H - 1)) * IMAGE.W
        row = tl.zeros((M, N), tl.float32)
        for j in range(TAPS_W):
            weight, is_column = share_of(j, left, right, centre, WIDTH, FILTER)
            pixel = line + tl.minimum(tl.maximum(left + j, 0), IMAGE.W - 1)
            mask = (row_mask & is_row & is_column)[:, None] & column_mask[None, :]
            value = tl.load(base + (pixel * IMAGE.row_stride)[:, None], mask=mask, other=0.0)
            row += value.to(tl.float32) * (weight / total_w)[:, None]
        acc += row * (share / total_h)[:, None]
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes, x = problem.attributes.expect(Resample), problem.inputs[0]
    of_axes = zip(x.shape[2:], attributes.size, attributes.steps, strict=True)
    height, width = (Axis(*of_axis) for of_axis in of_axes)
    vertical, horizontal = taps(attributes, x.shape[2:])
    constexprs = {
        "IMAGE": Image.of(x), "HEIGHT": height, "WIDTH": width, "TAPS_H": vertical,
        "TAPS_W": horizontal, "FILTER": attributes.filter, "CORNERS": attributes.corners,
        "REACH": REACH[attributes.filter],
    }  # fmt: skip
    return (tile_launch(problem, tile, resample_kernel, constexprs=constexprs),)


# By default 4 results per thread.
TILES = Tiles((256, 512, 1024), (16, 32, 64, 128), usual=lambda problem: 512)


@counted
def cost(problem: Problem) -> int:
    """A multiplication and an addition per pixel that an output looks at, and the weights."""
    attributes = problem.attributes.expect(Resample)
    vertical, horizontal = taps(attributes, problem.inputs[0].shape[2:])
    return 2 * vertical * horizontal * problem.output.spec.numel


def _capture(g: Builder, a: Arguments, kind: str) -> Any:
    corners = bool(a.align_corners)
    size, steps = size_and_steps(g, a, partial(pixels_per_output, corners=corners))
    return g.apply("resample", (a.input,), Resample(size, steps, kind, corners))


OP = Op(
    "resample", Resample, infer, reference, launches, cost,
    **TILES.space,
    aten={
        "aten.upsample_bicubic2d.vec": lambda g, a: _capture(g, a, CUBIC),
        "aten._upsample_bilinear2d_aa.vec": lambda g, a: _capture(g, a, LINEAR_WIDE),
        "aten._upsample_bicubic2d_aa.vec": lambda g, a: _capture(g, a, CUBIC_WIDE),
    },
    batched="upsampling",
)  # fmt: skip
