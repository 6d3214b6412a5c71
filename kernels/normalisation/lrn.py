"""local_response_norm: every channel divided by the energy of its neighbours.

y[n,c,h,w] = x[n,c,h,w] / (k + alpha/size · sum_j x[n,j,h,w]²)^beta, over the channels j from
c − floor(size/2) to c + floor((size−1)/2) that exist; the divisor is `size` at the borders, too.

x: (N, C, H, W) NHWC in memory -> y: the same; fp32 accumulation.

Source: Krizhevsky et al., ImageNet classification with deep convolutional neural networks, 2012.

Two kernels, chosen by the tile's LANES:
- LANES = 1: every neighbour is a load shifted by some channels; takes any shape;
- LANES = 8 (4 in fp32): a thread holds 16 bytes of channels and their two neighbours in registers,
  so that x is read about once: 18 instead of 58 instructions per element. Needs aligned channels.
A product with a banded matrix would need fewer operations, but one NaN poisons the whole pixel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import op
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target
from ..contract.spec import TensorSpec, rows_and_columns
from ..tile.finish import put
from ..tile.geometry import Matrix, tile_launch
from ..tile.space import output_tile


@dataclass(frozen=True)
class LocalResponseNorm(Attributes):
    """As torch.nn.LocalResponseNorm."""

    size: int = 5
    alpha: float = 1e-4
    beta: float = 0.75
    k: float = 1.0


def infer(attributes: LocalResponseNorm, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    if x.rank != 4:
        raise InvalidInputError(f"local_response_norm: expected x (N,C,H,W), got {x}")
    if attributes.size < 1:
        raise InvalidInputError(
            f"local_response_norm: size must be positive, got {attributes.size}"
        )
    return (x,)


def reference(attributes: LocalResponseNorm, x: torch.Tensor) -> torch.Tensor:
    return F.local_response_norm(x, **vars(attributes))


@triton.jit
def scaled(value, energy, BETA: tl.constexpr):
    """value / energy^BETA."""
    if BETA == 0.75:
        # Two special-function operations; a logarithm is computed in software.
        root = tl.rsqrt(energy)
        result = value * (root * tl.sqrt(root))
    elif BETA == 0.5:
        result = value * tl.rsqrt(energy)
    elif BETA == 1.0:
        result = value / energy
    elif BETA == 0.0:
        result = value
    else:
        result = value * tl.exp2(-BETA * tl.log2(energy))
    return result


class Norm(NamedTuple):
    """y = x / (k + alpha · s)^beta, s the sum of squares from `below` channels before it to `above`
    channels after it."""

    below: int
    above: int
    alpha: float
    k: float
    beta: float

    @staticmethod
    def of(attributes: LocalResponseNorm) -> Norm:
        size, alpha, k = attributes.size, attributes.alpha / attributes.size, attributes.k
        return Norm(size // 2, (size - 1) // 2, alpha, float(k), float(attributes.beta))


@triton.jit
def normalised(value, energy, NORM: tl.constexpr):
    """A channel divided by what the sum of squares around it gives."""
    return scaled(value, NORM.k + NORM.alpha * energy, NORM.beta)


@triton.jit
def shifted_kernel(
    x, y, extras, m, X: tl.constexpr, NORM: tl.constexpr, LANES: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    mask = row_mask[:, None] & column_mask[None, :]
    pixel = x + X.offset + (rows * X.row_stride)[:, None]
    energy = tl.zeros((M, N), tl.float32)
    for shift in range(-NORM.below, NORM.above + 1):
        channels = columns + shift
        exists = (channels >= 0) & (channels < X.C)
        near = row_mask[:, None] & exists[None, :]
        value = tl.load(pixel + channels[None, :], mask=near, other=0.0).to(tl.float32)
        energy += value * value
    value = tl.load(pixel + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    acc = normalised(value, energy, NORM)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


@triton.jit
def unpack(value, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """The slices of the last axis of [ROWS, GROUPS, LANES]: free where a thread owns that axis."""
    if LANES == 8:
        even, odd = tl.split(tl.reshape(value, (ROWS, GROUPS, 2, 2, 2)))
        even_low, even_high = tl.split(even)
        odd_low, odd_high = tl.split(odd)
        v0, v4 = tl.split(even_low)
        v2, v6 = tl.split(even_high)
        v1, v5 = tl.split(odd_low)
        v3, v7 = tl.split(odd_high)
        result = (v0, v1, v2, v3, v4, v5, v6, v7)
    else:
        even, odd = tl.split(tl.reshape(value, (ROWS, GROUPS, 2, 2)))
        v0, v2 = tl.split(even)
        v1, v3 = tl.split(odd)
        result = (v0, v1, v2, v3)
    return result


@triton.jit
def pack(v, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """The inverse of `unpack`, as a tile [ROWS, GROUPS * LANES]."""
    if LANES == 8:
        even = tl.join(tl.join(v[0], v[4]), tl.join(v[2], v[6]))
        odd = tl.join(tl.join(v[1], v[5]), tl.join(v[3], v[7]))
    else:
        even = tl.join(v[0], v[2])
        odd = tl.join(v[1], v[3])
    return tl.reshape(tl.join(even, odd), (ROWS, GROUPS * LANES))


@triton.jit
def load_lanes(address, channels, live, C: tl.constexpr, LANES: tl.constexpr, OTHER: tl.constexpr):
    """A vector of channels, the one before it and the one after, as fp32."""
    near = live & (channels >= LANES) & (channels < C + LANES)
    before = tl.load(address - LANES, mask=near, other=OTHER)
    here = tl.load(address, mask=live & (channels < C), other=OTHER)
    after = tl.load(address + LANES, mask=live & (channels < C - LANES), other=OTHER)
    return before.to(tl.float32), here.to(tl.float32), after.to(tl.float32)


@triton.jit
def lane_values(before, here, after, ROWS: tl.constexpr, GROUPS: tl.constexpr, LANES: tl.constexpr):
    """The 3 * LANES neighbouring channels as a tuple."""
    return (
        unpack(before, ROWS, GROUPS, LANES)
        + unpack(here, ROWS, GROUPS, LANES)
        + unpack(after, ROWS, GROUPS, LANES)
    )


@triton.jit
def lane_energy(v, lane: tl.constexpr, BELOW: tl.constexpr, ABOVE: tl.constexpr):
    """The sum of squares around one of them."""
    energy = v[lane - BELOW] * v[lane - BELOW]
    for j in tl.static_range(lane - BELOW + 1, lane + ABOVE + 1):
        energy += v[j] * v[j]
    return energy


@triton.jit
def lanes_kernel(
    x, y, extras, m, X: tl.constexpr, NORM: tl.constexpr, LANES: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # C is a multiple of LANES, and the window reaches at most LANES channels to either side.
    M: tl.constexpr = TILE.M
    C: tl.constexpr = X.C
    GROUPS: tl.constexpr = TILE.N // LANES
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    start = tl.program_id(0) % ((C + TILE.N - 1) // TILE.N) * TILE.N
    group = start + tl.arange(0, GROUPS) * LANES
    channels = (group[:, None] + tl.arange(0, LANES)[None, :])[None, :, :]
    address = x + X.offset + (rows * X.row_stride)[:, None, None] + channels
    before, here, after = load_lanes(address, channels, row_mask[:, None, None], C, LANES, 0.0)
    v = lane_values(before, here, after, M, GROUPS, LANES)
    results = ()
    for lane in tl.static_range(LANES, 2 * LANES):
        # Tuples grow by addition: Triton has no starred elements.
        energy = lane_energy(v, lane, NORM.below, NORM.above)
        results = results + (normalised(v[lane], energy, NORM),)
    acc = pack(results, M, GROUPS, LANES)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def lanes(problem: Problem) -> int:
    """Channels in 16 bytes, or 1 where they do not line up or the window is wider than that."""
    x, attributes = problem.inputs[0], problem.attributes
    # One that is fused with a pooling is a part of its attributes.
    norm = getattr(attributes, "lrn", attributes).expect(LocalResponseNorm)
    width = 16 // x.spec.dtype.itemsize
    aligned = not any(value % width for value in (x.shape[1], x.pitch, x.offset))
    return width if aligned and norm.size // 2 <= width else 1


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the kernel that the tile's LANES chooses."""
    launch = tile_launch(
        problem, tile, shifted_kernel if tile["LANES"] == 1 else lanes_kernel,
        constexprs={
            "X": Matrix.of(problem.inputs[0]), "LANES": tile["LANES"],
            "NORM": Norm.of(problem.attributes.expect(LocalResponseNorm)),
        },
        instructions=tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"] * instructions_per_result(tile),
    )  # fmt: skip
    return (launch,)


