"""The loop of an implicit matrix product, whatever its left operand is made of."""

from __future__ import annotations

import triton
import triton.language as tl

from ..contract import programmatic_launch
from ..contract.targets import Target
from .geometry import Tile

MANY_SUMS = 128
"""Of a thread: beside so many sums no loop should be unrolled on any GPU."""
FEW_SUMS = 16
AHEAD_BYTES = tl.constexpr(65_536)
"""Of weights, that one program asks for ahead: of all that run at a time no more than a third of
the L2 cache (assumed)."""


def least_rolled(tile: Tile, num_warps: int, target: Target) -> int:
    """From how many steps on their number is kept from ptxas, which unrolls loops of 8 to 18 steps;
    0 where it is not.

    128x256 over 128 channels by 8 warps on sm_90: 255 registers and 40 bytes on the stack, instead
    of 196. 3x3 over 64 channels, 128x64 by 8 warps on sm_80: 128 registers, 8 bytes and 1072
    instructions instead of 105 and 568. On sm_90 a known number saves 80 of 896 instructions of
    128x64 by 4 warps, but 3x3x3 on 16x32 by 2 warps takes 872 and spills 8 bytes, instead of 336.
    """
    if not target.is_gpu:
        return 0
    sums = tile.M * tile.N // (32 * num_warps)
    if sums >= MANY_SUMS:
        return 2
    return 4 if target.capability < 90 or sums < FEW_SUMS else 0


@triton.jit
def share_of(split, STEPS: tl.constexpr, SPLIT: tl.constexpr):
    """First and past-the-end step of one of SPLIT programs."""
    share: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
    first = tl.minimum(split * share, STEPS)
    return first, tl.minimum(first + share, STEPS)


@triton.jit
def ask_for_weights(
    w, columns, column_mask, row, split, TAPS: tl.constexpr, DEPTH: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What a program multiplies first of the rows `columns` of w (K, taps·depth) is asked for
    before the kernel in front has ended; row: zero in one of the programs that share them."""
    ITEM: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
    if PDL and DEPTH * ITEM % 16 == 0:  # noqa: SIM102 - known when compiled, unlike the row
        if row == 0:
            blocks: tl.constexpr = (DEPTH + TILE.K - 1) // TILE.K
            first, last = share_of(split, TAPS * blocks, SPLIT)
            begin = first // blocks * DEPTH + first % blocks * TILE.K
            end = last // blocks * DEPTH + last % blocks * TILE.K
            terms = tl.minimum(end - begin, AHEAD_BYTES // (TILE.N * ITEM))
            if terms > 0:
                rows = tl.where(column_mask, columns, 0)
                start = w + rows.to(tl.int64) * (TAPS * DEPTH) + begin
                programmatic_launch.ask_ahead(start, rows * 0 + terms * ITEM)


@triton.jit
def add_product(
    acc, x, w, at, columns, column_mask, stop, split, extras,
    SOURCE: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """acc [M, N] plus this program's share of the products of SOURCE with the rows `columns` of w
    (K, taps·depth).

    One loop, flattened over taps and blocks of terms: that is what Triton's pipeliner turns into
    asynchronous copies. stop: a number above zero that the compiler does not know.
    """
    DEPTH: tl.constexpr = SOURCE.depth
    blocks: tl.constexpr = (DEPTH + TILE.K - 1) // TILE.K
    STEPS: tl.constexpr = SOURCE.taps * blocks
    depth = tl.arange(0, TILE.K)
    w_tile = w + (columns * (SOURCE.taps * DEPTH))[:, None] + depth[None, :]
    first, last = 0, STEPS
    if TILE.rolled != 0 and TILE.rolled <= STEPS:
        last = STEPS - tl.maximum(1 - stop, 0)
    if SPLIT > 1:
        first, last = share_of(split, STEPS, SPLIT)
    for step in range(first, last):
        # A single tap has nothing to divide: its mask then leaves the loop.
        tap = step // blocks if SOURCE.taps > 1 else 0
        start = (step % blocks if SOURCE.taps > 1 else step) * TILE.K
        a = SOURCE.load(x, at, tap, start, extras, SOURCE, TILE)
        mask = column_mask[:, None]
        if DEPTH % TILE.K != 0:
            mask = mask & (start + depth < DEPTH)[None, :]
        b = tl.load(w_tile + (tap * DEPTH + start), mask=mask, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=TILE.precision)
    return acc
