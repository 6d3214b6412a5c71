"""The kernel of `normalize.py`, whose docstring says what it computes and how."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def together(
    value,
    OUTER: tl.constexpr,
    LENGTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Sums of a tile (OUTER·LENGTH, GROUPS·WIDTH) over LENGTH and WIDTH; broadcast against it."""
    if LENGTH == 1 and GROUPS == 1:
        total = tl.sum(value, axis=1)[:, None]
    elif OUTER == 1 and WIDTH == 1:
        total = tl.sum(value, axis=0)[None, :]
    else:
        parts = tl.reshape(value, (OUTER, LENGTH, GROUPS, WIDTH))
        sums = tl.sum(tl.sum(parts, axis=3), axis=1)[:, None, :, None]
        whole = tl.broadcast_to(sums, (OUTER, LENGTH, GROUPS, WIDTH))
        total = tl.reshape(whole, (OUTER * LENGTH, GROUPS * WIDTH))
    return total


@triton.jit
def scale_of(squares, COUNT: tl.constexpr, EPS: tl.constexpr):
    """1 / sqrt(variance + eps), rounded exactly: its error is in every element."""
    variance = tl.div_rn(squares, tl.full(squares.shape, COUNT, tl.float32))
    return tl.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.sqrt_rn(variance + EPS))


@triton.jit
def finish(
    acc, y, rows, columns, row_mask, column_mask, extras,
    Y_PITCH: tl.constexpr, Y_OFFSET: tl.constexpr, EPILOGUE: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, and its store."""
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def normalize_kernel(
    x,
    y,
    extras,
    m,
    LENGTH: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
    OUTER_ROW: tl.constexpr,
    LENGTH_ROW: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    EPS: tl.constexpr,
    CENTRED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_OUTER: tl.constexpr,
    BLOCK_LENGTH: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    # m counts outer indices.
    COUNT: tl.constexpr = LENGTH * WIDTH
    group_tiles: tl.constexpr = (GROUPS + BLOCK_GROUPS - 1) // BLOCK_GROUPS
    program = tl.program_id(0)
    vertical = tl.arange(0, BLOCK_OUTER * BLOCK_LENGTH)
    outer = program // group_tiles * BLOCK_OUTER + vertical // BLOCK_LENGTH
    within = vertical % BLOCK_LENGTH
    horizontal = tl.arange(0, BLOCK_GROUPS * BLOCK_WIDTH)
    group = program % group_tiles * BLOCK_GROUPS + horizontal // BLOCK_WIDTH
    across = horizontal % BLOCK_WIDTH
    if BLOCK_WIDTH == WIDTH:
        # Neighbouring lanes are neighbouring columns: said so that the compiler sees it.
        left = program % group_tiles * (BLOCK_GROUPS * BLOCK_WIDTH) + horizontal
    else:
        left = group * WIDTH + across
    if WIDE:
        outer = outer.to(tl.int64)
        within = within.to(tl.int64)
    first = OUTER_ROW(outer)
    source = x + X_OFFSET
    if LENGTH <= BLOCK_LENGTH and WIDTH <= BLOCK_WIDTH:
        rows = first + LENGTH_ROW(within)
        row_mask = (outer < m) & (within < LENGTH)
        column_mask = (group < GROUPS) & (across < WIDTH)
        mask = row_mask[:, None] & column_mask[None, :]
        value = tl.load(source + (rows * X_PITCH)[:, None] + left[None, :], mask=mask, other=0.0)
        value = value.to(tl.float32)
        if CENTRED:
            # Twice: a long sum of large values rounds, the mean of what is left does not.
            for _ in tl.static_range(2):
                total = together(value, BLOCK_OUTER, BLOCK_LENGTH, BLOCK_GROUPS, BLOCK_WIDTH)
                mean = tl.div_rn(total, tl.full(total.shape, COUNT, tl.float32))
                value = tl.where(mask, value - mean, 0.0)
        squares = together(value * value, BLOCK_OUTER, BLOCK_LENGTH, BLOCK_GROUPS, BLOCK_WIDTH)
        acc = value * scale_of(squares, COUNT, EPS)
        finish(acc, y, rows, left, row_mask, column_mask, extras, Y_PITCH, Y_OFFSET, EPILOGUE)
    else:
        width_tiles: tl.constexpr = (WIDTH + BLOCK_WIDTH - 1) // BLOCK_WIDTH
        steps: tl.constexpr = (LENGTH + BLOCK_LENGTH - 1) // BLOCK_LENGTH * width_tiles
        shape: tl.constexpr = (BLOCK_OUTER * BLOCK_LENGTH, BLOCK_GROUPS * BLOCK_WIDTH)
        # A value of the group close to most others: means of differences to it round less.
        pivot = tl.zeros((1, 1), tl.float32)
        if CENTRED:
            address = source + (first * X_PITCH)[:, None] + (group * WIDTH)[None, :]
            mask = (outer < m)[:, None] & (group < GROUPS)[None, :]
            pivot = tl.load(address, mask=mask, other=0.0).to(tl.float32)
        seen = tl.zeros(shape, tl.float32)
        mean = tl.zeros(shape, tl.float32)
        squares = tl.zeros(shape, tl.float32)
        for step in range(steps):
            length = step // width_tiles * BLOCK_LENGTH + within
            start = step % width_tiles * BLOCK_WIDTH
            rows = first + LENGTH_ROW(length)
            columns = left + start
            row_mask = (outer < m) & (length < LENGTH)
            column_mask = (group < GROUPS) & (across + start < WIDTH)
            mask = row_mask[:, None] & column_mask[None, :]
            address = source + (rows * X_PITCH)[:, None] + columns[None, :]
            value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
            if CENTRED:
                seen += mask.to(tl.float32)
                value -= pivot
                gap = value - mean
                # A lane that is masked has seen nothing new; max() is for one that never does.
                mean += tl.where(mask, gap / tl.maximum(seen, 1.0), 0.0)
                squares += tl.where(mask, gap * (value - mean), 0.0)
            else:
                squares += value * value
        if CENTRED:
            total = together(mean * seen, BLOCK_OUTER, BLOCK_LENGTH, BLOCK_GROUPS, BLOCK_WIDTH)
            centre = tl.div_rn(total, tl.full(total.shape, COUNT, tl.float32))
            squares += seen * (mean - centre) * (mean - centre)
        else:
            centre = tl.zeros((1, 1), tl.float32)
        squares = together(squares, BLOCK_OUTER, BLOCK_LENGTH, BLOCK_GROUPS, BLOCK_WIDTH)
        scale = scale_of(squares, COUNT, EPS)
        for step in range(steps):
            length = step // width_tiles * BLOCK_LENGTH + within
            start = step % width_tiles * BLOCK_WIDTH
            rows = first + LENGTH_ROW(length)
            columns = left + start
            row_mask = (outer < m) & (length < LENGTH)
            column_mask = (group < GROUPS) & (across + start < WIDTH)
            mask = row_mask[:, None] & column_mask[None, :]
            address = source + (rows * X_PITCH)[:, None] + columns[None, :]
            value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
            acc = ((value - pivot) - centre) * scale
            finish(
                acc, y, rows, columns, row_mask, column_mask, extras, Y_PITCH, Y_OFFSET, EPILOGUE
            )
