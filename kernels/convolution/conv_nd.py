"""conv3d, and conv2d whose border is not zero:

    y[n,k,o,p,q] = sum_{t,r,s,c} x[n, c, o·sd − front + t·dd, p·sh − top + r·dh, q·sw − left + s·dw]
                                 w[k,c,t,r,s]

x: (N, C, D, H, W) channels innermost in memory; w: (K, C/G, T, R, S), a constant packed as
(K, T·R·S·C/G); y: (N, K, O, P, Q) channels innermost; fp32 accumulation. The bias is an epilogue.
`border_conv2d` is the same without D, O and T, and x outside its image is what `pad` would have put
there (reflect, replicate, circular): nothing is padded, the loads find their pixels themselves.

Implicit GEMM by the tile engine, as conv2d: one loop flattened over (t, r, s) and channel blocks,
or with few channels per group over (tap, channel) pairs. A step of that loop at 128x64 and 4 warps
on sm_90: 3x3x3 218 instructions, 152 without padding, against 171 of conv2d's 3x3; a 3x3 filter
with borders 232 (replicate) to 256 (circular). A 1x1x1 filter with stride 1 is a matrix product
(`gemm.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, TensorSpec, counted
from ..movement.arguments import convolution
from ..movement.pad import check_border, correction
from ..tile import choice, conv_geometry, engine, gemm, space
from ..tile.geometry import Image, Window
from ..tile.source import Source, runs_by_tap


@dataclass(frozen=True)
class Conv3d(Attributes):
    """stride and dilation in depth, vertical, horizontal; padding as (front, back, top, bottom,
    left, right), negative where the input is cropped; border: how `pad` finds what lies there."""

    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)
    groups: int = 1
    border: str = "constant"


@dataclass(frozen=True)
class BorderConv2d(Conv3d):
    """The same without depth."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1)
    border: str = "reflect"


