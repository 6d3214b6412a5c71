"""median_pool2d: the median of every window of an image.

y[n,c,p,q] = the median of x[n,c,p·sh + r,q·sw + s] over 0 <= r < R, 0 <= s < S; of an even number
of elements the lower of the two in the middle, and NaN where the window holds one, as torch.median
has it.

x: (N, C, H, W) NHWC in memory -> y: (N, C, P, Q) NHWC. A border is a `pad` in front.

Selection by forgetting (M. McGuire, "A fast, small-radius GPU median filter", ShaderX6, 2008): of
any n/2 + 2 elements the smallest and the largest cannot be the median. They are dropped, one more
element comes in, and so on, all by minima and maxima of registers without a branch: 20 exchanges of
two elements for a 3x3 window, 132 for 5x5. The exchanges are generated once per number of elements.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.epilogue import GeneratedFunction
from ..contract.launch_tiles import tiled_launch, tiles_of
from ..contract.op import (
    Attributes,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Problem,
    Target,
    config,
    tensor_bytes,
    tile_config,
)
from ..contract.spec import Layout, TensorSpec
from .tiles import channel_block

MOST_TAPS = 49
"""A 7x7 window: 27 elements at a time, for each result of a thread, stay in registers."""


@dataclass(frozen=True)
class MedianPool2d(Attributes):
    """The window and its stride as (vertical, horizontal)."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)


