"""stem: the first convolution of a network, reading the user's image as it lies.

y[n,k,p,q] = sum_{c,r,s} v[n, c, p·sh − top + r·dh, q·sw − left + s·dw] w[k,c,r,s]
v[n,c,h,w] = (x[n,c,h,w] − mean[c]) · scale[c], rounded to w's dtype; zero outside the image

x: (N, C, H, W) in any layout and float dtype, as a rule dense fp32; w: (K, C, R, S), a constant
packed as (K, C·R·S); y: (N, K, P, Q) NHWC in w's dtype. fp32 accumulation. The bias is an epilogue.

Cast, change of layout and normalisation cost no kernel and no tensor of their own. An image has too
few channels for rows of the product to be copied whole, so elements are loaded one by one; but a
warp loads 32 neighbouring pixels of one row at a time, and a thread owns all terms of its pixels,
whose filter taps are constants in its code. 3x3 over 3 channels, 128x64, half precision on sm_90:
496 instructions, where the convolution of an NHWC image has 896 for a tile of half the size. Its
loop is unrolled for that, which the tile engine's is not: hence a kernel of its own, with the
engine's space and finish.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import cost_model, op, programmatic_launch
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, TensorSpec
from ..tile import choice, conv_geometry
from ..tile.conv_geometry import Conv2d
from ..tile.finish import put
from ..tile.geometry import Window, tile_launch
from ..tile.source import inside
from ..tile.space import of_pixels, pixel_index
from .stem_input import StridedImage, check_normalisation, normalised, side_by_side

MOST_TERMS = {torch.float16: 160, torch.bfloat16: 160, torch.float32: 48}
"""Terms of one sum, all unrolled, that fit registers. 7x7 over 3 channels takes 146 registers on
sm_90 and 213 on sm_80 (Triton 3.6); in fp32, whose products are three, 5x5 takes 255 and spills."""
BLOCK = 32
"""Terms that are multiplied at a time; rows of the packed weight start at multiples of it."""


@dataclass(frozen=True)
class Stem(Attributes):
    """conv: the convolution, without groups; mean, scale: per channel, or empty."""

    conv: Conv2d = field(default_factory=Conv2d)
    mean: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()


def infer(attributes: Stem, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The convolution's shape, in the weight's dtype."""
    x, w = inputs
    (y,) = conv_geometry.infer(attributes.conv, (x, w))
    if attributes.conv.groups != 1:
        raise InvalidInputError(f"stem: expected 1 group, got {attributes.conv.groups}")
    check_normalisation("stem", attributes.mean, attributes.scale, x.shape[1])
    return (y.with_(dtype=w.dtype),)


