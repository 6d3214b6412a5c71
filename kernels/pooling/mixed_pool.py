"""mixed_pool2d: a blend of the maximum and the average of every window.

y[n,c,p,q] = a[c]·max(r,s) x[n,c,h,w] + b[c]·mean(r,s) x[n,c,h,w], h = p·sh + r and w = q·sw + s;
with b = 1 − a the mixed pooling of C.-Y. Lee, P. Gallagher, Z. Tu, "Generalizing pooling functions
in CNNs" (2016). NaN wins, as in both poolings.

x: (N, C, H, W) NHWC in memory; a and b: one number, or one per channel as (C, 1, 1) or (1, C, 1, 1)
-> y: (N, C, P, Q) NHWC; fp32 inside. One pass over the image instead of two, and neither pooled
image is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import scalars
from ..contract.op import Config, Launch, Op, Operand, Problem, Target, TensorSpec, counted
from ..tile.finish import put
from ..tile.geometry import tile_launch
from ..tile.space import output_tile
from .pool_kernel import image_windows
from .pool_window import InnerWindow, windows
from .pool_window import infer as infer_window
from .tiles import MOST_UNROLLED_TAPS, Tiles, unrolled_taps


@dataclass(frozen=True)
class MixedPool2d(InnerWindow):
    """The window and its stride as (vertical, horizontal)."""


def is_weight(spec: TensorSpec, channels: int) -> bool:
    """Whether a tensor is one number, or one per channel of images."""
    return spec.numel == 1 or spec.shape in ((channels, 1, 1), (1, channels, 1, 1))


def infer(attributes: MixedPool2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """P = floor((H - R) / sh) + 1, Q likewise."""
    if len(inputs) != 3:
        raise InvalidInputError(f"mixed_pool2d: expected x, a and b, got {len(inputs)} tensors")
    x, *weights = inputs
    specs = infer_window("mixed_pool2d", attributes, (x,))
    for weight in weights:
        if not is_weight(weight, x.shape[1]) or weight.batch is not None:
            raise InvalidInputError(
                f"mixed_pool2d: expected one number or {x.shape[1]}, one per channel and without a "
                f"batch, got {weight}"
            )
    return specs


def reference(
    attributes: MixedPool2d, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    window = (attributes.kernel, attributes.stride)
    return a * F.max_pool2d(x, *window) + b * F.avg_pool2d(x, *window)


@triton.jit
def blended(most, total, value, mask):
    """Maximum and sum of a window after one more element."""
    value = value.to(tl.float32)
    return scalars.maximum(most, tl.where(mask, value, float("-inf"))), total + value


@triton.jit
def mixed_pool_kernel(
    x, a, b, y, extras, m,
    WINDOWS: tl.constexpr, A: tl.constexpr, B: tl.constexpr, UNROLL: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    S: tl.constexpr = WINDOWS.width.taps
    TAPS: tl.constexpr = WINDOWS.height.taps * S
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    mask = row_mask[:, None] & column_mask[None, :]
    _, _, corner = image_windows(rows, WINDOWS)
    base = x + WINDOWS.offset + (corner * WINDOWS.row_stride)[:, None] + columns[None, :]
    most = tl.full((M, N), float("-inf"), tl.float32)
    total = tl.zeros((M, N), tl.float32)
    if UNROLL:
        for tap in tl.static_range(TAPS):
            offset = (tap // S * WINDOWS.width.size + tap % S) * WINDOWS.row_stride
            most, total = blended(most, total, tl.load(base + offset, mask=mask, other=0.0), mask)
    else:
        for tap in range(TAPS):
            offset = (tap // S * WINDOWS.width.size + tap % S) * WINDOWS.row_stride
            most, total = blended(most, total, tl.load(base + offset, mask=mask, other=0.0), mask)
    for_most = tl.load(a + A.offset + columns * A.step, mask=column_mask, other=0.0)
    for_mean = tl.load(b + B.offset + columns * B.step, mask=column_mask, other=0.0)
    mean = total / TAPS
    acc = for_most.to(tl.float32)[None, :] * most + for_mean.to(tl.float32)[None, :] * mean
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


class Weight(NamedTuple):
    """Elements from the number of one channel to that of the next, and before the first."""

    step: int
    offset: int

    @staticmethod
    def of(weight: Operand) -> Weight:
        return Weight(0 if weight.spec.numel == 1 else weight.strides[-3], weight.offset)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    _, a, b = problem.inputs
    launch = tile_launch(
        problem, tile, mixed_pool_kernel,
        constexprs={
            "WINDOWS": windows(problem), "A": Weight.of(a), "B": Weight.of(b),
            "UNROLL": windows(problem).taps <= MOST_UNROLLED_TAPS,
        },
    )  # fmt: skip
    return (launch,)


TILES = Tiles(
    (256, 512, 1024, 2048),
    (32, 64, 128),
    usual=lambda problem: 1024 if windows(problem).taps <= 9 else 512,
    held=unrolled_taps,
    most=100,
)


@counted
def cost(problem: Problem) -> int:
    """A comparison and an addition per tap."""
    return 2 * windows(problem).taps * problem.output.spec.numel


OP = Op("mixed_pool2d", MixedPool2d, infer, reference, launches, cost, **TILES.space)