def infer(attributes: MedianPool2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """P = floor((H - R) / sh) + 1, Q likewise."""
    (x,) = inputs
    if x.rank != 4:
        raise InvalidInputError(f"median_pool2d: expected x (N,C,H,W), got {x}")
    if min(*attributes.kernel, *attributes.stride) < 1:
        raise InvalidInputError(
            f"median_pool2d: window and stride must be positive: {attributes}"
        )
    if math.prod(attributes.kernel) > MOST_TAPS:
        raise InvalidInputError(
            f"median_pool2d: a window of {attributes.kernel} has more than {MOST_TAPS} elements"
        )
    sizes = []
    for axis in (0, 1):
        room = x.shape[2 + axis] - attributes.kernel[axis]
        if room < 0:
            raise InvalidInputError(
                f"median_pool2d: a window of {attributes.kernel[axis]} pixels does not fit "
                f"dimension {axis + 2} of {x}"
            )
        sizes.append(room // attributes.stride[axis] + 1)
    return (TensorSpec((*x.shape[:2], *sizes), x.dtype, Layout.NHWC, x.batch),)


def reference(attributes: MedianPool2d, x: torch.Tensor) -> torch.Tensor:
    (r, s), (stride_h, stride_w) = attributes.kernel, attributes.stride
    windows = x.unfold(2, r, stride_h).unfold(3, s, stride_w)
    return windows.flatten(-2).median(dim=-1).values


def exchanges(count: int) -> tuple[list[tuple[int, int]], int]:
    """Which elements to exchange, in order, so that the first of each pair is the smaller one, and
    where the (lower) median of `count` elements then stands."""
    pairs: list[tuple[int, int]] = []
    held: list[int] = []
    left, rank, coming = count, (count - 1) // 2, 0
    while left > 1:
        # The largest has rank + 1 elements below it and the smallest left - rank above.
        wanted = min(left, max(rank + 2, left - rank + 1))
        held += range(coming, coming + wanted - len(held))
        coming = max(coming, max(held) + 1)
        half = len(held) // 2
        lower, upper = held[:half], held[-half:]
        # Every element loses one comparison: then the smallest is below, the largest above.
        pairs += zip(lower, upper, strict=True)
        middle = held[half:-half]
        pairs += [(lower[0], other) for other in (*lower[1:], *middle)]
        pairs += [(other, upper[-1]) for other in (*upper[:-1], *middle)]
        held.remove(upper[-1])
        left -= 1
        if rank > 0:
            held.remove(lower[0])
            left, rank = left - 1, rank - 1
    return pairs, held[0] if held else 0


@cache
def selection(count: int) -> GeneratedFunction:
    """`median(values)`: the lower median of a tuple of `count` tiles."""
    pairs, place = exchanges(count)
    lines = ["@triton.jit", "def median(values):"]
    lines += [f"    v{at} = values[{at}]" for at in range(count)]
    for a, b in pairs:
        lines.append(f"    v{a}, v{b} = tl.minimum(v{a}, v{b}), tl.maximum(v{a}, v{b})")
    lines.append(f"    return v{place}")
    return GeneratedFunction("median", "\n".join(lines) + "\n")


@triton.jit
def median_pool_kernel(
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
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    MEDIAN: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column_tiles: tl.constexpr = (C + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    column_mask = columns < C
    mask = row_mask[:, None] & column_mask[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
    pixel = (rows // (P * Q) * H + rows // Q % P * STRIDE_H) * WIDTH + rows % Q * STRIDE_W
    base = x + X_OFFSET + (pixel * X_PITCH)[:, None] + columns[None, :]
    values = ()
    # Minima and maxima of a GPU drop NaN: it is carried beside them.
    poisoned = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for tap in tl.static_range(R * S):
        offset = (tap // S * WIDTH + tap % S) * X_PITCH
        value = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
        poisoned = tl.where(value != value, value, poisoned)
        values = values + (value,)  # type: ignore[assignment]
    acc = tl.where(poisoned != poisoned, poisoned, MEDIAN(values))
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


def _attributes(problem: Problem) -> MedianPool2d:
    assert isinstance(problem.attributes, MedianPool2d)
    return problem.attributes


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """The one launch of the kernel."""
    attributes = _attributes(problem)
    x, out = problem.inputs[0], problem.output
    _, c, p, q = out.shape
    return tiled_launch(
        problem,
        tile,
        median_pool_kernel,
        {
            "H": x.shape[2], "WIDTH": x.shape[3], "C": c, "P": p, "Q": q,
            "R": attributes.kernel[0], "S": attributes.kernel[1],
            "STRIDE_H": attributes.stride[0], "STRIDE_W": attributes.stride[1],
            "MEDIAN": selection(math.prod(attributes.kernel)),
        },
    )  # fmt: skip


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """128 to 1024 results per program: each holds its whole window in registers."""
    for tile in tiles_of((128, 256, 512, 1024), (16, 32, 64)):
        if legal(problem, tile, target) is None:
            yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    taps = math.prod(_attributes(problem).kernel)
    results = tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"] // (32 * tile.num_warps)
    if target.is_gpu and results > 1 and results * taps > 100:
        return "more than 100 elements per thread spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """Four results per thread for windows up to 3x3, two up to 5x5, one beyond."""
    n, c, p, q = problem.output.shape
    if target.name == "interpreter":
        return config(1, 1, **dict(tile_config(n * p * q, c, target).blocks))
    taps = math.prod(_attributes(problem).kernel)
    elements = 512 if taps <= 9 else 256 if taps <= 25 else 128
    columns = channel_block(c)
    return config(4, 1, BLOCK_ROWS=elements // columns, BLOCK_COLUMNS=columns)


def cost(problem: Problem) -> Cost:
    """A minimum and a maximum per exchange; nothing is rounded."""
    pairs, _ = exchanges(math.prod(_attributes(problem).kernel))
    return Cost(2 * len(pairs) * problem.output.spec.numel, *tensor_bytes(problem))


def _build(draw: Mapping[str, Any]) -> tuple[MedianPool2d, tuple[TensorSpec, ...]] | None:
    attributes = MedianPool2d(draw["kernel"], draw["stride"])
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    try:
        infer(attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


OP = Op(
    name="median_pool2d",
    attributes=MedianPool2d,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    domain=Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (2, 2), (5, 5), (7, 9)),
            "C": (1, 3, 8, 33),
            "kernel": ((1, 1), (2, 2), (3, 3), (1, 3), (3, 2), (5, 5)),
            "stride": ((1, 1), (2, 2), (1, 2)),
        },
        build=_build,
        interesting=({"N": 1, "image": (8, 7), "C": 8, "kernel": (7, 7), "stride": (1, 1)},),
    ),
)
