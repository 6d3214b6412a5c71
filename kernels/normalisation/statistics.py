"""Ops that scale a tensor by statistics of itself: how their one kernel goes over it.

In memory the tensor is a matrix of rows and columns (the innermost dimension). Its columns are
`groups` runs of `width` neighbours that are taken together; its rows are (outer, length): `length`
of them share their statistics. A program owns some outer indices by some groups and
- holds all they take together in registers, where that fits: one read and one write;
- otherwise walks it twice: the second read, mostly from the L2 cache, writes the result.

Means and deviations (`normalize.py`) are taken in two passes over registers, or while a tensor is
walked by Welford's method (1962): every lane keeps mean and squared deviations of what it has seen
as differences to the first element, and the lanes are combined (Chan, Golub and LeVeque 1979).
E[x²] − E[x]² is never formed: it cancels where the mean is large. A walk for `softmax.py` keeps a
running maximum and rescales the running sum when it grows (Milakov and Gimelshein, "Online
normalizer calculation for softmax", 2018).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..contract import epilogue as ep
from ..contract.cost_model import MULTIPROCESSORS
from ..contract.op import Config, Launch, Problem, Target, config, counted, power_of_two
from ..tile.finish import put
from ..tile.geometry import Matrix, tile_launch

WHOLE = 16384
"""Most elements that a program keeps in registers: 32 per thread at 16 warps."""
RUN, SHORTEST_RUN = 32, 16
"""Neighbouring elements that a program reads of a row, and at least: a 32-byte sector of halves."""
DEVIATION = "deviation"
"""What the kernel scales by, where it is not a softmax or its logarithm."""


class Sizes(NamedTuple):
    """Of a tensor as the kernel sees it, or of the part of it that a program holds at a time."""

    outer: int
    length: int
    groups: int
    width: int


@triton.jit
def fold(value, AXIS: tl.constexpr, IS_MAXIMUM: tl.constexpr):
    return tl.max(value, axis=AXIS) if IS_MAXIMUM else tl.sum(value, axis=AXIS)


@triton.jit
def together(value, HELD: tl.constexpr, IS_MAXIMUM: tl.constexpr):
    """Sums, or maxima, of a tile (outer·length, groups·width) over length and width; they broadcast
    against it."""
    OUTER: tl.constexpr = HELD.outer
    LENGTH: tl.constexpr = HELD.length
    GROUPS: tl.constexpr = HELD.groups
    WIDTH: tl.constexpr = HELD.width
    if LENGTH == 1 and GROUPS == 1:
        total = fold(value, 1, IS_MAXIMUM)[:, None]
    elif OUTER == 1 and WIDTH == 1:
        total = fold(value, 0, IS_MAXIMUM)[None, :]
    else:
        parts = tl.reshape(value, (OUTER, LENGTH, GROUPS, WIDTH))
        sums = fold(fold(parts, 3, IS_MAXIMUM), 1, IS_MAXIMUM)[:, None, :, None]
        whole = tl.broadcast_to(sums, (OUTER, LENGTH, GROUPS, WIDTH))
        total = tl.reshape(whole, (OUTER * LENGTH, GROUPS * WIDTH))
    return total


@triton.jit
def scale_of(squares, COUNT: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(variance + eps), rounded exactly: its error is in every element."""
    variance = tl.div_rn(squares, tl.full(squares.shape, COUNT, tl.float32))
    return tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(variance + EPS))


@triton.jit
def normalized(value, peak, total, LOG: tl.constexpr):
    """The softmax of a tile whose rows' maximum and sum are known and broadcast against it."""
    if LOG:
        return (value - peak) - tl.log(total)
    # One reciprocal per row instead of one division per element.
    return tl.exp(value - peak) * (1.0 / total)


@triton.jit
def over_deviation(
    value, mask, COUNT: tl.constexpr, HELD: tl.constexpr, CENTRED: tl.constexpr, EPS: tl.constexpr
):
    """The result for a tile that holds all that is taken together."""
    if CENTRED:
        # Twice: a long sum of large values rounds, the mean of what is left does not.
        for _ in tl.static_range(2):
            total = together(value, HELD, False)
            mean = tl.div_rn(total, tl.full(total.shape, COUNT, tl.float32))
            value = tl.where(mask, value - mean, 0.0)
    # A plain product would fuse with the first sum of two lanes, which then differ in the last bit.
    return value * scale_of(together(tl.fma(value, value, 0.0), HELD, False), COUNT, EPS)


