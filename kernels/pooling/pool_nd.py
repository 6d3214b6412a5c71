"""Maximum and average pooling of volumes; that of sequences by way of images.

Over the taps (t, r, s) whose voxel d = o·sd − pd + t·dd, h = p·sh − ph + r·dh, w = q·sw − pw + s·dw
lies in the volume:
- max_pool3d: y = max x[n,c,d,h,w], -inf for a window without voxels; NaN wins;
- avg_pool3d: y = sum x[n,c,d,h,w] / divisor, as `avg_pool2d` counts it.

x: (N, C, D, H, W) channels innermost in memory -> y: (N, C, O, P, Q) likewise; fp32 accumulation.

One loop over the depth of the window, whose planes are unrolled as far as `pool.py` unrolls its
windows: their loads are started together, which those of a whole 3x3x3 window have no registers
for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import triton
import triton.language as tl

from ..contract import epilogue as ep
from ..contract.launch_tiles import tiled_launch, tiles_of
from ..contract.op import (
    Capture,
    Config,
    Cost,
    Launch,
    Op,
    Problem,
    Target,
    config,
    tensor_bytes,
    tile_config,
)
from ..movement.arguments import pooling
from .adaptive_pool import largest_window, window
from .pool import MOST_LOADS, MOST_UNROLLED_TAPS, channel_block, combine, extent, reduction
from .pool_window import (
    AdaptivePool3d,
    AvgPool3d,
    MaxPool3d,
    Pool3d,
    infer,
    reference_avg_3d,
    reference_max_3d,
)


@triton.jit
def in_window(start, tap, length, SIZE: tl.constexpr, ADAPTIVE: tl.constexpr):
    """Whether a tap belongs to the window of one dimension and lies in the volume."""
    return tap < length if ADAPTIVE else (start + tap).to(tl.uint32, bitcast=True) < SIZE


@triton.jit
def pool_nd_kernel(
    x,
    y,
    extras,
    m,
    D: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    PLANES: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    MAXIMUM: tl.constexpr,
    COUNT: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    EMPTY: tl.constexpr = float("-inf") if MAXIMUM else 0.0
    column_tiles: tl.constexpr = (C + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    column_mask = columns < C
    if WIDE:
        rows = rows.to(tl.int64)
    front = (rows // (P * Q) % PLANES).to(tl.int32)
    top = (rows // Q % P).to(tl.int32)
    left = (rows % Q).to(tl.int32)
    if ADAPTIVE:
        # T, R and S are the sizes of the largest window.
        front, depth = window(front, D, PLANES)
        top, height = window(top, H, P)
        left, width = window(left, WIDTH, Q)
        depth = tl.where(row_mask, depth, 0)
        safe_front = front
    else:
        front = front * STRIDE_D - PADDING_D
        top = top * STRIDE_H - PADDING_H
        left = left * STRIDE_W - PADDING_W
        depth, height, width = T, R, S
        # Rows past the end get a position that no tap brings inside: one mask serves both.
        safe_front = tl.where(row_mask, front, -1048576)
    corner = ((rows // (PLANES * P * Q) * D + front) * H + top) * WIDTH + left
    base = x + X_OFFSET + (corner * X_PITCH)[:, None] + columns[None, :]
    acc = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), EMPTY, tl.float32)
    for t in range(T):
        in_depth = in_window(safe_front, t * DILATION_D, depth, D, ADAPTIVE)
        step = t * DILATION_D
        if WIDE:
            step = step.to(tl.int64)
        plane = base + step * (H * WIDTH * X_PITCH)
        if UNROLL:
            for tap in tl.static_range(R * S):
                inside = in_depth & in_window(top, tap // S * DILATION_H, height, H, ADAPTIVE)
                inside = inside & in_window(left, tap % S * DILATION_W, width, WIDTH, ADAPTIVE)
                mask = inside[:, None] & column_mask[None, :]
                offset = (tap // S * DILATION_H * WIDTH + tap % S * DILATION_W) * X_PITCH
                value = tl.load(plane + offset, mask=mask, other=EMPTY).to(tl.float32)
                acc = combine(acc, value, MAXIMUM)
        else:
            for tap in range(R * S):
                inside = in_depth & in_window(top, tap // S * DILATION_H, height, H, ADAPTIVE)
                inside = inside & in_window(left, tap % S * DILATION_W, width, WIDTH, ADAPTIVE)
                mask = inside[:, None] & column_mask[None, :]
                offset = (tap // S * DILATION_H * WIDTH + tap % S * DILATION_W) * X_PITCH
                value = tl.load(plane + offset, mask=mask, other=EMPTY).to(tl.float32)
                acc = combine(acc, value, MAXIMUM)
    if COUNT == "window":
        acc = acc / (depth * height * width).to(tl.float32)[:, None]
    elif COUNT is not None:
        count = extent(front, T, D, PADDING_D, COUNT) * extent(top, R, H, PADDING_H, COUNT)
        count = count * extent(left, S, WIDTH, PADDING_W, COUNT)
        acc = acc / count.to(tl.float32)[:, None]
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Windows:
    """The windows of a problem as the kernel takes them; of adaptive pooling `kernel` is the size
    of the largest. count: as `Reduction` has it, or "window" for all taps of a window."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)
    adaptive: bool = False
    maximum: bool = False
    count: str | None = None
    divisor: int | None = None


