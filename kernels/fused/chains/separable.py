"""separable: depthwise convolution -> 1x1 convolution (-> the next 1x1 convolution) in one kernel.

    t = D(depthwise(x, w1))       never in memory
    y = E(t · w2ᵀ)                stored if somebody reads it; E may add the residual
    z = G(y · w3ᵀ)                optional; stored

x: (N, C, H, W) NHWC; w1: (C, 1, R, S); w2: (K, C, 1, 1); w3: (L, K, 1, 1); y: (N, K, P, Q);
z: (N, L, P, Q). fp32 accumulation; t and y are rounded to the dtype of the tensors, as they would
be between separate kernels.

y alone is the depthwise separable convolution of MobileNet (Howard et al., 2017). With z it is the
inverted residual of MobileNet v2 (Sandler et al., 2018), cut after the *next* block's expansion
instead of before it: depthwise, projection, residual, expansion. No pixel is computed twice, the
depthwise result is never stored, and the narrow y only where a residual needs it.

The depthwise part computes bands of some output rows of BLOCK_M pixel columns by BLOCK_K channels
at a time (`convolution/depthwise.py`) and stacks the rows into one operand, as `space.bands` counts
them. Two ways to go on:

- the tile engine multiplies every channel block at once and adds into the accumulator of all its
  output channels: many channels in, few out. A further 1x1 product may follow, whose operand is the
  finished tile;
- `resident_kernel` keeps all channel blocks as operands (in shared memory) and then walks over the
  output channels with their weights copied asynchronously: few channels in, many out, and nothing
  is computed twice. The engine's loop makes an operand for one tile of channels: that is why this
  is a kernel of its own.

What keeps the machine code clean (sm_90, 3x3, 256 channels, 64 pixels, 4 warps):
- the rows are stacked by broadcast and select. One product per row instead costs 44 barriers per
  channel block, because the compiler then moves the operand's layout conversion up to every load;
  `tl.join` costs 26 on sm_80. Stacked it is 2 (3 on sm_80), with 128-bit loads throughout;
- no pipelining behind the engine: with two stages every tap goes through shared memory.

Tile sizes, and what programs cost, are in `separable_tiles.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ....errors import InvalidInputError
from ...contract import epilogue as ep
from ...contract import programmatic_launch
from ...contract.op import Attributes, Config, Launch, Op, Problem, Ref, Target, X, Y, counted
from ...contract.spec import TensorSpec
from ...convolution.depthwise import band_corner, band_sums
from ...tile import choice, engine
from ...tile.conv_geometry import Conv2d
from ...tile.finish import Finish, put, write
from ...tile.geometry import Image, Output, Window, tile_launch
from ...tile.source import Source
from ...tile.space import of_bands, pixel_index
from .. import links
from ..links import Link
from . import separable_tiles
from .separable_tiles import Block


@dataclass(frozen=True)
class Separable(Attributes):
    """The depthwise geometry and the pointwise stages after each part.

    keep: whether y is an output; always where there is no expansion. Inputs: x, w1, operands of
    `after_depthwise`, w2, operands of `after_project`, [w3, operands of `after_expand`]. Outputs:
    y if kept, then z if expanded.
    """

    depthwise: Conv2d = field(default_factory=Conv2d)
    after_depthwise: ep.Epilogue = ()
    after_project: ep.Epilogue = ()
    has_expand: bool = False
    after_expand: ep.Epilogue = ()
    keep: bool = True

    @property
    def links(self) -> tuple[Link, ...]:
        """The products, in order."""
        chain = (
            Link("depthwise", ("w1",), self.after_depthwise, self.depthwise),
            Link("project", ("w2",), self.after_project),
        )
        return (*chain, Link("expand", ("w3",), self.after_expand)) if self.has_expand else chain

    @property
    def stored(self) -> tuple[str, ...]:
        """The links whose results are outputs."""
        return ("project",) * self.keep + ("expand",) * self.has_expand


def infer(attributes: Separable, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """y where it is kept, and z where there is an expansion."""
    links.check_count("separable", attributes.links, inputs)
    if not attributes.stored:
        raise InvalidInputError("separable: without an expansion, expected keep=True")
    x, w1 = inputs[:2]
    if x.rank != 4 or w1.rank != 4 or w1.shape[0] != x.shape[1] or w1.shape[1] != 1:
        raise InvalidInputError(
            f"separable: expected x (N,C,H,W) and one filter per channel (C,1,R,S), got {x}, {w1}"
        )
    results = links.check("separable", attributes.links, inputs)
    return tuple(results[name] for name in attributes.stored)


def reference(attributes: Separable, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    results = links.reference(attributes.links, inputs)
    return tuple(results[name] for name in attributes.stored)


class Depthwise(NamedTuple):
    """What the source knows: the stages behind the filter, and which of `extras` its weight is,
    packed (R·S, C) in fp32."""

    stages: Any
    weight: int


class Expansion(NamedTuple):
    """What the finish knows: whether y is stored, and the product behind it. z: its output, None
    where there is none; weight, result: which of `extras` w3 and z are; step: columns at a time."""

    keep: bool
    z: Output | None
    weight: int
    result: int
    step: int


@triton.jit
def corner(
    first, stop, image, p, q, live,
    SOURCE: tl.constexpr, SPACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Of every column of the bands the offset of its window's corner in x, and the corner's row and
    column in the image; and the output pixel of every row of the tile, and which exist."""
    IMAGE: tl.constexpr = SOURCE.image
    _, _, _, _, pixel, top, left = band_corner(first, stop, IMAGE, SOURCE.window, SPACE, TILE)
    rows = pixel_index(first, image, p, q, SPACE, TILE)
    return pixel * IMAGE.row_stride + IMAGE.offset, top, left, rows, live