@triton.jit
def rescaled(value, peak, total, HELD: tl.constexpr):
    """The maximum and the sum relative to it with those of one more tile."""
    new_peak = tl.maximum(peak, together(value, HELD, True))
    # A row of -inf so far must not give exp(-inf + inf) = NaN: later elements may be finite. NaN
    # needs no care: whether the maximum keeps it or not, the sum does.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    total = total * tl.exp(peak - shift)
    return new_peak, total + together(tl.exp(value - shift), HELD, False)


@triton.jit
def deviated(value, mask, seen, mean, squares):
    """What every lane has seen, with one more tile."""
    seen += mask.to(tl.float32)
    gap = value - mean
    # A lane that is masked has seen nothing new; max() is for one that never does.
    mean += tl.where(mask, gap / tl.maximum(seen, 1.0), 0.0)
    return seen, mean, squares + tl.where(mask, gap * (value - mean), 0.0)


@triton.jit
def read_step(
    source, step, m, outer, within, group, across, first, left, LENGTH_ROW: tl.constexpr,
    ROW_STRIDE: tl.constexpr, SIZES: tl.constexpr, HELD: tl.constexpr, OUTSIDE: tl.constexpr,
):  # fmt: skip
    """The tile of one step in fp32, OUTSIDE where there is nothing; its rows and columns, and which
    of them there are."""
    width_tiles: tl.constexpr = (SIZES.width + HELD.width - 1) // HELD.width
    length = step // width_tiles * HELD.length + within
    start = step % width_tiles * HELD.width
    rows = first + LENGTH_ROW(length)
    columns = left + start
    row_mask = (outer < m) & (length < SIZES.length)
    column_mask = (group < SIZES.groups) & (across + start < SIZES.width)
    address = source + (rows * ROW_STRIDE)[:, None] + columns[None, :]
    value = tl.load(address, mask=row_mask[:, None] & column_mask[None, :], other=OUTSIDE)
    return value.to(tl.float32), rows, columns, row_mask, column_mask


