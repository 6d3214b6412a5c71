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
from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.epilogue import GeneratedFunction
from ..contract.op import Config, Launch, Op, Problem, Target, TensorSpec, counted
from ..tile.finish import put
from ..tile.geometry import tile_launch
from ..tile.space import output_tile
from .pool_kernel import image_windows
from .pool_window import InnerWindow, windows
from .pool_window import infer as infer_window
from .tiles import Tiles

MOST_TAPS = 49
"""A 7x7 window: 27 elements at a time, for each result of a thread, stay in registers."""


@dataclass(frozen=True)
class MedianPool2d(InnerWindow):
    """The window and its stride as (vertical, horizontal)."""


def infer(attributes: MedianPool2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """P = floor((H - R) / sh) + 1, Q likewise."""
    if math.prod(attributes.kernel) > MOST_TAPS:
        raise InvalidInputError(
            f"median_pool2d: a window of {attributes.kernel} has more than {MOST_TAPS} elements"
        )
    return infer_window("median_pool2d", attributes, inputs)


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
    x, y, extras, m,
    WINDOWS: tl.constexpr, MEDIAN: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    S: tl.constexpr = WINDOWS.width.taps
    TAPS: tl.constexpr = WINDOWS.height.taps * S
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    mask = row_mask[:, None] & column_mask[None, :]
    _, _, corner = image_windows(rows, WINDOWS)
    base = x + WINDOWS.offset + (corner * WINDOWS.row_stride)[:, None] + columns[None, :]
    values = ()
    # Minima and maxima of a GPU drop NaN: it is carried beside them.
    poisoned = tl.zeros((M, N), tl.float32)
    for tap in tl.static_range(TAPS):
        offset = (tap // S * WINDOWS.width.size + tap % S) * WINDOWS.row_stride
        value = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
        poisoned = tl.where(value != value, value, poisoned)
        values = values + (value,)  # type: ignore[assignment]
    acc = tl.where(poisoned != poisoned, poisoned, MEDIAN(values))
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    window = windows(problem)
    constexprs = {"WINDOWS": window, "MEDIAN": selection(window.taps)}
    return (tile_launch(problem, tile, median_pool_kernel, constexprs=constexprs),)


def _usual(problem: Problem) -> int:
    """Four results per thread for windows up to 3x3, two up to 5x5, one beyond."""
    taps = windows(problem).taps
    return 512 if taps <= 9 else 256 if taps <= 25 else 128


# Each result holds its whole window in registers.
TILES = Tiles(
    (128, 256, 512, 1024),
    (16, 32, 64),
    usual=_usual,
    held=lambda problem: windows(problem).taps,
    most=100,
)


@counted
def cost(problem: Problem) -> int:
    """A minimum and a maximum per exchange; nothing is rounded."""
    pairs, _ = exchanges(windows(problem).taps)
    return 2 * len(pairs) * problem.output.spec.numel


OP = Op("median_pool2d", MedianPool2d, infer, reference, launches, cost, **TILES.space)
