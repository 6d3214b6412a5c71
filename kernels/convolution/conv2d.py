"""conv2d: y[n,k,p,q] = sum_{r,s,c} x[n, c, p·sh − top + r·dh, q·sw − left + s·dw] w[k,c,r,s].

x: (N, C, H, W) NHWC in memory; w: (K, C/G, R, S), a constant packed as (K, R·S·C/G);
y: (N, K, P, Q) NHWC. fp32 accumulation. The bias is an epilogue.

Implicit GEMM (Chetlur et al., cuDNN, 2014): the rows of the product are output pixels, its inner
dimension the filter taps and channels; the input matrix is never built. Five algorithms:
- `gemm`: 1x1, stride 1, no padding: a plain matrix product (`product.py`);
- `depthwise`: one input channel per group: no matrix product at all (`depthwise.py`);
- `grouped`: few channels per group: several groups in one product (`grouped.py`);
- `rows`: 4 or 8 channels and no padding at the sides: whole filter rows at a time (`conv_rows.py`);
- `implicit`: everything else, one loop flattened over taps and channel blocks, which is what
  Triton's pipeliner turns into asynchronous copies. With few channels per group the flattened loop
  runs over (tap, channel) pairs instead of whole channel blocks. Where output tiles are few (batch
  1), SPLIT programs share the sums of each (`split.py`). From sm_90 on its configurations may also
  read boxes of pixels through descriptors (`conv_tma.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..contract import programmatic_launch
from ..contract.op import Config, Cost, Launch, Op, Problem, W, X, Y, tensor_bytes
from ..contract.targets import Target
from ..movement.arguments import convolution
from ..products import gemm, product
from ..tile import choice, residual
from ..tile import split_k as split_k
from ..tile.conv_geometry import Conv2d, infer, reference
from . import conv_rows, conv_tma, depthwise, grouped


def pack(attributes: Conv2d, w: torch.Tensor) -> torch.Tensor:
    """(K, C/G, R, S) -> (K, R·S·C/G), or depthwise's own order."""
    if w.shape[1] == 1 and attributes.groups > 1:
        return depthwise.pack(w)
    return w.permute(0, 2, 3, 1).reshape(w.shape[0], -1).contiguous()


def _pack_for_algorithm(attributes: Conv2d, w: torch.Tensor) -> torch.Tensor:
    """As `pack`, or in runs where whole filter rows are read."""
    if conv_rows.applies(attributes, tuple(w.shape)):
        return conv_rows.pack(w)
    if grouped.applies(attributes, tuple(w.shape)):
        return grouped.pack(attributes.groups, w)
    return pack(attributes, w)