@triton.jit
def statistics_kernel(
    x, y, extras, m, SIZES: tl.constexpr, HELD: tl.constexpr,
    OUTER_ROW: tl.constexpr, LENGTH_ROW: tl.constexpr, X: tl.constexpr,
    KIND: tl.constexpr, CENTRED: tl.constexpr, EPS: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # m counts outer indices.
    COUNT: tl.constexpr = SIZES.length * SIZES.width
    DEVIATES: tl.constexpr = KIND == "deviation"
    LOG: tl.constexpr = KIND == "log_softmax"
    OUTSIDE: tl.constexpr = 0.0 if DEVIATES else float("-inf")
    height: tl.constexpr = HELD.outer * HELD.length
    breadth: tl.constexpr = HELD.groups * HELD.width
    group_tiles: tl.constexpr = (SIZES.groups + HELD.groups - 1) // HELD.groups
    width_tiles: tl.constexpr = (SIZES.width + HELD.width - 1) // HELD.width
    steps: tl.constexpr = (SIZES.length + HELD.length - 1) // HELD.length * width_tiles
    program = tl.program_id(0)
    vertical = tl.arange(0, height)
    outer = program // group_tiles * HELD.outer + vertical // HELD.length
    within = vertical % HELD.length
    horizontal = tl.arange(0, breadth)
    group = program % group_tiles * HELD.groups + horizontal // HELD.width
    across = horizontal % HELD.width
    if HELD.width == SIZES.width:
        # Neighbouring lanes are neighbouring columns: said so that the compiler sees it.
        left = program % group_tiles * breadth + horizontal
    else:
        left = group * SIZES.width + across
    if TILE.wide:
        outer = outer.to(tl.int64)
        within = within.to(tl.int64)
    first = OUTER_ROW(outer)
    source = x + X.offset
    if steps == 1:
        value, rows, columns, row_mask, column_mask = read_step(
            source, 0, m, outer, within, group, across, first, left,
            LENGTH_ROW, X.row_stride, SIZES, HELD, OUTSIDE,
        )  # fmt: skip
        if DEVIATES:
            mask = row_mask[:, None] & column_mask[None, :]
            acc = over_deviation(value, mask, COUNT, HELD, CENTRED, EPS)
        else:
            peak = together(value, HELD, True)
            acc = normalized(value, peak, together(tl.exp(value - peak), HELD, False), LOG)
        put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)
    else:
        # Of softmax: sums relative to the maximum so far.
        peak = together(tl.full((height, breadth), float("-inf"), tl.float32), HELD, True)
        total = tl.zeros(peak.shape, tl.float32)
        # Of deviations: a value of the group is close to most others, and means of differences to
        # it round less.
        pivot = tl.zeros((1, 1), tl.float32)
        if DEVIATES and CENTRED:
            address = source + (first * X.row_stride)[:, None] + (group * SIZES.width)[None, :]
            mask = (outer < m)[:, None] & (group < SIZES.groups)[None, :]
            pivot = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        seen = tl.zeros((height, breadth), tl.float32)
        mean = tl.zeros((height, breadth), tl.float32)
        squares = tl.zeros((height, breadth), tl.float32)
        for step in range(steps):
            value, rows, columns, row_mask, column_mask = read_step(
                source, step, m, outer, within, group, across, first, left,
                LENGTH_ROW, X.row_stride, SIZES, HELD, OUTSIDE,
            )  # fmt: skip
            if not DEVIATES:
                peak, total = rescaled(value, peak, total, HELD)
            elif CENTRED:
                mask = row_mask[:, None] & column_mask[None, :]
                seen, mean, squares = deviated(value - pivot, mask, seen, mean, squares)
            else:
                squares = tl.fma(value, value, squares)
        centre = tl.zeros((1, 1), tl.float32)
        if DEVIATES and CENTRED:
            sums = together(tl.fma(mean, seen, 0.0), HELD, False)
            centre = tl.div_rn(sums, tl.full(sums.shape, COUNT, tl.float32))
            squares += seen * (mean - centre) * (mean - centre)
        scale = scale_of(together(squares, HELD, False), COUNT, EPS)
        for step in range(steps):
            value, rows, columns, row_mask, column_mask = read_step(
                source, step, m, outer, within, group, across, first, left,
                LENGTH_ROW, X.row_stride, SIZES, HELD, OUTSIDE,
            )  # fmt: skip
            if DEVIATES:
                acc = ((value - pivot) - centre) * scale
            else:
                acc = normalized(value, peak, total, LOG)
            put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


@dataclass(frozen=True)
class Walk:
    """The tensor as the kernel goes over it: rows (outer, length), columns (groups, width).

    outer_rows, length_rows: row strides of the dimensions that make up the two, with their sizes.
    """

    outer_sizes: tuple[int, ...]
    outer_rows: tuple[int, ...]
    length_sizes: tuple[int, ...]
    length_rows: tuple[int, ...]
    groups: int
    width: int

    @property
    def outer(self) -> int:
        return math.prod(self.outer_sizes)

    @property
    def length(self) -> int:
        return math.prod(self.length_sizes)

    def is_whole(self, tile: Config) -> bool:
        """Whether a program reads all it normalises at once."""
        return self.length <= tile["BLOCK_LENGTH"] and self.width <= tile["BLOCK_WIDTH"]