@triton.jit
def filtered(x, at, step, start, extras, SOURCE: tl.constexpr, TILE: tl.constexpr):
    """A block of channels of t, its rows stacked."""
    offset, top, left, rows, live = at
    IMAGE: tl.constexpr = SOURCE.image
    COLUMNS: tl.constexpr = offset.shape[0]
    K: tl.constexpr = TILE.K
    HEIGHT: tl.constexpr = TILE.M // COLUMNS
    channels = start + tl.arange(0, K)
    exists = channels < IMAGE.C
    base = x + offset[:, None] + channels[None, :]
    sums = band_sums(
        base, extras[SOURCE.detail.weight], top, left, channels, exists,
        IMAGE, SOURCE.window, IMAGE.C, HEIGHT, COLUMNS, K,
    )  # fmt: skip
    t = sums[0]
    if HEIGHT > 1:
        which = tl.arange(0, HEIGHT)[:, None, None]
        stack = tl.broadcast_to(tl.reshape(t, (1, COLUMNS, K)), (HEIGHT, COLUMNS, K))
        for j in tl.static_range(1, HEIGHT):
            stack = tl.where(which == j, tl.reshape(sums[j], (1, COLUMNS, K)), stack)
        t = tl.reshape(stack, (TILE.M, K))
    t = SOURCE.detail.stages(t, rows, channels, live, exists, extras)
    if IMAGE.C % K != 0:
        # Channels past the end must stay zero whatever the stages made of them.
        t = tl.where(exists[None, :], t, 0.0)
    return t.to(x.dtype.element_ty)


