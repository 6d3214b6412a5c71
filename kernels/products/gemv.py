"""y = epilogue(x wᵀ) for few rows: the weights are streamed once, on the CUDA cores.

x: (M, C), M at most 8; w: (K, C) K-major; y: (M, K); fp32 accumulation.

A tile of a matrix product has at least 16 rows, of which a batch of 1 uses one, and waits for its
operands step by step. Here a program reads BLOCK_N rows of the weight in runs of BLOCK_K elements,
multiplies each run with all rows of x, and adds up the lanes once at the end: the time is that of
reading the weights. The sums of a result are always added in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from ..contract import programmatic_launch
from ..contract.op import Config, Launch, Problem, Target, config, power_of_two
from ..tile import choice, gemm
from ..tile.finish import put
from ..tile.geometry import Matrix, tile_launch
from ..tile.product import ask_for_weights

MOST_ROWS = 8
MOST_SUMS = 64
"""fp32 sums of one thread; 110 registers on sm_90."""
MOST_COLUMNS_ON_SM_100 = 2
"""There Triton 3.6 keeps 8 bytes on the stack for 4 or 8 columns; 3.7 does not."""
VECTOR_BYTES = 16
"""What one thread loads at a time."""


@triton.jit
def gemv_kernel(
    x, w, y, extras, m, X: tl.constexpr, PROLOGUE: tl.constexpr, OUTPUT: tl.constexpr,
    TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    ROWS: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    C: tl.constexpr = X.C
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, ROWS)
    depth = tl.arange(0, BLOCK_K)
    row_mask = rows < m
    column_mask = columns < OUTPUT.K
    w_rows = columns
    if TILE.wide:
        rows = rows.to(tl.int64)
        w_rows = w_rows.to(tl.int64)
    w_tile = w + (w_rows * C)[:, None] + depth[None, :]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (tl.zeros((BLOCK_N, BLOCK_K), tl.float32),)
    ask_for_weights(w, columns, column_mask, 0, 0, 1, C, TILE, 1, PDL)
    programmatic_launch.grid_dependency_wait(PDL)
    for start in range(0, C, BLOCK_K):
        channels = start + depth
        in_channels = channels < C
        b = tl.load(w_tile + start, mask=column_mask[:, None] & in_channels[None, :], other=0.0)
        b = b.to(tl.float32)
        added = ()
        for row in tl.static_range(ROWS):
            here = tl.arange(0, 1) + row
            if TILE.wide:
                here = here.to(tl.int64)
            live = (here < m)[:, None] & in_channels[None, :]
            a = tl.load(
                x + X.offset + (here * X.row_stride)[:, None] + channels[None, :],
                mask=live, other=0.0,
            )  # fmt: skip
            value = a.to(tl.float32)
            if PROLOGUE is not None:
                value = PROLOGUE(value, here, channels, here < m, in_channels, extras)
                # Channels outside the tensor must stay zero whatever the prologue adds.
                value = tl.where(live, value, 0.0).to(a.dtype).to(tl.float32)
            added = added + (sums[row] + value * b,)
        sums = added
    acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for row in tl.static_range(ROWS):
        total = tl.sum(sums[row], axis=1)
        acc = tl.where((tl.arange(0, ROWS) == row)[:, None], total[None, :], acc)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def uses_gemv(tile: Config) -> bool:
    """Whether a configuration of a product is this algorithm's."""
    return "ROWS" in dict(tile.blocks)


def configs(size: choice.Size, target: Target) -> Iterator[Config]:
    """Runs that one or two loads of all threads cover; none for more rows than are worth it."""
    if not 0 < size.rows <= MOST_ROWS:
        return
    for warps in (4, 2, 1):
        for loads in (1, 2):
            block_k = loads * _covered(size, warps)
            for block_n in (1, 2, 4, 8):
                tile = config(
                    warps, 1, ROWS=power_of_two(size.rows), BLOCK_N=block_n, BLOCK_K=block_k
                )
                if legal(size, tile, target) is None:
                    yield tile


def _covered(size: choice.Size, warps: int) -> int:
    """Elements that all threads of a program load at once."""
    return 32 * warps * VECTOR_BYTES // size.dtype.itemsize


def legal(size: choice.Size, tile: Config, target: Target) -> str | None:
    """Why a configuration cannot compute a product of that size, or None."""
    if size.rows > tile["ROWS"]:
        return f"{size.rows} rows; the weights are streamed for {tile['ROWS']}"
    if target.name == "interpreter":
        return None
    if tile["BLOCK_K"] % _covered(size, tile.num_warps):
        # Threads side by side in one row of weights hold the same part of x in registers;
        # otherwise it goes through shared memory, with a barrier in each step.
        return (
            f"runs of {tile['BLOCK_K']} elements; {tile.num_warps} warps load "
            f"{_covered(size, tile.num_warps)} at a time"
        )
    return None


def crowded(tile: Config, target: Target) -> str | None:
    """Why a configuration is expected to need more registers than there are, or None."""
    sums = tile["ROWS"] * tile["BLOCK_N"] * tile["BLOCK_K"] // (32 * tile.num_warps)
    if sums > MOST_SUMS:
        return f"{sums} sums per thread; more than {MOST_SUMS} spill"
    if target.capability >= 100 and tile["BLOCK_N"] > MOST_COLUMNS_ON_SM_100:
        return f"{tile['BLOCK_N']} columns; more than {MOST_COLUMNS_ON_SM_100} spill"
    return None


def launch_for_cost_model(size: choice.Size, tile: Config) -> Launch:
    """What the cost model needs to know of the launch that a configuration would become."""
    return choice.sketch(tile, size.rows, size.columns, **_modelled(size, tile))


def _modelled(size: choice.Size, tile: Config) -> dict[str, Any]:
    block_n, rows, steps = tile["BLOCK_N"], tile["ROWS"], -(-size.depth // tile["BLOCK_K"])
    # As counted in sm_90 code for half precision: a conversion for each weight and element of x, a
    # multiply-add for each product, and at the end 14 instructions of every thread for each result.
    loop = steps * tile["BLOCK_K"] * (block_n * (1.2 + rows) + 1.5 * rows)
    return {
        "l2_bytes": size.depth * (block_n + size.rows) * size.dtype.itemsize,
        "instructions": int(loop + 14 * rows * block_n * 32 * tile.num_warps),
        "steps": steps,
    }


def launch(problem: Problem, tile: Config) -> Launch:
    """The product of the first input, seen as a matrix of its innermost dimension, with the packed
    weight."""
    size = gemm.problem_size(problem)
    return tile_launch(
        problem, tile, gemv_kernel,
        constexprs={
            "X": Matrix.of(problem.inputs[0]), "PROLOGUE": gemm.prologue_of(problem), "PDL": False,
        },
        rows=size.rows,
        **_modelled(size, tile),
    )  # fmt: skip
