"""stem_input: the user's image as the first convolution wants it, in one kernel.

y[n, c, h, left + w] = (x[n, c, h, w] − mean[c]) · scale[c], zero around it and in channels beyond C

x: (N, C, H, W) in any layout and float dtype; y: (N, channels, H, width) NHWC in the dtype of the
computation. One reading and one writing instead of a cast, a subtraction, a division and a change
of layout; the columns and the channel of zeros let the convolution copy whole filter rows at a time
(`conv_rows.py`). The normalisation is computed in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import op
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target
from ..contract.spec import Layout, Operand, TensorSpec
from ..tile.geometry import tile_launch


@dataclass(frozen=True)
class StemInput(Attributes):
    """dtype, channels and width of the result; left: columns of zeros before the image.

    mean, scale: one number per channel, or empty for images that are taken as they are.
    """

    dtype: torch.dtype = torch.float32
    channels: int = 4
    left: int = 0
    width: int = 1
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()


def check_normalisation(
    op: str, mean: tuple[float, ...], scale: tuple[float, ...], channels: int
) -> None:
    """Refuses numbers that are not finite or not one per channel.

    Raises: InvalidInputError.
    """
    if not all(map(math.isfinite, (*mean, *scale))):
        raise InvalidInputError(f"{op}: mean {mean} and scale {scale} must be finite")
    if len(mean) != len(scale) or len(mean) not in (0, channels):
        raise InvalidInputError(
            f"{op}: expected a mean and a scale for each of the {channels} channels, or neither; "
            f"got {len(mean)} means and {len(scale)} scales"
        )


def normalised(
    x: torch.Tensor, mean: tuple[float, ...], scale: tuple[float, ...], dtype: torch.dtype
) -> torch.Tensor:
    """(x − mean) · scale per channel, computed in at least fp32, in `dtype`."""
    if mean:
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        shape = (1, -1, 1, 1)
        x = x - torch.tensor(mean, dtype=x.dtype, device=x.device).reshape(shape)
        x = x * torch.tensor(scale, dtype=x.dtype, device=x.device).reshape(shape)
    return x.to(dtype)


def infer(attributes: StemInput, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, channels, H, width), NHWC."""
    (x,) = inputs
    if x.rank != 4:
        raise InvalidInputError(f"stem_input: expected an image (N, C, H, W), got {x}")
    n, c, h, width = x.shape
    if c > attributes.channels or attributes.channels & (attributes.channels - 1):
        raise InvalidInputError(
            f"stem_input: expected a power of two of at least {c} channels, got "
            f"{attributes.channels}"
        )
    if attributes.left < 0 or attributes.width <= attributes.left:
        raise InvalidInputError(
            f"stem_input: {attributes.width} columns hold nothing of an image {width} wide that "
            f"begins at column {attributes.left}"
        )
    check_normalisation("stem_input", attributes.mean, attributes.scale, c)
    shape = (n, attributes.channels, h, attributes.width)
    return (TensorSpec(shape, attributes.dtype, Layout.NHWC, x.batch),)


def reference(attributes: StemInput, x: torch.Tensor) -> torch.Tensor:
    # What is evaluated in fp64 stays there.
    dtype = x.dtype if x.dtype is torch.float64 else attributes.dtype
    value = normalised(x, attributes.mean, attributes.scale, dtype)
    right = attributes.width - attributes.left - x.shape[3]
    more = attributes.channels - x.shape[1]
    return F.pad(value, (attributes.left, right, 0, 0, 0, more))


class StridedImage(NamedTuple):
    """An image in any layout: its sizes, the elements from one sample, channel, row and column to
    the next, and those before the first."""

    H: int
    W: int
    C: int
    sample: int
    channel: int
    row: int
    column: int
    offset: int

    @staticmethod
    def of(x: Operand) -> StridedImage:
        """Of a tensor (N, C, H, W)."""
        (_, c, h, w), (sample, channel, row, column) = x.shape, x.strides
        return StridedImage(h, w, c, sample, channel, row, column, x.offset)


