"""Kernels with one program per tile of the output, some pixels times some channels: what their
launches and their tuning spaces have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import epilogue as ep
from .op import Config, Epilogue, Launch, Problem, Ref, X, Y, config, operand_refs

FROM_X_TO_Y: Mapping[str, Ref] = {"x": X, "y": Y}


def tiled_launch(
    problem: Problem,
    tile: Config,
    kernel: Any,
    constexprs: Mapping[str, Any],
    *,
    rows: int | None = None,
    pointers: Mapping[str, Ref] = FROM_X_TO_Y,
    before: Epilogue = (),
    **modelled: Any,
) -> tuple[Launch, ...]:
    """BLOCK_ROWS of `rows` (by default the output's pixels) times BLOCK_COLUMNS of its channels per
    program.

    The kernel also takes {X,Y}_{PITCH,OFFSET}, EPILOGUE, WIDE and the tile's blocks. before: stages
    in front of the epilogue. modelled: what the cost model asks of a `Launch`.
    """
    x, out = problem.inputs[0], problem.output
    channels = out.shape[1]
    stages = (*before, *problem.epilogue)
    launch = Launch(
        kernel=kernel,
        pointers=pointers,
        extras=operand_refs(problem),
        rows=out.shape[0] * math.prod(out.shape[2:]) if rows is None else rows,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_ROWS"],
        columns=-(-channels // tile["BLOCK_COLUMNS"]),
        constexprs={
            **constexprs,
            "X_PITCH": x.pitch,
            "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch,
            "Y_OFFSET": out.offset,
            "EPILOGUE": ep.for_output(stages, problem.operands, out.spec),
            "WIDE": problem.is_wide,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **modelled,
    )
    return (launch,)


def tiles_of(results: Sequence[int], channels: Sequence[int]) -> Iterator[Config]:
    """Tiles of so many results, so many of them side by side, for four warps."""
    for elements in results:
        for columns in channels:
            yield config(4, 1, BLOCK_ROWS=elements // columns, BLOCK_COLUMNS=columns)