@triton.jit
def conv2d_kernel(
    x,
    w,
    y,
    parts,
    tickets,
    extras,
    m,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    GROUPS: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    EPILOGUE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BY_TAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
    PDL: tl.constexpr,
):
    # C and K count the channels of one group. Only sums by tap are split.
    group_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = gemm.tile_index(
        tl.program_id(0) // SPLIT, tl.cdiv(m, BLOCK_M), GROUPS * group_tiles, GROUP_M
    )
    group = column_tile // group_tiles
    within = column_tile % group_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = group * K + within
    column_mask = within < K
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    image = rows // (P * Q)
    top = (rows // Q % P).to(tl.int32) * STRIDE_H - TOP
    left = (rows % Q).to(tl.int32) * STRIDE_W - LEFT
    corner = (image * H + top) * WIDTH + left
    # Rows past the end get a position that no tap brings inside the image: one mask serves both.
    top = tl.where(row_mask, top, -1048576)
    depth = tl.arange(0, BLOCK_K)
    x_group = x + X_OFFSET + group * C
    x_corner = (corner * X_PITCH)[:, None]
    w_tile = w + (columns * (R * S * C))[:, None] + depth[None, :]
    split = tl.program_id(0) % SPLIT
    programmatic_launch.wait(PDL)
    acc = residual.begin(
        rows, columns, row_mask, column_mask, extras, RESIDUAL, RESIDUAL_FIRST, BLOCK_M, BLOCK_N
    )
    if BY_TAP:
        blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
        x_tile = x_corner + depth[None, :]
        # A number that ptxas does not know: it would unroll loops of 18 steps, and 128x256 over 128
        # channels by 8 warps takes 255 registers then and spills 40 bytes, instead of 196.
        first, stop = 0, tl.where(m > 0, R * S * blocks, 0)
        if SPLIT > 1:
            first, stop = gemm.share_of(split, R * S * blocks, SPLIT)
        for step in range(first, stop):
            tap = step // blocks
            start = step % blocks * BLOCK_K
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            inside = ((top + r).to(tl.uint32, bitcast=True) < H) & (
                (left + s).to(tl.uint32, bitcast=True) < WIDTH
            )
            x_step = x_group + ((r * WIDTH + s) * X_PITCH + start)
            w_step = w_tile + (tap * C + start)
            channels = start + depth
            a_mask = inside[:, None]
            b_mask = column_mask[:, None]
            if C % BLOCK_K != 0:
                a_mask = a_mask & (channels < C)[None, :]
                b_mask = b_mask & (channels < C)[None, :]
            a = tl.load(x_step + x_tile, mask=a_mask, other=0.0)
            b = tl.load(w_step, mask=b_mask, other=0.0)
            if PROLOGUE is not None:
                # The border is zero after the prologue, not before it.
                value = PROLOGUE(a.to(tl.float32), rows, channels, row_mask, channels < C, extras)
                live = inside[:, None] & (channels < C)[None, :]
                a = tl.where(live, value, 0.0).to(a.dtype)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        for start in range(0, R * S * C, BLOCK_K):
            index = start + depth
            tap = index // C
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            inside = (
                ((top[:, None] + r[None, :]).to(tl.uint32, bitcast=True) < H)
                & ((left[:, None] + s[None, :]).to(tl.uint32, bitcast=True) < WIDTH)
                & (index < R * S * C)[None, :]
            )
            offset = (r * WIDTH + s) * X_PITCH + index % C
            a = tl.load(x_group + x_corner + offset[None, :], mask=inside, other=0.0)
            b_mask = column_mask[:, None] & (index < R * S * C)[None, :]
            b = tl.load(w_tile + start, mask=b_mask, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    programmatic_launch.release(PDL)
    tile = row_tile * (GROUPS * group_tiles) + column_tile
    gemm.finish_share(
        acc, y, parts, tickets, tile, split, rows, columns, row_mask, column_mask, extras,
        EPILOGUE, Y_PITCH, Y_OFFSET, SPLIT, BLOCK_M, BLOCK_N,
    )  # fmt: skip


def algorithm(problem: Problem) -> str:
    """Which of the five algorithms computes the problem."""
    attributes = problem.attributes
    assert isinstance(attributes, Conv2d)
    _, per_group, r, s = problem.inputs[1].shape
    if per_group == 1 and attributes.groups > 1:
        return "depthwise"
    if conv_rows.applies(attributes, problem.inputs[1].shape):
        return "rows"
    if grouped.applies(attributes, problem.inputs[1].shape):
        return "grouped"
    plain = attributes.stride == (1, 1) and not any(attributes.padding) and attributes.groups == 1
    return "gemm" if plain and r == s == 1 else "implicit"


def runs_by_tap(channels: int, taps: int) -> bool:
    """Whether a block of one tap's channels fills the inner dimension of a matrix product.

    A single tap with few channels is already one short block.
    """
    return channels >= 16 or taps == 1


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the algorithm's kernel."""
    chosen = algorithm(problem)
    attributes = problem.attributes
    assert isinstance(attributes, Conv2d)
    if chosen == "gemm":
        return (product.launch(problem, tile, target),)
    if chosen == "depthwise":
        return (depthwise.launch(problem, tile),)
    if chosen == "rows":
        return (conv_rows.launch(problem, tile),)
    if chosen == "grouped":
        return (grouped.launch(problem, tile),)
    if conv_tma.is_one(tile):
        return (conv_tma.launch(problem, tile),)
    x, out = problem.inputs[0], problem.output
    _, _, h, width = x.shape
    n, k, p, q = out.shape
    _, per_group, r, s = problem.inputs[1].shape
    groups = attributes.groups
    size, split = _size(problem), choice.split_of(tile)
    tiles = size.tiles(tile["BLOCK_M"], tile["BLOCK_N"])
    steps = -(-size.steps(tile["BLOCK_K"]) // split)
    launch = Launch(
        kernel=conv2d_kernel,
        pointers={"x": X, "w": W, "y": Y, **split_k.pointers(split)},
        extras=gemm.all_extras(problem),
        rows=n * p * q,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=groups * -(-(k // groups) // tile["BLOCK_N"]) * split,
        constexprs={
            "SPLIT": 1, "PDL": False,
            "H": h, "WIDTH": width, "C": per_group, "K": k // groups, "P": p, "Q": q,
            "R": r, "S": s,
            "STRIDE_H": attributes.stride[0], "STRIDE_W": attributes.stride[1],
            "TOP": attributes.padding[0], "LEFT": attributes.padding[2],
            "DILATION_H": attributes.dilation[0], "DILATION_W": attributes.dilation[1],
            "GROUPS": groups,
            "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
            "PRECISION": choice.dot_precision(problem, per_group * r * s),
            "WIDE": problem.is_wide, "PROLOGUE": gemm.prologue_of(problem),
            "BY_TAP": runs_by_tap(per_group, r * s) or bool(problem.prologue),
            **dict(tile.blocks), **residual.constants(problem, tile),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=choice.l2_bytes(problem, tile, min(per_group * r * s, steps * tile["BLOCK_K"])),
        instructions=_gathering(problem, tile),
        steps=steps,
        step_instructions=0 if size.gathers else choice.step_instructions(tile, size.dtype, r * s),
        combine_bytes=split_k.combine_bytes(split, tile["BLOCK_M"], tile["BLOCK_N"]),
        scratch=split_k.scratch(tiles, split, tile["BLOCK_M"], tile["BLOCK_N"]),
    )  # fmt: skip
    return (launch,)


def _gathering(problem: Problem, tile: Config) -> int:
    """Instructions of one program that loads its input element by element: 23 for each, 16 for each
    result, as counted in sm_90 code for half precision; 0 where blocks of channels are copied."""
    size = _size(problem)
    if not size.gathers:
        return 0
    steps = -(-size.depth // tile["BLOCK_K"])
    return tile["BLOCK_M"] * (23 * steps * tile["BLOCK_K"] + 16 * tile["BLOCK_N"])


def _size(problem: Problem) -> choice.Size:
    if algorithm(problem) == "rows":
        return conv_rows.size(problem)
    attributes = problem.attributes
    assert isinstance(attributes, Conv2d)
    n, k, p, q = problem.output.shape
    _, per_group, r, s = problem.inputs[1].shape
    by_tap = runs_by_tap(per_group, r * s) or bool(problem.prologue)
    depth = per_group if by_tap else per_group * r * s
    dtype = problem.inputs[0].spec.dtype
    groups = attributes.groups
    return choice.Size(
        n * p * q, k // groups, depth, dtype, groups, not by_tap, taps=r * s, splits=by_tap
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    if algorithm(problem) == "depthwise":
        return depthwise.configs(problem, target)
    if algorithm(problem) == "rows":
        return conv_rows.configs(problem, target)
    if algorithm(problem) == "grouped":
        return grouped.configs(problem, target)
    if algorithm(problem) == "gemm":
        return product.configs(problem, target)
    tiles = (*choice.tile_configs(_size(problem), target), *conv_tma.configs(problem, target))
    return itertools.chain(tiles, residual.variants(problem, tiles))


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    if algorithm(problem) == "depthwise":
        return None
    if algorithm(problem) == "grouped":
        return grouped.legal(problem, tile, target)
    if algorithm(problem) == "gemm":
        return product.legal(problem, tile, target)
    if (refused := residual.legal(problem, tile)) is not None:
        return refused
    if conv_tma.is_one(tile):
        return conv_tma.legal(problem, tile, target)
    return choice.legal(_size(problem), tile, target)


def default(problem: Problem, target: Target) -> Config:
    if algorithm(problem) == "depthwise":
        return depthwise.default(problem, target)
    if algorithm(problem) == "rows":
        return conv_rows.default(problem, target)
    if algorithm(problem) == "grouped":
        return grouped.default(problem, target)
    if algorithm(problem) == "gemm":
        return product.default(problem, target)
    return choice.default_tile(_size(problem), target)


def cost(problem: Problem) -> Cost:
    _, per_group, r, s = problem.inputs[1].shape
    read, written = tensor_bytes(problem)
    return Cost(2 * problem.output.spec.numel * per_group * r * s, read, written)


OP = Op(
    name="conv2d",
    attributes=Conv2d,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    aten={
        f"aten.conv{dims}d.{overload}": convolution("conv2d", Conv2d)
        for dims in (1, 2)
        for overload in ("default", "padding")
    },
    batched="convolution",
    packs=lambda attributes: {1: _pack_for_algorithm},
    takes_prologue=True,
)