@triton.jit
def side_by_side(vectors, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """COUNT = 2**LEVELS vectors of length M as an (M, COUNT) matrix.

    No value moves: each thread keeps what it loaded, whatever layout the compiler would have chosen
    for a load of the whole matrix (Triton 3.6 and 3.7 choose differently).
    """
    for level in tl.static_range(LEVELS):
        joined = ()
        for index in tl.static_range(COUNT >> (level + 1)):
            other = vectors[index + (COUNT >> (level + 1))]
            joined = joined + (tl.join(vectors[index], other),)
        vectors = joined
    return vectors[0].reshape(vectors[0].shape[0], COUNT)


@triton.jit
def stem_input_kernel(
    x, y, extras, m, IMAGE: tl.constexpr, OUTPUT: tl.constexpr, LEFT: tl.constexpr,
    LEVELS: tl.constexpr, MEAN: tl.constexpr, SCALE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = TILE.M
    CHANNELS: tl.constexpr = OUTPUT.K
    pixels = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = pixels < m
    if TILE.wide:
        pixels = pixels.to(tl.int64)
    sample = pixels // (IMAGE.H * OUTPUT.Q)
    row = pixels // OUTPUT.Q % IMAGE.H
    column = (pixels % OUTPUT.Q).to(tl.int32) - LEFT
    inside = live & (column.to(tl.uint32, bitcast=True) < IMAGE.W)
    start = x + IMAGE.offset + (sample * IMAGE.sample + row * IMAGE.row + column * IMAGE.column)
    values = ()
    for channel in tl.static_range(CHANNELS):
        if channel < IMAGE.C:
            # Neighbouring threads load neighbouring pixels.
            value = tl.load(start + channel * IMAGE.channel, mask=inside, other=0.0)
            value = value.to(tl.float32)
            if MEAN is not None:
                value = tl.where(inside, (value - MEAN[channel]) * SCALE[channel], 0.0)
        else:
            value = tl.zeros((BLOCK_M,), tl.float32)
        values = values + (value,)
    # And each thread writes all channels of its pixels.
    rows = (pixels * OUTPUT.row_stride)[:, None]
    out = y + OUTPUT.offset + rows + tl.arange(0, CHANNELS)[None, :]
    matrix = side_by_side(values, CHANNELS, LEVELS).to(y.dtype.element_ty)
    tl.store(out, matrix, mask=live[:, None])


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes = problem.attributes.expect(StemInput)
    x = problem.inputs[0]
    launch = tile_launch(
        problem, tile, stem_input_kernel,
        constexprs={
            "IMAGE": StridedImage.of(x), "LEFT": attributes.left,
            "LEVELS": attributes.channels.bit_length() - 1,
            "MEAN": attributes.mean or None, "SCALE": attributes.scale or None,
        },
        columns=1,
        l2_bytes=tile["BLOCK_M"] * x.shape[1] * x.spec.dtype.itemsize,
        # 112 per thread for two pixels, of sm_90 code that casts and normalises.
        instructions=tile["BLOCK_M"] * 56,
    )  # fmt: skip
    return (launch,)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    for pixels in (128, 256, 512, 1024):
        yield op.config(4, 1, BLOCK_M=pixels)


def default(problem: Problem, target: Target) -> Config:
    """Eight pixels per thread: 24 loads in flight.

    In the interpreter, which pays per program, a quarter of a million pixels.
    """
    if target.name == "interpreter":
        rows = problem.output.spec.numel // problem.output.shape[1]
        return op.config(1, 1, BLOCK_M=min(1 << 18, op.power_of_two(rows)))
    return op.config(4, 1, BLOCK_M=1024)


@op.counted
def cost(problem: Problem) -> int:
    """Two operations per element where it normalises."""
    operations = 2 if problem.attributes.expect(StemInput).mean else 0
    return operations * problem.inputs[0].spec.numel


OP = Op(
    "stem_input", StemInput, infer, reference, launches, cost, configs, default,
    takes_epilogue=False, images=False,
)  # fmt: skip