def reference(attributes: Stem, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    value = normalised(x, attributes.mean, attributes.scale, w.dtype)
    return conv_geometry.reference(attributes.conv, value, w)


def terms(w: TensorSpec) -> int:
    """Products in one sum."""
    return w.numel // w.shape[0]


def _pitch(w: TensorSpec) -> int:
    return -(-terms(w) // BLOCK) * BLOCK


def pack(attributes: Stem, w: torch.Tensor) -> torch.Tensor:
    """(K, C, R, S) -> (K, C·R·S), rows filled up with zeros."""
    flat = w.flatten(1)
    return F.pad(flat, (0, -flat.shape[1] % BLOCK)).contiguous()


@triton.jit
def stem_kernel(
    x, w, y, extras, m, IMAGE: tl.constexpr, WINDOW: tl.constexpr, SPACE: tl.constexpr,
    OUTPUT: tl.constexpr, TERMS: tl.constexpr, W_PITCH: tl.constexpr, MEAN: tl.constexpr,
    SCALE: tl.constexpr, LEVELS: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    taps: tl.constexpr = WINDOW.R * WINDOW.S
    column_tiles: tl.constexpr = (OUTPUT.K + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    first = program // column_tiles * BLOCK_M
    image, p, q, row_mask = SPACE.place(first, m, SPACE, TILE)
    columns = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < OUTPUT.K
    top = p * WINDOW.stride_h - WINDOW.top
    left = q * WINDOW.stride_w - WINDOW.left
    corner = x + IMAGE.offset + (image * IMAGE.sample + top * IMAGE.row + left * IMAGE.column)
    # Rows past the end get a position that no tap brings inside the image: one mask serves both.
    top = tl.where(row_mask, top, -1048576)
    w_tile = w + (columns * W_PITCH)[:, None] + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    programmatic_launch.grid_dependency_wait(PDL)
    for start in tl.static_range(0, TERMS, BLOCK_K):
        values = ()
        for term in tl.static_range(start, start + BLOCK_K):
            if term < TERMS:
                channel = term // taps
                r = term // WINDOW.S % WINDOW.R * WINDOW.dilation_h
                s = term % WINDOW.S * WINDOW.dilation_w
                there = inside(top + r, left + s, IMAGE)
                # Neighbouring threads load neighbouring pixels.
                offset = channel * IMAGE.channel + r * IMAGE.row + s * IMAGE.column
                value = tl.load(corner + offset, mask=there, other=0.0).to(tl.float32)
                if MEAN is not None:
                    # The border is zero after the normalisation, not before it.
                    value = (value - MEAN[term // taps]) * SCALE[term // taps]
                    value = tl.where(there, value, 0.0)
            else:
                value = tl.zeros((BLOCK_M,), tl.float32)
            values = values + (value,)
        a = side_by_side(values, BLOCK_K, LEVELS).to(w.dtype.element_ty)
        b = tl.load(w_tile + start, mask=column_mask[:, None], other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=TILE.precision)
    rows = pixel_index(first, image, p, q, SPACE, TILE)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes = problem.attributes.expect(Stem)
    w = problem.inputs[1].spec
    launch = tile_launch(
        problem, tile, stem_kernel,
        constexprs={
            "IMAGE": StridedImage.of(problem.inputs[0]),
            "WINDOW": Window.of(w.shape[2:], attributes.conv),
            "SPACE": of_pixels(problem.output.spec, tile["BLOCK_M"]),
            "TERMS": terms(w), "W_PITCH": _pitch(w),
            "MEAN": attributes.mean or None, "SCALE": attributes.scale or None,
            "LEVELS": tile["BLOCK_K"].bit_length() - 1, "PDL": False,
        },
        precision=choice.dot_precision(problem, _pitch(w)),
        l2_bytes=_l2_bytes(problem, tile),
        instructions=_instructions(problem, tile),
        steps=-(-terms(w) // tile["BLOCK_K"]),
    )  # fmt: skip
    return (launch,)


def _l2_bytes(problem: Problem, tile: Config) -> int:
    """The part of the image under one tile, once (taps read it again from the first-level cache),
    the weights, and what the epilogue reads in full."""
    attributes = problem.attributes.expect(Stem)
    x, w, out = problem.inputs[0].spec, problem.inputs[1].spec, problem.output
    _, c, r, s = w.shape
    conv = attributes.conv
    pixels = min(tile["BLOCK_M"], out.shape[3])
    lines = -(-tile["BLOCK_M"] // out.shape[3])
    height = (lines - 1) * conv.stride[0] + (r - 1) * conv.dilation[0] + 1
    width = (pixels - 1) * conv.stride[1] + (s - 1) * conv.dilation[1] + 1
    full = sum(operand.spec.numel == out.spec.numel for operand in problem.operands)
    halves = tile["BLOCK_N"] * (_pitch(w) + full * tile["BLOCK_M"])
    return c * height * width * x.dtype.itemsize + halves * w.dtype.itemsize


def _instructions(problem: Problem, tile: Config) -> int:
    """Of one program, as counted in sm_90 code for half precision and one pixel per thread: 5 for
    each term, 4 more where it is normalised, 5 for each output channel and 60 beside; or the time
    of its loads, if that is more.

    A multiprocessor issues four warps' instructions per cycle but reads one 128-byte line of its
    first-level cache, and a warp's load with stride s touches s of them.
    """
    attributes = problem.attributes.expect(Stem)
    x, count = problem.inputs[0].spec, terms(problem.inputs[1].spec)
    lines = max(1.0, attributes.conv.stride[1] * x.dtype.itemsize / 4)
    issued = (9 if attributes.mean else 5) * count + 5 * tile["BLOCK_N"] + 60
    return int(tile["BLOCK_M"] * max(issued, 4 * lines * count))


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """One pixel per thread; fp32 takes twice the registers per element, and three products each."""
    half = problem.output.spec.dtype is not torch.float32
    for warps in (4, 2, 1):
        for block_n in (16, 32, 64) if half else (16, 32):
            tile = op.config(warps, 1, BLOCK_M=32 * warps, BLOCK_N=block_n, BLOCK_K=BLOCK)
            if legal(problem, tile, target) is None:
                yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return choice.legal_tile(problem.output.spec.dtype, tile, target)


def crowded(problem: Problem, tile: Config, target: Target) -> str | None:
    """For a 3x3 filter over 3 channels ptxas stops at 80 registers of 2 warps with 64 columns, and
    keeps 8 bytes on the stack."""
    single_step = terms(problem.inputs[1].spec) <= BLOCK
    wide = (tile.num_warps, tile["BLOCK_N"]) == (2, 64)
    if target.capability >= 90 and single_step and wide:
        return f"64 columns and 2 warps spill on {target.name}"
    return None


def default(problem: Problem, target: Target) -> Config:
    """128 pixels; fewer where that leaves multiprocessors idle."""
    n, k, p, q = problem.output.shape
    half = problem.output.spec.dtype is not torch.float32
    if target.name == "interpreter":
        block_m = max(16, min(4096, op.power_of_two(n * p * q)))
        block_n = max(16, min(1024, (1 << 20) // block_m, op.power_of_two(k)))
        return op.config(1, 1, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=BLOCK)
    block_n = min(64 if half else 32, max(16, op.power_of_two(k)))
    tiles = -(-k // block_n) * n * p * q // 128
    enough = cost_model.MULTIPROCESSORS
    warps = 4 if tiles >= enough else 2 if 2 * tiles >= enough else 1
    tile = op.config(warps, 1, BLOCK_M=32 * warps, BLOCK_N=block_n, BLOCK_K=BLOCK)
    if crowded(problem, tile, target) is None:
        return tile
    return op.config(4, 1, BLOCK_M=128, BLOCK_N=block_n, BLOCK_K=BLOCK)


@op.counted
def cost(problem: Problem) -> int:
    return 2 * problem.output.spec.numel * terms(problem.inputs[1].spec)


OP = Op(
    "stem", Stem, infer, reference, launches, cost, configs, default, legal, crowded,
    packs=lambda attributes: {1: pack}, images=False,
)  # fmt: skip
