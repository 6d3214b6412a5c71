"""conv_rearrange: a convolution that writes its result rearranged, as pixel shuffle wants it.

    y = rearrange(F(conv2d(B(x), w)))

x: (N, C, H, W) NHWC; w: (K, C, R, S), a constant packed as conv2d packs it; y: the parts of the
result's dimensions in another order (`movement/rearrangement.py`), (N, K/r², P·r, Q·r) for pixel
shuffle. B and F are chains of pointwise stages. fp32 from the convolution on, rounded once.

Sub-pixel convolution (Shi et al., ESPCN, 2016). Every part has one stride in y, so an element's
address is a sum of what its pixel and what its channel add. Channels are taken in the order in
which they lie in y: what one row of a tile writes is contiguous.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..contract.op import Config, Launch, Op, Problem, Target, TensorSpec, W, X, Y, counted
from ..movement import rearrange
from ..movement.rearrangement import Rearrange, factors, spread
from ..tile import choice, space
from ..tile.product import add_product
from . import conv_tile
from .conv_tile import StagedConv


@dataclass(frozen=True)
class ConvRearrange(StagedConv):
    """The convolution with its stages, and how their result is rearranged."""

    then: Rearrange = field(default_factory=Rearrange)

    def unsupported(self, pixels: tuple[int, ...]) -> str | None:
        """Why the kernel cannot compute the convolution, whatever its result's height and width."""
        groups = self.conv.groups
        return None if groups == 1 else f"the convolution has {groups} groups"


def infer(attributes: ConvRearrange, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    result = conv_tile.result_of("conv_rearrange", attributes, inputs)
    return rearrange.infer_rearrange(attributes.then, (result,))


def reference(attributes: ConvRearrange, *tensors: torch.Tensor) -> torch.Tensor:
    return rearrange.rearrange(attributes.then, conv_tile.reference(attributes, tensors))


@triton.jit
def place(index, SIZES: tl.constexpr, STRIDES: tl.constexpr):
    """The sum of digit times stride over the digits of `index`, the innermost first."""
    total = index * 0
    for part in tl.static_range(len(SIZES)):
        total += index % SIZES[part] * STRIDES[part]
        index = index // SIZES[part]
    return total


class Walk(NamedTuple):
    """The parts of pixels and of channels, the innermost first, with their strides in y; for
    channels also those in w's order. K: channels of the convolution; offset: of y."""

    pixels: tuple[int, ...]
    pixel_strides: tuple[int, ...]
    channels: tuple[int, ...]
    channel_strides: tuple[int, ...]
    channel_order: tuple[int, ...]
    K: int
    offset: int


@triton.jit
def conv_rearrange_kernel(
    x, w, y, extras, m, SPACE: tl.constexpr, SOURCE: tl.constexpr, FINISH: tl.constexpr,
    TILE: tl.constexpr, WALK: tl.constexpr,
):  # fmt: skip
    # The engine's tile with its columns in y's order, so that neighbours are stored together.
    column_tiles: tl.constexpr = (WALK.K + TILE.N - 1) // TILE.N
    row_tile, column_tile = space.tile_index(
        tl.program_id(0), tl.cdiv(m, TILE.M), column_tiles, TILE.GROUP_M
    )
    columns = column_tile * TILE.N + tl.arange(0, TILE.N)
    column_mask = columns < WALK.K
    channels = place(columns, WALK.channels, WALK.channel_order)
    first = row_tile * TILE.M
    image, p, q, live = SPACE.place(first, m, SPACE, TILE)
    at = SOURCE.begin(first, m, image, p, q, live, SOURCE, SPACE, TILE)
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc = add_product(acc, x, w, at, channels, column_mask, m, 0, extras, SOURCE, TILE, 1)
    rows = space.pixel_index(first, image, p, q, SPACE, TILE)
    acc = FINISH.stages(acc, rows, channels, live, column_mask, extras)
    pixel = place(rows, WALK.pixels, WALK.pixel_strides)
    address = y + WALK.offset + pixel[:, None]
    address += place(columns, WALK.channels, WALK.channel_strides)[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=live[:, None] & column_mask[None, :])


def _walk(problem: Problem, result: TensorSpec) -> Walk:
    then, out = problem.attributes.expect(ConvRearrange).then, problem.output
    before, after = factors(result.shape, then.split), factors(out.shape, then.parts)
    assert before is not None and after is not None
    written = dict(zip(then.dims, spread(out.strides, after, then.parts), strict=True))
    own = spread((0, 1, 0, 0), before, then.split)
    images, channels, *pixels = before
    rows = [part for dim in (images, *pixels) for part in dim][::-1]
    columns = sorted(channels, key=lambda part: (written[part], own[part]))
    return Walk(
        tuple(then.split[part] for part in rows),
        tuple(written[part] for part in rows),
        tuple(then.split[part] for part in columns),
        tuple(written[part] for part in columns),
        tuple(own[part] for part in columns),
        result.shape[1],
        out.offset,
    )


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes, result = problem.attributes.expect(ConvRearrange), conv_tile.result(problem)
    n, k, p, q = result.shape
    launch = conv_tile.launch(
        problem, tile, target, space.of_pixels(result, tile["BLOCK_M"]), attributes.stages, result,
        None,
        rows=n * p * q,
        l2_bytes=conv_tile.l2_bytes(problem, tile["BLOCK_M"], tile["BLOCK_N"], result),
    )  # fmt: skip
    constants = {name: launch.constexprs[name] for name in ("SPACE", "SOURCE", "FINISH", "TILE")}
    launch = replace(
        launch,
        kernel=conv_rearrange_kernel,
        pointers={"x": X, "w": W, "y": Y},
        columns=-(-k // tile["BLOCK_N"]),
        constexprs={**constants, "WALK": _walk(problem, result)},
    )
    return (launch,)


def _size(problem: Problem) -> choice.Size:
    n, _, p, q = conv_tile.result(problem).shape
    return conv_tile.size_of(problem, n * p * q)


OP = Op(
    "conv_rearrange", ConvRearrange, infer, reference, launches, counted(conv_tile.flops),
    **choice.of_product(_size), packs=lambda attributes: {1: conv_tile.pack}, takes_epilogue=False,
    writes_any=True,
)  # fmt: skip
