"""head: the end of a classifier in one kernel: [average of pixels ->] linear layers [-> softmax].

    s = mean of x over its pixels, or x itself
    t_i = F_i(t_{i-1} · w_iᵀ)       one to three links, t_0 = s
    y = E(softmax(t_last)), E(log_softmax(t_last)) or E(t_last)

x: (N, C, H, W) NHWC in memory where pixels are averaged, else (N, C) dense; w_i: (K_i, K_{i-1}),
constants; y: (N, K_last). fp32 accumulation; s and every t_i but the last are rounded to the dtype
of the tensors, as they would be between separate kernels.

A program owns BLOCK_M samples. Every t_i is a whole tile, which bounds the widths; the first
product walks its depth in blocks, the others take it at once. LeNet-5's 400 -> 120 -> 84 -> 10
(LeCun et al., 1998) is one launch instead of three or four, none of which fills a GPU. Pixels
are averaged straight into the operand of the first product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract import op
from ..contract.op import Attributes, Config, Launch, Op, Problem, Ref, Target, X, Y
from ..contract.spec import Operand, TensorSpec
from ..normalisation.statistics import normalized
from ..tile import choice, source
from ..tile.finish import put
from ..tile.geometry import Image, Output, Tile, Window
from ..tile.product import add_product
from ..tile.source import Source, inside
from . import links
from .links import Link

MOST_LINKS = 3
SOFTMAX = ("", "softmax", "log_softmax")
MOST_WEIGHTS = 256
"""Bytes of a whole weight tile that a thread may hold on its way to shared memory: 64 registers."""

LEAST_ROLLED = 4
"""Steps of the first product from which ptxas does not know their number: it would unroll loops
that are short, to 1024 instead of 864 instructions on sm_90 (400 -> 120 -> 84 -> 10)."""


@dataclass(frozen=True)
class Head(Attributes):
    """Whether pixels are averaged first, the stages after each link, and what normalises the end
    ("", "softmax" or "log_softmax").

    Inputs: x, then for each link its weight and the operands of its stages.
    """

    links: tuple[ep.Epilogue, ...] = ((),)
    average: bool = False
    softmax: str = ""

    @property
    def chain(self) -> tuple[Link, ...]:
        """The products, in order."""
        stages = enumerate(self.links, 1)
        return tuple(Link(f"link{number}", (f"w{number}",), after) for number, after in stages)


def infer(attributes: Head, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, K_last)."""
    if not 1 <= len(attributes.links) <= MOST_LINKS or attributes.softmax not in SOFTMAX:
        raise InvalidInputError(
            f"head: expected 1 to {MOST_LINKS} links and a softmax of {SOFTMAX}, got {attributes}"
        )
    links.check_count("head", attributes.chain, inputs)
    x, rank = inputs[0], 4 if attributes.average else 2
    if x.rank != rank or min(x.shape) < 1:
        expected = "(N,C,H,W) with pixels" if attributes.average else "(N,C)"
        raise InvalidInputError(f"head: expected x {expected}, got {x}")
    return tuple(results(attributes, inputs).values())[-1:]


def results(attributes: Head, inputs: tuple[TensorSpec, ...]) -> dict[str, TensorSpec]:
    """The specs of t_1, t_2, ... by their links."""
    x = inputs[0]
    s = TensorSpec(x.shape[:2], x.dtype, batch=x.batch)
    return links.check("head", attributes.chain, (s, *inputs[1:]))


