"""What becomes of the sums of a tile: they are stored, pooled, averaged or added to others'.

`end(acc, y, workspace, semaphores, tile, split, first, stop, rows, live, columns, ...)` takes them
to memory; the arguments are those of `space.py`, and of `split_k.py` where programs share a sum.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..contract import scalars
from . import split_k


class Finish(NamedTuple):
    """end: one of the functions below. stages: applied to the sums before they are pooled or
    averaged; maximum: whether pooling takes the maximum, else the sum; detail: what only one `end`
    knows of."""

    end: Any
    stages: Any = None
    maximum: bool = True
    detail: Any = None


@triton.jit
def write(tile, y, rows, row_mask, columns, column_mask, OUTPUT: tl.constexpr):
    """Stores a tile in the output's dtype."""
    address = y + OUTPUT.offset + (rows * OUTPUT.row_stride)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, tile.to(y.dtype.element_ty), mask=mask)


@triton.jit
def put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT: tl.constexpr):
    """The epilogue of an output tile, and its store."""
    acc = OUTPUT.epilogue(acc, rows, columns, row_mask, column_mask, extras)
    write(acc, y, rows, row_mask, columns, column_mask, OUTPUT)


@triton.jit
def unit_rows(first, stop, COUNT: tl.constexpr, TILE: tl.constexpr):
    """The units of a tile as rows of the output."""
    rows = first + tl.arange(0, COUNT)
    row_mask = rows < stop
    if TILE.wide:
        rows = rows.to(tl.int64)
    return rows, row_mask


@triton.jit
def store(
    acc, y, workspace, semaphores, tile, split, first, stop, rows, live, columns, column_mask,
    extras, SPACE: tl.constexpr, FINISH: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Every pixel; where SPLIT programs share a sum, by the one that completes it, or each a share
    of the rows where they are a cluster."""
    if SPLIT == 1:
        put(acc, y, rows, live, columns, column_mask, extras, OUTPUT)
    elif TILE.cluster:
        acc = split_k.sum_in_cluster(acc, split, SPLIT, TILE)
        SHARE: tl.constexpr = TILE.M // SPLIT
        rows, live = unit_rows(first + split * SHARE, stop, SHARE, TILE)
        put(acc, y, rows, live, columns, column_mask, extras, OUTPUT)
        split_k.meet_cluster(split)
    elif split_k.store_partial(acc, workspace, semaphores, tile, split, SPLIT, TILE):
        acc = split_k.reduce_partials(workspace, semaphores, tile, SPLIT, TILE)
        put(acc, y, rows, live, columns, column_mask, extras, OUTPUT)


@triton.jit
def combine(a, b, MAXIMUM: tl.constexpr):
    """The larger value, NaN if there is one, or the sum."""
    return scalars.maximum(a, b) if MAXIMUM else a + b


@triton.jit
def halves(tile, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows whose index has the bit of value STEP clear, and those where it is set."""
    pairs = tl.reshape(tile, (ROWS // (2 * STEP), 2, STEP, COLUMNS))
    clear, set_ = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
    shape: tl.constexpr = (ROWS // 2, COLUMNS)
    return tl.reshape(clear, shape), tl.reshape(set_, shape)


@triton.jit
def pool_windows(
    acc, y, workspace, semaphores, tile, split, first, stop, rows, live, columns, column_mask,
    extras, SPACE: tl.constexpr, FINISH: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The maximum or sum of every 2x2 window, of a tile that `space.windows` placed.

    The members of a window lie in one thread's registers, or where tiles are short in two: nothing
    else is exchanged.
    """
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    LOW: tl.constexpr = min(8, M // 4)
    acc = FINISH.stages(acc, rows, columns, live, column_mask, extras)
    # The members a thread holds in any case first: what is left to exchange is then half as much.
    even, odd = halves(acc, M, LOW, N)
    upper, lower = halves(combine(even, odd, FINISH.maximum), M // 2, M // 4, N)
    pooled = combine(upper, lower, FINISH.maximum)
    units, unit_mask = unit_rows(first, stop, SPACE.per_tile, TILE)
    put(pooled, y, units, unit_mask, columns, column_mask, extras, OUTPUT)


@triton.jit
def average_images(
    acc, y, workspace, semaphores, tile, split, first, stop, rows, live, columns, column_mask,
    extras, SPACE: tl.constexpr, FINISH: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """The mean of every image, of a tile that `space.images` placed."""
    IMAGES: tl.constexpr = SPACE.per_tile
    ROWS: tl.constexpr = TILE.M // IMAGES
    N: tl.constexpr = TILE.N
    acc = FINISH.stages(acc, rows, columns, live, column_mask, extras)
    # Rows without a pixel must stay zero whatever the stages made of them.
    acc = tl.where(live[:, None], acc, 0.0)
    total = tl.sum(tl.reshape(acc, (IMAGES, ROWS, N)), axis=1)
    mean = tl.div_rn(total, tl.full(total.shape, SPACE.P * SPACE.Q, tl.float32))
    units, unit_mask = unit_rows(first, stop, IMAGES, TILE)
    put(mean, y, units, unit_mask, columns, column_mask, extras, OUTPUT)
