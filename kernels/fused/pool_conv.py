"""pool_conv: maximum or average pooling -> 1x1 convolution in one kernel.

    t = F(pool2d(x))          stored only with `keep`, for its other readers
    y = E(G(t) · wᵀ)

x: (N, C, H, W) NHWC in memory; w: (K, C, 1, 1); t: (N, C, P, Q); y: (N, K, P, Q) NHWC. The window
is reduced in fp32 and t and G(t) are rounded to the dtype of the tensors, as they would be between
separate kernels; fp32 accumulation. NaN wins a maximum, as in torch.

A program pools its pixels a block of channels at a time, straight into the operand of the matrix
product: the branch of an Inception block (Szegedy et al., 2015) that pools and projects, or a
stage's pooling with the first reduction behind it. Every tile of output channels pools again, so a
tile is as wide as all of them where registers allow.

The taps are read through L1, which serves eight of nine; asynchronous copies bypass it, and a
pipelined loop needs a buffer per tap (84 KB at three stages) and unpacks the half-precision
maximum: 976 instead of 464 instructions at 64x32x32 on sm_90.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import (
    Attributes,
    Config,
    Launch,
    Op,
    Problem,
    Ref,
    config,
    counted,
    operand_refs,
    power_of_two,
)
from ..contract.spec import Operand, TensorSpec
from ..contract.targets import Target
from ..convolution import conv2d
from ..pooling import pool_kernel, pool_window
from ..pooling.pool_window import AvgPool2d, MaxPool2d
from ..tile import choice, conv_geometry, engine, source, space
from ..tile.conv_geometry import Conv2d
from ..tile.finish import combine
from ..tile.geometry import Image, Output, Window
from ..tile.source import Source
from ..tile.torch_convolution import convolve
from . import links
from .links import Link

MOST_LOADS = 144
"""Elements that a thread reads for one block of pooled channels: 16 results of a 3x3 window take 98
to 153 registers on sm_90; beside 16 outputs they spill 16 bytes (32x16x64 with 4 warps)."""
MOST_WEIGHTS = 128
"""Bytes of a weight tile that a thread holds on its way to shared memory."""
EVERY_TAP, EVERY_PACKED_TAP, EVERY_RESULT = 3, 2, 4
"""Thread instructions for one element of a window and for one pooled element, counted in sm_90 code
at 64x64x64; the maximum of halves is packed."""


@dataclass(frozen=True)
class PoolConv(Attributes):
    """The pooling, the pointwise stages after it (seen by all readers of t) and before the
    convolution (seen by it alone), and whether t is a second output.

    Inputs: x, w, operands of `after_pool`, operands of `before_conv`.
    """

    pool: MaxPool2d | AvgPool2d = field(default_factory=MaxPool2d)
    after_pool: ep.Epilogue = ()
    before_conv: ep.Epilogue = ()
    keep: bool = False

    def links(self, divide: ep.Epilogue = ()) -> tuple[Link, ...]:
        """What follows the pooling, for all readers and for one; divide: stages in front."""
        stages = (*divide, *self.after_pool)
        return Link("after_pool", ("w",), stages), Link("before_conv", (), self.before_conv)


def pooled_spec(attributes: PoolConv, x: TensorSpec) -> TensorSpec:
    pool = attributes.pool
    return pool_window.infer(pool_window.name_of(pool), pool, (x,))[0]


def infer(attributes: PoolConv, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """y, and t where it is kept."""
    links.check_count("pool_conv", attributes.links(), inputs)
    x, w, *operands = inputs
    if w.rank != 4 or w.shape[2:] != (1, 1):
        raise InvalidInputError(f"pool_conv: expected w (K,C,1,1), got {w}")
    t = pooled_spec(attributes, x)
    links.check_operands("pool_conv", "the pooling", operands, t)
    (y,) = conv_geometry.infer(Conv2d(), (t, w))
    return (y, t) if attributes.keep else (y,)


def reference(
    attributes: PoolConv, *inputs: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    (x, w, *_), where = inputs, links.slots(attributes.links()).operands
    t = pool_window.pooled(attributes.pool, x)
    t = ep.apply_reference(attributes.after_pool, t, inputs[where["after_pool"]])
    read = ep.apply_reference(attributes.before_conv, t, inputs[where["before_conv"]])
    y = convolve(read, w)
    return (y, t) if attributes.keep else y


class Pooling(NamedTuple):
    """How the operand is pooled. maximum: instead of the sum; counted: as the `count` of
    `pool.Reduction`; after_pool, before_conv: the stages; t: where the pooled pixels lie; keep:
    which of `extras` they are stored in, by the programs of the first of so many tiles of output
    channels; None where they are not.
    """

    maximum: bool
    counted: str | None
    after_pool: Any
    before_conv: Any
    t: Output
    keep: int | None
    column_tiles: int


@triton.jit
def window_corner(
    first, stop, image, p, q, live,
    SOURCE: tl.constexpr, SPACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """As `source.corner`; and the pixels themselves, which exist, and the pixels of their
    windows."""
    pixel, top, left = source.corner(first, stop, image, p, q, live, SOURCE, SPACE, TILE)
    count = top
    POOLING: tl.constexpr = SOURCE.detail
    WINDOW: tl.constexpr = SOURCE.window
    if POOLING.counted is not None:
        above = p * WINDOW.stride_h - WINDOW.top
        height = pool_kernel.extent(above, WINDOW.R, SOURCE.image.H, WINDOW.top, POOLING.counted)
        width = pool_kernel.extent(left, WINDOW.S, SOURCE.image.W, WINDOW.left, POOLING.counted)
        count = height * width
    rows = (image * POOLING.t.P + p) * POOLING.t.Q + q
    return pixel, top, left, rows, live, count


@triton.jit
def pooled(x, at, step, start, extras, SOURCE: tl.constexpr, TILE: tl.constexpr):
    """A block of channels of the pooled windows."""
    pixel, top, left, rows, live, count = at
    IMAGE: tl.constexpr = SOURCE.image
    WINDOW: tl.constexpr = SOURCE.window
    POOLING: tl.constexpr = SOURCE.detail
    EMPTY: tl.constexpr = float("-inf") if POOLING.maximum else 0.0
    R: tl.constexpr = WINDOW.R
    S: tl.constexpr = WINDOW.S
    M: tl.constexpr = TILE.M
    K: tl.constexpr = TILE.K
    depth = tl.arange(0, K)
    channels = start + depth
    exists = channels < IMAGE.C
    x_tile = x + IMAGE.offset + (pixel * IMAGE.row_stride)[:, None] + depth[None, :]
    best = tl.full((M, K), EMPTY, tl.float32)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            down = r * WINDOW.dilation_h
            right = s * WINDOW.dilation_w
            mask = source.inside(top + down, left + right, IMAGE)[:, None]
            if IMAGE.C % K != 0:
                mask = mask & exists[None, :]
            offset = (down * IMAGE.W + right) * IMAGE.row_stride
            value = tl.load(x_tile + (offset + start), mask=mask, other=EMPTY).to(tl.float32)
            best = combine(best, value, POOLING.maximum)
    # A sum over an axis of length 2 costs one addition and is what keeps the compiler from
    # converting every tap, instead of the result, to the layout of the product's operand: 4
    # barriers and 117 registers per block of channels at 64x64x32, 22 and 146 without it.
    best = tl.sum(tl.join(best, tl.zeros((M, K), tl.float32)), axis=2)
    if POOLING.counted is not None:
        best = best / count.to(tl.float32)[:, None]
    best = POOLING.after_pool(best, rows, channels, live, exists, extras)
    a = best.to(x.dtype.element_ty)
    if POOLING.keep is not None:
        t = extras[POOLING.keep] + POOLING.t.offset + start
        stored = live & (tl.program_id(0) % POOLING.column_tiles == 0)
        t_tile = (rows * POOLING.t.row_stride)[:, None] + depth[None, :]
        tl.store(t + t_tile, a, mask=stored[:, None] & exists[None, :])
    if POOLING.before_conv is not None:
        value = POOLING.before_conv(a.to(tl.float32), rows, channels, live, exists, extras)
        a = value.to(x.dtype.element_ty)
    if IMAGE.C % K != 0:
        # Channels outside the tensor must be zero whatever the stages made of -inf or zero.
        a = tl.where(exists[None, :], a, 0.0).to(x.dtype.element_ty)
    return a


def pooling(problem: Problem) -> Problem:
    """The problem of the pooling alone."""
    attributes, x = problem.attributes.expect(PoolConv), problem.inputs[0]
    t = Operand.dense(pooled_spec(attributes, x.spec))
    return Problem(pool_window.name_of(attributes.pool), attributes.pool, (x,), (t,))


def _source(problem: Problem, tile: Config) -> tuple[Source, tuple[Ref, ...]]:
    """The pooled image, one block of channels after the other, and what its stages read."""
    attributes = problem.attributes.expect(PoolConv)
    reduction = pool_window.reduction(pooling(problem))
    x, y, kept = problem.inputs[0], problem.output, problem.outputs[1:]
    t = pooled_spec(attributes, x.spec)
    chain, own = attributes.links(reduction.divide), operand_refs(problem)
    bound = links.bind(chain, problem.inputs, {link.name: t for link in chain}, own)
    detail = Pooling(
        reduction.maximum,
        reduction.counts,
        bound.functions["after_pool"],
        bound.functions["before_conv"] if attributes.before_conv else None,
        Output.of(kept[0] if kept else Operand.dense(t), None),
        len(bound.extras) if kept else None,
        -(-y.shape[1] // tile["BLOCK_N"]),
    )
    window = Window.of(attributes.pool.kernel, attributes.pool)
    c = x.shape[1]
    read = Source(Image.of(x), window, window_corner, pooled, 1, c, detail=detail)
    return read, bound.extras[len(own) :]


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the tile kernel; neighbouring programs share their pixels, which stay in
    L2."""
    read, extras = _source(problem, tile)
    kept = [Ref("output", index) for index in range(1, len(problem.outputs))]
    launch = engine.launch(
        problem, tile, target, space.of_pixels(problem.output.spec, tile["BLOCK_M"]), read,
        extras=(*extras, *kept),
        precision=choice.dot_precision(problem, problem.inputs[0].shape[1]),
        **_modelled(problem, tile),
    )  # fmt: skip
    return (launch,)


