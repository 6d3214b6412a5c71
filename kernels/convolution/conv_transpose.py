"""conv_transpose2d and conv_transpose3d, the adjoints of convolution:

    y[n,k,p,q] = sum_{i,j,r,s,c} x[n,c,i,j] w[c,k,r,s] over all i·sh − ph + r·dh = p and
                                                           j·sw − pw + s·dw = q

x: (N, C, H, W) channels innermost in memory; w: (C, K/G, R, S), a constant packed as
(K, R·S·C/G); y: (N, K, P, Q) channels innermost; volumes likewise. fp32 accumulation. The bias is
an epilogue.

Nothing is scattered: outputs gather. Along one dimension the outputs p = s·j + f of one phase f,
0 <= f < s, need the taps with r·d = f + pad (mod s). With g = gcd(d, s) there are none unless g
divides f + pad; else they are r0, r0 + s/g, ..., and tap number u reads the input at
j + (f + pad − r0·d)/s − u·d/g. Each phase is therefore an implicit matrix product of its own with a
part of the taps, over the same packed weights; phases without taps still write their epilogue. One
launch computes all phases: they are further columns of the grid, so that programs that read the
same pixels run together. The number of taps is a run-time value where phases differ in it.

With few channels per group the loop runs over (tap, channel) pairs, as in `conv2d.py`; with one
channel per group (bilinear upsampling as a layer) there is no matrix product at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import triton
import triton.language as tl

from ..contract.aten import Arguments, Builder
from ..contract.op import Config, Launch, Op, Problem, Target, config, counted, either, power_of_two
from ..movement.arguments import attributes_of, with_bias
from ..tile import choice, space
from ..tile.finish import put
from ..tile.geometry import Matrix, tile_launch
from ..tile.source import runs_by_tap
from .conv_phases import ConvTranspose2d, ConvTranspose3d, axes, infer, pack, reference


@triton.jit
def first_tap(phase, AXIS: tl.constexpr):
    """(first tap, number of taps, input position of that tap less j) of a phase's outputs."""
    EVERY: tl.constexpr = AXIS.stride // AXIS.shared
    shifted = phase + AXIS.padding
    first = shifted // AXIS.shared * AXIS.inverse % EVERY
    has_taps = (shifted % AXIS.shared == 0) & (first < AXIS.taps)
    count = tl.where(has_taps, (AXIS.taps - first + EVERY - 1) // EVERY, 0)
    # Exact where there are taps, so that it does not matter how negative numbers are rounded.
    return first, count, (shifted - first * AXIS.dilation) // AXIS.stride


@triton.jit
def reach(
    row_mask, front, top, left, number, count_h, count_w, first_d, first_h, first_w,
    DEPTH: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Of a phase's taps, counted along the width first: whether they read inside, how many
    pixels before the first tap, and which taps of the filter they are."""
    # Filters one tap deep need no division: it cost a register too many in the loop.
    d = 0 if DEPTH.taps == 1 else number // (count_h * count_w)
    h = number // count_w if DEPTH.taps == 1 else number // count_w % count_h
    v = number % count_w
    back_d = d * (DEPTH.dilation // DEPTH.shared)
    back_h = h * (HEIGHT.dilation // HEIGHT.shared)
    back_w = v * (WIDTH.dilation // WIDTH.shared)
    inside = row_mask
    if HEIGHT.is_open:
        # Rows past the end are where no tap comes inside: they need no mask of their own.
        inside = (top - back_h).to(tl.uint32, bitcast=True) < HEIGHT.size
    if WIDTH.is_open:
        inside = inside & ((left - back_w).to(tl.uint32, bitcast=True) < WIDTH.size)
    if DEPTH.is_open:
        inside = inside & ((front - back_d).to(tl.uint32, bitcast=True) < DEPTH.size)
    if WIDE:
        back_d = back_d.to(tl.int64)
    back = (back_d * HEIGHT.size + back_h) * WIDTH.size + back_w
    tap = (first_d + d * (DEPTH.stride // DEPTH.shared)) * HEIGHT.taps
    tap = (tap + first_h + h * (HEIGHT.stride // HEIGHT.shared)) * WIDTH.taps
    return inside, back, tap + first_w + v * (WIDTH.stride // WIDTH.shared)


@triton.jit
def conv_transpose_kernel(
    x, w, y, extras, m, X: tl.constexpr, DEPTH: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, GROUPS: tl.constexpr, METHOD: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    # C and K count the channels of one group; depthwise there is one group of all channels.
    C: tl.constexpr = X.C
    K: tl.constexpr = OUTPUT.K // GROUPS
    # m counts the outputs of one phase: N * ceil(outputs / stride) of every dimension.
    PHASES: tl.constexpr = DEPTH.stride * HEIGHT.stride * WIDTH.stride
    PLANES: tl.constexpr = (DEPTH.outputs + DEPTH.stride - 1) // DEPTH.stride
    LINES: tl.constexpr = (HEIGHT.outputs + HEIGHT.stride - 1) // HEIGHT.stride
    POINTS: tl.constexpr = (WIDTH.outputs + WIDTH.stride - 1) // WIDTH.stride
    group_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = space.tile_index(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), PHASES * GROUPS * group_tiles, TILE.GROUP_M
    )
    phase = column_tile % PHASES
    group = column_tile // PHASES // group_tiles
    within = column_tile // PHASES % group_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = group * K + within
    column_mask = within < K
    phase_d = phase // (HEIGHT.stride * WIDTH.stride)
    phase_h = phase // WIDTH.stride % HEIGHT.stride
    phase_w = phase % WIDTH.stride
    first_d, count_d, base_d = first_tap(phase_d, DEPTH)
    first_h, count_h, base_h = first_tap(phase_h, HEIGHT)
    first_w, count_w, base_w = first_tap(phase_w, WIDTH)
    count_d = count_d if DEPTH.tap_count is None else DEPTH.tap_count
    count_h = count_h if HEIGHT.tap_count is None else HEIGHT.tap_count
    count_w = count_w if WIDTH.tap_count is None else WIDTH.tap_count
    taps = count_d * count_h * count_w
    # Loads are prepared for before it is known whether the loop is entered at all, and after a
    # division by zero the compiler may assume anything: it took phases without taps for others.
    count_h = tl.maximum(count_h, 1) if HEIGHT.tap_count is None else count_h
    count_w = tl.maximum(count_w, 1) if WIDTH.tap_count is None else count_w
    index = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = index < m
    if TILE.wide:
        index = index.to(tl.int64)
    image = index // (PLANES * LINES * POINTS)
    front = (index // (LINES * POINTS) % PLANES).to(tl.int32)
    top = (index // POINTS % LINES).to(tl.int32)
    left = (index % POINTS).to(tl.int32)
    o = front * DEPTH.stride + phase_d
    p = top * HEIGHT.stride + phase_h
    q = left * WIDTH.stride + phase_w
    row_mask = row_mask & (o < DEPTH.outputs) & (p < HEIGHT.outputs) & (q < WIDTH.outputs)
    rows = ((image * DEPTH.outputs + o) * HEIGHT.outputs + p) * WIDTH.outputs + q
    front += base_d
    top += base_h
    left += base_w
    corner = ((image * DEPTH.size + front) * HEIGHT.size + top) * WIDTH.size + left
    # Rows past the end get a position that no tap brings inside: one mask serves both.
    top = tl.where(row_mask, top, -1048576)
    depth = tl.arange(0, BLOCK_K)[None, :]
    x_corner = x + X.offset + group * C + (corner * X.row_stride)[:, None]
    w_tile = w + (columns * (DEPTH.taps * HEIGHT.taps * WIDTH.taps * C))[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if METHOD == "channels":
        blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
        for step in range(taps * blocks):
            number = step // blocks
            channels = step % blocks * BLOCK_K + depth
            inside, back, tap = reach(
                row_mask, front, top, left, number, count_h, count_w, first_d, first_h, first_w,
                DEPTH, HEIGHT, WIDTH, TILE.wide,
            )  # fmt: skip
            a_mask = inside[:, None]
            b_mask = column_mask[:, None]
            if C % BLOCK_K != 0:
                a_mask = a_mask & (channels < C)
                b_mask = b_mask & (channels < C)
            a = tl.load(x_corner + (channels - back * X.row_stride), mask=a_mask, other=0.0)
            b = tl.load(w_tile + (tap * C + channels), mask=b_mask, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=TILE.precision)
    elif METHOD == "pairs":
        for start in range(0, taps * C, BLOCK_K):
            pair = start + depth
            live = pair < taps * C
            number = pair // C
            inside, back, tap = reach(
                row_mask[:, None], front[:, None], top[:, None], left[:, None],
                number, count_h, count_w, first_d, first_h, first_w,
                DEPTH, HEIGHT, WIDTH, TILE.wide,
            )  # fmt: skip
            offset = pair % C - back * X.row_stride
            a = tl.load(x_corner + offset, mask=inside & live, other=0.0)
            b_mask = column_mask[:, None] & live
            b = tl.load(w_tile + (tap * C + pair % C), mask=b_mask, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=TILE.precision)
    else:
        x_tile = x_corner + (columns // (K // C))[None, :]
        for number in range(taps):
            inside, back, tap = reach(
                row_mask, front, top, left, number, count_h, count_w, first_d, first_h, first_w,
                DEPTH, HEIGHT, WIDTH, TILE.wide,
            )  # fmt: skip
            mask = inside[:, None] & column_mask[None, :]
            value = tl.load(x_tile - back * X.row_stride, mask=mask, other=0.0).to(tl.float32)
            weight = tl.load(w + tap * K + columns, mask=column_mask, other=0.0)
            acc += value * weight[None, :]
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def _phases(problem: Problem) -> int:
    return math.prod(problem.attributes.expect(ConvTranspose2d).stride)


def method(problem: Problem) -> str:
    """Over what a step of the kernel's loop goes: a tap's channels, (tap, channel) pairs, or
    without a matrix product one tap ("depthwise")."""
    per_group, groups = _per_group(problem), problem.attributes.expect(ConvTranspose2d).groups
    if per_group == 1 < groups:
        return "depthwise"
    return "channels" if runs_by_tap(per_group, _most_taps(problem)) else "pairs"


def _per_group(problem: Problem) -> int:
    return problem.inputs[0].shape[1] // problem.attributes.expect(ConvTranspose2d).groups


def _most_taps(problem: Problem) -> int:
    return math.prod(axis.most for axis in axes(problem))


def _size(problem: Problem) -> choice.Size:
    """The matrix product of one phase; the phases are further groups."""
    groups, out = problem.attributes.expect(ConvTranspose2d).groups, problem.output
    rows = out.shape[0] * math.prod(axis.phase_outputs for axis in axes(problem))
    gathers = method(problem) == "pairs"
    taps = _most_taps(problem)
    depth = _per_group(problem) * (taps if gathers else 1)
    dtype = problem.inputs[0].spec.dtype
    return choice.Size(
        rows, out.shape[1] // groups, depth, dtype, groups * _phases(problem), gathers, taps
    )


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    x, size, chosen = problem.inputs[0], _size(problem), method(problem)
    groups = problem.attributes.expect(ConvTranspose2d).groups
    depth, height, width = axes(problem)
    channels, blocks = _per_group(problem), dict(tile.blocks)
    steps = -(-size.depth // blocks.get("BLOCK_K", 1)) * (1 if size.gathers else size.taps)
    moved = steps * blocks.get("BLOCK_K", 1) * (blocks["BLOCK_M"] + blocks["BLOCK_N"])
    instructions, issued = 0, 0
    if chosen == "depthwise":
        channels, groups = x.shape[1], 1
        moved = size.taps * blocks["BLOCK_M"] * blocks["BLOCK_N"]
        instructions = 3 * moved
        tile = config(tile.num_warps, tile.num_stages, BLOCK_K=1, GROUP_M=8, **blocks)
    else:
        issued = choice.step_instructions(tile, size.dtype, size.taps)
    launch = tile_launch(
        problem, tile, conv_transpose_kernel,
        constexprs={
            "X": Matrix(channels, x.pitch, x.offset), "DEPTH": depth,
            "HEIGHT": height, "WIDTH": width, "GROUPS": groups, "METHOD": chosen,
        },
        precision=choice.dot_precision(problem, channels * size.taps),
        rows=size.rows,
        groups=groups,
        programs=_phases(problem),
        l2_bytes=moved * x.spec.dtype.itemsize,
        instructions=instructions,
        step_instructions=issued,
    )  # fmt: skip
    return (launch,)


def _configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Depthwise 512 to 2048 results per program."""
    for elements in (512, 1024, 2048):
        for block_n in (32, 64, 128):
            yield config(4, 1, BLOCK_M=elements // block_n, BLOCK_N=block_n)


def _default(problem: Problem, target: Target) -> Config:
    """Depthwise 1024 results, or as many as the interpreter likes."""
    k = problem.output.shape[1]
    if target.name == "interpreter":
        block_n = min(256, power_of_two(k))
        block_m = min(power_of_two(_size(problem).rows), (1 << 20) // block_n)
        return config(1, 1, BLOCK_M=block_m, BLOCK_N=block_n)
    block_n = 64 if k % 64 == 0 or k > 256 else 32
    return config(4, 1, BLOCK_M=1024 // block_n, BLOCK_N=block_n)


@counted
def cost(problem: Problem) -> int:
    """Every input pixel meets every tap."""
    per_input = math.prod(problem.inputs[1].shape[1:])
    return 2 * problem.inputs[0].spec.numel * per_input


def _op(name: str, make: type[ConvTranspose2d], *calls: str) -> Op:
    """calls: those of aten that become it, of sequences as of images of one row."""

    def capture(g: Builder, a: Arguments) -> Any:
        return with_bias(g, name, a, attributes_of(g, a, make))

    return Op(
        name, make, partial(infer, name), reference, launches, cost,
        **either(
            lambda problem: method(problem) == "depthwise",
            {"configs": _configs, "default": _default}, choice.of_product(_size),
        ),
        aten={f"aten.{call}": capture for call in calls}, batched="convolution",
        packs=lambda attributes: {1: pack},
    )  # fmt: skip


OPS = (
    _op("conv_transpose2d", ConvTranspose2d, "conv_transpose1d.default", "conv_transpose2d.input"),
    _op("conv_transpose3d", ConvTranspose3d, "conv_transpose3d.input"),
)
