"""Kernels with one program per tile of a matrix, most often the output's pixels times its channels:
what the kernels and their launches have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from . import epilogue as ep
from .op import Config, Epilogue, Launch, Problem, Ref, X, Y, operand_refs
from .op import tiles_of as tiles_of
from .spec import rows_and_columns

FROM_X_TO_Y: Mapping[str, Ref] = {"x": X, "y": Y}


@triton.jit
def tile_of_program(
    m, COLUMNS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """rows [BLOCK_ROWS], columns [BLOCK_COLUMNS] of this program's tile of a matrix (m, COLUMNS),
    and which of them there are."""
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    column_mask = columns < COLUMNS
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    return rows, columns, row_mask, column_mask


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


def tiled_launch(
    problem: Problem,
    tile: Config,
    kernel: Any,
    constexprs: Mapping[str, Any],
    *,
    rows: int | None = None,
    columns: int | None = None,
    blocks: tuple[str, str] = ("BLOCK_ROWS", "BLOCK_COLUMNS"),
    programs: int = 1,
    pointers: Mapping[str, Ref] = FROM_X_TO_Y,
    before: Epilogue = (),
    **more: Any,
) -> tuple[Launch, ...]:
    """One program for each tile of a matrix, by default of the output's rows and columns in memory.

    The kernel also takes what it names of {X,Y}_{PITCH,OFFSET}, EPILOGUE, WIDE and the tile's
    blocks. blocks: those of the matrix; programs: for each tile; before: stages in front of the
    epilogue; more: what else a `Launch` says, or says otherwise.
    """
    x, out = problem.inputs[0], problem.output
    all_rows, all_columns = rows_and_columns(out.spec)
    stages = (*before, *problem.epilogue)
    offered = {
        "X_PITCH": x.pitch, "X_OFFSET": x.offset, "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
        "EPILOGUE": ep.for_output(stages, problem.operands, out.spec), "WIDE": problem.is_wide,
        **dict(tile.blocks),
    }  # fmt: skip
    named = {name: value for name, value in offered.items() if name in kernel.arg_names}
    fields: dict[str, Any] = {
        "kernel": kernel,
        "pointers": pointers,
        "extras": operand_refs(problem),
        "rows": all_rows if rows is None else rows,
        "batch": out.spec.batch,
        "block_rows": tile[blocks[0]],
        "columns": -(-(all_columns if columns is None else columns) // tile[blocks[1]]) * programs,
        "constexprs": {**named, **constexprs},
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
    return (Launch(**{**fields, **more}),)
