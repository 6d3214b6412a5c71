"""conv_pool: a convolution and the 2x2 pooling of its result in one kernel.

    y = pool2x2(F(conv2d(B(x), w)))

x: (N, C, H, W) NHWC; w: (K, C, R, S), a constant packed as conv2d packs it; y: (N, K, P', Q') NHWC,
where P' = P/2, rounded as the pooling rounds, Q' likewise. B and F are chains of pointwise stages;
the pooling is the maximum or the average. fp32 from the convolution on, rounded once at the end.

Rows of an implicit matrix product may be output pixels in any order. Here they come window by
window (`tile/space.py`), the four members where one thread holds them: the window is reduced
without exchanging anything between threads, nothing is computed twice, and only a quarter of the
pixels is written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from ..contract import epilogue as ep
from ..contract.op import Config, Launch, Op, Problem, Target, TensorSpec, counted
from ..hopper import core
from ..pooling import pool_window
from ..pooling.pool_window import AvgPool2d, MaxPool2d
from ..tile import choice, finish, space
from . import conv_tile
from .conv_tile import StagedConv

PAIR = (2, 2)
# max(f(a), f(b)) = f(max(a, b)), NaN included; adding a number is not among them: inf - inf is NaN.
MONOTONE = ("relu", "clamp", "sigmoid", "tanh", "hardsigmoid")


@dataclass(frozen=True)
class ConvPool(StagedConv):
    """The convolution with its stages, and the pooling of their result."""

    pool: MaxPool2d | AvgPool2d = field(default_factory=lambda: MaxPool2d(PAIR, PAIR))

    def unsupported(self, pixels: tuple[int, ...]) -> str | None:
        """Why the kernel cannot pool a convolution's result of that height and width, or None."""
        conv, pool = self.conv, self.pool
        if conv.groups != 1:
            return f"the convolution has {conv.groups} groups; the kernel takes groups=1"
        for name, value, only in (
            ("window", pool.kernel, PAIR),
            ("stride", pool.stride, PAIR),
            ("dilation", pool.dilation, (1, 1)),
            ("padding", pool.padding, (0, 0)),
        ):
            if value != only:
                return f"the pooling's {name} is {value[0]}x{value[1]}, not {only[0]}x{only[1]}"
        odd = any(size % 2 for size in pixels)
        if isinstance(pool, AvgPool2d) and pool.ceil_mode and odd:
            return f"averages over windows that overhang {pixels[0]}x{pixels[1]} pixels (ceil_mode)"
        return None


def infer(attributes: ConvPool, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    result = conv_tile.result_of("conv_pool", attributes, inputs)
    pool = attributes.pool
    return pool_window.infer(pool_window.name_of(pool), pool, (result,))


def reference(attributes: ConvPool, *tensors: torch.Tensor) -> torch.Tensor:
    return pool_window.pooled(attributes.pool, conv_tile.reference(attributes, tensors))


def is_monotone(stage: ep.Stage) -> bool:
    """Whether the maximum may be taken before the stage instead of after it."""
    if stage.name == "leaky_relu":
        return stage.parameters[0] >= 0
    return stage.name in MONOTONE


def split_stages(attributes: ConvPool) -> tuple[ep.Epilogue, ep.Epilogue]:
    """The stages between convolution and pooling that stay there, and those that may follow the
    pooling, where they are a quarter of the work; the divisor of an average is among the latter."""
    stages, pool = attributes.stages, attributes.pool
    if isinstance(pool, AvgPool2d):
        return stages, (ep.Stage("div", literal=float(pool.divisor_override or 4)),)
    keep = len(stages)
    while keep and is_monotone(stages[keep - 1]):
        keep -= 1
    return stages[:keep], stages[keep:]


def _launch(problem: Problem, tile: Config, target: Target) -> Launch:
    """Of the tile kernel, or the Hopper core's where the configuration says so."""
    attributes = problem.attributes.expect(ConvPool)
    result = conv_tile.result(problem)
    stay, move = split_stages(attributes)
    return conv_tile.launch(
        problem, tile, target, space.of_windows(result, tile["BLOCK_M"], problem.output.spec), stay,
        result, finish.pool_windows,
        maximum=isinstance(attributes.pool, MaxPool2d),
        before=move,
        l2_bytes=conv_tile.l2_bytes(problem, tile["BLOCK_M"], tile["BLOCK_N"], result),
        instructions=tile["BLOCK_M"] * tile["BLOCK_N"],
    )  # fmt: skip


def _size(problem: Problem) -> choice.Size:
    n, _, p, q = problem.output.shape
    return conv_tile.size_of(problem, 4 * n * p * q)


def _flops(problem: Problem) -> int:
    """Of the products of the pixels that are pooled."""
    return 2 * 4 * problem.output.spec.numel * math.prod(problem.inputs[1].shape[1:])


configs, default, legal = core.beside(choice.of_product(_size), _launch)
OP = Op(
    "conv_pool", ConvPool, infer, reference,
    lambda problem, tile, target: (_launch(problem, tile, target),), counted(_flops), configs,
    default, legal,
    packs=lambda attributes: {1: conv_tile.pack},
)  # fmt: skip
