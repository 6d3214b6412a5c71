"""Pooling over sliding windows: the maximum, the average and the Lp norm of an image's windows.

Over the taps (r, s) whose pixel h = p·sh − ph + r·dh, w = q·sw − pw + s·dw lies in the image:
- max_pool2d: y = max x[n,c,h,w], -inf for a window without pixels; NaN wins;
- avg_pool2d: y = sum x[n,c,h,w] / divisor;
- lp_pool2d:  y = (R·S · mean x[n,c,h,w]^p)^(1/p), torch's definition: without an absolute value.

x: (N, C, H, W) NHWC in memory -> y: (N, C, P, Q) NHWC; fp32 accumulation.

One kernel walks the input rows that TILE_ROWS output rows need, reduces each horizontally once, and
combines it into every output row it belongs to. With stride 1 and TILE_ROWS=4 instead of 1 a 3x3
window costs 4.5 loads per result instead of 9 and 11 instructions instead of 24, a 5x5 window 10
loads instead of 25 and 25 instructions instead of 49 (sm_90, half precision).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import triton
import triton.language as tl

from ..contract import elementary, scalars
from ..contract import epilogue as ep
from ..contract.launch_tiles import tiled_launch
from ..contract.op import (
    Config,
    Cost,
    Launch,
    Op,
    Problem,
    Target,
    config,
    power_of_two,
    tensor_bytes,
    tile_config,
)
from ..movement.arguments import pooling
from .pool_window import (
    POOLS,
    AvgPool2d,
    AvgPool3d,
    LpPool2d,
    MaxPool2d,
    MaxPool3d,
    Pool2d,
    infer,
    reference_avg,
    reference_lp,
    reference_max,
    window_sizes,
)

# Up to here the taps are unrolled: a loop over taps loses the packed half-precision maximum.
MOST_UNROLLED_TAPS = 25
# Whole powers up to here are products, in a few instructions; others go through fp64 logarithms.
MOST_MULTIPLIED = tl.constexpr(16)
# Loads per thread of one output row that fit the registers (channels that are not a multiple of 8
# take one each).
MOST_LOADS = 200
# Programs that keep an H200 busy: 4 blocks of 128 threads on each multiprocessor.
ENOUGH_PROGRAMS = 4 * 132


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
    start,
    LENGTH: tl.constexpr,
    SIZE: tl.constexpr,
    PADDING: tl.constexpr,
    COUNT: tl.constexpr,
):
    """How much of a window of one dimension lies in the padded image or in the image itself."""
    if COUNT == "padded":
        result = tl.minimum(start + LENGTH, SIZE + PADDING) - start
    else:
        result = tl.minimum(start + LENGTH, SIZE) - tl.maximum(start, 0)
    return result


@triton.jit
def combine(a, b, MAXIMUM: tl.constexpr):
    """The larger value, NaN if there is one, or the sum."""
    return scalars.maximum(a, b) if MAXIMUM else a + b


@triton.jit
def pool_kernel(
    x,
    y,
    extras,
    m,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    MAXIMUM: tl.constexpr,
    NORM: tl.constexpr,
    COUNT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    EMPTY: tl.constexpr = float("-inf") if MAXIMUM else 0.0
    # m counts columns of output tiles: N * ceil(P / TILE_ROWS) * Q.
    bands: tl.constexpr = (P + TILE_ROWS - 1) // TILE_ROWS
    column_tiles: tl.constexpr = (C + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    index = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live = index < m
    column_mask = columns < C
    if WIDE:
        index = index.to(tl.int64)
    image = index // (bands * Q)
    first = (index // Q % bands).to(tl.int32) * TILE_ROWS
    q = (index % Q).to(tl.int32)
    top = first * STRIDE_H - PADDING_H
    left = q * STRIDE_W - PADDING_W
    base = x + X_OFFSET + (((image * H + top) * WIDTH + left) * X_PITCH)[:, None]
    base = base + columns[None, :]
    # Rows past the end get a position that no tap brings inside the image: one mask serves both.
    safe_top = tl.where(live, top, -1048576)
    accs = ()
    for _ in tl.static_range(TILE_ROWS):
        # Tuples grow by addition: Triton has no starred elements.
        accs = accs + (tl.full((BLOCK_ROWS, BLOCK_COLUMNS), EMPTY, tl.float32),)
    if UNROLL:
        for i in tl.static_range((TILE_ROWS - 1) * STRIDE_H + (R - 1) * DILATION_H + 1):
            row_inside = (safe_top + i).to(tl.uint32, bitcast=True) < H
            line = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), EMPTY, tl.float32)
            for s in tl.static_range(S):
                inside = row_inside & ((left + s * DILATION_W).to(tl.uint32, bitcast=True) < WIDTH)
                mask = inside[:, None] & column_mask[None, :]
                offset = (i * WIDTH + s * DILATION_W) * X_PITCH
                value = tl.load(base + offset, mask=mask, other=EMPTY).to(tl.float32)
                line = combine(line, term(value, NORM), MAXIMUM)
            # Input row i belongs to output row j as its tap (i - j * stride) / dilation.
            updated = ()
            for j in tl.static_range(TILE_ROWS):
                if (
                    (i - j * STRIDE_H >= 0)
                    and ((i - j * STRIDE_H) % DILATION_H == 0)
                    and ((i - j * STRIDE_H) // DILATION_H < R)
                ):
                    updated = updated + (combine(accs[j], line, MAXIMUM),)
                else:
                    updated = updated + (accs[j],)
            accs = updated
    else:
        acc = accs[0]
        for tap in range(R * S):
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            inside = ((safe_top + r).to(tl.uint32, bitcast=True) < H) & (
                (left + s).to(tl.uint32, bitcast=True) < WIDTH
            )
            mask = inside[:, None] & column_mask[None, :]
            value = tl.load(base + (r * WIDTH + s) * X_PITCH, mask=mask, other=EMPTY)
            acc = combine(acc, term(value.to(tl.float32), NORM), MAXIMUM)
        accs = (acc,)
    for j in tl.static_range(TILE_ROWS):
        p = first + j
        rows = (image * P + p) * Q + q
        row_mask = live & (p < P)
        acc = accs[j]
        if COUNT is not None:
            height = extent(top + j * STRIDE_H, R, H, PADDING_H, COUNT)
            acc = acc / (height * extent(left, S, WIDTH, PADDING_W, COUNT)).to(tl.float32)[:, None]
            if NORM is not None:
                acc = acc * (R * S)
        acc = root(acc, NORM)
        acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
        address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Reduction:
    """How the kernel reduces a window.

    maximum: the maximum instead of the sum; count: whose pixels divide the sum ("padded", "image")
    where their number differs between windows; divisor: their number where it does not; norm: the
    p of an Lp norm.
    """

    maximum: bool = False
    count: str | None = None
    divisor: int | None = None
    norm: float | None = None


def reduction(problem: Problem) -> Reduction:
    """The reduction that the problem's attributes ask for."""
    attributes = problem.attributes
    if isinstance(attributes, (MaxPool2d, MaxPool3d)):
        return Reduction(maximum=True)
    if isinstance(attributes, LpPool2d):
        # Without overhang the mean times R·S is the sum.
        count = "padded" if _overhangs(problem) else None
        norm = attributes.norm
        return Reduction(count=count, norm=int(norm) if norm == int(norm) else norm)
    assert isinstance(attributes, (AvgPool2d, AvgPool3d))
    if attributes.divisor_override is not None:
        return Reduction(divisor=attributes.divisor_override)
    padded = attributes.count_include_pad or not any(attributes.padding)
    if not padded or _overhangs(problem):
        return Reduction(count="padded" if padded else "image")
    return Reduction(divisor=math.prod(attributes.kernel))


