"""conv_mean: a convolution and the average of its result over all pixels in one kernel.

    y[n, k] = 1 / (P·Q) · sum_{p,q} F(conv2d(B(x), w))[n, k, p, q]

x: (N, C, H, W) NHWC; w: (K, C, R, S), a constant packed as conv2d packs it; y: (N, K, 1, 1), or
(N, K) without `keepdim`. B and F are chains of pointwise stages, usually bias, residual and
activation. fp32 from the convolution on, rounded once at the end.

Global average pooling (Lin et al., Network in Network, 2014) as the end of the convolution before
it: a program owns whole images, each in a power of two of rows, and a block of channels; what is
averaged never reaches memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..contract.op import Config, Launch, Op, Problem, Target, config, counted, power_of_two
from ..contract.spec import Layout, TensorSpec
from ..hopper import core
from ..tile import choice, finish, space
from ..tile.space import Space
from . import conv_tile
from .conv_tile import StagedConv

MOST_PIXELS = 256
# (BLOCK_M, BLOCK_N, warps): an image of up to 256 pixels is one tile high; narrow ones keep the
# multiprocessors busy at batch 1.
TILES = (
    (256, 64, 8), (256, 32, 4), (256, 16, 4), (128, 128, 8), (128, 64, 4), (128, 32, 4),
    (128, 16, 4), (64, 128, 4), (64, 64, 4), (64, 32, 4), (64, 16, 4), (32, 64, 4), (32, 32, 4),
    (16, 64, 4), (16, 32, 2),
)  # fmt: skip


@dataclass(frozen=True)
class ConvMean(StagedConv):
    """The convolution with its stages, and whether the pixels stay as two dimensions of size 1."""

    keepdim: bool = True

    def unsupported(self, pixels: tuple[int, ...]) -> str | None:
        """Why the kernel cannot average a result of that height and width, or None."""
        if self.conv.groups != 1:
            return f"the convolution has {self.conv.groups} groups; the kernel takes groups=1"
        if math.prod(pixels) > MOST_PIXELS:
            shown = "x".join(map(str, pixels))
            return f"{shown} pixels do not fit one tile (at most {MOST_PIXELS})"
        return None


def infer(attributes: ConvMean, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, K, 1, 1), or (N, K)."""
    result = conv_tile.result_of("conv_mean", attributes, inputs)
    n, k = result.shape[:2]
    if attributes.keepdim:
        return (result.with_(shape=(n, k, 1, 1)),)
    return (result.with_(shape=(n, k), layout=Layout.DENSE),)


def reference(attributes: ConvMean, *tensors: torch.Tensor) -> torch.Tensor:
    return conv_tile.reference(attributes, tensors).mean((2, 3), attributes.keepdim)


def _pixels(problem: Problem) -> int:
    """Rows of the matrix product that one image takes."""
    return power_of_two(math.prod(conv_tile.result(problem).shape[2:]))


def _launch(problem: Problem, tile: Config, target: Target) -> Launch:
    """Of the tile kernel, or the Hopper core's where the configuration says so."""
    attributes, result = problem.attributes.expect(ConvMean), conv_tile.result(problem)
    n, _, p, q = result.shape
    images = tile["BLOCK_M"] // _pixels(problem)
    return conv_tile.launch(
        problem, tile, target, Space(space.images, p, q, images), attributes.stages, result,
        finish.average_images,
        rows=n,
        l2_bytes=conv_tile.l2_bytes(problem, images * p * q, tile["BLOCK_N"], result),
        instructions=2 * tile["BLOCK_M"] * tile["BLOCK_N"],
    )  # fmt: skip


def _default_tiles(problem: Problem, target: Target) -> Iterator[tuple[int, int, int]]:
    """The tiles that hold whole images, without those that may take more registers than there are
    (sm_86, 3x3 behind a prologue, 64 sums per thread and 4 warps: 252)."""
    size, pixels = _size(problem), _pixels(problem)
    short = size.dtype is torch.float32 or target.capability < 90
    for block_m, block_n, warps in TILES:
        most = 32 if short and (warps <= 4 or size.dtype is torch.float32) else 64
        if block_m % pixels == 0 and block_m * block_n // (32 * warps) <= most:
            yield block_m, block_n, warps


def _tile(m: int, n: int, k: int, warps: int, stages: int) -> Config:
    return config(warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8)


def _size(problem: Problem) -> choice.Size:
    images = problem.output.shape[0]
    return conv_tile.size_of(problem, images * _pixels(problem))


def _configs(problem: Problem, target: Target) -> Iterator[Config]:
    size = _size(problem)
    for block_m, block_n, warps in TILES:
        for block_k in (64, 32, 16):
            for stages in (3, 4, 2):
                tile = _tile(block_m, block_n, block_k, warps, stages)
                if block_k <= _deepest(size, block_m) and _legal(problem, tile, target) is None:
                    yield tile


def _deepest(size: choice.Size, block_m: int) -> int:
    """The largest BLOCK_K worth having: tall tiles of fp32 or of gathered rows take registers.

    256 rows of fp32 on sm_90: 254 registers at 32, 168 at 16; 128 rows on sm_80: 231 at 32.
    """
    widest = 64
    if size.dtype is torch.float32:
        widest = 32 if block_m <= 64 else 16
    elif size.gathers:
        widest = 32 if block_m <= 128 else 16
    return max(16, min(widest, power_of_two(size.depth)))


def _legal(problem: Problem, tile: Config, target: Target) -> str | None:
    size, pixels = _size(problem), _pixels(problem)
    if tile["BLOCK_M"] % pixels:
        return f"tiles of {tile['BLOCK_M']} pixels do not hold whole images of {pixels}"
    return choice.legal(size, tile, target)


def _default(problem: Problem, target: Target) -> Config:
    size = _size(problem)
    if target.name == "interpreter":
        return choice.interpreter_tile(size, _pixels(problem))

    tiles = (
        _tile(block_m, block_n, _deepest(size, block_m), warps, stages)
        for block_m, block_n, warps in _default_tiles(problem, target)
        for stages in (3, 2)  # Three of 256 rows are more than sm_86 has of shared memory.
    )
    fitting = (tile for tile in tiles if _legal(problem, tile, target) is None)
    return choice.fastest(size, fitting, target)


configs, default, legal = core.beside(
    {"configs": _configs, "default": _default, "legal": _legal}, _launch
)
OP = Op(
    "conv_mean", ConvMean, infer, reference,
    lambda problem, tile, target: (_launch(problem, tile, target),), counted(conv_tile.flops),
    configs, default, legal,
    # Mostly positive: an error relative to an average that cancels means nothing.
    input_range=(-1.0, 3.0), packs=lambda attributes: {1: conv_tile.pack},
)  # fmt: skip
