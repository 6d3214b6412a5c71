"""conv_chain: convolution -> 1x1 expansion -> 1x1 reduction in one kernel, without halo recompute.

    t = F(conv2d(x, w1))          all channels of t in one tile, kept in registers
    y = E(t · w2ᵀ + s · wsᵀ)      stored; E usually adds the residual and applies the activation
    z = G(y · w3ᵀ)                stored; the next block's 1x1 reduction, summed while y passes by

x: (N, C, H, W) NHWC; w1: (M, C, R, S); w2: (E, M, 1, 1); s: (N, D, H2, W2) read at a stride;
ws: (E, D, 1, 1); w3: (O, E, 1, 1); y: (N, E, P, Q); z: (N, O, P, Q). fp32 accumulation; t and y are
rounded to the dtype of the tensors, as they would be between separate kernels. The first
convolution and the last are optional, and so is s, the input of the 1x1 shortcut with which a stage
begins: a second product into the accumulator of y.

This is the "rotated bottleneck" of ResNet (He et al., 2016): cutting the net after the reduction
instead of before it puts the 3x3 first, so no pixel is computed twice, and the wide tensor y is
written once and never read back by the reduction. Back-to-back products whose intermediate stays in
registers: CUTLASS example 13.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ...contract import epilogue as ep
from ...contract import programmatic_launch
from ...contract.op import Attributes, Config, Launch, Op, Problem, Ref, Target, counted
from ...contract.spec import Layout, Operand, TensorSpec
from ...hopper import core
from ...tile import choice, conv_geometry, source, space
from ...tile.conv_geometry import Conv2d
from ...tile.finish import put, write
from ...tile.geometry import Image, Output, Tile
from ...tile.product import add_product, ask_for_weights
from ...tile.source import Source
from ...tile.space import pixel_index
from .. import links
from ..links import Link
from . import conv_chain_hopper as hopper
from . import conv_chain_tiles as tiles


@dataclass(frozen=True)
class ConvChain(Attributes):
    """The links of the chain and the pointwise stages after each of them.

    front: None where x already is t; shortcut: the 1x1 convolution beside the expansion. Inputs:
    x, [w1, operands of `after_front`], w2, [s, ws], operands of `after_expand`, [w3, operands of
    `after_reduce`].
    """

    front: Conv2d | None = None
    after_front: ep.Epilogue = ()
    after_expand: ep.Epilogue = ()
    has_reduce: bool = False
    after_reduce: ep.Epilogue = ()
    shortcut: Conv2d | None = None

    @property
    def links(self) -> tuple[Link, ...]:
        """Those that there are."""
        beside = () if self.shortcut is None else ("s", "ws")
        chain = [Link("expand", ("w2", *beside), self.after_expand, shortcut=self.shortcut)]
        if self.front is not None:
            chain.insert(0, Link("front", ("w1",), self.after_front, self.front))
        if self.has_reduce:
            chain.append(Link("reduce", ("w3",), self.after_reduce))
        return tuple(chain)


def middle(attributes: ConvChain, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
    if attributes.front is None:
        return inputs[0].with_(layout=Layout.NHWC)
    return conv_geometry.infer(attributes.front, (inputs[0], inputs[1]))[0]


def infer(attributes: ConvChain, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """y, and z where there is a reduction."""
    results = links.check("conv_chain", attributes.links, inputs)
    return tuple(results[name] for name in ("expand", "reduce") if name in results)


def reference(attributes: ConvChain, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    results = links.reference(attributes.links, inputs)
    return tuple(results[name] for name in ("expand", "reduce") if name in results)


class Product(NamedTuple):
    """A convolution inside the kernel: what it reads, and the tile that it is computed in."""

    source: Source
    tile: Tile


@triton.jit
def conv_chain_kernel(
    x, w1, w2, w3, s, ws, y, z, extras, m,
    IMAGE: tl.constexpr, FRONT: tl.constexpr, STAGES: tl.constexpr, SHORTCUT: tl.constexpr,
    MIDDLE: tl.constexpr, SPACE: tl.constexpr, Y: tl.constexpr, Z: tl.constexpr,
    TILE: tl.constexpr, BLOCK_MIDDLE: tl.constexpr, BLOCK_NARROW: tl.constexpr,
    LOOP_STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # One program owns the pixels of its rows and all their channels, N of the wide ones in a step
    # of a loop of LOOP_STAGES. IMAGE is x, STAGES follow FRONT, MIDDLE counts the channels of t,
    # BLOCK_* those of t and z filled up; the links that are absent are None.
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    first = tl.program_id(0) * BLOCK_M
    image, p, q, row_mask = SPACE.place(first, m, SPACE, TILE)
    rows = pixel_index(first, image, p, q, SPACE, TILE)
    inner = tl.arange(0, BLOCK_MIDDLE)
    inner_mask = inner < MIDDLE
    if FRONT is not None:
        ask_for_weights(
            w1, inner, inner_mask, first, 0, FRONT.source.taps, FRONT.source.depth, FRONT.tile, 1,
            PDL,
        )  # fmt: skip
    programmatic_launch.grid_dependency_wait(PDL)
    if FRONT is None:
        tile = x + IMAGE.offset + (rows * IMAGE.row_stride)[:, None] + inner[None, :]
        t = tl.load(tile, mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
    else:
        at = FRONT.source.begin(first, m, image, p, q, row_mask, FRONT.source, SPACE, FRONT.tile)
        acc = tl.zeros((BLOCK_M, BLOCK_MIDDLE), tl.float32)
        acc = add_product(
            acc, x, w1, at, inner, inner_mask, m, 0, extras, FRONT.source, FRONT.tile, 1
        )
        acc = STAGES(acc, rows, inner, row_mask, inner_mask, extras)
        # Channels past MIDDLE must stay zero whatever the stages made of them.
        t = tl.where(inner_mask[None, :], acc, 0.0).to(x.dtype.element_ty)
    if SHORTCUT is not None:
        SOURCE: tl.constexpr = SHORTCUT.source
        BLOCK_SHORTCUT: tl.constexpr = SHORTCUT.tile.K
        beside = tl.arange(0, BLOCK_SHORTCUT)
        at = SOURCE.begin(first, m, image, p, q, row_mask, SOURCE, SPACE, SHORTCUT.tile)
        if SOURCE.depth <= BLOCK_SHORTCUT:
            # All channels in one tile: it stays, like t, where every step of the loop reads it.
            s_tile = SOURCE.load(s, at, 0, 0, extras, SOURCE, SHORTCUT.tile)
    if Z is not None:
        narrow = tl.arange(0, BLOCK_NARROW)
        narrow_mask = narrow < Z.K
        total = tl.zeros((BLOCK_M, BLOCK_NARROW), tl.float32)
    for begin in tl.range(0, Y.K, BLOCK_N, num_stages=LOOP_STAGES):
        columns = begin + tl.arange(0, BLOCK_N)
        column_mask = columns < Y.K
        b = links.load_weights(w2, columns, column_mask, inner, inner_mask, MIDDLE, BLOCK_MIDDLE)
        product = tl.dot(t, b.T, input_precision=TILE.precision)
        if SHORTCUT is not None:
            if SOURCE.depth <= BLOCK_SHORTCUT:
                b = links.load_weights(
                    ws, columns, column_mask, beside, beside < SOURCE.depth, SOURCE.depth,
                    BLOCK_SHORTCUT,
                )  # fmt: skip
                product = tl.dot(s_tile, b.T, product, input_precision=TILE.precision)
            else:
                product = add_product(
                    product, s, ws, at, columns, column_mask, m, 0, extras, SOURCE, SHORTCUT.tile,
                    1,
                )  # fmt: skip
        product = Y.epilogue(product, rows, columns, row_mask, column_mask, extras)
        wide = product.to(y.dtype.element_ty)
        write(wide, y, rows, row_mask, columns, column_mask, Y)
        if Z is not None:
            if Y.K % BLOCK_N != 0:
                wide = tl.where(column_mask[None, :], wide, 0.0).to(y.dtype.element_ty)
            b = links.load_weights(w3, narrow, narrow_mask, columns, column_mask, Y.K, BLOCK_N)
            total = tl.dot(wide, b.T, total, input_precision=TILE.precision)
    if Z is not None:
        put(total, z, rows, row_mask, narrow, narrow_mask, extras, Z)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; every program owns BLOCK_M pixels and all their channels. It is what the cost
    model ranks, with a kernel: `tile_launch` knows of one output, and here two are written."""
    if core.uses_core(tile):
        return (hopper.launch(problem, tile, target),)
    (chain, own), inputs = _chain(problem), problem.inputs
    specs = tuple(operand.spec for operand in inputs)
    results = links.check("conv_chain", chain.links, specs)
    bound = links.bind(chain.links, inputs, results)
    y, z = problem.outputs[0], problem.outputs[-1]
    sizes, block = _sizes(problem), Tile.of(problem, tile, choice.dot_precision(problem, 16))
    front = shortcut = None
    if chain.front is not None:
        read = source.by_tap(chain.front, own["x"], own["w1"].shape)
        front = Product(read, block._replace(N=sizes.block_middle))
    if chain.shortcut is not None:
        read = source.by_tap(chain.shortcut, own["s"], own["ws"].shape)
        shortcut = Product(read, block._replace(K=tile["BLOCK_SHORTCUT"]))
    # Absent links are compiled out; their pointers are never read.
    absent = dict.fromkeys(("w1", "w3", "s", "ws"), bound.tensors["w2"])
    launch = replace(
        launch_for_cost_model(problem, tile),
        kernel=conv_chain_kernel,
        pointers={
            **absent, **bound.tensors,
            "y": Ref("output", 0), "z": Ref("output", len(problem.outputs) - 1),
        },
        extras=bound.extras,
        batch=y.spec.batch,
        constexprs={
            "IMAGE": Image.of(inputs[0]),
            "FRONT": front, "STAGES": bound.functions.get("front"), "SHORTCUT": shortcut,
            "MIDDLE": own["w2"].shape[1],
            "SPACE": space.of_pixels(y.spec, block.M),
            "Y": Output.of(y, bound.functions["expand"]),
            "Z": Output.of(z, bound.functions["reduce"]) if chain.has_reduce else None,
            "TILE": block, "LOOP_STAGES": tile["INNER_STAGES"],
            "BLOCK_MIDDLE": sizes.block_middle, "BLOCK_NARROW": sizes.block_narrow, "PDL": False,
        },
    )  # fmt: skip
    return (launch,)