def walk_of(problem: Problem) -> Walk:
    """How the kernel goes over a problem's tensor; its attributes say which dimensions (`dims`) are
    taken together, and into how many parts (`groups`) dimension 1 is split first."""
    attributes: Any = problem.attributes
    spec = problem.inputs[0].spec

    def parts(dim: int) -> tuple[tuple[int, bool], ...]:
        """A dimension's sizes, outermost first, and whether each is normalised over."""
        size = spec.shape[dim]
        if dim == 1 and attributes.groups > 1:
            return (attributes.groups, False), (size // attributes.groups, True)
        return ((size, dim in attributes.dims),)

    *row_dims, last = spec.layout.order(spec.rank)
    kept: list[tuple[int, int]] = []
    reduced: list[tuple[int, int]] = []
    stride = 1
    for size, is_reduced in reversed([part for dim in row_dims for part in parts(dim)]):
        (reduced if is_reduced else kept).insert(0, (size, stride))
        stride *= size
    columns = parts(last)
    return Walk(
        tuple(size for size, _ in kept),
        tuple(step for _, step in kept),
        tuple(size for size, _ in reduced),
        tuple(step for _, step in reduced),
        math.prod(size for size, is_reduced in columns if not is_reduced),
        math.prod(size for size, is_reduced in columns if is_reduced),
    )


def launches(
    kind: str, problem: Problem, tile: Config, target: Target, eps: float = 0.0,
    centred: bool = True,
) -> tuple[Launch, ...]:  # fmt: skip
    """One launch; its cost model counts the second read where there is one."""
    walk, x = walk_of(problem), problem.inputs[0]
    reads = 1 if walk.is_whole(tile) else 2
    owned = walk.length * walk.width * tile["BLOCK_OUTER"] * tile["BLOCK_GROUPS"]
    launch = tile_launch(
        problem, tile, statistics_kernel,
        constexprs={
            "SIZES": Sizes(walk.outer, walk.length, walk.groups, walk.width),
            "HELD": Sizes(*(tile[f"BLOCK_{name.upper()}"] for name in Sizes._fields)),
            "OUTER_ROW": ep.row_offset_function(walk.outer_sizes, walk.outer_rows),
            "LENGTH_ROW": ep.row_offset_function(walk.length_sizes, walk.length_rows),
            "X": Matrix.of(x), "KIND": kind, "CENTRED": centred, "EPS": eps,
        },
        rows=walk.outer,
        columns=walk.groups,
        l2_bytes=reads * owned * x.spec.dtype.itemsize,
    )  # fmt: skip
    return (launch,)


def tile_of(walk: Walk, least: int, whole: int, run: int = RUN, warps: int | None = None) -> Config:
    """A tile that holds `least` elements or more, everything it normalises if that is at most
    `whole`, and reads runs of `run` neighbours."""
    width = power_of_two(walk.width)
    if width > whole:
        width = whole // 4
    groups = 1
    if width >= walk.width:
        groups = min(max(1, run // width), power_of_two(walk.groups))
    length = power_of_two(walk.length)
    if length * groups * width > whole:
        length = max(1, min(length, whole // 4 // (groups * width)))
    elif width >= walk.width:
        groups = max(groups, min(power_of_two(walk.groups), least // (length * width)))
    outer = max(1, min(power_of_two(walk.outer), least // (length * groups * width)))
    elements = outer * length * groups * width
    return config(
        warps or min(16, max(4, power_of_two(elements) // 512)),
        1,
        BLOCK_OUTER=outer,
        BLOCK_LENGTH=length,
        BLOCK_GROUPS=groups,
        BLOCK_WIDTH=width,
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """512 to 2048 elements or one whole group per program; loops over groups of 2048 to 16384
    elements."""
    walk = walk_of(problem)
    yield from {
        tile_of(walk, least, whole, run): None
        for least in (512, 1024, 2048)
        for whole in (2048, 4096, WHOLE)
        for run in (16, RUN, 64)
    }


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Groups whose columns take several tiles are done one at a time."""
    walk = walk_of(problem)
    if walk.width > tile["BLOCK_WIDTH"] and tile["BLOCK_GROUPS"] > 1:
        return f"several groups at a time, of {walk.width} columns, do not fit tiles of fewer"
    return None


def default(problem: Problem, target: Target) -> Config:
    """1024 elements, 8 per thread, or whatever is normalised together up to `WHOLE`; fewer groups
    side by side where that saves the second read or keeps more multiprocessors busy."""
    walk = walk_of(problem)
    if target.name == "interpreter":
        return tile_of(walk, 1 << 18, 1 << 20, run=256, warps=1)
    tile, narrow = (tile_of(walk, 1024, WHOLE, run) for run in (RUN, SHORTEST_RUN))
    programs = -(-walk.outer // tile["BLOCK_OUTER"]) * -(-walk.groups // tile["BLOCK_GROUPS"])
    if programs < MULTIPROCESSORS or (walk.is_whole(narrow) and not walk.is_whole(tile)):
        return narrow
    return tile


cost = counted(lambda problem: 5 * problem.output.spec.numel)
"""Sum, difference, square or exponential, its sum and the scaling."""
