"""Adaptive pooling: the output's size is given, the windows follow from it.

y[n,c,p,q] = mean or max of x[n,c,h,w] over floor(p·H/P) <= h < ceil((p+1)·H/P), and w likewise;
NaN wins a maximum.

x: (N, C, H, W) NHWC in memory -> y: (N, C, P, Q) NHWC; fp32 accumulation. Windows overlap and
differ in size where P does not divide H. Two algorithms:
- `taps`: small windows, as in `pool.py`: a tile of outputs goes through the largest window's taps;
- `region`: large windows, global pooling above all: a program takes few outputs (on a GPU one, that
  is one image by a block of channels), reads each one's pixels a block at a time, and reduces the
  blocks at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.launch_tiles import tiled_launch, tiles_of
from ..contract.op import (
    Arguments,
    Attributes,
    Builder,
    Capture,
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
from ..contract.spec import Layout, TensorSpec
from ..movement.arguments import adaptive_size, as_image, as_rank_of
from .pool import ENOUGH_PROGRAMS, MOST_UNROLLED_TAPS, channel_block, combine


@dataclass(frozen=True)
class AdaptivePool2d(Attributes):
    """The output's height and width."""

    size: tuple[int, int] = (1, 1)


def infer(
    name: str, attributes: AdaptivePool2d, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """(N, C, *size)."""
    (x,) = inputs
    if x.rank != 4:
        raise InvalidInputError(f"{name}: expected x (N,C,H,W), got {x}")
    if min(*attributes.size, *x.shape[2:]) < 1:
        raise InvalidInputError(f"{name}: cannot pool {x} to {attributes.size}; both need pixels")
    return (TensorSpec((*x.shape[:2], *attributes.size), x.dtype, Layout.NHWC, x.batch),)


def reference_avg(attributes: AdaptivePool2d, x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x, attributes.size)


def reference_max(attributes: AdaptivePool2d, x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_max_pool2d(x, attributes.size)


@triton.jit
def window(index, SIZE: tl.constexpr, OUTPUTS: tl.constexpr):
    """First element and length of an output's window along one dimension."""
    start = index * SIZE // OUTPUTS
    return start, ((index + 1) * SIZE + OUTPUTS - 1) // OUTPUTS - start


@triton.jit
def taps_kernel(
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
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    MAXIMUM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # R and S are the largest window's height and width.
    EMPTY: tl.constexpr = float("-inf") if MAXIMUM else 0.0
    column_tiles: tl.constexpr = (C + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    column_mask = columns < C
    if WIDE:
        rows = rows.to(tl.int64)
    top, height = window((rows // Q % P).to(tl.int32), H, P)
    left, width = window((rows % Q).to(tl.int32), WIDTH, Q)
    corner = (rows // (P * Q) * H + top) * WIDTH + left
    base = x + X_OFFSET + (corner * X_PITCH)[:, None] + columns[None, :]
    acc = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), EMPTY, tl.float32)
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            inside = row_mask & (r < height) & (s < width)
            mask = inside[:, None] & column_mask[None, :]
            value = tl.load(base + (r * WIDTH + s) * X_PITCH, mask=mask, other=EMPTY)
            acc = combine(acc, value.to(tl.float32), MAXIMUM)
    if not MAXIMUM:
        acc = acc / (height * width).to(tl.float32)[:, None]
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def region_kernel(
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
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    MAXIMUM: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
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
    top, height = window((rows // Q % P).to(tl.int32), H, P)
    left, width = window((rows % Q).to(tl.int32), WIDTH, Q)
    corner = (rows // (P * Q) * H + top) * WIDTH + left
    base = x + X_OFFSET + (corner * X_PITCH)[:, None, None] + columns[None, None, :]
    count = (height * width)[:, None]
    acc = tl.full((BLOCK_ROWS, BLOCK_PIXELS, BLOCK_COLUMNS), EMPTY, tl.float32)
    for start in range(0, R * S, BLOCK_PIXELS):
        pixel = (start + tl.arange(0, BLOCK_PIXELS))[None, :]
        if Q == 1:
            # Windows as wide as the image are contiguous.
            offset = pixel * X_PITCH
        else:
            offset = (pixel // width[:, None] * WIDTH + pixel % width[:, None]) * X_PITCH
        inside = row_mask[:, None] & (pixel < count)
        mask = inside[:, :, None] & column_mask[None, None, :]
        value = tl.load(base + offset[:, :, None], mask=mask, other=EMPTY).to(tl.float32)
        acc = combine(acc, value, MAXIMUM)
    if MAXIMUM:
        # tl.max may drop NaN: it is looked for separately.
        is_nan = acc != acc
        poisoned = tl.max(is_nan.to(tl.int32), axis=1) > 0
        largest = tl.max(tl.where(is_nan, EMPTY, acc), axis=1)
        result = tl.where(poisoned, float("nan"), largest)
    else:
        result = tl.sum(acc, axis=1) / count.to(tl.float32)
    result = EPILOGUE(result, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, result.to(y.dtype.element_ty), mask=mask)


def largest_window(size: int, outputs: int) -> int:
    """The most elements that one of `outputs` windows takes of `size`."""
    return max(-(-(at + 1) * size // outputs) - at * size // outputs for at in range(outputs))


def largest_windows(problem: Problem) -> tuple[int, int]:
    """Height and width that hold every window."""
    h, w = problem.inputs[0].shape[2:]
    p, q = problem.output.shape[2:]
    return largest_window(h, p), largest_window(w, q)


def algorithm(problem: Problem) -> str:
    """Which of the two algorithms computes the problem."""
    return "taps" if math.prod(largest_windows(problem)) <= MOST_UNROLLED_TAPS else "region"


def launches(name: str, problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the algorithm's kernel."""
    x, out = problem.inputs[0], problem.output
    _, c, p, q = out.shape
    _, _, h, width = x.shape
    r, s = largest_windows(problem)
    return tiled_launch(
        problem,
        tile,
        taps_kernel if algorithm(problem) == "taps" else region_kernel,
        {
            "H": h, "WIDTH": width, "C": c, "P": p, "Q": q, "R": r, "S": s,
            "MAXIMUM": name == "adaptive_max_pool2d",
        },
    )  # fmt: skip


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Taps: 512 to 2048 results per program; region: 2048 to 16384 inputs at a time for one."""
    if algorithm(problem) == "taps":
        yield from tiles_of((512, 1024, 2048), (32, 64, 128))
        return
    for elements in (2048, 4096, 8192, 16384):
        for columns in (16, 32, 64, 128):
            yield _region(elements, columns)


def _region(elements: int, columns: int) -> Config:
    """A tile of one output row, with 32 inputs per thread."""
    warps = elements // 1024
    pixels = elements // columns
    return config(warps, 1, BLOCK_ROWS=1, BLOCK_PIXELS=pixels, BLOCK_COLUMNS=columns)


def default(problem: Problem, target: Target) -> Config:
    """Channel blocks of 64, but narrower ones where few outputs would leave the GPU idle."""
    n, c, p, q = problem.output.shape
    pixels = power_of_two(math.prod(largest_windows(problem)))
    taps = algorithm(problem) == "taps"
    if target.name == "interpreter":
        if taps:
            return tile_config(n * p * q, c, target)
        columns = min(power_of_two(c), 1024)
        block_pixels = min(pixels, (1 << 20) // columns)
        rows = min(power_of_two(n * p * q), (1 << 20) // (columns * block_pixels))
        return config(1, 1, BLOCK_ROWS=rows, BLOCK_PIXELS=block_pixels, BLOCK_COLUMNS=columns)
    columns = channel_block(c)
    if taps:
        return config(4, 1, BLOCK_ROWS=1024 // columns, BLOCK_COLUMNS=columns)
    # 16 halves are one 32-byte sector, the least that memory delivers.
    while columns > 16 and n * p * q * -(-c // columns) < ENOUGH_PROGRAMS:
        columns //= 2
    # Where programs stay few, each must keep more reads in flight.
    most = 4096 if n * p * q * -(-c // columns) >= ENOUGH_PROGRAMS // 4 else 16384
    return _region(max(1024, min(most, pixels * columns)), columns)


def cost(problem: Problem) -> Cost:
    """One operation per element of each window, counted as the largest."""
    read, written = tensor_bytes(problem)
    taps = math.prod(largest_windows(problem))
    return Cost(taps * problem.output.spec.numel, read, written)


def _capture(name: str, indices: bool) -> Capture:
    """The capture of adaptive poolings of images, and of sequences as images of one row. With
    `indices` the call has a second result, for whose readers there is no kernel."""

    def capture(g: Builder, a: Arguments) -> Any:
        attributes = AdaptivePool2d(adaptive_size(g, a))
        y = as_rank_of(g, g.apply(name, (as_image(g, a.self),), attributes), a.self)
        return (y, None) if indices else y

    return capture


def _op(name: str, reference: Any, aten: Mapping[str, Any]) -> Op:
    return Op(
        name=name,
        attributes=AdaptivePool2d,
        infer=partial(infer, name),
        reference=reference,
        launches=partial(launches, name),
        configs=configs,
        default=default,
        cost=cost,
        aten=aten,
        batched="pooling",
    )


OPS = (
    _op(
        "adaptive_avg_pool2d",
        reference_avg,
        {
            f"aten.adaptive_avg_pool{dims}d.default": _capture("adaptive_avg_pool2d", False)
            for dims in (1, 2)
        },
    ),
    _op(
        "adaptive_max_pool2d",
        reference_max,
        {
            f"aten.adaptive_max_pool{dims}d.default": _capture("adaptive_max_pool2d", True)
            for dims in (1, 2)
        },
    ),
)
