"""conv_sum: y = E(conv2d(x1, w1) + conv2d(x2, w2)), two convolutions into one accumulator.

x1: (N, C1, H1, W1), x2: (N, C2, H2, W2), NHWC; w1: (K, C1, R1, S1), w2: (K, C2, R2, S2), constants
packed as conv2d packs them; y: (N, K, P, Q) NHWC. Each convolution has its own stride, padding and
dilation; both must give the same (N, K, P, Q). fp32 accumulation, rounded once, where separate
kernels round one of the two results before they add it. Biases are an epilogue.

The end of a residual block whose shortcut is a 1x1 convolution (He et al., 2016, option B) is one
kernel this way, and the shortcut's result is never in memory. Implicit GEMM, as conv2d: two loops
over taps and channel blocks, one after the other, share the accumulator and the tile sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...errors import InvalidInputError
from ..contract.op import Attributes, Config, Launch, Op, Problem, Ref, Target, config, counted
from ..contract.spec import TensorSpec
from ..convolution import conv2d
from ..tile import choice, conv_geometry, engine, source, space
from ..tile.conv_geometry import Conv2d


@dataclass(frozen=True)
class ConvSum(Attributes):
    """The geometry of both convolutions; neither has groups."""

    first: Conv2d = field(default_factory=Conv2d)
    second: Conv2d = field(default_factory=Conv2d)


def infer(attributes: ConvSum, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    x1, w1, x2, w2 = inputs
    if attributes.first.groups != 1 or attributes.second.groups != 1:
        raise InvalidInputError("conv_sum: expected convolutions without groups")
    (first,) = conv_geometry.infer(attributes.first, (x1, w1))
    (second,) = conv_geometry.infer(attributes.second, (x2, w2))
    if first != second:
        raise InvalidInputError(f"conv_sum: expected equal results, got {first} and {second}")
    return (first,)


def reference(attributes: ConvSum, *tensors: torch.Tensor) -> torch.Tensor:
    first = conv_geometry.reference(attributes.first, *tensors[:2])
    return first + conv_geometry.reference(attributes.second, *tensors[2:])


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the tile kernel; every program computes one tile of both products, or its share
    of each."""
    attributes, size = problem.attributes.expect(ConvSum), _size(problem)
    x1, w1, x2, w2 = problem.inputs
    launch = engine.launch(
        problem, tile, target, space.of_pixels(problem.output.spec, tile["BLOCK_M"]),
        source.of_convolution(attributes.first, x1, w1.shape),
        second=source.of_convolution(attributes.second, x2, w2.shape),
        pointers={"x2": Ref("input", 2), "w2": Ref("input", 3)},
        precision=choice.dot_precision(problem, size.depth),
        split=choice.split_of(tile),
        **_modelled(problem, tile),
    )  # fmt: skip
    return (launch,)


def _modelled(problem: Problem, tile: Config) -> dict[str, Any]:
    """What the launch says to the cost model, and its scratch."""
    split, costs = choice.split_of(tile), choice.modelled(_size(problem), tile)
    costs["l2_bytes"] = choice.l2_bytes(problem, tile, _terms(problem)) // split
    costs["steps"] = sum(-(-each.steps(tile["BLOCK_K"]) // split) for each in _products(problem))
    return costs


def _size(problem: Problem) -> choice.Size:
    """The product for the choice of a tile: the deeper convolution decides about its depth."""
    first, second = _products(problem)
    depth, taps = max(first.depth, second.depth), max(first.taps, second.taps)
    return replace(first, depth=depth, taps=taps)


def _products(problem: Problem) -> tuple[choice.Size, choice.Size]:
    n, k, p, q = problem.output.shape
    dtype = problem.inputs[0].spec.dtype
    first, second = (
        choice.Size(n * p * q, k, c, dtype, taps=r * s, splits=True)
        for _, c, r, s in (problem.inputs[slot].shape for slot in (1, 3))
    )
    return first, second


def _has_loops(problem: Problem, tile: Config) -> bool:
    """Whether some loop has a second step; without one all operands are in registers at once."""
    filters = (problem.inputs[slot].shape for slot in (1, 3))
    return any(math.prod(shape[1:]) > tile["BLOCK_K"] for shape in filters)


def default(problem: Problem, target: Target) -> Config:
    """The fastest by the model; channels in steps of 32 where a step of 64 leaves no loop.

    sm_80, 1x1 over 64 + 64 channels, 128x128 w8: 140 registers and asynchronous copies in two
    steps, 255 and none in one; with two steps sm_90 needs as many registers (128) as with one.
    """
    size = _size(problem)
    if not target.is_gpu:
        return choice.default_tile(size, target)

    tile = choice.choose(
        choice.candidates(size, target),
        lambda tile: choice.launch_for_cost_model(size, tile, **_modelled(problem, tile)),
        choice.Work.of(problem, cost(problem).flops),
        target,
        waste=lambda tile: -size.columns % tile["BLOCK_N"],
    )
    if not _has_loops(problem, tile) and tile["BLOCK_K"] > 32:
        blocks = {**dict(tile.blocks), "BLOCK_K": 32}
        return config(tile.num_warps, tile.num_stages, **blocks)
    return tile


@counted
def cost(problem: Problem) -> int:
    """Both products; neither convolution's own result is written or read."""
    return 2 * problem.output.spec.numel * _terms(problem)


def _terms(problem: Problem) -> int:
    """Products in the sum of one output."""
    return sum(problem.inputs[slot].spec.numel for slot in (1, 3)) // problem.output.shape[1]


OP = Op(
    "conv_sum", ConvSum, infer, reference, launches, cost,
    **choice.of_product(_size) | {"default": default},
    packs=lambda attributes: {slot: lambda _, w: conv2d.pack(Conv2d(), w) for slot in (1, 3)},
)  # fmt: skip