def reference(attributes: Head, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    s = x.mean((2, 3)) if attributes.average else x
    *_, t = links.reference(attributes.chain, (s, *others)).values()
    return getattr(torch, attributes.softmax)(t, 1) if attributes.softmax else t


class HeadLink(NamedTuple):
    """K columns in a tile of `block`, the stages behind them, and where the weight is among the
    extras."""

    K: int
    block: int
    stages: Any
    weight: int


class Classifier(NamedTuple):
    """A head of `length` links. source: a pixel, or `averaged` ones; tile: of the first product."""

    source: Source
    tile: Tile
    links: tuple[HeadLink, ...]
    length: int
    softmax: str
    output: Output


@triton.jit
def averaged(x, at, step, start, extras, SOURCE: tl.constexpr, TILE: tl.constexpr):
    """A block of channels of an image's average; `detail` reads of pixels in flight."""
    pixel, top, left = at
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_K: tl.constexpr = TILE.K
    BLOCK_PIXELS: tl.constexpr = SOURCE.detail
    IMAGE: tl.constexpr = SOURCE.image
    pixels: tl.constexpr = IMAGE.H * IMAGE.W
    depth = tl.arange(0, BLOCK_K)
    x_tile = x + IMAGE.offset + (pixel * IMAGE.row_stride)[:, None] + depth[None, :] + start
    mask = inside(top, left, IMAGE)[:, None] & (start + depth < IMAGE.C)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for first in range(0, pixels, BLOCK_PIXELS):
        for number in tl.static_range(BLOCK_PIXELS):
            live = mask
            if pixels % BLOCK_PIXELS != 0:
                live = mask & (first + number < pixels)
            value = tl.load(x_tile + (first + number) * IMAGE.row_stride, mask=live, other=0.0)
            total += value.to(tl.float32)
    # As in pool_conv.py: keeps the compiler from converting every pixel to the operand's layout.
    mean = tl.sum(tl.join(total, tl.zeros((BLOCK_M, BLOCK_K), tl.float32)), axis=2) / pixels
    return mean.to(x.dtype.element_ty)


@triton.jit
def staged(acc, rows, columns, row_mask, extras, LINK: tl.constexpr):
    """A link's result after its stages, zero in the columns past its width."""
    column_mask = columns < LINK.K
    acc = LINK.stages(acc, rows, columns, row_mask, column_mask, extras)
    return tl.where(column_mask[None, :], acc, 0.0)


@triton.jit
def linked(acc, x, rows, row_mask, extras, HEAD: tl.constexpr, NUMBER: tl.constexpr):
    """The result of a link with the whole depth at once, from that of the link before it."""
    LINK: tl.constexpr = HEAD.links[NUMBER]
    BEFORE: tl.constexpr = HEAD.links[NUMBER - 1]
    BLOCK: tl.constexpr = LINK.block
    BLOCK_DEPTH: tl.constexpr = BEFORE.block
    # Rounded before the weights are loaded, which takes 14 registers less on sm_90.
    t = acc.to(x.dtype.element_ty)
    columns = tl.arange(0, BLOCK)
    depth = tl.arange(0, BLOCK_DEPTH)
    b = links.load_weights(
        extras[LINK.weight], columns, columns < LINK.K, depth, depth < BEFORE.K, BEFORE.K,
        BLOCK_DEPTH,
    )  # fmt: skip
    acc = tl.dot(t, b.T, input_precision=HEAD.tile.precision)
    return staged(acc, rows, columns, row_mask, extras, LINK)


@triton.jit
def classify(x, y, extras, rows, row_mask, m, HEAD: tl.constexpr):
    """The head of the samples in `rows`, stored."""
    BLOCK_M: tl.constexpr = HEAD.tile.M
    BLOCK_N: tl.constexpr = HEAD.tile.N
    COUNT: tl.constexpr = HEAD.length
    FIRST: tl.constexpr = HEAD.links[0]
    origin = tl.zeros((BLOCK_M,), tl.int32)
    at = HEAD.source.begin(0, 0, rows, origin, origin, row_mask, HEAD.source, None, HEAD.tile)
    columns = tl.arange(0, BLOCK_N)
    acc = add_product(
        tl.zeros((BLOCK_M, BLOCK_N), tl.float32), x, extras[FIRST.weight], at, columns,
        columns < FIRST.K, m, 0, extras, HEAD.source, HEAD.tile, 1,
    )  # fmt: skip
    acc = staged(acc, rows, columns, row_mask, extras, FIRST)
    for number in tl.static_range(1, COUNT):
        acc = linked(acc, x, rows, row_mask, extras, HEAD, number)
    LAST: tl.constexpr = HEAD.links[COUNT - 1].block
    columns = tl.arange(0, LAST)
    column_mask = columns < HEAD.output.K
    if HEAD.softmax != "":
        acc = tl.where(column_mask[None, :], acc, float("-inf"))
        peak = tl.max(acc, axis=1)[:, None]
        total = tl.sum(tl.exp(acc - peak), axis=1)[:, None]
        acc = normalized(acc, peak, total, HEAD.softmax == "log_softmax")
    put(acc, y, rows, row_mask, columns, column_mask, extras, HEAD.output)


@triton.jit
def head_kernel(x, y, extras, m, HEAD: tl.constexpr, WIDE: tl.constexpr):
    rows = tl.program_id(0) * HEAD.tile.M + tl.arange(0, HEAD.tile.M)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    classify(x, y, extras, rows, row_mask, m, HEAD)


def _weights(problem: Problem) -> tuple[Operand, ...]:
    chain = problem.attributes.expect(Head).chain
    own = links.tensors(chain, problem.inputs)
    return tuple(own[name] for name in links.weights(chain))


def widths(problem: Problem) -> tuple[int, ...]:
    """K_1, K_2, ..."""
    return tuple(w.shape[0] for w in _weights(problem))


def _pixels(problem: Problem) -> int:
    return math.prod(problem.inputs[0].shape[2:])


def bind(
    problem: Problem,
    head: Head,
    chain: tuple[Link, ...],
    specs: Mapping[str, TensorSpec],
    x: Image,
    tile: Config,
) -> tuple[Classifier, links.Bound]:
    """What the kernel knows of the head, and a chain that ends with the head's, whose `extras`
    begin with the head's weights and the epilogue's operands.

    specs: of the chain's results. x: what is averaged, or an image of one pixel.
    """
    where, y = links.slots(chain).tensors, problem.output
    weights = tuple(Ref("input", where[name]) for name in links.weights(head.chain))
    extras = (*weights, *op.operand_refs(problem))
    bound = links.bind(chain, problem.inputs, specs, extras)
    chained = tuple(
        HeadLink(width, _block(width, tile["BLOCK_M"]), bound.functions[link.name], number)
        for number, link in enumerate(head.chain)
        for width in specs[link.name].shape[1:]
    )
    epilogue = ep.for_output(problem.epilogue, problem.operands, y.spec, len(weights))
    load, pixels = (averaged, tile["BLOCK_PIXELS"]) if head.average else (source.tap, 1)
    read = Source(x, Window(1, 1), source.corner, load, 1, x.C, detail=pixels)
    precision = choice.dot_precision(problem, 16)
    sizes = (tile["BLOCK_M"], chained[0].block, tile["BLOCK_K"])
    first = Tile(*sizes, 1, precision, problem.is_wide, LEAST_ROLLED)
    output = Output.of(y, epilogue)
    return Classifier(read, first, chained, len(chained), head.softmax, output), bound


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; every program owns BLOCK_M samples. It is made here and not by `tile_launch`: a
    classifier has several products, and the cost model would take its TILE for the only one."""
    attributes, x, y = problem.attributes.expect(Head), problem.inputs[0], problem.output
    specs = results(attributes, tuple(operand.spec for operand in problem.inputs))
    _, c, h, width = (*x.shape, 1, 1)[:4]
    image = Image(h, width, c, x.pitch, x.offset)
    head, bound = bind(problem, attributes, attributes.chain, specs, image, tile)
    launch = Launch(
        kernel=head_kernel,
        pointers={"x": X, "y": Y},
        extras=bound.extras,
        rows=y.shape[0],
        batch=y.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=1,
        constexprs={"HEAD": head, "WIDE": problem.is_wide},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **_modelled(problem, tile),
    )
    return (launch,)


def _block(width: int, rows: int) -> int:
    """The tile of that many columns, wider than it is high: the compiler splits chained products
    that are not among the warps by rows, of which there are too few, and every warp holds all of
    the weights: LeNet-5 takes 255 instead of 80 registers, 3,344 bytes of spills in fp32."""
    return max(2 * rows, op.power_of_two(width))


def _modelled(problem: Problem, tile: Config) -> dict[str, Any]:
    """What the cost model asks of the launch. A program reads its samples and all weights, takes
    blocks of the first product's inputs, of pixels for each, and the other products."""
    attributes, x, rows = problem.attributes.expect(Head), problem.inputs[0], tile["BLOCK_M"]
    sample, weights = math.prod(x.shape[1:]), sum(w.spec.numel for w in _weights(problem))
    blocks, pixels = -(-x.shape[1] // tile["BLOCK_K"]), -(-_pixels(problem) // tile["BLOCK_PIXELS"])
    # Averaging: conversion and addition per element; softmax: some 30 per class.
    count = 2 * sample if attributes.average else 0
    count += 30 * _block(widths(problem)[-1], rows) if attributes.softmax else 0
    return {
        "l2_bytes": (rows * sample + weights) * x.spec.dtype.itemsize,
        "instructions": rows * count,
        "steps": blocks * pixels + len(attributes.links) - 1,
    }


def _tile(problem: Problem, rows: int, depth: int, warps: int, stages: int) -> Config:
    """Up to 16 pixels at a time, as 64 elements per thread allow."""
    pixels = 1
    if problem.attributes.expect(Head).average:
        pixels = min(_pixels(problem), 16, max(1, 2048 * warps // (rows * depth)))
        stages = 1
    return op.config(warps, stages, BLOCK_M=rows, BLOCK_K=depth, BLOCK_PIXELS=pixels)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """16 or 32 samples, 16 to 128 inputs at a time."""
    deepest = max(16, op.power_of_two(problem.inputs[0].shape[1]))
    for warps in (4, 8, 16):
        for rows in (16, 32):
            for depth in (16, 32, 64, 128):
                for stages in (1,) if problem.attributes.expect(Head).average else (2, 3, 4):
                    tile = _tile(problem, rows, depth, warps, stages)
                    if depth <= deepest and legal(problem, tile, target) is None:
                        yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    size, rows, depth = problem.inputs[0].spec.dtype.itemsize, tile["BLOCK_M"], tile["BLOCK_K"]
    blocks = [_block(width, rows) for width in widths(problem)]
    whole = (before * after + rows * max(blocks) for before, after in pairwise(blocks))
    pipelined = tile.num_stages * (rows + blocks[0]) * depth
    return target.shared_shortage(size * max(pipelined, rows * max(blocks), *whole))


def crowded(problem: Problem, tile: Config, target: Target) -> str | None:
    """The widest tile, and whole weights."""
    if target.name == "interpreter":
        return None
    x, rows, depth = problem.inputs[0], tile["BLOCK_M"], tile["BLOCK_K"]
    blocks, threads = [_block(width, rows) for width in widths(problem)], 32 * tile.num_warps
    accumulators = rows * max(blocks) // threads
    if accumulators > 64:
        return f"{max(blocks)} columns are {accumulators} accumulators per thread; over 64 spill"
    size = x.spec.dtype.itemsize
    whole = [before * after for before, after in pairwise(blocks)]
    held = size * max([blocks[0] * depth if tile.num_stages == 1 else 0, *whole]) // threads
    # 512 threads have 128 registers each, and tf32x3 keeps operands twice.
    crowded = tile.num_warps > 8 and x.spec.dtype is torch.float32
    most = MOST_WEIGHTS // 2 if crowded else MOST_WEIGHTS
    if held > most:
        return f"{held} bytes of weights per thread; more than {most} spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """16 samples, the least a matrix product takes: heads have few, and more programs finish
    sooner. 64 inputs at a time (128 where pixels are averaged, 16 bytes for each thread), or as
    many as fit; 8 warps where tiles are wide."""
    depth = max(16, op.power_of_two(problem.inputs[0].shape[1]))
    if target.name == "interpreter":
        # Weights are at least twice as wide (`_block`), and Triton's largest tile is 2**20.
        rows = max(16, min(256, op.power_of_two(problem.output.shape[0])))
        return op.config(1, 1, BLOCK_M=rows, BLOCK_K=min(depth, 512), BLOCK_PIXELS=1)
    average = problem.attributes.expect(Head).average
    order = (4, 8, 16) if max(widths(problem)) <= 64 else (8, 16)
    tiles = [
        _tile(problem, 16, min(depth, block), warps, 3)
        for block in ((128, 64, 32, 16) if average else (64, 32, 16))
        for warps in order
    ]
    fitting = [tile for tile in tiles if legal(problem, tile, target) is None]
    roomy = (tile for tile in fitting if crowded(problem, tile, target) is None)
    return next(roomy, fitting[-1] if fitting else tiles[-1])


@op.counted
def cost(problem: Problem) -> int:
    """The products, the average, and five operations per class for a softmax."""
    attributes, n = problem.attributes.expect(Head), problem.output.shape[0]
    per_sample = sum(2 * w.spec.numel for w in _weights(problem))
    if attributes.average:
        per_sample += math.prod(problem.inputs[0].shape[1:])
    if attributes.softmax:
        per_sample += 5 * problem.output.shape[1]
    return n * per_sample


OP = Op(
    "head", Head, infer, reference, launches, cost, configs, default, legal, crowded,
    # Small logits: a softmax turns their absolute error into a relative one, which with values up
    # to 1 and 130 inputs was larger than the tolerance (N=1, C=130, 100 classes).
    input_range=(-0.5, 0.5), packs=lambda head: links.packs(head.chain), images=True,
)  # fmt: skip