def windows(problem: Problem) -> Windows:
    """What the problem's attributes ask for."""
    attributes = problem.attributes
    if isinstance(attributes, AdaptivePool3d):
        sizes = zip(problem.inputs[0].shape[2:], attributes.size, strict=True)
        largest = tuple(largest_window(size, outputs) for size, outputs in sizes)
        maximum = problem.op == "adaptive_max_pool3d"
        count = None if maximum else "window"
        return Windows(largest, adaptive=True, maximum=maximum, count=count)
    assert isinstance(attributes, (MaxPool3d, AvgPool3d))
    chosen = reduction(problem)
    return Windows(
        attributes.kernel,
        attributes.stride,
        attributes.padding,
        attributes.dilation,
        maximum=chosen.maximum,
        count=chosen.count,
        divisor=chosen.divisor,
    )


def _plane(problem: Problem) -> int:
    """Taps of one plane of the window."""
    return math.prod(windows(problem).kernel[1:])


def unrolls(problem: Problem) -> bool:
    """Whether the kernel unrolls the planes of its window.

    Channels that are no multiple of 4 are loaded one by one: 25 taps of 2 spill 24 bytes on sm_90.
    """
    return _plane(problem) <= (MOST_UNROLLED_TAPS if problem.output.shape[1] % 4 == 0 else 9)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """The one launch of the kernel."""
    asked, x, out = windows(problem), problem.inputs[0], problem.output
    divide = () if asked.divisor is None else (ep.Stage("div", literal=float(asked.divisor)),)
    c = out.shape[1]
    sizes = {
        ("D", "H", "WIDTH"): x.shape[2:],
        ("PLANES", "P", "Q"): out.shape[2:],
        ("T", "R", "S"): asked.kernel,
        ("STRIDE_D", "STRIDE_H", "STRIDE_W"): asked.stride,
        ("PADDING_D", "PADDING_H", "PADDING_W"): asked.padding,
        ("DILATION_D", "DILATION_H", "DILATION_W"): asked.dilation,
    }
    loads = math.prod(asked.kernel) * tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"]
    return tiled_launch(
        problem,
        tile,
        pool_nd_kernel,
        {
            **{
                name: value
                for names, values in sizes.items()
                for name, value in zip(names, values, strict=True)
            },
            "C": c,
            "ADAPTIVE": asked.adaptive, "MAXIMUM": asked.maximum, "COUNT": asked.count,
            "UNROLL": unrolls(problem),
        },
        before=divide,
        l2_bytes=loads * x.spec.dtype.itemsize,
        instructions=3 * loads,
    )  # fmt: skip


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """512 to 2048 results per program."""
    for tile in tiles_of((512, 1024, 2048), (32, 64, 128)):
        if legal(problem, tile, target) is None:
            yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    results = tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"] // (32 * tile.num_warps)
    if target.is_gpu and unrolls(problem) and results * _plane(problem) > MOST_LOADS:
        return f"more than {MOST_LOADS} loads per thread spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """16 x 64 results per program, a quarter of that where channels are loaded one by one: 3x3x3
    over 33 channels spills 8 bytes on sm_80 at half."""
    n, c, *sizes = problem.output.shape
    if target.name == "interpreter":
        tile = tile_config(n * math.prod(sizes), c, target)
        return config(1, 1, **dict(tile.blocks))
    columns = channel_block(c)
    return config(4, 1, BLOCK_ROWS=(256 if c % 4 else 1024) // columns, BLOCK_COLUMNS=columns)


def cost(problem: Problem) -> Cost:
    """One operation per tap."""
    read, written = tensor_bytes(problem)
    taps = math.prod(windows(problem).kernel)
    return Cost(taps * problem.output.spec.numel, read, written)


def _op(name: str, make: type[Pool3d], reference: Any, aten: Mapping[str, Capture]) -> Op:
    return Op(
        name=name,
        attributes=make,
        infer=partial(infer, name),
        reference=reference,
        launches=launches,
        configs=configs,
        default=default,
        legal=legal,
        cost=cost,
        aten=aten,
        batched="pooling",
    )  # fmt: skip


OPS = (
    _op(
        "max_pool3d",
        MaxPool3d,
        reference_max_3d,
        {"aten.max_pool3d.default": pooling("max_pool3d", MaxPool3d)},
    ),
    _op(
        "avg_pool3d",
        AvgPool3d,
        reference_avg_3d,
        {"aten.avg_pool3d.default": pooling("avg_pool3d", AvgPool3d)},
    ),
)
