"""mixed_pool2d: a blend of the maximum and the average of every window.

y[n,c,p,q] = a[c]·max(r,s) x[n,c,h,w] + b[c]·mean(r,s) x[n,c,h,w], h = p·sh + r and w = q·sw + s;
with b = 1 − a the mixed pooling of C.-Y. Lee, P. Gallagher, Z. Tu, "Generalizing pooling functions
in CNNs" (2016). NaN wins, as in both poolings.

x: (N, C, H, W) NHWC in memory; a and b: one number, or one per channel as (C, 1, 1) or (1, C, 1, 1)
-> y: (N, C, P, Q) NHWC; fp32 inside. One pass over the image instead of two, and neither pooled
image is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import scalars
from ..contract.launch_tiles import tiled_launch, tiles_of
from ..contract.op import (
    Attributes,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Operand,
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
from .pool import MOST_UNROLLED_TAPS
from .pool_window import MaxPool2d
from .pool_window import infer as infer_window
from .tiles import channel_block


@dataclass(frozen=True)
class MixedPool2d(Attributes):
    """The window and its stride as (vertical, horizontal); windows lie inside the image."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)


def is_weight(spec: TensorSpec, channels: int) -> bool:
    """Whether a tensor is one number, or one per channel of images."""
    return spec.numel == 1 or spec.shape in ((channels, 1, 1), (1, channels, 1, 1))


def infer(attributes: MixedPool2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """P = floor((H - R) / sh) + 1, Q likewise."""
    if len(inputs) != 3:
        raise InvalidInputError(f"mixed_pool2d: expected x, a and b, got {len(inputs)} tensors")
    x, *weights = inputs
    window = MaxPool2d(attributes.kernel, attributes.stride)
    specs = infer_window("mixed_pool2d", window, (x,))
    for weight in weights:
        if not is_weight(weight, x.shape[1]) or weight.batch is not None:
            raise InvalidInputError(
                f"mixed_pool2d: expected one number or {x.shape[1]}, one per channel and without a "
                f"batch, got {weight}"
            )
    return specs


def reference(
    attributes: MixedPool2d, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> torch.Tensor:
    window = (attributes.kernel, attributes.stride)
    return a * F.max_pool2d(x, *window) + b * F.avg_pool2d(x, *window)


@triton.jit
def blended(most, total, value, mask):
    """Maximum and sum of a window after one more element."""
    value = value.to(tl.float32)
    return scalars.maximum(most, tl.where(mask, value, float("-inf"))), total + value


@triton.jit
def mixed_pool_kernel(
    x,
    a,
    b,
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
    A_STEP: tl.constexpr,
    A_OFFSET: tl.constexpr,
    B_STEP: tl.constexpr,
    B_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
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
    mask = row_mask[:, None] & column_mask[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
    pixel = (rows // (P * Q) * H + rows // Q % P * STRIDE_H) * WIDTH + rows % Q * STRIDE_W
    base = x + X_OFFSET + (pixel * X_PITCH)[:, None] + columns[None, :]
    most = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    if UNROLL:
        for tap in tl.static_range(R * S):
            offset = (tap // S * WIDTH + tap % S) * X_PITCH
            most, total = blended(most, total, tl.load(base + offset, mask=mask, other=0.0), mask)
    else:
        for tap in range(R * S):
            offset = (tap // S * WIDTH + tap % S) * X_PITCH
            most, total = blended(most, total, tl.load(base + offset, mask=mask, other=0.0), mask)
    for_most = tl.load(a + A_OFFSET + columns * A_STEP, mask=column_mask, other=0.0)
    for_mean = tl.load(b + B_OFFSET + columns * B_STEP, mask=column_mask, other=0.0)
    mean = total / (R * S)
    acc = for_most.to(tl.float32)[None, :] * most + for_mean.to(tl.float32)[None, :] * mean
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


def _attributes(problem: Problem) -> MixedPool2d:
    assert isinstance(problem.attributes, MixedPool2d)
    return problem.attributes


def _step(weight: Operand) -> int:
    """Elements from the number of one channel to that of the next."""
    return 0 if weight.spec.numel == 1 else weight.strides[-3]


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """The one launch of the kernel."""
    attributes = _attributes(problem)
    (x, a, b), out = problem.inputs, problem.output
    _, c, p, q = out.shape
    return tiled_launch(
        problem,
        tile,
        mixed_pool_kernel,
        {
            "H": x.shape[2], "WIDTH": x.shape[3], "C": c, "P": p, "Q": q,
            "R": attributes.kernel[0], "S": attributes.kernel[1],
            "STRIDE_H": attributes.stride[0], "STRIDE_W": attributes.stride[1],
            "A_STEP": _step(a), "A_OFFSET": a.offset, "B_STEP": _step(b), "B_OFFSET": b.offset,
            "UNROLL": math.prod(attributes.kernel) <= MOST_UNROLLED_TAPS,
        },
        pointers={"x": X, "a": Ref("input", 1), "b": Ref("input", 2), "y": Y},
    )  # fmt: skip


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """256 to 2048 results per program, as far as their loads fit the registers."""
    for tile in tiles_of((256, 512, 1024, 2048), (32, 64, 128)):
        if legal(problem, tile, target) is None:
            yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    taps = math.prod(_attributes(problem).kernel)
    results = tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"] // (32 * tile.num_warps)
    if target.is_gpu and taps <= MOST_UNROLLED_TAPS and results * taps > 200 // 2:
        return f"more than {200 // 2} loads per thread spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """Eight results per thread, four for windows of more than nine elements."""
    n, c, p, q = problem.output.shape
    if target.name == "interpreter":
        return config(1, 1, **dict(tile_config(n * p * q, c, target).blocks))
    columns = channel_block(c)
    elements = 1024 if math.prod(_attributes(problem).kernel) <= 9 else 512
    return config(4, 1, BLOCK_ROWS=elements // columns, BLOCK_COLUMNS=columns)


def cost(problem: Problem) -> Cost:
    """A comparison and an addition per tap."""
    taps = math.prod(_attributes(problem).kernel)
    return Cost(2 * taps * problem.output.spec.numel, *tensor_bytes(problem))


def _build(draw: Mapping[str, Any]) -> tuple[MixedPool2d, tuple[TensorSpec, ...]] | None:
    c = draw["C"]
    x = TensorSpec((draw["N"], c, *draw["image"]), torch.float32, Layout.NHWC)
    shapes = {"one": (), "channel": (c, 1, 1), "image": (1, c, 1, 1)}
    weights = (TensorSpec(shapes[draw[name]], torch.float32) for name in ("a", "b"))
    specs = (x, *weights)
    attributes = MixedPool2d(draw["kernel"], draw["stride"])
    try:
        infer(attributes, specs)
    except InvalidInputError:
        return None
    return attributes, specs


OP = Op(
    name="mixed_pool2d",
    attributes=MixedPool2d,
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
            "kernel": ((1, 1), (2, 2), (3, 3), (1, 3), (6, 5)),
            "stride": ((1, 1), (2, 2), (1, 2)),
            "a": ("channel", "one", "image"),
            "b": ("channel", "one", "image"),
        },
        build=_build,
    ),
)
