"""squeeze_excite: the gate of a squeeze-and-excitation block in one kernel.

    s = mean of x over its pixels
    g = E(W2 · F(W1 · s))          one number per image and channel

x: (N, C, H, W) NHWC in memory; w1: (D, C, 1, 1), w2: (C, D, 1, 1), g: (N, C, 1, 1), as of 1x1
convolutions, or w1: (D, C), w2: (C, D), g: (N, C), as of linear layers. fp32 throughout: s and the
hidden vector are never rounded. Scaling x by g is somebody else's prologue or a kernel of its own.

Source: Hu et al., Squeeze-and-Excitation Networks, 2018.

A program is one image, all channels in one tile. It adds up blocks of pixels, then walks the hidden
units a block at a time: a row of W1 gives the unit, a column of W2 spreads it. Separate kernels
would be three dependent launches that leave a GPU idle, two of them products with N rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract import op
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, Y
from ..contract.spec import Layout, TensorSpec
from ..tile.finish import put
from ..tile.geometry import Image, tile_launch
from . import links
from .links import Link

MOST_CHANNELS = 4096
"""Channels that one tile holds: 8 per thread at 16 warps."""


@dataclass(frozen=True)
class SqueezeExcite(Attributes):
    """The stages F after W1, its bias and activation. Inputs: x, w1, w2, operands of F."""

    after_squeeze: ep.Epilogue = ()

    @property
    def links(self) -> tuple[Link, ...]:
        """One, with both weights: the other product is followed by the epilogue."""
        return (Link("w1", ("w1", "w2"), self.after_squeeze),)


def _hidden(inputs: tuple[TensorSpec, ...]) -> TensorSpec:
    """The spec of W1 · s."""
    x, w1 = inputs[:2]
    shape = (x.shape[0], w1.shape[0], *(1 for _ in w1.shape[2:]))
    layout = Layout.NHWC if len(shape) == 4 else Layout.DENSE
    return TensorSpec(shape, x.dtype, layout, x.batch)


def infer(attributes: SqueezeExcite, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, C, 1, 1), or (N, C) where the weights are those of linear layers."""
    links.check_count("squeeze_excite", attributes.links, inputs)
    x, w1, w2, *operands = inputs
    if x.rank != 4 or min(x.shape[2:]) < 1:
        raise InvalidInputError(f"squeeze_excite: expected x (N,C,H,W) with pixels, got {x}")
    ones = tuple(1 for _ in w1.shape[2:])
    channels, hidden = x.shape[1], w1.shape[0] if w1.shape else 0
    fitting = w1.shape == (hidden, channels, *ones) and w2.shape == (channels, hidden, *ones)
    if w1.rank not in (2, 4) or not fitting:
        raise InvalidInputError(
            f"squeeze_excite: expected w1 (D,{channels}[,1,1]) and w2 ({channels},D[,1,1]), got "
            f"{w1} and {w2}"
        )
    t = _hidden(inputs)
    links.check_operands("squeeze_excite", "w1", operands, t)
    return (t.with_(shape=(x.shape[0], channels, *ones)),)


def reference(
    attributes: SqueezeExcite,
    x: torch.Tensor,
    w1: torch.Tensor,
    w2: torch.Tensor,
    *operands: torch.Tensor,
) -> torch.Tensor:
    ones = (1,) * (w1.dim() - 2)
    squeezed = x.mean((2, 3)) @ w1.flatten(1).t()
    squeezed = squeezed.reshape(*squeezed.shape, *ones)
    excited = ep.apply_reference(attributes.after_squeeze, squeezed, operands)
    gate = excited.flatten(1) @ w2.flatten(1).t()
    return gate.reshape(*gate.shape, *ones)


