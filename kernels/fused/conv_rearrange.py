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

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.op import Config, Cost, Launch, Op, Problem, W, X, Y, tensor_bytes
from ..contract.spec import TensorSpec
from ..contract.targets import Target
from ..movement import rearrange
from ..movement.rearrangement import Rearrange, factors, spread
from ..products import gemm
from ..tile import choice
from . import conv_tile
from .conv_tile import StagedConv


@dataclass(frozen=True)
class ConvRearrange(StagedConv):
    """The convolution with its stages, and how their result is rearranged."""

    then: Rearrange = field(default_factory=Rearrange)


def unsupported(attributes: ConvRearrange, pixels: tuple[int, ...]) -> str | None:
    """Why the kernel cannot compute the convolution, whatever its result's height and width."""
    groups = attributes.conv.groups
    return None if groups == 1 else f"the convolution has {groups} groups"


def infer(attributes: ConvRearrange, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The rearranged spec of the convolution's result."""
    result = conv_tile.result_of("conv_rearrange", attributes, inputs)
    if (reason := unsupported(attributes, result.shape[2:])) is not None:
        raise InvalidInputError(f"conv_rearrange: {reason}")
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


@triton.jit
def conv_rearrange_kernel(
    x, w, y, extras, m,
    H: tl.constexpr, WIDTH: tl.constexpr, C: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    Q: tl.constexpr, R: tl.constexpr, S: tl.constexpr, STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr, DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr, X_PITCH: tl.constexpr, X_OFFSET: tl.constexpr,
    Y_OFFSET: tl.constexpr, PIXELS: tl.constexpr, PIXEL_STRIDES: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNEL_STRIDES: tl.constexpr, CHANNEL_ORDER: tl.constexpr,
    PROLOGUE: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BY_TAP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):  # fmt: skip
    column_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = gemm.tile_index(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), column_tiles, GROUP_M
    )
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < K
    channels = place(columns, CHANNELS, CHANNEL_ORDER)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    p, q = (rows // Q % P).to(tl.int32), (rows % Q).to(tl.int32)
    acc = conv_tile.convolve(
        x, w, rows // (P * Q), p, q, row_mask, channels, column_mask, extras,
        H, WIDTH, C, R, S, STRIDE_H, STRIDE_W, TOP, LEFT, DILATION_H, DILATION_W,
        X_PITCH, X_OFFSET, PROLOGUE, PRECISION, BY_TAP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    acc = STAGES(acc, rows, channels, row_mask, column_mask, extras)
    pixel = place(rows, PIXELS, PIXEL_STRIDES)
    address = y + Y_OFFSET + pixel[:, None] + place(columns, CHANNELS, CHANNEL_STRIDES)[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=row_mask[:, None] & column_mask[None, :])


def _result(problem: Problem) -> TensorSpec:
    """The spec of what is rearranged."""
    assert isinstance(problem.attributes, ConvRearrange)
    specs = tuple(operand.spec for operand in problem.inputs)
    return conv_tile.result_of("conv_rearrange", problem.attributes, specs)


def _walk(problem: Problem, result: TensorSpec) -> dict[str, tuple[int, ...]]:
    """The parts of pixels and of channels, the innermost first, with their strides in y; for
    channels also those in w's order."""
    assert isinstance(problem.attributes, ConvRearrange)
    then, out = problem.attributes.then, problem.output
    before, after = factors(result.shape, then.split), factors(out.shape, then.parts)
    assert before is not None and after is not None
    written = dict(zip(then.dims, spread(out.strides, after, then.parts), strict=True))
    own = spread((0, 1, 0, 0), before, then.split)
    images, channels, *pixels = before
    rows = [part for dim in (images, *pixels) for part in dim][::-1]
    columns = sorted(channels, key=lambda part: (written[part], own[part]))
    return {
        "PIXELS": tuple(then.split[part] for part in rows),
        "PIXEL_STRIDES": tuple(written[part] for part in rows),
        "CHANNELS": tuple(then.split[part] for part in columns),
        "CHANNEL_STRIDES": tuple(written[part] for part in columns),
        "CHANNEL_ORDER": tuple(own[part] for part in columns),
    }


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the kernel."""
    attributes, out, result = problem.attributes, problem.output, _result(problem)
    assert isinstance(attributes, ConvRearrange)
    chains = conv_tile.chains(problem, attributes.stages, result)
    n, k, p, q = result.shape
    launch = Launch(
        kernel=conv_rearrange_kernel,
        pointers={"x": X, "w": W, "y": Y},
        extras=chains.extras,
        rows=n * p * q,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=-(-k // tile["BLOCK_N"]),
        constexprs={
            **conv_tile.constants(problem, chains), **_walk(problem, result),
            "K": k, "P": p, "Q": q, "Y_OFFSET": out.offset, **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=conv_tile.l2_bytes(problem, tile["BLOCK_M"], tile["BLOCK_N"], result),
        step_instructions=conv_tile.step_instructions(problem, tile),
    )  # fmt: skip
    return (launch,)


def _size(problem: Problem) -> choice.Size:
    n, _, p, q = _result(problem).shape
    return conv_tile.size_of(problem, n * p * q)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Those of the convolution alone."""
    return choice.tile_configs(_size(problem), target)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return choice.legal(_size(problem), tile, target)


def default(problem: Problem, target: Target) -> Config:
    return choice.default_tile(_size(problem), target)


def cost(problem: Problem) -> Cost:
    """The products of the convolution."""
    read, written = tensor_bytes(problem)
    terms = math.prod(problem.inputs[1].shape[1:])
    return Cost(2 * problem.output.spec.numel * terms, read, written)


OP = Op(
    name="conv_rearrange",
    attributes=ConvRearrange,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    packs=lambda attributes: {1: conv_tile.pack},
    takes_epilogue=False,
)
