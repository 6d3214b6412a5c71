"""The kernel of poolings over windows of images and volumes; `pool.py` says what it computes.

It walks the input rows that TILE_ROWS output rows need, reduces each horizontally once, and
combines it into every output row it belongs to. With stride 1 and TILE_ROWS=4 instead of 1 a 3x3
window costs 4.5 loads per result instead of 9 and 11 instructions instead of 24, a 5x5 window 10
loads instead of 25 and 25 instructions instead of 49 (sm_90, half precision). The planes of a
volume's window are a loop: all loads of a plane are started together, which those of a whole 3x3x3
window have no registers for.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..contract import elementary, programmatic_launch
from ..tile.finish import combine, put
from ..tile.space import output_tile

# Whole powers up to here are products, in a few instructions; others go through fp64 logarithms.
MOST_MULTIPLIED = tl.constexpr(16)
# A row that no tap of any window brings inside.
FAR_OUTSIDE = tl.constexpr(-(2**20))


@triton.jit
def term(value, NORM: tl.constexpr):
    """value^NORM; whole powers (integers here) by multiplication, as far as that is cheaper."""
    if NORM is None:
        result = value
    elif NORM <= MOST_MULTIPLIED and NORM % 1 == 0:
        result = value
        for _ in tl.static_range(1, NORM):
            result = result * value
    else:
        result = elementary.power(value, tl.full((1, 1), NORM, tl.float32))
    return result


@triton.jit
def root(value, NORM: tl.constexpr):
    """value^(1/NORM) as IEEE 754 pow has it: NaN for negative values, infinity for -infinity."""
    if NORM is None or NORM == 1:
        result = value
    elif NORM == 2:
        result = tl.sqrt_rn(value)
    else:
        # In fp64: rounding 1/NORM to fp32 costs up to 2 ulps.
        result = tl.exp2(tl.log2(value.to(tl.float64)) * (1.0 / NORM)).to(tl.float32)
        result = tl.where(value == float("-inf"), float("inf"), result)
    return result


@triton.jit
def extent(
    start, LENGTH: tl.constexpr, SIZE: tl.constexpr, PADDING: tl.constexpr, COUNT: tl.constexpr
):
    """How much of a window of one dimension lies in the padded image or in the image itself."""
    if COUNT == "padded":
        result = tl.minimum(start + LENGTH, SIZE + PADDING) - start
    else:
        result = tl.minimum(start + LENGTH, SIZE) - tl.maximum(start, 0)
    return result


@triton.jit
def span(index, AXIS: tl.constexpr):
    """First element and length of an adaptive window along one dimension."""
    start = index * AXIS.size // AXIS.outputs
    return start, ((index + 1) * AXIS.size + AXIS.outputs - 1) // AXIS.outputs - start


@triton.jit
def in_window(start, tap, length, AXIS: tl.constexpr, ADAPTIVE: tl.constexpr):
    """Whether a tap belongs to the window of one dimension and lies in the input."""
    return tap < length if ADAPTIVE else (start + tap).to(tl.uint32, bitcast=True) < AXIS.size


@triton.jit
def image_windows(rows, WINDOWS: tl.constexpr):
    """Of output pixels: the top and the left of their windows, and the pixel there as an index."""
    HEIGHT: tl.constexpr = WINDOWS.height
    WIDTH: tl.constexpr = WINDOWS.width
    top = (rows // WIDTH.outputs % HEIGHT.outputs).to(tl.int32) * HEIGHT.stride - HEIGHT.padding
    left = (rows % WIDTH.outputs).to(tl.int32) * WIDTH.stride - WIDTH.padding
    image = rows // (HEIGHT.outputs * WIDTH.outputs)
    return top, left, (image * HEIGHT.size + top) * WIDTH.size + left


@triton.jit
def in_image(top, left, WINDOWS: tl.constexpr):
    """Whether pixels lie in the image."""
    row_inside = top.to(tl.uint32, bitcast=True) < WINDOWS.height.size
    return row_inside & (left.to(tl.uint32, bitcast=True) < WINDOWS.width.size)


@triton.jit
def empty_past_end(start, length, live, ADAPTIVE: tl.constexpr):
    """Where windows start and how long they are, such that those of rows past the end are empty."""
    if ADAPTIVE:
        length = tl.where(live, length, 0)
    else:
        start = tl.where(live, start, FAR_OUTSIDE)
    return start, length


@triton.jit
def add_rows(
    accs, source, top, left, height, width, plane_mask, column_mask,
    WINDOWS: tl.constexpr, REDUCTION: tl.constexpr, TILE_ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The accumulators of TILE_ROWS output rows with their taps of one plane, all unrolled."""
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    HEIGHT: tl.constexpr = WINDOWS.height
    WIDTH: tl.constexpr = WINDOWS.width
    R: tl.constexpr = HEIGHT.taps
    S: tl.constexpr = WIDTH.taps
    MAXIMUM: tl.constexpr = REDUCTION.maximum
    EMPTY: tl.constexpr = float("-inf") if MAXIMUM else 0.0
    INPUT_ROWS: tl.constexpr = (TILE_ROWS - 1) * HEIGHT.stride + (R - 1) * HEIGHT.dilation + 1
    # Lines of their own are summed side by side, which takes 8 registers more of a volume's 3x3x3.
    DIRECT: tl.constexpr = TILE_ROWS == 1 and (REDUCTION.adaptive or WINDOWS.depth.taps > 1)
    for i in tl.static_range(INPUT_ROWS):
        row_inside = plane_mask & in_window(top, i, height, HEIGHT, REDUCTION.adaptive)
        line = accs[0] if DIRECT else tl.full((M, N), EMPTY, tl.float32)
        for s in tl.static_range(S):
            inside = in_window(left, s * WIDTH.dilation, width, WIDTH, REDUCTION.adaptive)
            mask = (row_inside & inside)[:, None] & column_mask[None, :]
            offset = (i * WIDTH.size + s * WIDTH.dilation) * WINDOWS.row_stride
            value = tl.load(source + offset, mask=mask, other=EMPTY).to(tl.float32)
            line = combine(line, term(value, REDUCTION.norm), MAXIMUM)
        # Input row i belongs to output row j as its tap (i - j * stride) / dilation.
        updated = ()
        for j in tl.static_range(TILE_ROWS):
            if (
                (i - j * HEIGHT.stride >= 0)
                and ((i - j * HEIGHT.stride) % HEIGHT.dilation == 0)
                and ((i - j * HEIGHT.stride) // HEIGHT.dilation < R)
            ):
                total = line if DIRECT else combine(accs[j], line, MAXIMUM)
                updated = updated + (total,)  # type: ignore[assignment]
            else:
                updated = updated + (accs[j],)  # type: ignore[assignment]
        accs = updated
    return accs


@triton.jit
def add_plane(
    acc, source, top, left, height, width, plane_mask, column_mask,
    WINDOWS: tl.constexpr, REDUCTION: tl.constexpr,
):  # fmt: skip
    """The accumulator of one output row with its taps of one plane, one after the other."""
    HEIGHT: tl.constexpr = WINDOWS.height
    WIDTH: tl.constexpr = WINDOWS.width
    EMPTY: tl.constexpr = float("-inf") if REDUCTION.maximum else 0.0
    for tap in range(HEIGHT.taps * WIDTH.taps):
        r = tap // WIDTH.taps * HEIGHT.dilation
        s = tap % WIDTH.taps * WIDTH.dilation
        inside = plane_mask & in_window(top, r, height, HEIGHT, REDUCTION.adaptive)
        inside = inside & in_window(left, s, width, WIDTH, REDUCTION.adaptive)
        mask = inside[:, None] & column_mask[None, :]
        offset = (r * WIDTH.size + s) * WINDOWS.row_stride
        value = tl.load(source + offset, mask=mask, other=EMPTY).to(tl.float32)
        acc = combine(acc, term(value, REDUCTION.norm), REDUCTION.maximum)
    return acc


@triton.jit
def averaged(
    acc, front, top, left, depth, height, width, WINDOWS: tl.constexpr, REDUCTION: tl.constexpr
):
    """A window's sum divided by its pixels, where their number differs between windows."""
    DEPTH: tl.constexpr = WINDOWS.depth
    HEIGHT: tl.constexpr = WINDOWS.height
    WIDTH: tl.constexpr = WINDOWS.width
    COUNT: tl.constexpr = REDUCTION.counts
    if COUNT == "taps":
        acc = acc / (depth * height * width).to(tl.float32)[:, None]
    elif COUNT is not None:
        count = extent(top, HEIGHT.taps, HEIGHT.size, HEIGHT.padding, COUNT)
        count = count * extent(left, WIDTH.taps, WIDTH.size, WIDTH.padding, COUNT)
        count = count * extent(front, DEPTH.taps, DEPTH.size, DEPTH.padding, COUNT)
        acc = acc / count.to(tl.float32)[:, None]
        if REDUCTION.norm is not None:
            acc = acc * (HEIGHT.taps * WIDTH.taps)
    return acc


@triton.jit
def pool_kernel(
    x, y, extras, m,
    WINDOWS: tl.constexpr, REDUCTION: tl.constexpr, UNROLL: tl.constexpr, TILE_ROWS: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    DEPTH: tl.constexpr = WINDOWS.depth
    HEIGHT: tl.constexpr = WINDOWS.height
    WIDTH: tl.constexpr = WINDOWS.width
    ADAPTIVE: tl.constexpr = REDUCTION.adaptive
    EMPTY: tl.constexpr = float("-inf") if REDUCTION.maximum else 0.0
    # m counts columns of output tiles: N * O * ceil(P / TILE_ROWS) * Q.
    bands: tl.constexpr = (HEIGHT.outputs + TILE_ROWS - 1) // TILE_ROWS
    index, columns, live, column_mask = output_tile(m, OUTPUT, TILE)
    plane = index // (bands * WIDTH.outputs)
    front = (plane % DEPTH.outputs).to(tl.int32)
    first = (index // WIDTH.outputs % bands).to(tl.int32) * TILE_ROWS
    q = (index % WIDTH.outputs).to(tl.int32)
    if ADAPTIVE:
        front, depth = span(front, DEPTH)
        top, height = span(first, HEIGHT)
        left, width = span(q, WIDTH)
    else:
        front = front * DEPTH.stride - DEPTH.padding
        top = first * HEIGHT.stride - HEIGHT.padding
        left = q * WIDTH.stride - WIDTH.padding
        depth, height, width = DEPTH.taps, HEIGHT.taps, WIDTH.taps
    corner = ((plane // DEPTH.outputs * DEPTH.size + front) * HEIGHT.size + top) * WIDTH.size + left
    base = x + WINDOWS.offset + (corner * WINDOWS.row_stride)[:, None]
    base = base + columns[None, :]
    # Rows past the end have no tap inside in the outer loop: one mask serves both.
    safe_front, safe_depth = front, depth
    safe_top, safe_height = top, height
    if DEPTH.taps > 1:
        safe_front, safe_depth = empty_past_end(front, depth, live, ADAPTIVE)
    else:
        safe_top, safe_height = empty_past_end(top, height, live, ADAPTIVE)
    programmatic_launch.grid_dependency_wait(PDL)
    accs = ()
    for _ in tl.static_range(TILE_ROWS):
        # Tuples grow by addition: Triton has no starred elements.
        accs = accs + (tl.full((M, N), EMPTY, tl.float32),)  # type: ignore[assignment]
    for t in range(DEPTH.taps):
        step = t * DEPTH.dilation
        plane_mask = in_window(safe_front, step, safe_depth, DEPTH, ADAPTIVE)
        if TILE.wide:
            step = step.to(tl.int64)
        source = base + step * (HEIGHT.size * WIDTH.size * WINDOWS.row_stride)
        if UNROLL:
            accs = add_rows(
                accs, source, safe_top, left, safe_height, width, plane_mask, column_mask,
                WINDOWS, REDUCTION, TILE_ROWS, TILE,
            )  # fmt: skip
        else:
            acc = accs[0]  # type: ignore[misc]
            acc = add_plane(
                acc, source, safe_top, left, safe_height, width, plane_mask, column_mask,
                WINDOWS, REDUCTION,
            )  # fmt: skip
            accs = (acc,)  # type: ignore[assignment]
    for j in tl.static_range(TILE_ROWS):
        p = first + j
        rows = (plane * HEIGHT.outputs + p) * WIDTH.outputs + q
        row_mask = live & (p < HEIGHT.outputs)
        at = top + j * HEIGHT.stride
        acc = averaged(accs[j], front, at, left, depth, height, width, WINDOWS, REDUCTION)
        acc = root(acc, REDUCTION.norm)
        put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)
