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
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import (
    Attributes,
    Builder,
    Capture,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Problem,
    Target,
    config,
    tensor_bytes,
)
from ..contract.spec import Layout, TensorSpec
from ..movement.arguments import as_image, as_sequence, numbers
from ..tile.geometry import tile_launch
from .pool_kernel import MOST_MULTIPLIED, pool_kernel
from .pool_window import (
    AvgPool2d,
    AvgPool3d,
    LpPool2d,
    MaxPool2d,
    MaxPool3d,
    Pool2d,
    Pool3d,
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
    """The one launch of the kernel."""
    window, chosen, tile_rows = windows(problem), reduction(problem), tile["TILE_ROWS"]
    divide = () if chosen.divisor is None else (ep.Stage("div", literal=float(chosen.divisor)),)
    modelled: dict[str, Any] = {}
    if problem.output.spec.rank == 5:
        loads = window.taps * tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"]
        itemsize = problem.inputs[0].spec.dtype.itemsize
        modelled = {"l2_bytes": loads * itemsize, "instructions": 3 * loads}
    outputs = (axis.outputs for axis in (window.depth, window.width))
    launch = tile_launch(
        problem,
        tile,
        pool_kernel,
        constexprs={
            "WINDOWS": window, "REDUCTION": chosen, "UNROLL": unrolls(problem),
            "TILE_ROWS": tile_rows,
        },
        rows=problem.output.shape[0] * math.prod(outputs) * -(-window.height.outputs // tile_rows),
        before=divide,
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
    return TILES.legal(problem, tile, target)


def default(problem: Problem, target: Target) -> Config:
    """Four output rows per program where they share most of their input and there is work for every
    multiprocessor."""
    height, results, rows = windows(problem).height, problem.output.spec.numel, 1
    if target.is_gpu and shares_rows(problem) and height.stride == 1 and height.taps >= 3:
        while rows < min(4, height.outputs) and results // (2048 * rows) >= ENOUGH_PROGRAMS:
            rows *= 2
    return with_rows(TILES.default(problem, target), rows)


def cost(problem: Problem) -> Cost:
    """One operation per tap, and one more per power."""
    per_tap = 2 if isinstance(problem.attributes, LpPool2d) else 1
    taps = per_tap * windows(problem).taps
    return Cost(taps * problem.output.spec.numel, *tensor_bytes(problem))


def window_arguments(
    dims: int, kernel: Any, stride: Any, *more: Any
) -> tuple[tuple[int, ...], ...]:
    """Arguments of an aten pooling, one number per dimension; without a stride it is the window.

    Of sequences, as those of images of one row: `more` are padding, then dilation.
    """
    window = numbers(kernel, dims)
    stride = stride if isinstance(stride, int) or stride else window
    given = [window, numbers(stride, dims), *(numbers(value, dims) for value in more)]
    if dims == 1:
        given = [(first, *rest) for first, rest in zip((1, 1, 0, 1), given, strict=False)]
    return tuple(given)


def _capture_max(name: str, make: Any, dims: int) -> Capture:
    def capture(
        g: Builder,
        x: Any,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Any:
        window = window_arguments(dims, kernel, stride, padding, dilation)
        return _apply(g, name, x, make(*window, bool(ceil_mode)), dims)

    return capture


def _capture_avg(name: str, make: Any, dims: int) -> Capture:
    def capture(
        g: Builder,
        x: Any,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor: int | None = None,
    ) -> Any:
        window = window_arguments(dims, kernel, stride, padding)
        attributes = make(*window, bool(ceil_mode), bool(count_include_pad), divisor)
        return _apply(g, name, x, attributes, dims)

    return capture


def _apply(g: Builder, name: str, x: Any, attributes: Pool2d | Pool3d, dims: int) -> Any:
    if g.spec(x).rank != dims + 2:
        return g.refuse("unbatched pooling; pass a batch dimension")
    if dims > 1:
        return g.apply(name, (x,), attributes)
    return as_sequence(g, g.apply(name, (as_image(g, x),), attributes))


def _build(name: str, draw: Mapping[str, Any]) -> tuple[Pool2d, tuple[TensorSpec, ...]] | None:
    kernel, stride, ceil_mode = draw["kernel"], draw["stride"], draw["ceil_mode"]
    attributes: Pool2d
    if name == "max_pool2d":
        attributes = MaxPool2d(kernel, stride, draw["padding"], draw["dilation"], ceil_mode)
    elif name == "avg_pool2d":
        counts = draw["count_include_pad"], draw["divisor"]
        attributes = AvgPool2d(kernel, stride, draw["padding"], ceil_mode, *counts)
    else:
        attributes = LpPool2d(draw["norm"], kernel, stride, ceil_mode)
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    try:
        infer(name, attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


def _draw(**changes: Any) -> Mapping[str, Any]:
    """A draw of every op's domain: a 3x3 window with stride 2, but for the changes."""
    plain = {
        "N": 1, "image": (7, 9), "C": 8, "kernel": (3, 3), "stride": (2, 2), "padding": (0, 0),
        "dilation": (1, 1), "ceil_mode": False, "count_include_pad": True, "divisor": None,
        "norm": 2.0,
    }  # fmt: skip
    return {**plain, **changes}


INTERESTING = (
    _draw(image=(6, 6), padding=(1, 1), ceil_mode=True),
    _draw(image=(6, 6), padding=(1, 1), ceil_mode=True, count_include_pad=False),
    _draw(image=(2, 2), kernel=(5, 5), stride=(4, 4), ceil_mode=True),
    # The only window has its taps above, below and beside the image.
    _draw(image=(2, 2), kernel=(2, 2), stride=(1, 1), padding=(1, 1), dilation=(3, 3)),
    _draw(image=(1, 1), padding=(1, 1), C=1),
    _draw(image=(1, 1), kernel=(1, 1), stride=(1, 1), C=33),
    _draw(kernel=(7, 7), padding=(3, 3), stride=(1, 1), C=3),
    _draw(image=(3, 3), kernel=(2, 2), ceil_mode=True),
    _draw(divisor=-3, C=33, N=2),
    _draw(norm=3.0),
)


def _domain(name: str, **changes: Any) -> Domain:
    ranges: dict[str, Any] = {
        "N": (1, 2, 3),
        "image": ((1, 1), (2, 2), (5, 5), (7, 9), (12, 4), (16, 16)),
        "C": (1, 3, 8, 16, 33),
        "kernel": ((1, 1), (2, 2), (3, 3), (5, 5), (1, 3), (3, 2), (7, 6)),
        "stride": ((1, 1), (2, 2), (1, 2), (3, 1), (4, 4)),
        "padding": ((0, 0), (1, 1), (0, 1), (2, 2)),
        "ceil_mode": (False, True),
        **changes,
    }
    # Positive values: the cube root of a sum of cubes of either sign is ill-conditioned near zero.
    low = 0.05 if name == "lp_pool2d" else -2.0
    possible = tuple(draw for draw in INTERESTING if _build(name, draw) is not None)
    return Domain(ranges, partial(_build, name), possible, (low, 2.0))


def _build_3d(name: str, draw: Mapping[str, Any]) -> tuple[Pool3d, tuple[TensorSpec, ...]] | None:
    window = (draw["kernel"], draw["stride"], draw["padding"])
    attributes: Pool3d
    if name == "max_pool3d":
        attributes = MaxPool3d(*window, draw["dilation"], draw["ceil_mode"])
    else:
        attributes = AvgPool3d(
            *window, draw["ceil_mode"], draw["count_include_pad"], draw["divisor"]
        )
    shape = (draw["N"], draw["C"], *draw["image"])
    x = TensorSpec(shape, torch.float32, Layout.NHWC)
    try:
        infer(name, attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


def _draw_3d(**changes: Any) -> Mapping[str, Any]:
    plain = {
        "N": 1, "image": (4, 7, 5), "C": 8, "kernel": (3, 3, 3), "stride": (2, 2, 2),
        "padding": (1, 1, 1), "dilation": (1, 1, 1), "ceil_mode": False,
        "count_include_pad": True, "divisor": None,
    }  # fmt: skip
    return {**plain, **changes}


INTERESTING_3D = (
    _draw_3d(),
    _draw_3d(ceil_mode=True, image=(4, 6, 6), count_include_pad=False),
    _draw_3d(image=(1, 1, 1), C=1),
    _draw_3d(kernel=(2, 6, 5), padding=(1, 3, 2), stride=(1, 1, 1), C=33),
    _draw_3d(kernel=(2, 2, 2), padding=(0, 0, 0), ceil_mode=True, C=3),
)


DOMAIN_3D = {
    "N": (1, 2, 3),
    "image": ((1, 1, 1), (2, 5, 4), (4, 7, 5), (5, 4, 8)),
    "C": (1, 3, 8, 33),
    "kernel": ((1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 3, 2), (3, 1, 1), (2, 5, 6)),
    "stride": ((1, 1, 1), (2, 2, 2), (1, 2, 3), (3, 1, 2)),
    "padding": ((0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 1)),
    "dilation": ((1, 1, 1), (1, 1, 1), (2, 1, 2)),
    "ceil_mode": (False, True),
    "count_include_pad": (True, False),
    "divisor": (None, None, 7, -3),
}


def _domain_3d(name: str) -> Domain:
    possible = tuple(draw for draw in INTERESTING_3D if _build_3d(name, draw) is not None)
    return Domain(DOMAIN_3D, partial(_build_3d, name), possible)


def _op(
    name: str, make: type[Attributes], function: Any, domain: Domain, aten: Mapping[str, Capture]
) -> Op:
    return Op(
        name=name,
        attributes=make,
        infer=partial(infer, name),
        reference=partial(reference, function),
        launches=launches,
        configs=configs,
        default=default,
        legal=legal,
        cost=cost,
        domain=domain,
        aten=aten,
    )


OPS = (
    _op(
        "max_pool2d",
        MaxPool2d,
        F.max_pool2d,
        _domain("max_pool2d", dilation=((1, 1), (2, 2), (1, 3))),
        {
            "aten.max_pool1d.default": _capture_max("max_pool2d", MaxPool2d, 1),
            "aten.max_pool2d.default": _capture_max("max_pool2d", MaxPool2d, 2),
        },
    ),
    _op(
        "avg_pool2d",
        AvgPool2d,
        F.avg_pool2d,
        _domain("avg_pool2d", count_include_pad=(True, False), divisor=(None, None, 1, 7)),
        {
            "aten.avg_pool1d.default": _capture_avg("avg_pool2d", AvgPool2d, 1),
            "aten.avg_pool2d.default": _capture_avg("avg_pool2d", AvgPool2d, 2),
        },
    ),
    _op(
        "lp_pool2d",
        LpPool2d,
        F.lp_pool2d,
        _domain("lp_pool2d", norm=(1.0, 2.0, 3.0, 4.0, 17.0, 1.5), padding=((0, 0),)),
        {},
    ),
    _op(
        "max_pool3d",
        MaxPool3d,
        F.max_pool3d,
        _domain_3d("max_pool3d"),
        {"aten.max_pool3d.default": _capture_max("max_pool3d", MaxPool3d, 3)},
    ),
    _op(
        "avg_pool3d",
        AvgPool3d,
        F.avg_pool3d,
        _domain_3d("avg_pool3d"),
        {"aten.avg_pool3d.default": _capture_avg("avg_pool3d", AvgPool3d, 3)},
    ),
)
