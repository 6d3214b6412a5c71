"""max_pool2d_with_indices: the maximum of an image's windows, and where it stands.

y[n,c,p,q] = max over the taps (r, s) inside the image of x[n,c,h,w], h = p·sh − ph + r·dh and
w = q·sw − pw + s·dw; i[n,c,p,q] = h·W + w of that element. As in torch the first of equal values
counts, the last NaN, and of a window that holds −inf only its first pixel.

x: (N, C, H, W) NHWC in memory -> y and i: (N, C, P, Q) NHWC; i is int64, as the module returns it.

Kernels that move elements do so through fp32, which is exact for whole numbers up to 2^24: larger
images are refused. A program holds a tile of (window, channel) pairs and reads every window's
elements once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.launch_tiles import tiled_launch, tiles_of
from ..contract.op import (
    Builder,
    Capture,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Problem,
    Ref,
    Target,
    X,
    Y,
    config,
    tensor_bytes,
    tile_config,
)
from ..contract.spec import Layout, TensorSpec
from ..movement.arguments import as_image, as_sequence
from .pool import MOST_UNROLLED_TAPS, window_arguments
from .pool_window import MaxPool2d, window_sizes
from .pool_window import infer as infer_window
from .tiles import channel_block

NAME = "max_pool2d_with_indices"
MOST_PIXELS = 2**24


def infer(attributes: MaxPool2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The values' spec by the rule of pooling, and the same with int64."""
    (values,) = infer_window(NAME, attributes, inputs)
    pixels = math.prod(inputs[0].shape[2:])
    if pixels > MOST_PIXELS:
        raise InvalidInputError(
            f"{NAME}: {inputs[0]} has {pixels} pixels; indices up to {MOST_PIXELS} are exact"
        )
    return values, values.with_(dtype=torch.int64)


