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
MOST_IN_CLUSTER = 8
"""Programs of a cluster that every GPU with clusters has room for."""
PADDING = tl.constexpr(8)
"""Elements between the rows of partial sums in shared memory, for the sake of its banks."""


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


@triton.jit
def sum_in_cluster(acc, split, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """The total of a tile's partial sums, in order, of M / SPLIT of its rows: the share of the
    program `split` of the SPLIT that are a cluster. None may end before all have read: another
    `meet_cluster` must follow.

    Each has its partial sums in what it was given of shared memory beyond what the compiler asked
    for (`part_bytes`), and reads those of the others there.
    """
    N: tl.constexpr = TILE.N
    SHARE: tl.constexpr = TILE.M // SPLIT
    STRIDE: tl.constexpr = N + PADDING
    BYTES: tl.constexpr = 4 * TILE.M * STRIDE
    start = tl.inline_asm_elementwise(
        "{ .reg .b32 size; mov.u32 size, %dynamic_smem_size; mov.u32 $0, global_smem; "
        "add.u32 $0, $0, size; sub.u32 $0, $0, $1; }",
        "=&r,r", [BYTES + split * 0], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    columns = tl.arange(0, N)[None, :]
    own = start + 4 * (tl.arange(0, TILE.M)[:, None] * STRIDE + columns)
    # Where there are several groups of warps, the products of all have ended (triton issue 11047).
    tl.debug_barrier()
    tl.inline_asm_elementwise(
        "st.shared.f32 [$1], $2; mov.u32 $0, 0;", "=r,r,r", [own, acc],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    meet_cluster(split)
    rows = split * SHARE + tl.arange(0, SHARE)[:, None]
    share = start + 4 * (rows * STRIDE + columns)
    total = tl.zeros((SHARE, N), tl.float32)
    for rank in tl.static_range(SPLIT):
        total += tl.inline_asm_elementwise(
            "{ .reg .b32 far; mapa.shared::cluster.u32 far, $1, $2; "
            "ld.shared::cluster.f32 $0, [far]; }",
            "=f,r,r", [share, share * 0 + rank], dtype=tl.float32, is_pure=False, pack=1,
        )  # fmt: skip
    return total


@triton.jit
def meet_cluster(split):
    """Who passes has all of what the programs of its cluster did in front of it."""
    tl.inline_asm_elementwise(
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; "
        "mov.u32 $0, $1;",
        "=r,r", [split], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


def part_bytes(block_m: int, block_n: int) -> int:
    """Shared memory for the partial sums of a tile."""
    return 4 * block_m * (block_n + int(PADDING.value))


def pointers(split: int, cluster: int = 1) -> dict[str, Ref]:
    """The kernel arguments of the scratch; the output stands for what a launch without a split, or
    one in clusters, never reads."""
    if split == cluster:
        return {"workspace": Y, "semaphores": Y}
    return {"workspace": Ref("scratch", 0), "semaphores": Ref("scratch", 1)}


def combine_bytes(split: int, block_m: int, block_n: int, cluster: int = 1) -> int:
    """What the last program of a tile reads: all its partial sums; or each of a cluster from the
    others: their parts of its share."""
    if cluster > 1:
        return 4 * (split - 1) * block_m * block_n // split
    return 4 * split * block_m * block_n if split > 1 else 0


def scratch(
    tiles: int, split: int, block_m: int, block_n: int, cluster: int = 1
) -> tuple[Scratch, ...]:
    """The workspace and the semaphores of a launch; nothing where it is not split, or in
    clusters."""
    if split == cluster:
        return ()
    workspace = Scratch(torch.float32, tiles * split * block_m * block_n)
    return workspace, Scratch(torch.int32, tiles, zeroed=True)
