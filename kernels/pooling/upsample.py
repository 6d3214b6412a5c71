"""Upsampling (and shrinking) of images and volumes by interpolation between their pixels.

Along each dimension output p looks at position s of the input, `step` being the distance between
two outputs in input pixels:
- nearest: x[floor(p·step)]; nearest-exact: x[floor((p + 1/2)·step)];
- linear: (1 − f)·x[l] + f·x[l + 1] with s = max(0, (p + 1/2)·step − 1/2), l = floor(s), f = s − l;
- corners: the same with s = p·step, which maps corner pixels to corner pixels (align_corners).
With linear interpolation in every dimension (bilinear, trilinear) the weights multiply.

x: (N, C, H, W) or (N, C, D, H, W), channels innermost in memory -> y: (N, C, *size) likewise.
Positions are computed in fp32 for every dtype, as torch does, so that the same pixels are chosen.

A program takes a tile of output pixels by channels. Each output is written once; the inputs that
neighbouring outputs share come from the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.aten import Arguments, Builder, Capture
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, counted
from ..contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from ..movement.arguments import as_image, as_rank_of
from ..tile.finish import put
from ..tile.geometry import Matrix, tile_launch
from ..tile.space import output_tile
from .tiles import Tiles

NEAREST, EXACT, LINEAR, CORNERS = "nearest", "nearest-exact", "linear", "corners"
NEARBY, LINEARLY = "upsample_nearest", "upsample_linear"
RULES = {NEARBY: (NEAREST, EXACT), LINEARLY: (LINEAR, CORNERS)}


@dataclass(frozen=True)
class Upsample(Attributes):
    """size: of the output's spatial dimensions; steps: input pixels from one output to the next,
    fp32 values; rule: where an output lies in the input, one of `RULES`; sequence: the image is one
    row, and what is linear is so along it only (between a row and itself, 0 * Inf would be NaN)."""

    size: tuple[int, ...] = (1, 1)
    steps: tuple[float, ...] = (1.0, 1.0)
    rule: str = NEAREST
    sequence: bool = False


def infer(
    name: str, attributes: Upsample, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    size, steps = attributes.size, attributes.steps
    if x.rank not in MEMORY_FORMATS or not len(size) == len(steps) == x.rank - 2:
        raise InvalidInputError(
            f"{name}: expected x (N,C,H,W) or (N,C,D,H,W) and as many sizes and steps as it has "
            f"spatial dimensions, got {x}, sizes {size} and steps {steps}"
        )
    if min(*size, *x.shape[2:]) < 1:
        raise InvalidInputError(f"{name}: cannot resize {x} to {size}; both need pixels")
    if attributes.rule not in RULES[name] or not are_steps(steps, size):
        raise InvalidInputError(
            f"{name}: expected a rule of {RULES[name]} and steps to pixels below 2^24, got "
            f"{attributes}"
        )
    if attributes.sequence and not (x.rank == 4 and x.shape[2] == size[0] == 1):
        raise InvalidInputError(
            f"{name}: a sequence is an image of one row before and after, got {x} and {attributes}"
        )
    return (TensorSpec((*x.shape[:2], *size), x.dtype, Layout.NHWC, x.batch),)


def are_steps(steps: tuple[float, ...], outputs: tuple[int, ...]) -> bool:
    """Whether all outputs lie at pixels that fp32 can count."""
    return all(0 <= step * count <= 2**24 for step, count in zip(steps, outputs, strict=True))


def positions(
    rule: str, size: int, outputs: int, step: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For every output along one dimension: lower and upper input pixel, weight of the upper."""
    index = torch.arange(outputs, dtype=torch.float32)
    if rule in (NEAREST, CORNERS):
        position = index * step
    elif rule == EXACT:
        position = (index + 0.5) * step
    else:
        # Rounded once, as torch's own kernels do.
        position = ((index.double() + 0.5) * step - 0.5).float().clamp(min=0)
    low = position.to(torch.int64).clamp(max=size - 1)
    weight = (position - low).clamp(0, 1)
    # As in torch, a pixel that is kept as it is has no neighbour: 0 * NaN would be NaN.
    high = low if outputs == size else (low + 1).clamp(max=size - 1)
    return low, high, weight


