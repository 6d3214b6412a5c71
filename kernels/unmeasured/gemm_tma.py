"""The tiles of `tile/gemm.py` through TMA descriptors, from sm_90 on: a configuration of products.

One thread asks the copy engine for a whole box; addresses, masks and the swizzle of shared memory
cost no instructions, and the products read both operands where the boxes land. On sm_90 a step of
the loop has 84 instructions where pointers take 96 (128x128x64, 8 warps), 96 of 126 (128x64x64, 4
warps), and the copies hold no registers.

Descriptors are made on the host at the launch and become constants of a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ..contract.op import Config, Launch, Problem, Target, TmaDescriptor, W, X, power_of_two
from ..hopper.boxes import misaligned
from ..tile import choice, gemm

# Warp groups multiply 64 rows at a time: lower tiles would fall back to the older instructions.
TILES = (
    (128, 256, 8), (256, 128, 8), (128, 128, 8), (256, 64, 8), (128, 64, 4), (64, 128, 4),
    (64, 64, 4),
)  # fmt: skip
STEP_INSTRUCTIONS = 88
"""Of a warp beside the products (84 to 98 from 128x128 to 256x128)."""
BARRIERS = 1_024
"""Bytes of shared memory for the barriers of the copies and the alignment of their boxes."""


def uses_tma(tile: Config) -> bool:
    """Whether a configuration of a product is this algorithm's."""
    return bool(dict(tile.blocks).get("TMA", 0))


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """The search space: wide steps, since no instruction of theirs depends on their width."""
    size = gemm.problem_size(problem)
    widest = 128 // size.dtype.itemsize
    block_k = max(16, min(widest, power_of_two(size.depth)))
    for block in TILES:
        for stages in (3, 4):
            for split in choice.splits(size, block[0], block[1], block_k):
                plain = choice.config_of(size, block, block_k, stages, split)
                tile = replace(plain, blocks=(*plain.blocks, ("TMA", 1)))
                if legal(problem, tile, target) is None:
                    yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Why a configuration cannot compute the problem on the target, or None."""
    x = problem.inputs[0]
    if problem.prologue:
        return "TMA copies to shared memory; a prologue needs its elements in registers on the way"
    w = problem.inputs[1].spec
    if (reason := misaligned(x, w.numel // w.shape[0])) is not None:
        return reason
    if target.name == "interpreter":
        return None
    if target.capability < 90:
        return f"TMA: {target.name} has no such copies, sm_90 and later have"
    return target.shared_shortage(choice.shared_bytes(tile, x.spec.dtype) + BARRIERS)


def launch(problem: Problem, tile: Config) -> Launch:
    """The launch of `tile/gemm.py` that reads x and w in boxes."""
    plain, x, size = gemm.launch(problem, tile), problem.inputs[0], gemm.problem_size(problem)
    depth, block_k = size.depth, tile["BLOCK_K"]
    rows, batch = x.spec.numel // depth, x.spec.batch
    boxes = {
        "x": TmaDescriptor(
            X, (rows, depth), (x.pitch, 1), (tile["BLOCK_M"], block_k), x.offset, batch
        ),
        "w": TmaDescriptor(W, (size.columns, depth), (depth, 1), (tile["BLOCK_N"], block_k)),
    }
    pointers = {name: ref for name, ref in plain.pointers.items() if name not in boxes}
    return replace(plain, pointers=pointers, boxes=boxes, step_instructions=STEP_INSTRUCTIONS)