def instructions_per_result(tile: Config) -> int:
    """Of a thread in sm_90 code: with its neighbours in registers, and without."""
    return 16 if tile["LANES"] > 1 else 58


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """512 to 2048 results per program, in both forms."""
    for count in sorted({1, lanes(problem)}):
        for tile in op.tiles_of((512, 1024, 2048), (32, 64, 128)):
            yield op.config(tile.num_warps, 1, LANES=count, **dict(tile.blocks))


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    if tile["LANES"] in (1, lanes(problem)):
        return None
    return f"{tile['LANES']} channels per thread need aligned channels and a window that fits them"


def default(problem: Problem, target: Target) -> Config:
    """1024 results per program; a pixel's channels in 16-byte pieces where they line up."""
    tile = op.tile_config(*rows_and_columns(problem.output.spec), target, elements=1024)
    blocks = dict(tile.blocks)
    count = lanes(problem)
    blocks["BLOCK_COLUMNS"] = max(blocks["BLOCK_COLUMNS"], count)
    return op.config(tile.num_warps, 1, LANES=count, **blocks)


@op.counted
def cost(problem: Problem) -> int:
    """A multiply-add per neighbour, then about 8 operations."""
    return (2 * problem.attributes.expect(LocalResponseNorm).size + 8) * problem.output.spec.numel


OP = Op(
    "local_response_norm", LocalResponseNorm, infer, reference, launches, cost, configs, default,
    legal,
    input_range=(-4.0, 4.0),
)  # fmt: skip
