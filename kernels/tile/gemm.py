"""y = epilogue(x wᵀ): the matrix product behind linear layers and 1x1 convolutions.

x: (M, C); w: (K, C) K-major, so that B tiles need no transposition in shared memory for any dtype;
y: (M, K); fp32 accumulation.

`PROLOGUE` is a chain applied to x's columns (its channels) as they are read. With few output tiles
and a long inner dimension, SPLIT programs share the sums of a tile (`split_k.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..contract import epilogue as ep
from ..contract import programmatic_launch
from ..contract.op import Config, Launch, Problem, W, X, Y
from . import split_k
from .choice import Size, cluster_of, dot_precision, modelled, split_of
from .finish import store
from .geometry import Matrix, tile_launch
from .product import ask_for_weights, share_of
from .space import rows_and_columns, tile_index


@triton.jit
def sum_of_products(
    x, w, rows, columns, row_mask, column_mask, first, stop, extras,
    X: tl.constexpr, PROLOGUE: tl.constexpr, FINITE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N]: the products of the steps from `first` to `stop`.

    FINITE: what the prologue makes of channels outside the tensor is finite.
    """
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    C: tl.constexpr = X.C
    acc = tl.zeros((M, N), tl.float32)
    depth = tl.arange(0, BLOCK_K)
    x_tile = x + X.offset + (rows * X.row_stride)[:, None] + depth[None, :]
    w_tile = w + (columns * C)[:, None] + depth[None, :]
    for step in range(first, stop):
        start = step * BLOCK_K
        if C % BLOCK_K == 0:
            a = tl.load(x_tile + start, mask=row_mask[:, None], other=0.0)
            b = tl.load(w_tile + start, mask=column_mask[:, None], other=0.0)
        else:
            inside = (depth + start < C)[None, :]
            a = tl.load(x_tile + start, mask=row_mask[:, None] & inside, other=0.0)
            b = tl.load(w_tile + start, mask=column_mask[:, None] & inside, other=0.0)
        if PROLOGUE is not None:
            channels = depth + start
            in_channels = channels < C
            value = PROLOGUE(a.to(tl.float32), rows, channels, row_mask, in_channels, extras)
            # Channels outside the tensor meet weights of zero: they only must be finite. Rows need
            # not: a row of the product depends on no other row of x, and those are not stored.
            # (Selecting by both costs 209 of 543 instructions at 128x64x64 with 4 warps.)
            if C % BLOCK_K != 0 and not FINITE:
                value = tl.where(in_channels[None, :], value, 0.0)
            a = value.to(a.dtype)
        acc = tl.dot(a, b.T, acc, input_precision=TILE.precision)
    return acc


@triton.jit
def gemm_kernel(
    x, w, y, workspace, semaphores, extras, m, X: tl.constexpr, PROLOGUE: tl.constexpr,
    FINITE: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    column_tiles: tl.constexpr = (OUTPUT.K + TILE.N - 1) // TILE.N
    steps: tl.constexpr = (X.C + TILE.K - 1) // TILE.K
    row_tile, column_tile = tile_index(
        tl.program_id(0) // SPLIT, tl.cdiv(m, TILE.M), column_tiles, TILE.GROUP_M
    )
    rows, columns, row_mask, column_mask = rows_and_columns(row_tile, column_tile, m, OUTPUT, TILE)
    split = tl.program_id(0) % SPLIT
    first, stop = 0, steps
    if SPLIT > 1:
        first, stop = share_of(split, steps, SPLIT)
    ask_for_weights(w, columns, column_mask, row_tile, split, 1, X.C, TILE, SPLIT, PDL)
    programmatic_launch.grid_dependency_wait(PDL)
    acc = sum_of_products(
        x, w, rows, columns, row_mask, column_mask, first, stop, extras, X, PROLOGUE, FINITE, TILE
    )
    tile = row_tile * column_tiles + column_tile
    store(
        acc, y, workspace, semaphores, tile, split, row_tile * TILE.M, m, rows, row_mask, columns,
        column_mask, extras, None, None, OUTPUT, TILE, SPLIT,
    )  # fmt: skip


def prologue_of(problem: Problem) -> ep.GeneratedFunction | None:
    """The problem's prologue over the first input's channels, if it has one."""
    if not problem.prologue:
        return None
    spec = problem.inputs[0].spec
    reads = tuple(ep.access(operand, spec) for operand in problem.prologue_operands)
    sizes = ep.memory_sizes(spec)
    return ep.generate(problem.prologue, reads, sizes, first=len(problem.operands), name="prologue")


def is_finite_at_zero(problem: Problem) -> bool:
    """Whether the prologue makes finite numbers of what is loaded beyond the last channel: zeros of
    x, and of operands that have a number per channel. Others may hold anything."""
    spec = problem.inputs[0].spec
    reads = [ep.access(operand, spec) for operand in problem.prologue_operands]
    zeros = tuple(torch.zeros(1) for _ in reads)
    values = ep.apply_reference(problem.prologue, torch.zeros(1), zeros).to(spec.dtype)
    return all(read.strides[-1] for read in reads) and bool(values.isfinite().all())


def launch(problem: Problem, tile: Config) -> Launch:
    """The product of the first input, seen as a matrix of its innermost dimension, with the packed
    weight."""
    size, split = problem_size(problem), split_of(tile)
    return tile_launch(
        problem, tile, gemm_kernel,
        constexprs={
            "X": Matrix.of(problem.inputs[0]), "PROLOGUE": prologue_of(problem),
            "FINITE": is_finite_at_zero(problem), "SPLIT": split, "PDL": False,
        },
        precision=dot_precision(problem, size.depth),
        pointers={"x": X, "w": W, "y": Y, **split_k.pointers(split, cluster_of(tile))},
        programs=split,
        **modelled(size, tile),
    )  # fmt: skip


def problem_size(problem: Problem) -> Size:
    """The product over the innermost dimensions of the first input and the output."""
    columns = ep.memory_sizes(problem.output.spec)[-1]
    depth = ep.memory_sizes(problem.inputs[0].spec)[-1]
    rows = problem.output.spec.numel // max(columns, 1)
    return Size(rows, columns, depth, problem.inputs[0].spec.dtype, splits=True)