def infer(name: str, attributes: Conv3d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """As of any convolution; a border that is not zero must be found in the input."""
    specs, x = conv_geometry.infer(attributes, inputs, name), inputs[0]
    if attributes.border != "constant":
        if min(attributes.padding) < 0:
            raise InvalidInputError(f"{name}: a {attributes.border} border cannot crop {x}")
        pairs = zip(attributes.padding[::2], attributes.padding[1::2], strict=True)
        for dim, (before, after) in enumerate(pairs, 2):
            check_border(name, attributes.border, x, dim, before, after)
    return specs


def reference(attributes: Conv3d, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    border = attributes.border if any(attributes.padding) else "constant"
    return conv_geometry.reference(attributes, x, w, border=border)


def pack(attributes: Conv3d, w: torch.Tensor) -> torch.Tensor:
    """(K, C/G, T, R, S) -> (K, T·R·S·C/G)."""
    return w.movedim(1, -1).reshape(w.shape[0], -1).contiguous()


class Volume(NamedTuple):
    """What a window of three dimensions, or with a border, has beside one of two.

    D, O: depth of input and output; T: of the filter. open: whether some tap can leave the input in
    that dimension; where none can, nothing is checked. border: what x is outside its image.
    """

    D: int
    O: int  # noqa: E741
    T: int
    stride_d: int
    front: int
    dilation_d: int
    open_d: bool
    open_h: bool
    open_w: bool
    border: str


@triton.jit
def volume_corner(
    first, stop, image, p, q, live,
    SOURCE: tl.constexpr, SPACE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The index of the first pixel that each row sees, and where it lies in the input."""
    IMAGE: tl.constexpr = SOURCE.image
    WINDOW: tl.constexpr = SOURCE.window
    VOLUME: tl.constexpr = SOURCE.detail
    front = (image % VOLUME.O).to(tl.int32) * VOLUME.stride_d - VOLUME.front
    top = p * WINDOW.stride_h - WINDOW.top
    left = q * WINDOW.stride_w - WINDOW.left
    pixel = ((image // VOLUME.O * VOLUME.D + front) * IMAGE.H + top) * IMAGE.W + left
    if VOLUME.border == "constant":
        # One mask for both: 218 instead of 230 instructions per step (3x3x3, 128x64, sm_90).
        top = tl.where(live, top, -1048576)
    return pixel, front, top, left, live


@triton.jit
def locate(live, front, top, left, IMAGE: tl.constexpr, VOLUME: tl.constexpr, TILE: tl.constexpr):
    """Whether there is something to load at a position, and how many pixels further it lies."""
    inside = live
    move = left * 0
    if TILE.wide:
        move = move.to(tl.int64)
    if VOLUME.border == "constant":
        if VOLUME.open_h:
            # Rows past the end are where no tap comes inside: they need no mask of their own.
            inside = top.to(tl.uint32, bitcast=True) < IMAGE.H
        if VOLUME.open_w:
            inside = inside & (left.to(tl.uint32, bitcast=True) < IMAGE.W)
        if VOLUME.open_d:
            inside = inside & (front.to(tl.uint32, bitcast=True) < VOLUME.D)
    else:
        if VOLUME.open_d:
            move += correction(front, VOLUME.D, VOLUME.border)
        move = move * IMAGE.H
        if VOLUME.open_h:
            move += correction(top, IMAGE.H, VOLUME.border)
        move = move * IMAGE.W
        if VOLUME.open_w:
            move += correction(left, IMAGE.W, VOLUME.border)
    return inside, move


@triton.jit
def volume_tap(x, at, step, start, extras, SOURCE: tl.constexpr, TILE: tl.constexpr):
    """A block of channels of one tap (t, r, s)."""
    pixel, front, top, left, live = at
    IMAGE: tl.constexpr = SOURCE.image
    WINDOW: tl.constexpr = SOURCE.window
    VOLUME: tl.constexpr = SOURCE.detail
    t = step // (WINDOW.R * WINDOW.S) * VOLUME.dilation_d
    r = step // WINDOW.S % WINDOW.R * WINDOW.dilation_h
    s = step % WINDOW.S * WINDOW.dilation_w
    there, move = locate(live, front + t, top + r, left + s, IMAGE, VOLUME, TILE)
    if TILE.wide:
        t = tl.cast(t, tl.int64)
    depth = tl.arange(0, TILE.K)
    x_step = x + IMAGE.offset + (((t * IMAGE.H + r) * IMAGE.W + s) * IMAGE.row_stride + start)
    x_tile = (pixel * IMAGE.row_stride)[:, None] + depth[None, :]
    mask = there[:, None]
    if IMAGE.C % TILE.K != 0:
        mask = mask & (start + depth < IMAGE.C)[None, :]
    return tl.load(x_step + (x_tile + (move * IMAGE.row_stride)[:, None]), mask=mask, other=0.0)


@triton.jit
def volume_gather(x, at, step, start, extras, SOURCE: tl.constexpr, TILE: tl.constexpr):
    """(tap, channel) pairs from `start` on."""
    pixel, front, top, left, live = at
    IMAGE: tl.constexpr = SOURCE.image
    WINDOW: tl.constexpr = SOURCE.window
    VOLUME: tl.constexpr = SOURCE.detail
    index = start + tl.arange(0, TILE.K)[None, :]
    tap = index // IMAGE.C
    t = tap // (WINDOW.R * WINDOW.S) * VOLUME.dilation_d
    r = tap // WINDOW.S % WINDOW.R * WINDOW.dilation_h
    s = tap % WINDOW.S * WINDOW.dilation_w
    there, move = locate(
        live[:, None], front[:, None] + t, top[:, None] + r, left[:, None] + s, IMAGE, VOLUME, TILE
    )
    if TILE.wide:
        t = t.to(tl.int64)
    offset = ((t * IMAGE.H + r) * IMAGE.W + s) * IMAGE.row_stride + index % IMAGE.C
    x_tile = (pixel * IMAGE.row_stride)[:, None] + offset + move * IMAGE.row_stride
    mask = there & (index < SOURCE.depth)
    return tl.load(x + IMAGE.offset + x_tile, mask=mask, other=0.0)


def _size(problem: Problem) -> choice.Size:
    w, y = problem.inputs[1].shape, problem.output.spec
    groups, taps = problem.attributes.expect(Conv3d).groups, math.prod(w[2:])
    by_tap = runs_by_tap(w[1], taps)
    depth = w[1] if by_tap else w[1] * taps
    rows, columns = y.numel // y.shape[1], y.shape[1] // groups
    dtype = problem.inputs[0].spec.dtype
    return choice.Size(rows, columns, depth, dtype, groups, not by_tap, taps)


def _three(values: tuple[int, ...], missing: int = 1) -> tuple[int, ...]:
    """For depth, height and width; images have no depth."""
    return (missing, *values) if len(values) == 2 else values


def _source(problem: Problem) -> Source:
    attributes, x = problem.attributes.expect(Conv3d), problem.inputs[0]
    channels = problem.inputs[1].shape[1]
    sizes, filters, outputs = (
        _three(shape[2:]) for shape in (x.shape, problem.inputs[1].shape, problem.output.shape)
    )
    strides, dilations = _three(attributes.stride), _three(attributes.dilation)
    before = _three(attributes.padding[::2], 0)
    each = zip(sizes, filters, outputs, strides, dilations, before, strict=True)
    open_d, open_h, open_w = (
        padding > 0 or (count - 1) * stride + (taps - 1) * dilation - padding >= size
        for size, taps, count, stride, dilation, padding in each
    )
    volume = Volume(
        sizes[0], outputs[0], filters[0], strides[0], before[0], dilations[0],
        open_d, open_h, open_w, attributes.border,
    )  # fmt: skip
    image = Image(sizes[1], sizes[2], channels, x.pitch, x.offset)
    window = Window(*filters[1:], *strides[1:], *before[1:], *dilations[1:])
    taps = math.prod(filters)
    by_tap = runs_by_tap(channels, taps)
    steps = (taps, channels) if by_tap else (1, taps * channels)
    load = volume_tap if by_tap else volume_gather
    return Source(image, window, volume_corner, load, *steps, detail=volume)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch: of the matrix product where the convolution is one."""
    attributes, size = problem.attributes.expect(Conv3d), _size(problem)
    if conv_geometry.is_product(attributes, problem.inputs[1].shape):
        return (gemm.launch(problem, tile),)
    steps = size.steps(tile["BLOCK_K"])
    launch = engine.launch(
        problem, tile, target, space.of_pixels(problem.output.spec, tile["BLOCK_M"]),
        _source(problem),
        groups=size.groups,
        precision=choice.dot_precision(problem, math.prod(problem.inputs[1].shape[1:])),
        l2_bytes=choice.l2_bytes(problem, tile, steps * tile["BLOCK_K"]),
        steps=steps,
        step_instructions=choice.step_instructions(tile, size.dtype, size.taps),
    )  # fmt: skip
    return (launch,)


def _flops(problem: Problem) -> int:
    return 2 * problem.output.spec.numel * math.prod(problem.inputs[1].shape[1:])


def _op(name: str, make: type[Conv3d], **more: Any) -> Op:
    return Op(
        name, make, partial(infer, name), reference, launches, counted(_flops),
        **choice.of_product(_size), packs=lambda attributes: {1: pack}, **more,
    )  # fmt: skip


OPS = (
    _op(
        "conv3d",
        Conv3d,
        aten={
            f"aten.conv3d.{overload}": convolution("conv3d", Conv3d)
            for overload in ("default", "padding")
        },
        batched="convolution",
    ),
    _op("border_conv2d", BorderConv2d),
)
