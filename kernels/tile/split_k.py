"""Sums split among programs: split-K in one launch, in a fixed order, with no second kernel.

Each of SPLIT programs computes partial sums of an output tile and stores them in a workspace. The
one that arrives last, told by a semaphore per tile, adds up all of them in order, whoever arrived
when: the result does not depend on timing. It then sets the semaphore back to zero, so that the
next launch, or the next replay of a CUDA graph, finds it as this one did.

The scheme of the semaphore is that of CUTLASS's serial split-K; the fixed order is what makes it
repeatable, which atomic additions would not be.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contract.op import Ref, Scratch, Y

REDUCE_STAGES = tl.constexpr(3)


@triton.jit
def store_partial(acc, workspace, semaphores, tile, split, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """Stores this program's partial sums; whether all of the tile's are there."""
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    place = workspace + (tile.to(tl.int64) * SPLIT + split) * (BLOCK_M * BLOCK_N)
    tl.store(place + inside, acc)
    # Every thread's sums are out before one of them counts in the semaphore that says so.
    tl.debug_barrier()
    return tl.atomic_add(semaphores + tile, 1, sem="acq_rel") == SPLIT - 1


@triton.jit
def reduce_partials(workspace, semaphores, tile, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """The total of a tile's partial sums, in order; sets its semaphore back to zero.

    No barrier stands here: every thread reads the count behind the one that Triton sets (seen in
    the PTX of 3.6.0 and 3.7.1; a test demands it), from shared memory and the one that counted.
    """
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    place = workspace + tile.to(tl.int64) * SPLIT * (BLOCK_M * BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Pipelined: one program reads all of them, and without copies on the way it waits for each.
    for split in tl.range(0, SPLIT, num_stages=REDUCE_STAGES):
        # From the L2 cache: another multiprocessor wrote it, the L1 cache would not know.
        acc += tl.load(place + split * (BLOCK_M * BLOCK_N) + inside, cache_modifier=".cg")
    tl.store(semaphores + tile, 0)
    return acc


def pointers(split: int) -> dict[str, Ref]:
    """The kernel arguments of the scratch; the output stands for what a launch without a split
    never reads."""
    if split == 1:
        return {"workspace": Y, "semaphores": Y}
    return {"workspace": Ref("scratch", 0), "semaphores": Ref("scratch", 1)}


def combine_bytes(split: int, block_m: int, block_n: int) -> int:
    """What the last program of a tile reads: all its partial sums."""
    return 4 * split * block_m * block_n if split > 1 else 0


def scratch(tiles: int, split: int, block_m: int, block_n: int) -> tuple[Scratch, ...]:
    """The workspace and the semaphores of a launch; nothing where it is not split."""
    if split == 1:
        return ()
    workspace = Scratch(torch.float32, tiles * split * block_m * block_n)
    return workspace, Scratch(torch.int32, tiles, zeroed=True)