@triton.jit
def squeeze_excite_kernel(
    x, w1, w2, y, extras, m, IMAGE: tl.constexpr, HIDDEN: tl.constexpr,
    AFTER_SQUEEZE: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr, BLOCK_HIDDEN: tl.constexpr,
):  # fmt: skip
    # m counts images, one per program; w1 and w2 are both (HIDDEN, C).
    C: tl.constexpr = IMAGE.C
    PIXELS: tl.constexpr = IMAGE.H * IMAGE.W
    row = tl.program_id(0) + tl.arange(0, 1)
    channels = tl.arange(0, BLOCK_C)
    exists = channels < C
    row_mask = row < m
    if TILE.wide:
        row = row.to(tl.int64)
    first = x + IMAGE.offset + (row * (PIXELS * IMAGE.row_stride))[:, None] + channels[None, :]
    total = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
    for start in range(0, PIXELS, BLOCK_PIXELS):
        pixels = start + tl.arange(0, BLOCK_PIXELS)
        inside = (pixels < PIXELS)[:, None] & exists[None, :]
        tile = first + (pixels * IMAGE.row_stride)[:, None]
        total += tl.load(tile, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / PIXELS
    # Every lane keeps its own part of the sum over hidden units until the end.
    partial = tl.zeros((BLOCK_HIDDEN, BLOCK_C), tl.float32)
    for start in range(0, HIDDEN, BLOCK_HIDDEN):
        units = start + tl.arange(0, BLOCK_HIDDEN)
        known = units < HIDDEN
        tile = (units * C)[:, None] + channels[None, :]
        mask = known[:, None] & exists[None, :]
        down = tl.load(w1 + tile, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(w2 + tile, mask=mask, other=0.0).to(tl.float32)
        hidden = tl.sum(down * mean[None, :], axis=1)[None, :]
        hidden = AFTER_SQUEEZE(hidden, row, units, row_mask, known, extras)
        # Units outside the layer must stay zero whatever the stages made of zero.
        hidden = tl.where(known[None, :], hidden, 0.0)
        partial += up * tl.reshape(hidden, (BLOCK_HIDDEN, 1))
    gate = tl.sum(partial, axis=0)[None, :]
    put(gate, y, row, row_mask, channels, exists, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes = problem.attributes.expect(SqueezeExcite)
    hidden = _hidden(tuple(operand.spec for operand in problem.inputs))
    refs = op.operand_refs(problem)
    bound = links.bind(attributes.links, problem.inputs, {"w1": hidden}, refs)
    n, channels, pixels, units = _sizes(problem)
    launch = tile_launch(
        problem, tile, squeeze_excite_kernel,
        constexprs={
            "IMAGE": Image.of(problem.inputs[0]), "HIDDEN": units,
            "AFTER_SQUEEZE": bound.functions["w1"], "BLOCK_C": op.power_of_two(channels),
            **dict(tile.blocks),
        },
        pointers={**bound.tensors, "y": Y},
        extras=bound.extras[len(refs) :],
        rows=n,
        columns=1,
        l2_bytes=(pixels + 2 * units) * channels * problem.inputs[0].spec.dtype.itemsize,
        # A load serves eight elements; conversion and addition, or conversion and multiplication.
        instructions=(2 * pixels + 4 * units) * op.power_of_two(channels),
        steps=-(-pixels // tile["BLOCK_PIXELS"]) + -(-units // tile["BLOCK_HIDDEN"]),
    )  # fmt: skip
    return (launch,)


def _sizes(problem: Problem) -> tuple[int, int, int, int]:
    """Images, channels, pixels of an image, hidden units."""
    n, c, h, width = problem.inputs[0].shape
    return n, c, h * width, problem.inputs[1].shape[0]


def _tile(problem: Problem, warps: int, per_thread: int) -> Config:
    """Blocks of pixels and of hidden units with that many elements per thread."""
    _, channels, pixels, units = _sizes(problem)
    most = max(1, 32 * warps * per_thread // op.power_of_two(channels))
    sizes = {"PIXELS": pixels, "HIDDEN": units}
    blocks = {f"BLOCK_{name}": min(most, op.power_of_two(size)) for name, size in sizes.items()}
    return op.config(warps, 1, **blocks)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """4 to 16 warps with 8 to 32 elements per thread."""
    for warps in (4, 8, 16):
        for per_thread in (8, 16, 32):
            tile = _tile(problem, warps, per_thread)
            if legal(problem, tile, target) is None:
                yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    channels = _sizes(problem)[1]
    if target.is_gpu and channels > MOST_CHANNELS:
        return f"{channels} channels do not fit one tile (at most {MOST_CHANNELS})"
    return None


def default(problem: Problem, target: Target) -> Config:
    """32 elements per thread; as many warps as have something to read."""
    _, channels, pixels, units = _sizes(problem)
    if target.name == "interpreter":
        return _tile(problem, 1, 1 << 15)
    elements = op.power_of_two(channels) * max(pixels, units)
    warps = 16 if elements >= 1 << 16 else 8 if elements >= 1 << 13 else 4
    return _tile(problem, warps, 32)


@op.counted
def cost(problem: Problem) -> int:
    """The mean, and two products with one row per image."""
    n, channels, pixels, units = _sizes(problem)
    return n * channels * (pixels + 4 * units)


OP = Op(
    "squeeze_excite", SqueezeExcite, infer, reference, launches, cost, configs, default, legal,
    # Not centred on zero: an error relative to a mean that cancels means nothing.
    input_range=(-1.0, 2.0),
    # Both weights (D, C), so that neighbouring lanes read neighbouring channels.
    packs=lambda attributes: {
        1: lambda _, w: w.flatten(1).contiguous(), 2: lambda _, w: w.flatten(1).t().contiguous(),
    },
)  # fmt: skip
