"""Pooling over sliding windows: the maximum, the average and the Lp norm of each window.

Of volumes over the taps (t, r, s) whose voxel d = o·sd − pd + t·dd, h = p·sh − ph + r·dh,
w = q·sw − pw + s·dw lies in the volume, of images over the (r, s), and likewise of sequences, which
are images of one row:
- max_pool: y = max x[n,c,d,h,w], -inf for a window without pixels; NaN wins;
- avg_pool: y = sum x[n,c,d,h,w] / divisor;
- lp_pool:  y = (R·S · mean x[n,c,h,w]^p)^(1/p), torch's definition: without an absolute value.

x: (N, C, H, W) or (N, C, D, H, W), channels innermost in memory -> y: (N, C, P, Q) or
(N, C, O, P, Q) likewise; fp32 accumulation.

The kernel, `pool_kernel.py`, also computes the adaptive poolings of `adaptive_pool.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F

from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, config, counted
from ..movement.arguments import pooling
from ..tile.geometry import tile_launch
from .pool_kernel import MOST_MULTIPLIED, pool_kernel
from .pool_window import (
    AvgPool2d,
    AvgPool3d,
    LpPool2d,
    MaxPool2d,
    MaxPool3d,
    infer,
    reduction,
    reference,
    windows,
)
from .tiles import MOST_UNROLLED_TAPS, Tiles

# Programs that keep an H200 busy: 4 blocks of 128 threads on each multiprocessor.
ENOUGH_PROGRAMS = 4 * 132


def needs_logarithms(problem: Problem) -> bool:
    """Whether the power of every term is more than a few products."""
    norm = reduction(problem).norm
    return norm is not None and (norm != int(norm) or norm > MOST_MULTIPLIED.value)


def unrolls(problem: Problem) -> bool:
    """Whether the kernel unrolls the taps of a plane, which several output rows per program need.

    A power in fp64 is some 150 instructions and 20 registers: once is enough. Channels that are no
    multiple of 4 are loaded one by one: of a volume 25 taps of 2 planes spill 24 bytes on sm_90.
    """
    is_volume, channels = problem.output.spec.rank == 5, problem.output.shape[1]
    most = 9 if is_volume and channels % 4 else MOST_UNROLLED_TAPS
    return not needs_logarithms(problem) and windows(problem).plane_taps <= most


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    window, chosen, tile_rows = windows(problem), reduction(problem), tile["TILE_ROWS"]
    modelled: dict[str, Any] = {}
    if problem.output.spec.rank == 5:
        loads = window.taps * tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"]
        itemsize = problem.inputs[0].spec.dtype.itemsize
        modelled = {"l2_bytes": loads * itemsize, "instructions": 3 * loads}
    outputs = (axis.outputs for axis in (window.depth, window.width))
    launch = tile_launch(
        problem, tile, pool_kernel,
        constexprs={
            "WINDOWS": window, "REDUCTION": chosen, "UNROLL": unrolls(problem),
            "TILE_ROWS": tile_rows, "PDL": False,
        },
        rows=problem.output.shape[0] * math.prod(outputs) * -(-window.height.outputs // tile_rows),
        before=chosen.divide,
        **modelled,
    )  # fmt: skip
    return (launch,)


def _usual(problem: Problem) -> int:
    """8 results per thread and row, fewer where registers are short: of channels that are loaded
    one by one 16 bytes spill on sm_80 at 8, of 3x3x3 voxels 8 bytes at 4."""
    scattered = problem.output.shape[1] % 4 != 0
    if problem.output.spec.rank == 5:
        return 256 if scattered else 1024
    return 512 if scattered or needs_logarithms(problem) else 1024


# The compiler starts all loads of an unrolled plane at once: 5x5 at 16 results spills.
TILES = Tiles(
    (512, 1024, 2048),
    (32, 64, 128),
    usual=_usual,
    held=lambda problem: windows(problem).plane_taps if unrolls(problem) else 0,
    most=200,
)


def shares_rows(problem: Problem) -> bool:
    """Whether the windows of several output rows of an image share input that is unrolled."""
    height = windows(problem).height
    is_sliding = problem.output.spec.rank == 4 and not reduction(problem).adaptive
    return is_sliding and unrolls(problem) and height.stride < height.taps


def with_rows(tile: Config, rows: int) -> Config:
    """The tile for so many output rows per program, of which each has its results."""
    return config(tile.num_warps, tile.num_stages, TILE_ROWS=rows, **dict(tile.blocks))


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """512 to 2048 results per output row and program; more rows reuse more but cost registers."""
    for rows in (1, 2, 4) if shares_rows(problem) else (1,):
        for tile in TILES.configs(problem, target):
            yield with_rows(tile, rows)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    if tile["TILE_ROWS"] > 1 and not unrolls(problem):
        return "several output rows need unrolled taps"
    return None


def default(problem: Problem, target: Target) -> Config:
    """Four output rows per program where they share most of their input and there is work for every
    multiprocessor."""
    height, results, rows = windows(problem).height, problem.output.spec.numel, 1
    if target.is_gpu and shares_rows(problem) and height.stride == 1 and height.taps >= 3:
        while rows < min(4, height.outputs) and results // (2048 * rows) >= ENOUGH_PROGRAMS:
            rows *= 2
    return with_rows(TILES.default(problem, target), rows)


@counted
def cost(problem: Problem) -> int:
    """One operation per tap, and one more per power."""
    per_tap = 2 if isinstance(problem.attributes, LpPool2d) else 1
    taps = per_tap * windows(problem).taps
    return taps * problem.output.spec.numel


def _op(name: str, make: type[Attributes], function: Any, *calls: str, **more: Any) -> Op:
    """calls: the poolings of aten that become it."""
    return Op(
        name, make, partial(infer, name), partial(reference, function), launches, cost, configs,
        default, legal,
        aten={f"aten.{call}.default": pooling(name, make) for call in calls}, batched="pooling",
        **more,
    )  # fmt: skip


OPS = (
    _op("max_pool2d", MaxPool2d, F.max_pool2d, "max_pool1d", "max_pool2d"),
    _op("avg_pool2d", AvgPool2d, F.avg_pool2d, "avg_pool1d", "avg_pool2d"),
    # Positive: the cube root of a sum of cubes of either sign is ill-conditioned near zero.
    _op("lp_pool2d", LpPool2d, F.lp_pool2d, input_range=(0.05, 2.0)),
    _op("max_pool3d", MaxPool3d, F.max_pool3d, "max_pool3d"),
    _op("avg_pool3d", AvgPool3d, F.avg_pool3d, "avg_pool3d"),
)
