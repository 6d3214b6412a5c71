"""y = epilogue(x wᵀ): the matrix product behind linear layers and 1x1 convolutions.

x: (M, C), rows `X_PITCH` apart; w: (K, C) K-major, so that B tiles need no transposition in shared
memory for any dtype; y: (M, K), rows `Y_PITCH` apart; fp32 accumulation.

`PROLOGUE` is a chain applied to x's columns (its channels) as they are read. With few output tiles
and a long inner dimension, SPLIT programs share the sums of a tile (`split.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contract import epilogue as ep
from ..contract import programmatic_launch
from ..contract.op import (
    Config,
    Launch,
    Problem,
    W,
    X,
    Y,
)
from ..contract.spec import Operand
from ..tile import residual
from ..tile import split_k as split_k
from ..tile.choice import Size, dot_precision, l2_bytes, split_of, step_instructions
from ..tile.geometry import problem_extras
from ..tile.product import share_of
from ..tile.space import tile_index
from . import gemm_loop


@triton.jit
def finish_tile(
    acc,
    y,
    rows,
    columns,
    row_mask,
    column_mask,
    extras,
    EPILOGUE: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
):
    """The epilogue of an output tile, and its store."""
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def finish_share(
    acc,
    y,
    parts,
    tickets,
    tile,
    split,
    rows,
    columns,
    row_mask,
    column_mask,
    extras,
    EPILOGUE: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The end of an output tile: at once where it has one program, else by the one that completes
    it."""
    if SPLIT == 1:
        finish_tile(
            acc, y, rows, columns, row_mask, column_mask, extras, EPILOGUE, Y_PITCH, Y_OFFSET
        )
    elif split_k.publish(acc, parts, tickets, tile, split, SPLIT, BLOCK_M, BLOCK_N):
        acc = split_k.collect(parts, tickets, tile, SPLIT, BLOCK_M, BLOCK_N)
        finish_tile(
            acc, y, rows, columns, row_mask, column_mask, extras, EPILOGUE, Y_PITCH, Y_OFFSET
        )


@triton.jit
def gemm_kernel(
    x,
    w,
    y,
    parts,
    tickets,
    extras,
    m,
    C: tl.constexpr,
    K: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    EPILOGUE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    PROLOGUE: tl.constexpr,
    FINITE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    column_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = tile_index(
        tl.program_id(0) // SPLIT, tl.cdiv(m, BLOCK_M), column_tiles, GROUP_M
    )
    rows, columns, row_mask, column_mask = gemm_loop.places(
        row_tile, column_tile, m, K, WIDE, BLOCK_M, BLOCK_N
    )
    split = tl.program_id(0) % SPLIT
    first, stop = 0, (C + BLOCK_K - 1) // BLOCK_K
    if SPLIT > 1:
        first, stop = share_of(split, (C + BLOCK_K - 1) // BLOCK_K, SPLIT)
    programmatic_launch.wait(PDL)
    acc = residual.begin(
        rows, columns, row_mask, column_mask, extras, RESIDUAL, RESIDUAL_FIRST, BLOCK_M, BLOCK_N
    )
    acc = gemm_loop.add_products(
        acc, x, w, row_tile, column_tile, rows, columns, row_mask, column_mask, first, stop,
        extras, C, X_PITCH, X_OFFSET, PROLOGUE, FINITE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, TMA,
    )  # fmt: skip
    programmatic_launch.release(PDL)
    tile = row_tile * column_tiles + column_tile
    finish_share(
        acc, y, parts, tickets, tile, split, rows, columns, row_mask, column_mask, extras,
        EPILOGUE, Y_PITCH, Y_OFFSET, SPLIT, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def chains(problem: Problem) -> tuple[ep.GeneratedFunction, ep.GeneratedFunction | None]:
    """The problem's epilogue, and its prologue over the first input's channels."""
    after = ep.for_output(problem.epilogue, problem.operands, problem.output.spec)
    return after, prologue_of(problem)


def prologue_of(problem: Problem) -> ep.GeneratedFunction | None:
    """The problem's prologue over the first input's channels, if it has one."""
    if not problem.prologue:
        return None
    spec = problem.inputs[0].spec
    reads = tuple(ep.access(operand, spec) for operand in problem.prologue_operands)
    sizes = ep.memory_sizes(spec)
    return ep.generate(
        problem.prologue, reads, sizes, first=len(problem.operands), name="prologue"
    )


def is_finite_at_zero(problem: Problem) -> bool:
    """Whether the prologue makes finite numbers of what is loaded beyond the last channel: zeros of
    x, and of operands that have a number per channel. Others may hold anything."""
    spec = problem.inputs[0].spec
    reads = [ep.access(operand, spec) for operand in problem.prologue_operands]
    zeros = tuple(torch.zeros(1) for _ in reads)
    made = ep.apply_reference(problem.prologue, torch.zeros(1), zeros).to(spec.dtype)
    return all(read.strides[-1] for read in reads) and bool(made.isfinite().all())


def launch(problem: Problem, tile: Config, x: Operand, columns: int) -> Launch:
    """The product of `x` seen as a matrix of its innermost dimension with the packed weight."""
    out = problem.output
    depth = ep.memory_sizes(x.spec)[-1]
    rows, split = out.spec.numel // columns, split_of(tile)
    size = Size(rows, columns, depth, x.spec.dtype)
    tiles = size.tiles(tile["BLOCK_M"], tile["BLOCK_N"])
    steps = -(-size.steps(tile["BLOCK_K"]) // split)
    return Launch(
        kernel=gemm_kernel,
        pointers={"x": X, "w": W, "y": Y, **split_k.pointers(split)},
        extras=problem_extras(problem),
        rows=rows,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=-(-columns // tile["BLOCK_N"]) * split,
        constexprs={
            "SPLIT": 1,
            "TMA": 0,
            "PDL": False,
            "C": depth,
            "K": columns,
            "X_PITCH": x.pitch,
            "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch,
            "Y_OFFSET": out.offset,
            "PRECISION": dot_precision(problem, depth),
            "WIDE": problem.is_wide,
            "PROLOGUE": prologue_of(problem),
            "FINITE": is_finite_at_zero(problem),
            **dict(tile.blocks),
            **residual.constants(problem, tile),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=l2_bytes(problem, tile, min(depth, steps * tile["BLOCK_K"])),
        steps=steps,
        step_instructions=step_instructions(tile, x.spec.dtype, taps=1),
        combine_bytes=split_k.combine_bytes(split, tile["BLOCK_M"], tile["BLOCK_N"]),
        scratch=split_k.scratch(tiles, split, tile["BLOCK_M"], tile["BLOCK_N"]),
    )


def problem_size(problem: Problem) -> Size:
    """The product over the innermost dimensions of the first input and the output."""
    columns = ep.memory_sizes(problem.output.spec)[-1]
    depth = ep.memory_sizes(problem.inputs[0].spec)[-1]
    rows = problem.output.spec.numel // max(columns, 1)
    return Size(rows, columns, depth, problem.inputs[0].spec.dtype, splits=True)
