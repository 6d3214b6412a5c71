"""A convolution as one tile of an implicit matrix product, for kernels that do more than store it.

    acc[i, j] = sum_{r,s,c} B(x)[n_i, c, p_i·sh − top + r·dh, q_i·sw − left + s·dw] w[k_j, c, r, s]

x: (N, C, H, W) NHWC in memory; w: (K, C, R, S), a constant packed as conv2d packs it; fp32
accumulation; B is a chain of pointwise stages that see no single pixels. The output pixels of a
tile are any, in any order: a kernel chooses them so that those it combines afterwards lie where
it wants them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import Attributes, Config, Problem, Ref
from ..contract.spec import TensorSpec
from ..convolution import conv2d
from ..tile import choice, conv_geometry
from ..tile.conv_geometry import Conv2d


@dataclass(frozen=True)
class StagedConv(Attributes):
    """A convolution, the stages on its input and those on its result.

    Inputs: x, w, operands of `before` (one number per channel of x, or per image and channel where
    the convolution has stride 1 and no padding), operands of `stages`.
    """

    conv: Conv2d = field(default_factory=Conv2d)
    before: ep.Epilogue = ()
    stages: ep.Epilogue = ()


def result_of(name: str, attributes: StagedConv, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
    """The spec of the convolution's result, stages included.

    Raises: InvalidInputError for a wrong number of inputs or an operand that does not fit.
    """
    first, last = (ep.operand_count(s) for s in (attributes.before, attributes.stages))
    if len(inputs) != 2 + first + last:
        raise InvalidInputError(f"{name}: expected {2 + first + last} inputs, got {len(inputs)}")
    (result,) = conv_geometry.infer(attributes.conv, inputs[:2])
    for operand in inputs[2 : 2 + first]:
        if not is_per_channel(operand, inputs[0]) and not (
            attributes.conv == Conv2d() and is_per_image(operand, inputs[0])
        ):
            raise InvalidInputError(
                f"{name}: {operand}, read before the convolution, is not one number per channel "
                f"of {inputs[0]}"
            )
    for operand in inputs[2 + first :]:
        if not ep.broadcasts(operand, result):
            raise InvalidInputError(
                f"{name}: {operand}, read after the convolution, does not broadcast to {result}"
            )
    return result


def is_per_channel(operand: TensorSpec, x: TensorSpec) -> bool:
    """Whether a tensor broadcasts to x and is the same for all its pixels."""
    sizes = (1,) * (x.rank - operand.rank) + operand.shape
    return ep.broadcasts(operand, x) and operand.numel == sizes[1]


def is_per_image(operand: TensorSpec, x: TensorSpec) -> bool:
    """Whether a tensor broadcasts to x and is the same for all pixels of an image."""
    return ep.broadcasts(operand, x) and operand.rank == 4 and operand.shape[2:] == (1, 1)


def reference(attributes: StagedConv, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The convolution and its stages by torch."""
    x, w, *operands = tensors
    first = ep.operand_count(attributes.before)
    x = ep.apply_reference(attributes.before, x, tuple(operands[:first]))
    y = conv_geometry.reference(attributes.conv, x, w)
    return ep.apply_reference(attributes.stages, y, tuple(operands[first:]))