def reference(attributes: Upsample, x: torch.Tensor) -> torch.Tensor:
    y = x if x.dtype is torch.float64 else x.float()
    for dim in reversed(range(2, x.dim())):
        outputs, step = attributes.size[dim - 2], attributes.steps[dim - 2]
        low, high, weight = positions(attributes.rule, x.shape[dim], outputs, step)
        lower = y.index_select(dim, low.to(x.device))
        if attributes.rule in RULES[NEARBY] or (attributes.sequence and dim == 2):
            y = lower
            continue
        share = weight.to(y).view(-1, *(1 for _ in range(dim + 1, x.dim())))
        y = lower * (1 - share) + y.index_select(dim, high.to(x.device)) * share
    return y.to(x.dtype)


class Axis(NamedTuple):
    """One dimension: pixels of the input and of the output, input pixels from one output to the
    next; a dimension that images do not have is kept as it is."""

    size: int = 1
    outputs: int = 1
    step: float = 1.0


@triton.jit
def position(index, AXIS: tl.constexpr, RULE: tl.constexpr):
    """Lower and upper input pixel of an output along one dimension, and the upper one's weight."""
    at = index.to(tl.float32)
    if RULE == "nearest":
        at = at * AXIS.step
    elif RULE == "corners":
        # A fused product: the difference below would fuse with another, and not be 0.
        at = tl.fma(at, AXIS.step, 0.0)
    elif RULE == "nearest-exact":
        at = (at + 0.5) * AXIS.step
    else:
        # Rounded once, as in torch: whether s is a whole number decides which pixels are looked at.
        at = tl.maximum(tl.fma(at + 0.5, AXIS.step, -0.5), 0.0)
    low = tl.minimum(at.to(tl.int32), AXIS.size - 1)
    weight = tl.minimum(tl.maximum(at - low.to(tl.float32), 0.0), 1.0)
    high = low
    if AXIS.outputs != AXIS.size:
        high = tl.minimum(low + 1, AXIS.size - 1)
    return low, high, weight


