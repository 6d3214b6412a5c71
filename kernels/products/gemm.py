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
from ..contract.op import Config, Launch, Problem, W, X, Y
from ..contract.spec import Operand
from ..tile import split_k
from ..tile.choice import Size, dot_precision, l2_bytes, split_of, step_instructions
from ..tile.geometry import problem_extras
from ..tile.product import share_of
from ..tile.space import tile_index


@triton.jit
def places(
    row_tile, column_tile, m, K: tl.constexpr, WIDE: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """rows [BLOCK_M], columns [BLOCK_N] of a tile, and which of them there are."""
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < m
    column_mask = columns < K
    if WIDE:
        rows = rows.to(tl.int64)
    return rows, columns, row_mask, column_mask


@triton.jit
def sum_of_products(
    x, w, rows, columns, row_mask, column_mask, first, stop, extras, C: tl.constexpr,
    X_PITCH: tl.constexpr, X_OFFSET: tl.constexpr, PROLOGUE: tl.constexpr, FINITE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """fp32 [BLOCK_M, BLOCK_N]: the products of the steps from `first` to `stop`.

    FINITE: what the prologue makes of channels outside the tensor is finite.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    depth = tl.arange(0, BLOCK_K)
    x_tile = x + X_OFFSET + (rows * X_PITCH)[:, None] + depth[None, :]
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
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def finish_tile(
    acc, y, rows, columns, row_mask, column_mask, extras,
    EPILOGUE: tl.constexpr, Y_PITCH: tl.constexpr, Y_OFFSET: tl.constexpr,
):  # fmt: skip
    """The epilogue of an output tile, and its store."""
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def finish_share(
    acc, y, parts, tickets, tile, split, rows, columns, row_mask, column_mask, extras,
    EPILOGUE: tl.constexpr, Y_PITCH: tl.constexpr, Y_OFFSET: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    x, w, y, parts, tickets, extras, m, C: tl.constexpr, K: tl.constexpr, X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr, Y_PITCH: tl.constexpr, Y_OFFSET: tl.constexpr, EPILOGUE: tl.constexpr,
    PROLOGUE: tl.constexpr, FINITE: tl.constexpr, PRECISION: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    column_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = tile_index(
        tl.program_id(0) // SPLIT, tl.cdiv(m, BLOCK_M), column_tiles, GROUP_M
    )
    rows, columns, row_mask, column_mask = places(
        row_tile, column_tile, m, K, WIDE, BLOCK_M, BLOCK_N
    )
    split = tl.program_id(0) % SPLIT
    first, stop = 0, (C + BLOCK_K - 1) // BLOCK_K
    if SPLIT > 1:
        first, stop = share_of(split, (C + BLOCK_K - 1) // BLOCK_K, SPLIT)
    programmatic_launch.wait(PDL)
    acc = sum_of_products(
        x, w, rows, columns, row_mask, column_mask, first, stop, extras, C, X_PITCH, X_OFFSET,
        PROLOGUE, FINITE, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    programmatic_launch.release(PDL)
    tile = row_tile * column_tiles + column_tile
    finish_share(
        acc, y, parts, tickets, tile, split, rows, columns, row_mask, column_mask, extras,
        EPILOGUE, Y_PITCH, Y_OFFSET, SPLIT, BLOCK_M, BLOCK_N,
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
    made = ep.apply_reference(problem.prologue, torch.zeros(1), zeros).to(spec.dtype)
    return all(read.strides[-1] for read in reads) and bool(made.isfinite().all())


def launch(problem: Problem, tile: Config, x: Operand, columns: int) -> Launch:
    """The product of `x` seen as a matrix of its innermost dimension with the packed weight."""
    depth = ep.memory_sizes(x.spec)[-1]
    rows, split = problem.output.spec.numel // columns, split_of(tile)
    size = Size(rows, columns, depth, x.spec.dtype)
    tiles = size.tiles(tile["BLOCK_M"], tile["BLOCK_N"])
    steps = -(-size.steps(tile["BLOCK_K"]) // split)
    out = problem.output
    return Launch(
        kernel=gemm_kernel,
        pointers={"x": X, "w": W, "y": Y, **split_k.pointers(split)},
        extras=problem_extras(problem),
        rows=rows,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=-(-columns // tile["BLOCK_N"]) * split,
        constexprs={
            "C": depth, "K": columns, "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch, "Y_OFFSET": out.offset, "WIDE": problem.is_wide,
            "PRECISION": dot_precision(problem, depth),
            "PROLOGUE": prologue_of(problem), "FINITE": is_finite_at_zero(problem),
            **{name: tile[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M")},
            "SPLIT": split, "PDL": False,
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, out.spec),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=l2_bytes(problem, tile, min(depth, steps * tile["BLOCK_K"])),
        steps=steps,
        step_instructions=step_instructions(tile, x.spec.dtype, taps=1),
        combine_bytes=split_k.combine_bytes(split, tile["BLOCK_M"], tile["BLOCK_N"]),
        scratch=split_k.scratch(tiles, split, tile["BLOCK_M"], tile["BLOCK_N"]),
    )  # fmt: skip


def problem_size(problem: Problem) -> Size:
    """The product over the innermost dimensions of the first input and the output."""
    columns = ep.memory_sizes(problem.output.spec)[-1]
    depth = ep.memory_sizes(problem.inputs[0].spec)[-1]
    rows = problem.output.spec.numel // max(columns, 1)
    return Size(rows, columns, depth, problem.inputs[0].spec.dtype, splits=True)
