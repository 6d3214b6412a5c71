"""lrn_pool: local response normalisation and max pooling in one kernel, in either order.

    y = E(max_pool2d(local_response_norm(x)))       AlexNet (Krizhevsky et al., 2012), `lrn_first`
    y = E(local_response_norm(max_pool2d(x)))       CaffeNet, GoogLeNet's first stage

x: (N, C, H, W) NHWC in memory -> y: (N, C, P, Q) NHWC; fp32 inside, the tensor between the two is
not rounded. NaN wins a maximum, as in torch; windows without pixels give -inf.

Normalising first costs each window's pixels a normalisation of their own: 9 per output of a 3x3
window instead of 4 with stride 2; what is saved is writing and reading x's normalised twin. Pooling
first computes nothing twice but the maxima of a few neighbouring channels. As in `lrn.py` a thread
holds 16 bytes of channels and their two neighbours (LANES = 8, or 4 in fp32) where they line up,
and otherwise every neighbour is a load of its own (LANES = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, TensorSpec, counted
from ..normalisation import lrn
from ..normalisation.lrn import LocalResponseNorm
from ..pooling import pool_window
from ..pooling.pool_kernel import FAR_OUTSIDE, image_windows, in_image
from ..pooling.pool_window import MaxPool2d
from ..tile.finish import combine, put
from ..tile.geometry import tile_launch
from ..tile.space import output_tile

POOLED = 3
"""Thread instructions for one element of a window with its neighbours: 139 per output of a 3x3
window where each is normalised, and 41 where the largest is, in sm_90 code."""


@dataclass(frozen=True)
class LrnPool(Attributes):
    """The two halves, and which of them comes first."""

    lrn: LocalResponseNorm = field(default_factory=LocalResponseNorm)
    pool: MaxPool2d = field(default_factory=MaxPool2d)
    lrn_first: bool = True


def infer(attributes: LrnPool, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    if len(inputs) != 1:
        raise InvalidInputError(f"lrn_pool: expected 1 input, got {len(inputs)}")
    lrn.infer(attributes.lrn, inputs)
    return pool_window.infer("max_pool2d", attributes.pool, inputs)


def reference(attributes: LrnPool, x: torch.Tensor) -> torch.Tensor:
    if attributes.lrn_first:
        return pool_window.pooled(attributes.pool, lrn.reference(attributes.lrn, x))
    return lrn.reference(attributes.lrn, pool_window.pooled(attributes.pool, x))


@triton.jit
def lanes_kernel(
    x, y, extras, m,
    WINDOWS: tl.constexpr, NORM: tl.constexpr, LRN_FIRST: tl.constexpr, LANES: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # C is a multiple of LANES, and the window of channels reaches at most LANES to either side.
    EMPTY: tl.constexpr = float("-inf")
    M: tl.constexpr = TILE.M
    GROUPS: tl.constexpr = TILE.N // LANES
    C: tl.constexpr = OUTPUT.K
    HEIGHT: tl.constexpr = WINDOWS.height
    WIDTH: tl.constexpr = WINDOWS.width
    R: tl.constexpr = HEIGHT.taps
    S: tl.constexpr = WIDTH.taps
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    top, left, corner = image_windows(rows, WINDOWS)
    # Rows past the end get a position that no tap brings inside the image: one mask serves both.
    top = tl.where(row_mask, top, FAR_OUTSIDE)
    start = tl.program_id(0) % ((C + TILE.N - 1) // TILE.N) * TILE.N
    group = start + tl.arange(0, GROUPS) * LANES
    channels = (group[:, None] + tl.arange(0, LANES)[None, :])[None, :, :]
    base = x + WINDOWS.offset + (corner * WINDOWS.row_stride)[:, None, None] + channels
    best = ()
    for lane in tl.static_range(LANES):
        # Tuples grow by addition: Triton has no starred elements.
        best = best + (tl.full((M, GROUPS), EMPTY, tl.float32),)
    before = tl.full((M, GROUPS, LANES), EMPTY, tl.float32)
    here = before
    after = before
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            inside = in_image(top + r * HEIGHT.dilation, left + s * WIDTH.dilation, WINDOWS)
            pixel = r * HEIGHT.dilation * WIDTH.size + s * WIDTH.dilation
            address = base + pixel * WINDOWS.row_stride
            live = inside[:, None, None]
            if LRN_FIRST:
                a, b, c = lrn.load_lanes(address, channels, live, C, LANES, 0.0)
                v = lrn.lane_values(a, b, c, M, GROUPS, LANES)
                updated = ()
                for lane in tl.static_range(LANES):
                    energy = lrn.lane_energy(v, LANES + lane, NORM.below, NORM.above)
                    value = lrn.normalised(v[LANES + lane], energy, NORM)
                    value = tl.where(inside[:, None], value, EMPTY)
                    updated = updated + (combine(best[lane], value, True),)
                best = updated
            else:
                a, b, c = lrn.load_lanes(address, channels, live, C, LANES, EMPTY)
                before = combine(before, a, True)
                here = combine(here, b, True)
                after = combine(after, c, True)
    if not LRN_FIRST:
        # Channels that do not exist count as zero, not as windows without pixels.
        before = tl.where(channels >= LANES, before, 0.0)
        after = tl.where(channels < C - LANES, after, 0.0)
        v = lrn.lane_values(before, here, after, M, GROUPS, LANES)
        best = ()
        for lane in tl.static_range(LANES):
            energy = lrn.lane_energy(v, LANES + lane, NORM.below, NORM.above)
            best = best + (lrn.normalised(v[LANES + lane], energy, NORM),)
    acc = lrn.pack(best, M, GROUPS, LANES)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


@triton.jit
def shifted_kernel(
    x, y, extras, m,
    WINDOWS: tl.constexpr, NORM: tl.constexpr, LRN_FIRST: tl.constexpr, LANES: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    EMPTY: tl.constexpr = float("-inf")
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    HEIGHT: tl.constexpr = WINDOWS.height
    WIDTH: tl.constexpr = WINDOWS.width
    # The neighbouring channels are walked inside the window, or the window for every neighbour.
    taps: tl.constexpr = HEIGHT.taps * WIDTH.taps
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    top, left, corner = image_windows(rows, WINDOWS)
    top = tl.where(row_mask, top, FAR_OUTSIDE)
    base = x + WINDOWS.offset + (corner * WINDOWS.row_stride)[:, None]
    acc = tl.full((M, N), EMPTY, tl.float32)
    if LRN_FIRST:
        for tap in range(taps):
            r = tap // WIDTH.taps * HEIGHT.dilation
            s = tap % WIDTH.taps * WIDTH.dilation
            inside = in_image(top + r, left + s, WINDOWS)[:, None]
            pixel = base + (r * WIDTH.size + s) * WINDOWS.row_stride
            energy = tl.zeros((M, N), tl.float32)
            for shift in range(-NORM.below, NORM.above + 1):
                near = columns + shift
                mask = inside & ((near >= 0) & (near < OUTPUT.K))[None, :]
                value = tl.load(pixel + near[None, :], mask=mask, other=0.0).to(tl.float32)
                energy += value * value
            mask = inside & column_mask[None, :]
            value = tl.load(pixel + columns[None, :], mask=mask, other=0.0).to(tl.float32)
            value = lrn.normalised(value, energy, NORM)
            acc = combine(acc, tl.where(inside, value, EMPTY), True)
    else:
        energy = tl.zeros((M, N), tl.float32)
        for shift in range(-NORM.below, NORM.above + 1):
            near = columns + shift
            exists = ((near >= 0) & (near < OUTPUT.K))[None, :]
            best = tl.full((M, N), EMPTY, tl.float32)
            for tap in range(taps):
                r = tap // WIDTH.taps * HEIGHT.dilation
                s = tap % WIDTH.taps * WIDTH.dilation
                mask = in_image(top + r, left + s, WINDOWS)[:, None] & exists
                pixel = base + (r * WIDTH.size + s) * WINDOWS.row_stride
                value = tl.load(pixel + near[None, :], mask=mask, other=EMPTY)
                best = combine(best, value.to(tl.float32), True)
            best = tl.where(exists, best, 0.0)
            energy += best * best
            acc = tl.where(shift == 0, best, acc)
        acc = lrn.normalised(acc, energy, NORM)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the kernel that the tile's LANES chooses."""
    attributes, x = problem.attributes.expect(LrnPool), problem.inputs[0]
    # The pixels of a program's windows, each read once thanks to L1.
    pixels = pool_window.pixels_read(problem, attributes.pool, tile["BLOCK_ROWS"])
    taps, every = math.prod(attributes.pool.kernel), lrn.instructions_per_result(tile)
    every = taps * every if attributes.lrn_first else every + POOLED * taps
    launch = tile_launch(
        problem, tile, shifted_kernel if tile["LANES"] == 1 else lanes_kernel,
        constexprs={
            "WINDOWS": pool_window.Windows.of(attributes.pool, x, problem.output),
            "NORM": lrn.Norm.of(attributes.lrn), "LRN_FIRST": attributes.lrn_first,
            "LANES": tile["LANES"],
        },
        l2_bytes=pixels * tile["BLOCK_COLUMNS"] * x.spec.dtype.itemsize,
        instructions=tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"] * every,
    )  # fmt: skip
    return (launch,)


@counted
def cost(problem: Problem) -> int:
    """The operations of both halves, each once."""
    attributes, x = problem.attributes.expect(LrnPool), problem.inputs[0]
    outputs = problem.output.spec.numel
    normalised = x.spec.numel if attributes.lrn_first else outputs
    taps = math.prod(attributes.pool.kernel)
    return (2 * attributes.lrn.size + 8) * normalised + taps * outputs


OP = Op(
    "lrn_pool", LrnPool, infer, reference, launches, cost, lrn.configs, lrn.default, lrn.legal,
    input_range=(-4.0, 4.0),
)  # fmt: skip
