"""sample_conv2d: a convolution whose weights are computed, one filter bank per sample or for all:

    y[n,k,p,q] = sum_{r,s,c} z[n, c, p·sh − top + r·dh, q·sw − left + s·dw] w[n,k,r,s,c]

where z is x with `spread − 1` zeros between pixels, so that transposed convolutions are among them.
x: (N, C, H, W) NHWC; w: (N or 1, K, R·S·C/G), rows of taps and channels; y: (N, K, P, Q) NHWC.
fp32 accumulation. The modulated convolutions of StyleGAN2 (Karras et al., 2020), dynamic filters,
and cross-correlation of two images (SiamFC, Bertinetto et al., 2016).

One program computes a tile of one sample: an implicit matrix product, in blocks of a tap's channels
or, where those are few, of (tap, channel) pairs. With one channel in and out of each group there is
no product: every channel is multiplied by its own taps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.op import Config, Launch, Op, Problem, Target, config, counted, either, power_of_two
from ..contract.spec import Layout, TensorSpec
from ..tile import choice, space
from ..tile.conv_geometry import Conv2d, SampleConv2d
from ..tile.conv_geometry import infer as infer_convolution
from ..tile.finish import put
from ..tile.geometry import Image, Window, tile_launch
from ..tile.source import runs_by_tap
from ..tile.torch_convolution import convolve


def infer(attributes: SampleConv2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """As a convolution of the spread image."""
    x, w = inputs
    (r, s), groups = attributes.kernel, attributes.groups
    fits = x.rank == 4 and w.rank == 3 and groups > 0 and x.shape[1] % groups == 0
    if not fits or w.shape[2] != r * s * (x.shape[1] // groups):
        raise InvalidInputError(
            f"sample_conv2d: expected x (N,C,H,W) and w (N or 1, K, {r}*{s}*C/{groups}), got {x} "
            f"and {w}"
        )
    shared = w.shape[0] == 1 and w.batch is None
    if not shared and (w.shape[0], w.batch) != (x.shape[0], x.batch):
        raise InvalidInputError(
            f"sample_conv2d: expected weights for each sample of {x}, or for all, got {w}"
        )
    n, c, h, width = x.shape
    (up, across), (k, per_group) = attributes.spread, (w.shape[1], c // groups)
    wide = x.with_(shape=(n, c, (h - 1) * up + 1, (width - 1) * across + 1))
    conv = Conv2d(attributes.stride, attributes.padding, attributes.dilation, groups)
    (y,) = infer_convolution(conv, (wide, TensorSpec((k, per_group, r, s), x.dtype)))
    return (y.with_(layout=Layout.NHWC),)


def reference(attributes: SampleConv2d, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    n, c, h, width = x.shape
    (r, s), (up, across), groups = attributes.kernel, attributes.spread, attributes.groups
    top, bottom, left, right = attributes.padding
    wide = x.new_zeros(n, c, (h - 1) * up + 1, (width - 1) * across + 1)
    wide[:, :, ::up, ::across] = x
    wide = torch.nn.functional.pad(wide, (left, right, top, bottom))
    filters = w.unflatten(2, (r, s, c // groups)).movedim(-1, 2).to(x.dtype)
    banks = filters.expand(n, *filters.shape[1:]).flatten(0, 1)
    y = convolve(
        wide.reshape(1, n * c, *wide.shape[2:]), banks,
        stride=attributes.stride, dilation=attributes.dilation, groups=n * groups,
    )  # fmt: skip
    return y.reshape(n, w.shape[1], *y.shape[2:])


@triton.jit
def seen(top, left, IMAGE: tl.constexpr, SPREAD: tl.constexpr):
    """The pixel of x at a position of the spread image, and whether there is one."""
    there = (top >= 0) & (left >= 0)
    if SPREAD[0] > 1:
        there = there & (top % SPREAD[0] == 0)
        top = top // SPREAD[0]
    if SPREAD[1] > 1:
        there = there & (left % SPREAD[1] == 0)
        left = left // SPREAD[1]
    return top * IMAGE.W + left, there & (top < IMAGE.H) & (left < IMAGE.W)


@triton.jit
def sample_conv_kernel(
    x, w, y, extras, m, IMAGE: tl.constexpr, WINDOW: tl.constexpr, SPREAD: tl.constexpr,
    W_STRIDES: tl.constexpr, W_OFFSET: tl.constexpr, GROUPS: tl.constexpr,
    IS_DEPTHWISE: tl.constexpr, BY_TAP: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # m counts samples; IMAGE.C and WIDTH are the channels of one group.
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    C: tl.constexpr = IMAGE.C
    WIDTH: tl.constexpr = OUTPUT.K // GROUPS
    PIXELS: tl.constexpr = OUTPUT.P * OUTPUT.Q
    TAPS: tl.constexpr = WINDOW.R * WINDOW.S
    row_tiles: tl.constexpr = (PIXELS + BLOCK_M - 1) // BLOCK_M
    group_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = row_tiles * GROUPS * group_tiles
    program = tl.program_id(0)
    sample = program // tiles
    row_tile, column_tile = space.tile_index(
        program % tiles, row_tiles, GROUPS * group_tiles, TILE.GROUP_M
    )
    group = column_tile // group_tiles
    within = column_tile % group_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = within < WIDTH
    columns = group * WIDTH + within
    pixels = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = pixels < PIXELS
    if TILE.wide:
        sample = sample.to(tl.int64)
        columns = columns.to(tl.int64)
    # Rows that do not exist get a position that no tap brings inside.
    top = tl.where(live, pixels // OUTPUT.Q * WINDOW.stride_h - WINDOW.top, -1048576)
    left = pixels % OUTPUT.Q * WINDOW.stride_w - WINDOW.left
    image = x + IMAGE.offset + sample * (IMAGE.H * IMAGE.W * IMAGE.row_stride) + group * C
    bank = w + W_OFFSET + sample * W_STRIDES[0] + columns * W_STRIDES[1]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if IS_DEPTHWISE:
        for tap in range(TAPS):
            r = tap // WINDOW.S * WINDOW.dilation_h
            s = tap % WINDOW.S * WINDOW.dilation_w
            pixel, there = seen(top + r, left + s, IMAGE, SPREAD)
            address = image + (pixel * IMAGE.row_stride)[:, None] + columns[None, :]
            value = tl.load(address, mask=there[:, None] & column_mask[None, :], other=0.0)
            weight = tl.load(bank + tap, mask=column_mask, other=0.0)
            acc += value.to(tl.float32) * weight.to(tl.float32)[None, :]
    else:
        depth = tl.arange(0, BLOCK_K)
        DEPTH: tl.constexpr = C if BY_TAP else TAPS * C
        blocks: tl.constexpr = (DEPTH + BLOCK_K - 1) // BLOCK_K
        for step in range(TAPS * blocks if BY_TAP else blocks):
            tap = step // blocks
            start = step % blocks * BLOCK_K
            index = start + depth
            inside = index < DEPTH
            if BY_TAP:
                r = tap // WINDOW.S * WINDOW.dilation_h
                s = tap % WINDOW.S * WINDOW.dilation_w
                pixel, there = seen(top + r, left + s, IMAGE, SPREAD)
                address = image + (pixel * IMAGE.row_stride)[:, None] + index[None, :]
                mask = there[:, None] & inside[None, :]
            else:
                r = index // C // WINDOW.S * WINDOW.dilation_h
                s = index // C % WINDOW.S * WINDOW.dilation_w
                pixel, there = seen(
                    top[:, None] + r[None, :], left[:, None] + s[None, :], IMAGE, SPREAD
                )
                address = image + pixel * IMAGE.row_stride + (index % C)[None, :]
                mask = there & inside[None, :]
            a = tl.load(address, mask=mask, other=0.0)
            terms = bank[:, None] + (tap * DEPTH + index)[None, :]
            b = tl.load(terms, mask=column_mask[:, None] & inside[None, :], other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=TILE.precision)
    put(acc, y, sample * PIXELS + pixels, live, columns, column_mask, extras, OUTPUT)


def is_depthwise(problem: Problem) -> bool:
    """Whether every group has one channel in and one out."""
    attributes = problem.attributes.expect(SampleConv2d)
    return attributes.groups == problem.inputs[0].shape[1] == problem.output.shape[1] > 1


def size_of(problem: Problem) -> choice.Size:
    """The product of one group of one sample, and how many of them there are."""
    attributes, x = problem.attributes.expect(SampleConv2d), problem.inputs[0]
    n, k, p, q = problem.output.shape
    groups, taps = attributes.groups, attributes.kernel[0] * attributes.kernel[1]
    c = x.shape[1] // groups
    by_tap = runs_by_tap(c, taps)
    depth = c if by_tap else c * taps
    return choice.Size(
        p * q, k // groups, depth, x.spec.dtype, n * groups, gathers=not by_tap, taps=taps
    )


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes = problem.attributes.expect(SampleConv2d)
    (x, w), out = problem.inputs, problem.output
    depthwise, size = is_depthwise(problem), size_of(problem)
    groups = 1 if depthwise else attributes.groups
    n, _, p, q = out.shape
    constexprs = {
        "IMAGE": Image.of(x)._replace(C=x.shape[1] // groups),
        "WINDOW": Window.of(attributes.kernel, attributes), "SPREAD": attributes.spread,
        "W_STRIDES": (0 if w.shape[0] == 1 else w.strides[0], w.strides[1]),
        "W_OFFSET": w.offset, "GROUPS": groups, "IS_DEPTHWISE": depthwise,
        "BY_TAP": not size.gathers,
    }  # fmt: skip
    modelled: dict[str, Any] = {}
    if not depthwise:
        modelled = {
            "precision": choice.dot_precision(problem, size.terms),
            "l2_bytes": choice.l2_bytes(problem, tile, size.terms),
            "steps": size.steps(tile["BLOCK_K"]),
            "step_instructions": choice.step_instructions(tile, size.dtype, size.taps),
        }
    launch = tile_launch(
        problem, tile, sample_conv_kernel,
        constexprs=constexprs,
        rows=n,
        block_rows=1,
        groups=groups,
        programs=-(-(p * q) // tile["BLOCK_M"]),
        **modelled,
    )  # fmt: skip
    return (launch,)


def _configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Depthwise 1024 results per program."""
    for block_n in (16, 32, 64, 128):
        yield config(4, 1, BLOCK_M=1024 // block_n, BLOCK_N=block_n)


def _default(problem: Problem, target: Target) -> Config:
    """Depthwise 32 channels, or a tile as large as the interpreter likes."""
    _, k, p, q = problem.output.shape
    if target.name == "interpreter":
        return config(1, 1, BLOCK_M=power_of_two(p * q), BLOCK_N=min(256, power_of_two(k)))
    return config(4, 1, BLOCK_M=32, BLOCK_N=32)


@counted
def cost(problem: Problem) -> int:
    """The zeros of a spread image, which are not multiplied, count too."""
    return 2 * problem.output.spec.numel * problem.inputs[1].shape[2]


OP = Op(
    "sample_conv2d", SampleConv2d, infer, reference, launches, cost,
    **either(
        is_depthwise, {"configs": _configs, "default": _default}, choice.of_product(size_of)
    ),
    factors=(0, 1),
)  # fmt: skip
