"""Which output pixels a program computes, and in which order they are the rows of its tile.

A tile's units are pixels, pooling windows, images or columns of bands; `m` counts them.
`place(first, stop, ...)` gives the rows of the units from `first` on, those before `stop`: image
(64 bits wide where offsets are), p and q of the convolution's result, and which of them exist.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..contract.spec import TensorSpec


class Space(NamedTuple):
    """place: one of the functions below; P, Q: height and width of a convolution's result;
    per_tile: units of a tile. across, down: units of an image, where they are not pixels."""

    place: Any
    P: int
    Q: int
    per_tile: int
    down: int = 0
    across: int = 0


def of_pixels(result: TensorSpec, rows: int) -> Space:
    """Tiles of so many pixels of a result (N, K, P, Q) or (N, K, O, P, Q), which is O images."""
    p, q = result.shape[-2:]
    return Space(pixels, p, q, rows)


def of_windows(result: TensorSpec, rows: int, pooled: TensorSpec) -> Space:
    """Tiles of so many pixels, as windows of a result of which `pooled` is made."""
    (p, q), (down, across) = result.shape[2:], pooled.shape[2:]
    return Space(windows, p, q, rows // 4, down, across)


def of_bands(result: TensorSpec, columns: int, height: int) -> Space:
    """Tiles of so many pixels side by side, of bands that are so many rows of a result high."""
    p, q = result.shape[2:]
    return Space(bands, p, q, columns, -(-p // height), q)


@triton.jit
def tile_index(program, row_tiles, COLUMN_TILES: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column tile of a program; GROUP_M row tiles share their weights in L2."""
    group = program // (GROUP_M * COLUMN_TILES)
    first = group * GROUP_M
    height = tl.minimum(row_tiles - first, GROUP_M) if GROUP_M > 1 else 1
    within = program % (GROUP_M * COLUMN_TILES)
    return first + within % height, within // height


@triton.jit
def rows_and_columns(row_tile, column_tile, m, OUTPUT: tl.constexpr, TILE: tl.constexpr):
    """The rows of a tile, of `m`, and its columns of the output, and which of them exist."""
    rows = row_tile * TILE.M + tl.arange(0, TILE.M)
    columns = column_tile * TILE.N + tl.arange(0, TILE.N)
    row_mask = rows < m
    column_mask = columns < OUTPUT.K
    if TILE.wide:
        rows = rows.to(tl.int64)
    return rows, columns, row_mask, column_mask


@triton.jit
def output_tile(m, OUTPUT: tl.constexpr, TILE: tl.constexpr):
    """As `rows_and_columns`, of the program's tile; both are 64 bits wide where offsets are."""
    column_tiles: tl.constexpr = (OUTPUT.K + TILE.N - 1) // TILE.N
    program = tl.program_id(0)
    rows, columns, row_mask, column_mask = rows_and_columns(
        program // column_tiles, program % column_tiles, m, OUTPUT, TILE
    )
    if TILE.wide:
        columns = columns.to(tl.int64)
    return rows, columns, row_mask, column_mask


@triton.jit
def pixels(first, stop, SPACE: tl.constexpr, TILE: tl.constexpr):
    """M pixels in their order in memory."""
    rows = first + tl.arange(0, TILE.M)
    live = rows < stop
    if TILE.wide:
        rows = rows.to(tl.int64)
    image = rows // (SPACE.P * SPACE.Q)
    p = (rows // SPACE.Q % SPACE.P).to(tl.int32)
    q = (rows % SPACE.Q).to(tl.int32)
    return image, p, q, live


@triton.jit
def windows(first, stop, SPACE: tl.constexpr, TILE: tl.constexpr):
    """M / 4 windows of 2x2 pixels, of which an image has `down` x `across`.

    A row is a window and two bits that say which of its members it is: bit 3 and the top bit. With
    those, reduced in that order, sm_90 needs 8 instructions per thread more than for the
    convolution alone, at 128x64 and also at 64x64, where the top bit lies between warps; with the
    members in bits 2 and 3 it is 224 and 80, and the top bit first makes it 328 at 64x64.
    """
    HIGH: tl.constexpr = TILE.M // 2
    LOW: tl.constexpr = min(8, TILE.M // 4)
    index = tl.arange(0, TILE.M)
    window = first + index % HIGH // (2 * LOW) * LOW + index % LOW
    live = window < stop
    if TILE.wide:
        window = window.to(tl.int64)
    image = window // (SPACE.down * SPACE.across)
    p = (window // SPACE.across % SPACE.down).to(tl.int32) * 2 + index // HIGH
    q = (window % SPACE.across).to(tl.int32) * 2 + index // LOW % 2
    # A window that overhangs sees its last pixels twice, which changes no maximum.
    if 2 * SPACE.down > SPACE.P:
        p = tl.minimum(p, SPACE.P - 1)
    if 2 * SPACE.across > SPACE.Q:
        q = tl.minimum(q, SPACE.Q - 1)
    return image, p, q, live


@triton.jit
def images(first, stop, SPACE: tl.constexpr, TILE: tl.constexpr):
    """Whole images, each in M / per_tile rows, of which the first P·Q are its pixels."""
    ROWS: tl.constexpr = TILE.M // SPACE.per_tile
    index = tl.arange(0, TILE.M)
    pixel = index % ROWS
    image = first + index // ROWS
    live = (image < stop) & (pixel < SPACE.P * SPACE.Q)
    if TILE.wide:
        image = image.to(tl.int64)
    return image, pixel // SPACE.Q, pixel % SPACE.Q, live


@triton.jit
def band_of(index, stop, SPACE: tl.constexpr, TILE: tl.constexpr):
    """Image, first row and column of columns of bands, and which of them there are."""
    live = index < stop
    if TILE.wide:
        index = index.to(tl.int64)
    HEIGHT: tl.constexpr = TILE.M // SPACE.per_tile
    p = (index // SPACE.across % SPACE.down).to(tl.int32) * HEIGHT
    return index // (SPACE.down * SPACE.across), p, (index % SPACE.across).to(tl.int32), live


@triton.jit
def band_columns(first, stop, SPACE: tl.constexpr, TILE: tl.constexpr):
    """The first rows of per_tile columns of bands: image, p, q, and which columns there are."""
    return band_of(first + tl.arange(0, SPACE.per_tile), stop, SPACE, TILE)


@triton.jit
def bands(first, stop, SPACE: tl.constexpr, TILE: tl.constexpr):
    """Bands of M / per_tile rows of an image, row after row, each per_tile columns long."""
    lane = tl.arange(0, TILE.M)
    image, p, q, live = band_of(first + lane % SPACE.per_tile, stop, SPACE, TILE)
    p += lane // SPACE.per_tile
    return image, p, q, live & (p < SPACE.P)


@triton.jit
def pixel_index(first, image, p, q, SPACE: tl.constexpr, TILE: tl.constexpr):
    """The rows of a tile as indices of pixels of the convolution's result. Asked for where it is
    used: it need not be held through a loop."""
    if SPACE.per_tile == TILE.M:
        rows = first + tl.arange(0, TILE.M)
        if TILE.wide:
            rows = rows.to(tl.int64)
    else:
        rows = (image * SPACE.P + p) * SPACE.Q + q
    return rows