@triton.jit
def expand(
    acc, y, workspace, semaphores, tile, split, first, stop, rows, live, columns, column_mask,
    extras, SPACE: tl.constexpr, FINISH: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Stores y if it is kept, and its product with w3, if there is one."""
    EXPANSION: tl.constexpr = FINISH.detail
    Z: tl.constexpr = EXPANSION.z
    acc = OUTPUT.epilogue(acc, rows, columns, live, column_mask, extras)
    if EXPANSION.keep:
        write(acc, y, rows, live, columns, column_mask, OUTPUT)
    if Z is not None:
        N: tl.constexpr = TILE.N
        STEP: tl.constexpr = EXPANSION.step
        if OUTPUT.K % N != 0:
            acc = tl.where(column_mask[None, :], acc, 0.0)
        narrow = acc.to(y.dtype.element_ty)
        w3, z = extras[EXPANSION.weight], extras[EXPANSION.result]
        for start in tl.range(0, Z.K, STEP, num_stages=1):
            wide = start + tl.arange(0, STEP)
            b = links.load_weights(w3, wide, wide < Z.K, columns, column_mask, OUTPUT.K, N)
            product = tl.dot(narrow, b.T, input_precision=TILE.precision)
            put(product, z, rows, live, wide, wide < Z.K, extras, Z)


@triton.jit
def resident_kernel(
    x, w, y, extras, m, SPACE: tl.constexpr, SOURCE: tl.constexpr, SPAN: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # A program owns SPAN output channels of its pixels.
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    C: tl.constexpr = SOURCE.depth
    blocks: tl.constexpr = (C + TILE.K - 1) // TILE.K
    spans: tl.constexpr = (OUTPUT.K + SPAN - 1) // SPAN
    program = tl.program_id(0)
    first = program // spans * SPACE.per_tile
    image, p, q, live = SPACE.place(first, m, SPACE, TILE)
    rows = pixel_index(first, image, p, q, SPACE, TILE)
    at = SOURCE.begin(first, m, image, p, q, live, SOURCE, SPACE, TILE)
    programmatic_launch.grid_dependency_wait(PDL)
    operands = ()
    for block in tl.static_range(blocks):
        operands = operands + (SOURCE.load(x, at, 0, block * TILE.K, extras, SOURCE, TILE),)
    for start in range(0, SPAN, BLOCK_N):
        columns = program % spans * SPAN + start + tl.arange(0, BLOCK_N)
        column_mask = columns < OUTPUT.K
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for block in tl.static_range(blocks):
            channels = block * TILE.K + tl.arange(0, TILE.K)
            b = links.load_weights(w, columns, column_mask, channels, channels < C, C, TILE.K)
            acc = tl.dot(operands[block], b.T, acc, input_precision=TILE.precision)
        put(acc, y, rows, live, columns, column_mask, extras, OUTPUT)


def _specs(problem: Problem) -> tuple[Separable, dict[str, TensorSpec]]:
    """The attributes, and the specs of t, y and z by the link that makes them."""
    attributes = problem.attributes.expect(Separable)
    inputs = tuple(operand.spec for operand in problem.inputs)
    return attributes, links.check("separable", attributes.links, inputs)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; a program owns TILE_ROWS rows of BLOCK_M pixel columns."""
    attributes, results = _specs(problem)
    chain, x, w1 = attributes.links, problem.inputs[0], problem.inputs[1].shape
    own = {name: Ref("input", at) for name, at in links.slots(chain).tensors.items()}
    # In front of what the stages read; what is absent is compiled out.
    front = (own["w1"], own.get("w3", own["w2"]), Ref("output", len(problem.outputs) - 1))
    bound = links.bind(chain, problem.inputs, results, front)
    stages, z = bound.functions, problem.outputs[-1] if attributes.has_expand else None
    channels = results["project"].shape[1]
    source = Source(
        Image.of(x), Window.of(w1[2:], attributes.depthwise), corner, filtered, 1,
        x.shape[1], detail=Depthwise(stages["depthwise"], 0),
    )  # fmt: skip
    expansion = Expansion(
        attributes.keep, Output.of(z, stages["expand"]) if z else None, 1, 2,
        separable_tiles.BLOCK_LAST,
    )  # fmt: skip
    space = of_bands(results["project"], tile["BLOCK_M"], tile["TILE_ROWS"])
    block = _block(problem)
    shared: dict[str, Any] = {
        "output": Output.of(problem.outputs[0], stages["project"])._replace(K=channels),
        "extras": bound.extras,
        "precision": choice.dot_precision(problem, 16),
        "rows": x.shape[0] * space.down * space.across,
        "l2_bytes": separable_tiles.l2_bytes(block, tile),
        "instructions": separable_tiles.instructions(block, tile),
        "shared_traffic": separable_tiles.shared_traffic(block, tile),
        "shared_held": separable_tiles.shared_bytes(block, tile),
        "registers": separable_tiles.registers(block, tile),
    }
    if not tile["SPAN"]:
        finish = Finish(expand, detail=expansion)
        pointers = {"w": own["w2"]}
        launch = engine.launch(
            problem, tile, target, space, source, finish=finish, pointers=pointers, **shared
        )
        return (launch,)
    launch = tile_launch(
        problem, tile, resident_kernel,
        constexprs={"SPACE": space, "SOURCE": source, "SPAN": tile["SPAN"], "PDL": False},
        pointers={"x": X, "w": own["w2"], "y": Y},
        block_rows=space.per_tile,
        **shared,
    )  # fmt: skip
    return (replace(launch, columns=-(-channels // tile["SPAN"])),)


def _block(problem: Problem) -> Block:
    """The problem's sizes, as its tiles depend on them."""
    attributes, results = _specs(problem)
    y, where = results["project"], links.slots(attributes.links).operands
    counts = (
        sum(operand.shape == spec.shape for operand in problem.inputs[where[name]])
        for name, spec in results.items()
    )
    return Block(
        attributes.depthwise,
        problem.inputs[1].shape[2:],
        (*(spec.shape[1] for spec in results.values()), 0)[:3],
        (*counts, 0)[:3],
        y.numel // y.shape[1],
        problem.inputs[0].spec.dtype,
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    block = _block(problem)
    for tile in (*separable_tiles.accumulating(block), *separable_tiles.resident(block)):
        if separable_tiles.legal(block, tile, target) is None:
            yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return separable_tiles.legal(_block(problem), tile, target)


def crowded(problem: Problem, tile: Config, target: Target) -> str | None:
    return separable_tiles.crowded(_block(problem), tile, target)


@lru_cache(maxsize=4096)
def default(problem: Problem, target: Target) -> Config:
    """The legal configuration with the least modelled time; among equals the first with at most
    32 accumulators per thread, which leaves registers for a second program."""
    block = _block(problem)
    if target.name == "interpreter":
        return separable_tiles.interpreter_tile(block)

    def accumulators(tile: Config) -> int:
        area = tile["TILE_ROWS"] * tile["BLOCK_M"] * tile["BLOCK_N"]
        return max(area // (32 * tile.num_warps), 32)

    return choice.choose(
        configs(problem, target), lambda tile: launches(problem, tile, target)[0],
        choice.Work.of(problem, cost(problem).flops), target,
        waste=accumulators,
        crowded=lambda tile: separable_tiles.crowded(block, tile, target),
        default=next(separable_tiles.accumulating(block)),  # `legal` tells why none can run.
    )  # fmt: skip


@counted
def cost(problem: Problem) -> int:
    """The products of all parts; t is neither written nor read, y is not read."""
    attributes, results = _specs(problem)
    own, y = links.tensors(attributes.links, problem.inputs), results["project"]
    products = sum(own[name].spec.numel for name in links.weights(attributes.links))
    return 2 * y.numel // y.shape[1] * products


OP = Op(
    "separable", Separable, infer, reference, launches, cost, configs, default, legal, crowded,
    packs=lambda separable: links.packs(separable.links), takes_epilogue=False,
)  # fmt: skip