def _overhangs(problem: Problem) -> bool:
    """Whether the last window reaches beyond the padded image, as `ceil_mode` allows."""
    attributes = problem.attributes
    assert isinstance(attributes, POOLS)
    for axis in range(len(attributes.kernel)):
        last = (problem.output.shape[2 + axis] - 1) * attributes.stride[axis]
        size = problem.inputs[0].shape[2 + axis] + 2 * attributes.padding[axis]
        if last + attributes.kernel[axis] > size:
            return True
    return False


def _attributes(problem: Problem) -> Pool2d:
    assert isinstance(problem.attributes, (MaxPool2d, AvgPool2d, LpPool2d))
    return problem.attributes


def needs_logarithms(attributes: Pool2d) -> bool:
    """Whether the power of every term is more than a few products."""
    if not isinstance(attributes, LpPool2d):
        return False
    return attributes.norm != int(attributes.norm) or attributes.norm > MOST_MULTIPLIED.value


def unrolls(attributes: Pool2d) -> bool:
    """Whether the kernel unrolls its taps, which several output rows per program need.

    A power in fp64 is some 150 instructions and 20 registers: once is enough.
    """
    return not needs_logarithms(attributes) and math.prod(attributes.kernel) <= MOST_UNROLLED_TAPS


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """The one launch of the kernel."""
    attributes, chosen = _attributes(problem), reduction(problem)
    divide = () if chosen.divisor is None else (ep.Stage("div", literal=float(chosen.divisor)),)
    x, out = problem.inputs[0], problem.output
    n, _, p, q = out.shape
    return tiled_launch(
        problem,
        tile,
        pool_kernel,
        {
            **window_sizes(attributes, x, out),
            "MAXIMUM": chosen.maximum, "NORM": chosen.norm, "COUNT": chosen.count,
            "UNROLL": unrolls(attributes),
        },
        rows=n * -(-p // tile["TILE_ROWS"]) * q,
        before=divide,
    )  # fmt: skip


def channel_block(channels: int) -> int:
    """Channels per program: 64 (128 bytes in half precision), or fewer where that wastes fewer."""
    if channels < 32:
        return power_of_two(channels)
    if channels >= 256:
        return 64
    return min((64, 32), key=lambda block: -(-channels // block) * block)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """512 to 2048 results per output row and program; more rows reuse more but cost registers."""
    attributes = _attributes(problem)
    shares_rows = unrolls(attributes) and attributes.stride[0] < attributes.kernel[0]
    for tile_rows in (1, 2, 4) if shares_rows else (1,):
        for elements in (512, 1024, 2048):
            for columns in (32, 64, 128):
                rows = elements // columns
                tile = config(4, 1, TILE_ROWS=tile_rows, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)
                if legal(problem, tile, target) is None:
                    yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    attributes = _attributes(problem)
    if not unrolls(attributes):
        return None if tile["TILE_ROWS"] == 1 else "several output rows need unrolled taps"
    # The compiler starts all loads of an unrolled window at once: 5x5 at 16 results spills.
    results = tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"] // (32 * tile.num_warps)
    if target.is_gpu and results * math.prod(attributes.kernel) > MOST_LOADS:
        return f"more than {MOST_LOADS} loads per thread spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """16 x 64 results per program (half of that where registers are short), and four output rows
    where they share input and there is work for every multiprocessor."""
    n, c, p, q = problem.output.shape
    if target.name == "interpreter":
        tile = tile_config(n * p * q, c, target)
        return config(1, 1, TILE_ROWS=1, **dict(tile.blocks))
    attributes = _attributes(problem)
    columns = channel_block(c)
    # Channels that are no multiple of 4 are loaded one by one: 16 bytes spill on sm_80 at 1024.
    short = needs_logarithms(attributes) or c % 4 != 0
    rows = (512 if short else 1024) // columns
    tile_rows = 1
    if unrolls(attributes) and attributes.stride[0] == 1 and attributes.kernel[0] >= 3:
        while tile_rows < min(4, p) and n * p * q * c // (2048 * tile_rows) >= ENOUGH_PROGRAMS:
            tile_rows *= 2
    return config(4, 1, TILE_ROWS=tile_rows, BLOCK_ROWS=rows, BLOCK_COLUMNS=columns)


def cost(problem: Problem) -> Cost:
    """One operation per tap, and one more per power."""
    attributes = _attributes(problem)
    read, written = tensor_bytes(problem)
    per_tap = 2 if isinstance(attributes, LpPool2d) else 1
    taps = math.prod(attributes.kernel)
    return Cost(per_tap * taps * problem.output.spec.numel, read, written)


OPS = (
    Op(
        name="max_pool2d",
        attributes=MaxPool2d,
        infer=partial(infer, "max_pool2d"),
        reference=reference_max,
        launches=launches,
        configs=configs,
        default=default,
        legal=legal,
        cost=cost,
        aten={
            f"aten.max_pool{dims}d.default": pooling("max_pool2d", MaxPool2d) for dims in (1, 2)
        },
        batched="pooling",
    ),
    Op(
        name="avg_pool2d",
        attributes=AvgPool2d,
        infer=partial(infer, "avg_pool2d"),
        reference=reference_avg,
        launches=launches,
        configs=configs,
        default=default,
        legal=legal,
        cost=cost,
        aten={
            f"aten.avg_pool{dims}d.default": pooling("avg_pool2d", AvgPool2d) for dims in (1, 2)
        },
        batched="pooling",
    ),
    Op(
        name="lp_pool2d",
        attributes=LpPool2d,
        infer=partial(infer, "lp_pool2d"),
        reference=reference_lp,
        launches=launches,
        configs=configs,
        default=default,
        legal=legal,
        cost=cost,
    ),
)
