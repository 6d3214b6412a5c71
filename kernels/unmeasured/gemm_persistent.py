"""The tiles of `tile/gemm.py` by programs that stay: as many as the multiprocessors hold at a time.

Of P programs the first computes tiles 0, P, 2P, ..., in the order in which `gemm_kernel` starts
them. The loops over tiles and over steps are one for the pipeliner (`flatten`): while a tile's
results are on their way out, the first copies of the next one are on their way in. What that saves
is the filling and draining of each tile, where tiles are many and steps few: 1x1 convolutions. On
sm_90 even a tile of one step has asynchronous copies then, and nothing spills; a step costs more
registers (128x128 with 8 warps by pointers: 178 instead of 128).

How many programs there are follows from the target, not from a GPU that is at hand: a device with
fewer multiprocessors of the same generation runs them in two goes, with the same results.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import triton
import triton.language as tl

from ..contract import cost_model, programmatic_launch
from ..contract.op import Config, Launch, Problem, Target
from ..tile import choice, gemm, residual, space
from ..tile.finish import put

BLOCK = "PERSISTENT"
RESIDENT = (1, 2)
"""Programs on one multiprocessor."""
STAGES = 3
"""Of the configurations that are also tried so."""


@triton.jit
def persistent_kernel(
    x, w, y, extras, m, X: tl.constexpr, PROLOGUE: tl.constexpr, FINITE: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr, TMA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    column_tiles: tl.constexpr = (OUTPUT.K + N - 1) // N
    row_tiles = tl.cdiv(m, M)
    programmatic_launch.grid_dependency_wait(PDL)
    for tile in tl.range(
        tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True
    ):
        row_tile, column_tile = space.tile_index(tile, row_tiles, column_tiles, TILE.GROUP_M)
        rows, columns, row_mask, column_mask = space.rows_and_columns(
            row_tile, column_tile, m, OUTPUT, TILE
        )
        acc = gemm.add_products(
            tl.zeros((M, N), tl.float32), x, w, row_tile, column_tile, rows, columns, row_mask,
            column_mask, 0, (X.C + TILE.K - 1) // TILE.K, extras, X, PROLOGUE, FINITE, TILE, TMA,
        )  # fmt: skip
        put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)
    programmatic_launch.launch_dependents(PDL)


def programs_per_sm(tile: Config) -> int:
    """How many programs of a configuration stay on a multiprocessor; 0 where none stays."""
    return dict(tile.blocks).get(BLOCK, 0)


def programs(tile: Config, target: Target) -> int:
    """How many programs a persistent configuration starts."""
    return cost_model.machine_for(target).multiprocessors * programs_per_sm(tile)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Why programs of a configuration cannot stay, or None; also where they are not to."""
    resident, gpu = programs_per_sm(tile), cost_model.machine_for(target)
    if not resident:
        return None
    if choice.split_of(tile) > 1:
        return f"{BLOCK}: {choice.split_of(tile)} programs share each tile, because there are few"
    if residual.comes_first(tile):
        return f"{BLOCK}: what waits for the residual already copies the next tile meanwhile"
    size = gemm.problem_size(problem)
    tiles, started = size.tiles(tile["BLOCK_M"], tile["BLOCK_N"]), programs(tile, target)
    if tiles <= started:
        return f"{BLOCK}: {tiles} tiles for {started} programs; none would have a second one"
    needed = resident * choice.shared_bytes(tile, size.dtype)
    if target.is_gpu and needed > gpu.shared_kb * 1024:
        return (
            f"{BLOCK}: {resident} programs need {needed} bytes of shared memory; a multiprocessor "
            f"has {gpu.shared_kb * 1024}"
        )
    return None


def variants(problem: Problem, tiles: Iterable[Config], target: Target) -> Iterator[Config]:
    """Those of the configurations whose programs can stay, so."""
    for tile in tiles:
        for resident in RESIDENT if tile.num_stages == STAGES else ():
            stays = replace(tile, blocks=(*tile.blocks, (BLOCK, resident)))
            if legal(problem, stays, target) is None:
                yield stays


def make_persistent(launch: Launch, tile: Config, target: Target) -> Launch:
    """The launch of `tile/gemm.py`, by pointers or descriptors, with programs that stay."""
    kept = set(persistent_kernel.arg_names)
    return replace(
        launch,
        kernel=persistent_kernel,
        pointers={name: ref for name, ref in launch.pointers.items() if name in kept},
        constexprs={name: value for name, value in launch.constexprs.items() if name in kept},
        most_programs=programs(tile, target),
    )