@triton.jit
def upsample_kernel(
    x, y, extras, m,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PLANES: tl.constexpr, LINES: tl.constexpr, RULE: tl.constexpr,
    X: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # PLANES, LINES: of the input, which an output lies between.
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    mask = row_mask[:, None] & column_mask[None, :]
    line, plane = rows // WIDTH.outputs, rows // (HEIGHT.outputs * WIDTH.outputs)
    front, back, depth_weight = position((plane % DEPTH.outputs).to(tl.int32), DEPTH, RULE)
    top, bottom, height_weight = position((line % HEIGHT.outputs).to(tl.int32), HEIGHT, RULE)
    left, right, width_weight = position((rows % WIDTH.outputs).to(tl.int32), WIDTH, RULE)
    image = plane // DEPTH.outputs
    base = x + X.offset + columns[None, :]
    if RULE == "nearest" or RULE == "nearest-exact":
        pixel = ((image * DEPTH.size + front) * HEIGHT.size + top) * WIDTH.size + left
        acc = tl.load(base + (pixel * X.row_stride)[:, None], mask=mask, other=0.0).to(tl.float32)
    else:
        acc = tl.zeros((M, N), tl.float32)
        for at_depth in tl.static_range(PLANES):
            total = tl.zeros((M, N), tl.float32)
            for at_height in tl.static_range(LINES):
                line = (image * DEPTH.size + (back if at_depth else front)) * HEIGHT.size
                line = (line + (bottom if at_height else top)) * WIDTH.size
                low = tl.load(base + ((line + left) * X.row_stride)[:, None], mask=mask, other=0.0)
                high = tl.load(
                    base + ((line + right) * X.row_stride)[:, None], mask=mask, other=0.0
                )
                row = low.to(tl.float32) * (1.0 - width_weight)[:, None]
                row += high.to(tl.float32) * width_weight[:, None]
                share = height_weight if at_height else 1.0 - height_weight
                total += row * share[:, None]
            share = depth_weight if at_depth else 1.0 - depth_weight
            acc += total * share[:, None]
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes, x, out = problem.attributes.expect(Upsample), problem.inputs[0], problem.output
    geometry = zip(x.shape[2:], out.shape[2:], attributes.steps, strict=True)
    axes = [Axis(*of_axis) for of_axis in geometry]
    is_volume = len(axes) == 3
    depth, height, width = axes if is_volume else (Axis(), *axes)
    constexprs = {
        "DEPTH": depth, "HEIGHT": height, "WIDTH": width, "PLANES": 2 if is_volume else 1,
        "LINES": 1 if attributes.sequence else 2, "RULE": attributes.rule, "X": Matrix.of(x),
    }  # fmt: skip
    return (tile_launch(problem, tile, upsample_kernel, constexprs=constexprs),)


# 8 results per thread by default: each takes up to eight loads, all in flight together.
TILES = Tiles((512, 1024, 2048), (16, 32, 64, 128), usual=lambda problem: 1024)


@counted
def cost(problem: Problem) -> int:
    """A multiplication and an addition per input pixel that an output looks at."""
    attributes = problem.attributes.expect(Upsample)
    is_linear = attributes.rule in RULES[LINEARLY]
    dimensions = problem.output.spec.rank - 2 - attributes.sequence
    return 2 * (2**dimensions if is_linear else 0) * problem.output.spec.numel


def pixels_per_output(size: int, outputs: int, scale: float | None, corners: bool) -> float:
    """Input pixels between neighbouring outputs, rounded to fp32 as torch's own kernels do: a scale
    that the caller gave counts exactly, not the ratio of the sizes it led to."""
    if corners:
        ratio = (size - 1) / (outputs - 1) if outputs > 1 else 0.0
    else:
        ratio = 1.0 / scale if scale else size / outputs
    return float(torch.tensor(ratio, dtype=torch.float32))


def step_of(size: int, outputs: int, scale: float | None, rule: str) -> float:
    """As `pixels_per_output`; but, as in torch, a scale does not count where a dimension keeps its
    size (unless for `EXACT`) or doubles it (`NEAREST`)."""
    kept = outputs == size and rule != EXACT
    if kept or (outputs == 2 * size and rule == NEAREST):
        scale = None
    return pixels_per_output(size, outputs, scale, rule == CORNERS)


def size_and_steps(
    g: Builder, a: Arguments, step: Callable[[int, int, float | None], float]
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The sizes that a call of torch's upsampling asks for, given so or as scales, and the steps of
    its dimensions by their size, outputs and scale."""
    extents, size, scales = g.spec(a.input).shape[2:], a.output_size, a.scale_factors
    if size is None:
        size = [math.floor(old * scale) for old, scale in zip(extents, scales, strict=True)]
    scales = scales or [None] * len(size)
    return tuple(map(int, size)), tuple(map(step, extents, map(int, size), scales))


def _capture(name: str, rule: str) -> Capture:
    """The capture of upsampling to a size or by a scale; rule: where corners are not aligned."""

    def capture(g: Builder, a: Arguments) -> Any:
        chosen = CORNERS if a.get("align_corners") else rule
        size, steps = size_and_steps(g, a, partial(step_of, rule=chosen))
        rows = (1,) * (2 - len(size))
        is_sequence = name == LINEARLY and bool(rows)
        shape = (*rows, *size)
        attributes = Upsample(shape, (*map(float, rows), *steps), chosen, is_sequence)
        return as_rank_of(g, g.apply(name, (as_image(g, a.input),), attributes), a.input)

    return capture


CALLS = {
    NEARBY: {
        f"{stem}{dims}d": rule
        for stem, rule in (("upsample_nearest", NEAREST), ("_upsample_nearest_exact", EXACT))
        for dims in (1, 2, 3)
    },
    LINEARLY: {f"upsample_{kind}": LINEAR for kind in ("linear1d", "bilinear2d", "trilinear3d")},
}
OPS = tuple(
    Op(
        name, Upsample, partial(infer, name), reference, launches, cost,
        **TILES.space,
        aten={f"aten.{call}.vec": _capture(name, rule) for call, rule in calls.items()},
        batched="upsampling",
    )
    for name, calls in CALLS.items()
)  # fmt: skip
