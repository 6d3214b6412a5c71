"""The tile engine: one kernel for everything that is a product of images and a step behind it.

What it computes is composed of four answers, each a named tuple with a jit function:

    SPACE   which output pixels a tile holds, in which order      space.py
    SOURCE  how the left operand of a product is made             source.py
    FINISH  what becomes of the sums                              finish.py
    OUTPUT  where results go, and what is applied to them         geometry.py

and of the loop between them (product.py). Weights are packed (K, terms of a sum).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl

from ..contract import programmatic_launch
from ..contract.op import Config, Launch, Problem, Ref, Target, W, X, Y
from . import split_k
from .finish import Finish, store
from .geometry import Tile, tile_launch
from .product import add_product, ask_for_weights, least_rolled
from .source import Source
from .space import Space, pixel_index, tile_index


@triton.jit
def compute_tile(
    x, w, x2, w2, y, workspace, semaphores, tile, split, first, stop, columns, column_mask, extras,
    SPACE: tl.constexpr, SOURCE: tl.constexpr, SECOND: tl.constexpr,
    FINISH: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr, SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """The units of SPACE from `first` on, those before `stop`, in the output channels `columns`."""
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    image, p, q, live = SPACE.place(first, stop, SPACE, TILE)
    at = SOURCE.begin(first, stop, image, p, q, live, SOURCE, SPACE, TILE)
    ask_for_weights(
        w, columns, column_mask, first, split, SOURCE.taps, SOURCE.depth, TILE, SPLIT, PDL
    )
    programmatic_launch.grid_dependency_wait(PDL)
    acc = tl.zeros((M, N), tl.float32)
    acc = add_product(acc, x, w, at, columns, column_mask, stop, split, extras, SOURCE, TILE, SPLIT)
    if SECOND is not None:
        at = SECOND.begin(first, stop, image, p, q, live, SECOND, SPACE, TILE)
        acc = add_product(
            acc, x2, w2, at, columns, column_mask, stop, split, extras, SECOND, TILE, SPLIT
        )
    rows = pixel_index(first, image, p, q, SPACE, TILE)
    FINISH.end(
        acc, y, workspace, semaphores, tile, split, first, stop, rows, live, columns, column_mask,
        extras, SPACE, FINISH, OUTPUT, TILE, SPLIT,
    )  # fmt: skip


@triton.jit
def tile_kernel(
    x, w, x2, w2, y, workspace, semaphores, extras, m,
    SPACE: tl.constexpr, SOURCE: tl.constexpr, SECOND: tl.constexpr,
    FINISH: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr, GROUPS: tl.constexpr,
    SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of the output; m counts the units of SPACE.

    SECOND: another source, with weights of its own, whose products are added; None where there is
    none. GROUPS: of the channels, in and out, each multiplied by itself. SPLIT: how many programs
    share a sum (`split_k.py`).
    """
    WIDTH: tl.constexpr = OUTPUT.K // GROUPS
    group_tiles: tl.constexpr = (WIDTH + TILE.N - 1) // TILE.N
    row_tile, column_tile = tile_index(
        tl.program_id(0) // SPLIT, tl.cdiv(m, SPACE.per_tile), GROUPS * group_tiles, TILE.GROUP_M
    )
    tile = row_tile * (GROUPS * group_tiles) + column_tile
    columns = tl.arange(0, TILE.N)
    # Where one tile has all channels and more, its mask is a constant. Of full tiles it is better
    # none: 3x3 over 64 channels, 128x64 by 4 warps on sm_90, takes 204 registers instead of 152.
    if group_tiles > 1 or WIDTH % TILE.N == 0:
        columns += column_tile * TILE.N
    column_mask = columns < WIDTH
    if GROUPS > 1:
        group = column_tile // group_tiles
        within = column_tile % group_tiles * TILE.N + tl.arange(0, TILE.N)
        column_mask = within < WIDTH
        columns = group * WIDTH + within
        x += group * SOURCE.image.C
    compute_tile(
        x, w, x2, w2, y, workspace, semaphores, tile, tl.program_id(0) % SPLIT,
        row_tile * SPACE.per_tile, m, columns, column_mask, extras,
        SPACE, SOURCE, SECOND, FINISH, OUTPUT, TILE, SPLIT, PDL,
    )  # fmt: skip


STORED = Finish(store)


def launch(
    problem: Problem,
    tile: Config,
    target: Target,
    space: Space,
    source: Source,
    *,
    second: Source | None = None,
    finish: Finish = STORED,
    pointers: Mapping[str, Ref] | None = None,
    groups: int = 1,
    split: int = 1,
    **more: Any,
) -> Launch:
    """The launch of a tile kernel; `more` as `tile_launch` takes it.

    pointers: of other tensors than the first input and the first weight.
    """
    return tile_launch(
        problem, tile, tile_kernel,
        # What is not there is never read: the output stands for it.
        pointers={
            "x": X, "w": W, "x2": Y, "w2": Y, "y": Y,
            **split_k.pointers(split, more.get("cluster", 1)),
            **(pointers or {}),
        },
        block_rows=space.per_tile,
        groups=groups,
        programs=split,
        rolled=least_rolled(Tile.of(problem, tile), tile.num_warps, target),
        constexprs={
            "SPACE": space, "SOURCE": source, "SECOND": second, "FINISH": finish,
            "GROUPS": groups, "SPLIT": split, "PDL": False,
        },
        **more,
    )  # fmt: skip
