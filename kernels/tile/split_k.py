"""Sums split among programs: split-K in one launch, in a fixed order, with no second kernel.

Each of SPLIT programs computes its part of an output tile and stores it. The one that arrives last,
told by a ticket counter per tile, adds up all the parts in order, whoever arrived when: the result
does not depend on timing. It then sets the counter back to zero, so that the next launch, or the
next replay of a CUDA graph, finds it as this one did.

The scheme of the semaphore is that of CUTLASS's serial split-K; the fixed order is what makes it
repeatable, which atomic additions of the parts would not be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contract.op import Ref, Scratch, Y

COLLECT_STAGES = tl.constexpr(3)


@triton.jit
def publish(
    acc,
    parts,
    tickets,
    tile,
    split,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Stores this program's part; whether all parts of the tile are there."""
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    place = parts + (tile.to(tl.int64) * SPLIT + split) * (BLOCK_M * BLOCK_N)
    tl.store(place + inside, acc)
    # Every thread's part is out before one of them takes the ticket that says so.
    tl.debug_barrier()
    return tl.atomic_add(tickets + tile, 1, sem="acq_rel") == SPLIT - 1


@triton.jit
def collect(
    parts,
    tickets,
    tile,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sum of a tile's parts, in order; gives the tickets back.

    No barrier stands here: every thread reads its ticket behind the one that Triton sets (seen in
    the PTX of 3.6.0 and 3.7.1; a test demands it), from shared memory and the one that took it.
    """
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    place = parts + tile.to(tl.int64) * SPLIT * (BLOCK_M * BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Pipelined: one program reads all the parts, and without copies on the way it waits for each.
    for split in tl.range(0, SPLIT, num_stages=COLLECT_STAGES):
        # From the L2 cache: another multiprocessor wrote it, the L1 cache would not know.
        acc += tl.load(place + split * (BLOCK_M * BLOCK_N) + inside, cache_modifier=".cg")
    tl.store(tickets + tile, 0)
    return acc


def pointers(split: int) -> dict[str, Ref]:
    """The kernel arguments of the scratch; the output stands for what a launch without a split
    never reads."""
    if split == 1:
        return {"parts": Y, "tickets": Y}
    return {"parts": Ref("scratch", 0), "tickets": Ref("scratch", 1)}


def combine_bytes(split: int, block_m: int, block_n: int) -> int:
    """What the last program of a tile reads: all its parts."""
    return 4 * split * block_m * block_n if split > 1 else 0


def scratch(tiles: int, split: int, block_m: int, block_n: int) -> tuple[Scratch, ...]:
    """The parts and the tickets of a launch; nothing where it is not split."""
    if split == 1:
        return ()
    parts = Scratch(torch.float32, tiles * split * block_m * block_n)
    return parts, Scratch(torch.int32, tiles, zeroed=True)