def reference(attributes: MaxPool2d, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    window = (attributes.kernel, attributes.stride, attributes.padding, attributes.dilation)
    values, indices = F.max_pool2d_with_indices(x, *window, attributes.ceil_mode)
    return values, indices


@triton.jit
def max_pool_indices_kernel(
    x,
    y,
    i,
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
    I_PITCH: tl.constexpr,
    I_OFFSET: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column_tiles: tl.constexpr = (C + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    column_mask = columns < C
    if WIDE:
        rows = rows.to(tl.int64)
    image = rows // (P * Q)
    top = (rows // Q % P).to(tl.int32) * STRIDE_H - PADDING_H
    left = (rows % Q).to(tl.int32) * STRIDE_W - PADDING_W
    base = x + X_OFFSET + (((image * H + top) * WIDTH + left) * X_PITCH)[:, None]
    base = base + columns[None, :]
    # Rows past the end get a position that no tap brings inside the image: one mask serves both.
    safe_top = tl.where(row_mask, top, -1048576)
    # The first pixel of the window: what a window without a larger value than -inf points at.
    first_h = top + (tl.maximum(-top, 0) + DILATION_H - 1) // DILATION_H * DILATION_H
    first_w = left + (tl.maximum(-left, 0) + DILATION_W - 1) // DILATION_W * DILATION_W
    best = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
    where = tl.broadcast_to((first_h * WIDTH + first_w)[:, None], (BLOCK_ROWS, BLOCK_COLUMNS))
    if UNROLL:
        for tap in tl.static_range(R * S):
            best, where = later_tap(
                best, where, base, safe_top, top, left, column_mask, tap, H, WIDTH, S,
                DILATION_H, DILATION_W, X_PITCH,
            )  # fmt: skip
    else:
        for tap in range(R * S):
            best, where = later_tap(
                best, where, base, safe_top, top, left, column_mask, tap, H, WIDTH, S,
                DILATION_H, DILATION_W, X_PITCH,
            )  # fmt: skip
    mask = row_mask[:, None] & column_mask[None, :]
    target = i + I_OFFSET + (rows * I_PITCH)[:, None] + columns[None, :]
    tl.store(target, where.to(tl.int64), mask=mask)
    acc = EPILOGUE(best, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def later_tap(
    best,
    where,
    base,
    safe_top,
    top,
    left,
    column_mask,
    tap,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    X_PITCH: tl.constexpr,
):
    """The largest value so far and its place, after one more tap in row-major order."""
    r = tap // S * DILATION_H
    s = tap % S * DILATION_W
    inside = ((safe_top + r).to(tl.uint32, bitcast=True) < H) & (
        (left + s).to(tl.uint32, bitcast=True) < WIDTH
    )
    mask = inside[:, None] & column_mask[None, :]
    value = tl.load(base + (r * WIDTH + s) * X_PITCH, mask=mask, other=float("-inf"))
    value = value.to(tl.float32)
    # Only a larger value wins, so the first of equals stays; every NaN wins, so the last one does.
    better = (value > best) | (value != value)
    best = tl.where(better, value, best)
    return best, tl.where(better, ((top + r) * WIDTH + left + s)[:, None], where)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """The one launch of the kernel."""
    attributes = problem.attributes
    assert isinstance(attributes, MaxPool2d)
    x, out, where = problem.inputs[0], problem.outputs[0], problem.outputs[1]
    return tiled_launch(
        problem,
        tile,
        max_pool_indices_kernel,
        {
            **window_sizes(attributes, x, out),
            "I_PITCH": where.pitch, "I_OFFSET": where.offset,
            "UNROLL": math.prod(attributes.kernel) <= MOST_UNROLLED_TAPS,
        },
        pointers={"x": X, "y": Y, "i": Ref("output", 1)},
    )  # fmt: skip


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """256 to 1024 results per program: each costs a value, an index and, unrolled, its loads."""
    for tile in tiles_of((256, 512, 1024), (16, 32, 64)):
        if legal(problem, tile, target) is None:
            yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    assert isinstance(problem.attributes, MaxPool2d)
    taps = math.prod(problem.attributes.kernel)
    results = tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"] // (32 * tile.num_warps)
    if target.is_gpu and taps <= MOST_UNROLLED_TAPS and results * taps > 100:
        return "more than 100 loads per thread spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """Four results per thread, or as few as the loads of an unrolled window leave registers for."""
    n, c, p, q = problem.output.shape
    if target.name == "interpreter":
        return config(1, 1, **dict(tile_config(n * p * q, c, target).blocks))
    assert isinstance(problem.attributes, MaxPool2d)
    many = math.prod(problem.attributes.kernel) > 9
    columns = channel_block(c)
    return config(4, 1, BLOCK_ROWS=(256 if many else 512) // columns, BLOCK_COLUMNS=columns)


def cost(problem: Problem) -> Cost:
    """One comparison per tap."""
    assert isinstance(problem.attributes, MaxPool2d)
    read, written = tensor_bytes(problem)
    taps = math.prod(problem.attributes.kernel)
    return Cost(taps * problem.output.spec.numel, read, written)


def _capture(dims: int) -> Capture:
    """Sequences as images of one row, where a pixel's index is its position."""

    def capture(
        g: Builder,
        x: Any,
        kernel: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> Any:
        if g.spec(x).rank != dims + 2:
            return g.refuse("unbatched pooling; pass a batch dimension")
        window = window_arguments(dims, kernel, stride, padding, dilation)
        image = x if dims == 2 else as_image(g, x)
        attributes = MaxPool2d(*window, bool(ceil_mode))  # type: ignore[arg-type, call-arg]
        values = g.apply(NAME, (image,), attributes)
        results = (values, g.output(values, 1))
        return results if dims == 2 else tuple(as_sequence(g, each) for each in results)

    return capture


def _build(draw: Mapping[str, Any]) -> tuple[MaxPool2d, tuple[TensorSpec, ...]] | None:
    attributes = MaxPool2d(
        draw["kernel"], draw["stride"], draw["padding"], draw["dilation"], draw["ceil_mode"]
    )
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    try:
        infer(attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


OP = Op(
    name=NAME,
    attributes=MaxPool2d,
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
            "image": ((1, 1), (2, 2), (5, 5), (7, 9), (12, 4)),
            "C": (1, 3, 8, 33),
            "kernel": ((1, 1), (2, 2), (3, 3), (1, 3), (7, 6)),
            "stride": ((1, 1), (2, 2), (1, 2), (4, 4)),
            "padding": ((0, 0), (1, 1), (0, 1)),
            "dilation": ((1, 1), (2, 2), (1, 3)),
            "ceil_mode": (False, True),
        },
        build=_build,
        interesting=(
            {
                "N": 2, "image": (6, 6), "C": 8, "kernel": (3, 3), "stride": (2, 2),
                "padding": (1, 1), "dilation": (1, 1), "ceil_mode": True,
            },
            # The only window has its taps above, below and beside the image.
            {
                "N": 1, "image": (2, 2), "C": 3, "kernel": (2, 2), "stride": (1, 1),
                "padding": (1, 1), "dilation": (3, 3), "ceil_mode": False,
            },
        ),
    ),
    aten={
        "aten.max_pool2d_with_indices.default": _capture(2),
        "aten.max_pool1d_with_indices.default": _capture(1),
    },
    integers=True,
)  # fmt: skip