def _modelled(problem: Problem, tile: Config) -> dict[str, Any]:
    """What the cost model asks of the launch: what a program reads, its windows' pixels, each once
    thanks to L1, and its weights; and what pooling takes."""
    spec, window = problem.inputs[0].spec, problem.attributes.expect(PoolConv).pool
    channels, taps = spec.shape[1], math.prod(window.kernel)
    results = min(tile["BLOCK_M"], math.prod(problem.output.shape[2:]))
    values = min(pool_window.pixels_read(problem, window, results), results * taps)
    packed = isinstance(window, MaxPool2d) and spec.dtype is not torch.float32
    every_tap = EVERY_PACKED_TAP if packed else EVERY_TAP
    return {
        "l2_bytes": (values + tile["BLOCK_N"]) * channels * spec.dtype.itemsize,
        "instructions": tile["BLOCK_M"] * channels * (every_tap * taps + EVERY_RESULT),
        "steps": -(-channels // tile["BLOCK_K"]),
    }


def _size(problem: Problem) -> tuple[int, int, int]:
    """Pixels, input channels and output channels of the product."""
    k = problem.output.shape[1]
    return problem.output.spec.numel // k, problem.inputs[0].shape[1], k


def _tile(pixels: int, outputs: int, channels: int, warps: int) -> Config:
    return config(warps, 1, BLOCK_M=pixels, BLOCK_N=outputs, BLOCK_K=channels)


def _shapes(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """(BLOCK_M, BLOCK_K, warps) with 16 to 2 pooled elements per thread, the most first.

    Fewer than 64 bytes of a pixel at a time would waste L1, which serves a line per cycle.
    """
    x = problem.inputs[0]
    widest = max(16, power_of_two(x.shape[1]))
    least = min(widest, 64 // x.spec.dtype.itemsize)
    for per_thread in (16, 8, 4, 2):
        for pixels, warps in ((64, 8), (64, 4), (32, 4), (32, 8), (128, 8), (16, 4)):
            channels = per_thread * 32 * warps // pixels
            if least <= channels <= widest:
                yield pixels, channels, warps


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Every shape of the pooled tile with 32 to 256 output channels."""
    widest = max(16, power_of_two(_size(problem)[2]))
    for pixels, channels, warps in _shapes(problem):
        for outputs in (16, 32, 64, 128, 256):
            tile = _tile(pixels, outputs, channels, warps)
            if widest // 4 <= outputs <= widest and legal(problem, tile, target) is None:
                yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return choice.legal_tile(problem.inputs[0].spec.dtype, tile, target)


def crowded(problem: Problem, tile: Config, target: Target) -> str | None:
    """The taps, the weights and the accumulators."""
    if target.name == "interpreter":
        return None
    x, threads = problem.inputs[0], 32 * tile.num_warps
    # One step, or two, which ptxas unrolls: 8 bytes on the stack at 128x64x32 over 64 channels.
    if target.capability < 90 and tile.num_warps > 4 and x.shape[1] <= 2 * tile["BLOCK_K"]:
        return f"{tile.num_warps} warps and all channels in two blocks spill before sm_90"
    # Channels that do not line up are loaded one by one; tf32x3 keeps its operands twice.
    single = x.spec.dtype is torch.float32
    aligned = not any(value % 8 for value in (x.shape[1], x.pitch, x.offset))
    most = MOST_LOADS if aligned and not single and tile["BLOCK_N"] > 16 else MOST_LOADS // 2
    pooled = tile["BLOCK_M"] * tile["BLOCK_K"] // threads
    loads = pooled * math.prod(problem.attributes.expect(PoolConv).pool.kernel)
    if loads > most:
        return f"{loads} loads per thread and block of channels; more than {most} spill"
    held = tile["BLOCK_N"] * tile["BLOCK_K"] * x.spec.dtype.itemsize // threads
    if held > MOST_WEIGHTS:
        return f"{held} bytes of weights per thread; more than {MOST_WEIGHTS} spill"
    accumulators = tile["BLOCK_M"] * tile["BLOCK_N"] // threads
    if single and accumulators > 32:
        return f"{accumulators} fp32 accumulators per thread; more than 32 spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """The shape that should take the least time: few tiles of output channels, because each pools
    again, but enough tiles to keep the multiprocessors busy."""
    if target.name == "interpreter":
        rows, c, k = _size(problem)
        tile = choice.interpreter_tile(choice.Size(rows, k, c, problem.inputs[0].spec.dtype))
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        return config(1, 1, **{name: tile[name] for name in names})
    rows, _, k = _size(problem)

    def slower(tile: Config) -> float:
        # 16 pooled elements beside 64 accumulators leave room for one program: 64x256x64 takes 158
        # to 186 registers (sm_80 to sm_100), 64x256x32 112 to 158.
        threads = 32 * tile.num_warps
        return 2 if tile["BLOCK_M"] * (tile["BLOCK_K"] + tile["BLOCK_N"]) > 72 * threads else 1

    return choice.choose(
        configs(problem, target),
        lambda tile: choice.sketch(tile, rows, k, **_modelled(problem, tile)),
        choice.Work.of(problem, cost(problem).flops), target,
        factor=slower,
        crowded=lambda tile: crowded(problem, tile, target),
        default=_tile(16, 16, 16, 4),
    )  # fmt: skip


@counted
def cost(problem: Problem) -> int:
    """The product, and one operation per tap."""
    rows, c, k = _size(problem)
    taps = math.prod(problem.attributes.expect(PoolConv).pool.kernel)
    return 2 * rows * c * k + taps * rows * c


OP = Op(
    "pool_conv", PoolConv, infer, reference, launches, cost, configs, default, legal, crowded,
    packs=lambda attributes: {1: lambda _, w: conv2d.pack(Conv2d(), w)},
)  # fmt: skip