def _chain(problem: Problem) -> tuple[ConvChain, dict[str, Operand]]:
    """The attributes, and the links' own tensors by their names."""
    chain = problem.attributes.expect(ConvChain)
    return chain, links.tensors(chain.links, problem.inputs)


def launch_for_cost_model(problem: Problem, tile: Config) -> Launch:
    """What the cost model needs to know of the launch that a configuration would become."""
    wide = problem.outputs[0].shape[1]
    return tiles.launch_for_cost_model(_sizes(problem), tile, wide, _l2_bytes(problem, tile))


def _l2_bytes(problem: Problem, tile: Config) -> int:
    """What one program reads: its pixels of every link, all weights, and the residual."""
    (chain, own), inputs, y = _chain(problem), problem.inputs, problem.outputs[0]
    weights = sum(own[name].spec.numel for name in links.weights(chain.links))
    _, c, r, s = own.get("w1", own["w2"]).shape
    channels = r * s * c
    if chain.shortcut is not None:
        beside = own["s"].shape[1]
        steps = -(-y.shape[1] // tile["BLOCK_N"]) if beside > tile["BLOCK_SHORTCUT"] else 1
        channels += steps * beside
    residuals = inputs[links.slots(chain.links).operands["expand"]]
    channels += sum(y.shape[1] for o in residuals if o.spec.numel == y.spec.numel)
    return (tile["BLOCK_M"] * channels + weights) * inputs[0].spec.dtype.itemsize


def _sizes(problem: Problem) -> tiles.Sizes:
    (chain, own), x, y = _chain(problem), problem.inputs[0], problem.outputs[0]
    return tiles.Sizes(
        rows=y.spec.numel // y.shape[1],
        channels=x.shape[1],
        middle=own["w2"].shape[1],
        narrow=problem.outputs[1].shape[1] if chain.has_reduce else 0,
        shortcut=own["s"].shape[1] if "s" in own else 0,
        taps=math.prod(own["w1"].shape[2:]) if "w1" in own else 0,
        dtype=x.spec.dtype,
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    yield from tiles.configs(_sizes(problem), target)
    yield from hopper.configs(problem, target)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    if core.uses_core(tile):
        return hopper.legal(problem, tile, target)
    return tiles.legal(_sizes(problem), tile, target)


def crowded(problem: Problem, tile: Config, target: Target) -> str | None:
    if core.uses_core(tile):
        return None
    return tiles.crowded(_sizes(problem), tile, target)


def default(problem: Problem, target: Target) -> Config:
    """The fastest by the model; where none is legal any, of which `legal` tells why."""

    def launch_of(tile: Config) -> Launch:
        if core.uses_core(tile):
            return hopper.launch(problem, tile, target)
        return launch_for_cost_model(problem, tile)

    found, flops = list(hopper.configs(problem, target)), cost(problem).flops
    return core.faster(problem, target, _plain(problem, target), found, launch_of, flops)


@lru_cache(maxsize=4096)
def _plain(problem: Problem, target: Target) -> Config:
    sizes = _sizes(problem)
    if target.name == "interpreter":
        return tiles.interpreter_tile(sizes)
    return choice.choose(
        tiles.configs(sizes, target), lambda tile: launch_for_cost_model(problem, tile),
        choice.Work.of(problem, cost(problem).flops), target,
        crowded=lambda tile: tiles.crowded(sizes, tile, target),
        default=tiles.any_tile(sizes),
    )  # fmt: skip


@counted
def cost(problem: Problem) -> int:
    """The products of all links; t is neither written nor read, y is not read."""
    (chain, own), y = _chain(problem), problem.outputs[0]
    products = sum(own[name].spec.numel for name in links.weights(chain.links))
    return 2 * y.spec.numel // y.shape[1] * products


OP = Op(
    "conv_chain", ConvChain, infer, reference, launches, cost, configs, default, legal, crowded,
    # Mostly positive: an intermediate that is rounded to the other side, as the order of a sum
    # decides, means nothing beside a result that cancels.
    input_range=(-1.0, 3.0), packs=lambda chain: links.packs(chain.links), takes_epilogue=False,
)  # fmt: skip