@triton.jit
def convolve(
    x,
    w,
    image,
    p,
    q,
    row_mask,
    columns,
    column_mask,
    extras,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    BY_TAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc: fp32 [BLOCK_M, BLOCK_N], zero in masked rows; without B's share of them.

    image (64 bits wide where offsets are), p, q: [BLOCK_M]; columns: output channels.
    """
    top = p * STRIDE_H - TOP
    left = q * STRIDE_W - LEFT
    corner = (image * H + top) * WIDTH + left
    # Masked rows get a position that no tap brings inside the image: one mask serves both.
    top = tl.where(row_mask, top, -1048576)
    depth = tl.arange(0, BLOCK_K)
    x_corner = (corner * X_PITCH)[:, None]
    w_tile = w + (columns * (R * S * C))[:, None] + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BY_TAP:
        # One loop over taps and channel blocks: the pipeliner makes asynchronous copies of it.
        blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
        x_tile = x_corner + depth[None, :]
        for step in range(R * S * blocks):
            # A single tap has nothing to divide: its mask then leaves the loop.
            tap = step // blocks if R * S > 1 else 0
            start = (step % blocks if R * S > 1 else step) * BLOCK_K
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            inside = ((top + r).to(tl.uint32, bitcast=True) < H) & (
                (left + s).to(tl.uint32, bitcast=True) < WIDTH
            )
            channels = start + depth
            a_mask = inside[:, None]
            b_mask = column_mask[:, None]
            if C % BLOCK_K != 0:
                a_mask = a_mask & (channels < C)[None, :]
                b_mask = b_mask & (channels < C)[None, :]
            x_step = x + X_OFFSET + ((r * WIDTH + s) * X_PITCH + start)
            a = tl.load(x_step + x_tile, mask=a_mask, other=0.0)
            b = tl.load(w_tile + (tap * C + start), mask=b_mask, other=0.0)
            if PROLOGUE is not None:
                # The border is zero after the prologue, not before it.
                value = PROLOGUE(a.to(tl.float32), corner, channels, inside, channels < C, extras)
                live = inside[:, None] & (channels < C)[None, :]
                a = tl.where(live, value, 0.0).to(a.dtype)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        # Few channels: the inner dimension is (tap, channel) pairs.
        for start in range(0, R * S * C, BLOCK_K):
            index = start + depth
            tap = index // C
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            inside = (
                ((top[:, None] + r[None, :]).to(tl.uint32, bitcast=True) < H)
                & ((left[:, None] + s[None, :]).to(tl.uint32, bitcast=True) < WIDTH)
                & (index < R * S * C)[None, :]
            )
            offset = (r * WIDTH + s) * X_PITCH + index % C
            a = tl.load(x + X_OFFSET + x_corner + offset[None, :], mask=inside, other=0.0)
            b_mask = column_mask[:, None] & (index < R * S * C)[None, :]
            b = tl.load(w_tile + start, mask=b_mask, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@dataclass(frozen=True)
class Chains:
    """The generated functions around a convolution, and the tensors they read: the first extras."""

    prologue: ep.GeneratedFunction | None
    stages: ep.GeneratedFunction
    extras: tuple[Ref, ...]


def chains(problem: Problem, stages: ep.Epilogue, result: TensorSpec) -> Chains:
    """`before` over the channels of x, and `stages` over the pixels of the result as rows.

    stages: those of the attributes, or their first ones without which no operand is read.
    """
    attributes = problem.attributes
    assert isinstance(attributes, StagedConv)
    x, _, *operands = problem.inputs
    first = ep.operand_count(attributes.before)
    prologue = None
    if attributes.before:
        reads = tuple(ep.access(operand, x.spec) for operand in operands[:first])
        sizes = ep.memory_sizes(x.spec)
        prologue = ep.generate(attributes.before, reads, sizes, name="prologue")
    reads = tuple(ep.access(operand, result) for operand in operands[first:])
    function = ep.generate(stages, reads, ep.memory_sizes(result), first, name="stages")
    extras = tuple(Ref("input", 2 + index) for index in range(len(operands)))
    return Chains(prologue, function, extras)


def constants(problem: Problem, chains: Chains) -> dict[str, Any]:
    """Compile-time constants of a kernel around `convolve`, but for its tile."""
    attributes = problem.attributes
    assert isinstance(attributes, StagedConv)
    conv, x, (_, c, r, s) = attributes.conv, problem.inputs[0], problem.inputs[1].shape
    return {
        "H": x.shape[2], "WIDTH": x.shape[3], "C": c, "R": r, "S": s,
        "STRIDE_H": conv.stride[0], "STRIDE_W": conv.stride[1],
        "TOP": conv.padding[0], "LEFT": conv.padding[2],
        "DILATION_H": conv.dilation[0], "DILATION_W": conv.dilation[1],
        "X_PITCH": x.pitch, "X_OFFSET": x.offset,
        "PROLOGUE": chains.prologue, "STAGES": chains.stages,
        "PRECISION": choice.dot_precision(problem, c * r * s),
        "WIDE": problem.is_wide,
        "BY_TAP": runs_by_tap(problem),
    }  # fmt: skip


def runs_by_tap(problem: Problem) -> bool:
    """Whether the loop goes over blocks of channels, which is all that a prologue can be given."""
    attributes = problem.attributes
    assert isinstance(attributes, StagedConv)
    _, c, r, s = problem.inputs[1].shape
    return bool(attributes.before) or conv2d.runs_by_tap(c, r * s)


def size_of(problem: Problem, rows: int) -> choice.Size:
    """The matrix product for `rows` pixels, as `gemm` chooses tiles for it."""
    k, c, r, s = problem.inputs[1].shape
    by_tap = runs_by_tap(problem)
    depth = c if by_tap else c * r * s
    dtype = problem.inputs[0].spec.dtype
    return choice.Size(rows, k, depth, dtype, gathers=not by_tap, taps=r * s)


def step_instructions(problem: Problem, tile: Config) -> int:
    """What a warp issues in a step beside the products; as `gemm` counts it."""
    _, _, r, s = problem.inputs[1].shape
    return choice.step_instructions(tile, problem.inputs[0].spec.dtype, r * s)


def l2_bytes(problem: Problem, rows: int, columns: int, result: TensorSpec) -> int:
    """What a program of that many pixels and channels reads: both operand tiles for all terms of
    its sums, and its part of the tensors that stages read in full; those of the epilogue are
    smaller."""
    _, c, r, s = problem.inputs[1].shape
    full = sum(operand.spec.numel == result.numel for operand in problem.inputs[2:])
    elements = c * r * s * (rows + columns) + full * rows * columns
    return elements * problem.inputs[0].spec.dtype.itemsize


def pack(attributes: StagedConv, w: torch.Tensor) -> torch.Tensor:
    """As conv2d packs it."""
    return conv2d.pack(attributes.conv, w)
