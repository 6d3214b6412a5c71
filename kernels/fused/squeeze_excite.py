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

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import (
    Attributes,
    Config,
    Cost,
    Launch,
    Op,
    Problem,
    Ref,
    W,
    X,
    Y,
    config,
    operand_refs,
    power_of_two,
    tensor_bytes,
)
from ..contract.spec import Layout, TensorSpec
from ..contract.targets import Target

MOST_CHANNELS = 4096
"""Channels that one tile holds: 8 per thread at 16 warps."""


@dataclass(frozen=True)
class SqueezeExcite(Attributes):
    """The stages F after W1, its bias and activation. Inputs: x, w1, w2, operands of F."""

    after_squeeze: ep.Epilogue = ()


def _hidden(inputs: tuple[TensorSpec, ...]) -> TensorSpec:
    """The spec of W1 · s."""
    x, w1 = inputs[:2]
    shape = (x.shape[0], w1.shape[0], *(1 for _ in w1.shape[2:]))
    layout = Layout.NHWC if len(shape) == 4 else Layout.DENSE
    return TensorSpec(shape, x.dtype, layout, x.batch)


def infer(attributes: SqueezeExcite, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, C, 1, 1), or (N, C) where the weights are those of linear layers."""
    expected = 3 + ep.operand_count(attributes.after_squeeze)
    if len(inputs) != expected:
        raise InvalidInputError(f"squeeze_excite: expected {expected} inputs, got {len(inputs)}")
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
    for operand in operands:
        if not ep.broadcasts(operand, t):
            raise InvalidInputError(
                f"squeeze_excite: {operand}, read after w1, does not broadcast to {t}"
            )
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
    x,
    w1,
    w2,
    y,
    extras,
    m,
    C: tl.constexpr,
    HIDDEN: tl.constexpr,
    PIXELS: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    AFTER_SQUEEZE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_HIDDEN: tl.constexpr,
):
    # m counts images, one per program; w1 and w2 are both (HIDDEN, C).
    row = tl.program_id(0) + tl.arange(0, 1)
    channels = tl.arange(0, BLOCK_C)
    exists = channels < C
    row_mask = row < m
    if WIDE:
        row = row.to(tl.int64)
    first = x + X_OFFSET + (row * (PIXELS * X_PITCH))[:, None] + channels[None, :]
    total = tl.zeros((BLOCK_PIXELS, BLOCK_C), tl.float32)
    for start in range(0, PIXELS, BLOCK_PIXELS):
        pixels = start + tl.arange(0, BLOCK_PIXELS)
        inside = (pixels < PIXELS)[:, None] & exists[None, :]
        total += tl.load(first + (pixels * X_PITCH)[:, None], mask=inside, other=0.0).to(tl.float32)
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
    gate = EPILOGUE(gate, row, channels, row_mask, exists, extras)
    address = y + Y_OFFSET + (row * Y_PITCH)[:, None] + channels[None, :]
    tl.store(address, gate.to(y.dtype.element_ty), mask=row_mask[:, None] & exists[None, :])


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of one program per image."""
    attributes = problem.attributes
    assert isinstance(attributes, SqueezeExcite)
    x, out, operands = problem.inputs[0], problem.output, problem.inputs[3:]
    refs = operand_refs(problem)
    hidden = _hidden(tuple(operand.spec for operand in problem.inputs))
    reads = tuple(ep.access(operand, hidden) for operand in operands)
    squeeze = ep.generate(
        attributes.after_squeeze, reads, ep.memory_sizes(hidden), len(refs), "after_squeeze"
    )
    n, channels, pixels, units = _sizes(problem)
    itemsize = x.spec.dtype.itemsize
    launch = Launch(
        kernel=squeeze_excite_kernel,
        pointers={"x": X, "w1": W, "w2": Ref("input", 2), "y": Y},
        extras=(*refs, *(Ref("input", 3 + index) for index in range(len(operands)))),
        rows=n,
        batch=out.spec.batch,
        block_rows=1,
        columns=1,
        constexprs={
            "C": channels,
            "HIDDEN": units,
            "PIXELS": pixels,
            "X_PITCH": x.pitch,
            "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch,
            "Y_OFFSET": out.offset,
            "AFTER_SQUEEZE": squeeze,
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, out.spec),
            "WIDE": problem.is_wide,
            "BLOCK_C": power_of_two(channels),
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=(pixels + 2 * units) * channels * itemsize,
        # A load serves eight elements; conversion and addition, or conversion and multiplication.
        instructions=(2 * pixels + 4 * units) * power_of_two(channels),
        steps=-(-pixels // tile["BLOCK_PIXELS"]) + -(-units // tile["BLOCK_HIDDEN"]),
    )
    return (launch,)


def _sizes(problem: Problem) -> tuple[int, int, int, int]:
    """Images, channels, pixels of an image, hidden units."""
    n, c, h, width = problem.inputs[0].shape
    return n, c, h * width, problem.inputs[1].shape[0]


def _tile(problem: Problem, warps: int, per_thread: int) -> Config:
    """Blocks of pixels and of hidden units with that many elements per thread."""
    _, channels, pixels, units = _sizes(problem)
    most = max(1, 32 * warps * per_thread // power_of_two(channels))
    return config(
        warps,
        1,
        BLOCK_PIXELS=min(most, power_of_two(pixels)),
        BLOCK_HIDDEN=min(most, power_of_two(units)),
    )


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
    elements = power_of_two(channels) * max(pixels, units)
    warps = 16 if elements >= 1 << 16 else 8 if elements >= 1 << 13 else 4
    return _tile(problem, warps, 32)


def cost(problem: Problem) -> Cost:
    """The mean, and two products with one row per image."""
    n, channels, pixels, units = _sizes(problem)
    read, written = tensor_bytes(problem)
    return Cost(n * channels * (pixels + 4 * units), read, written)


def packs(attributes: SqueezeExcite) -> Mapping[int, Callable[[Any, torch.Tensor], torch.Tensor]]:
    """Both weights (D, C), so that neighbouring lanes read neighbouring channels."""
    return {
        1: lambda _, w: w.flatten(1).contiguous(),
        2: lambda _, w: w.flatten(1).t().contiguous(),
    }


OP = Op(
    name="squeeze_excite",
    attributes=SqueezeExcite,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    # Not centred on zero: an error relative to a mean that cancels means nothing.
    input_range=(-1.0, 2.0),
    packs=packs,
)
