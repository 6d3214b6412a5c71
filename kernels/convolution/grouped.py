"""Grouped convolution with few channels per group, an algorithm of conv2d: several groups at once.

y[n,k,p,q] = sum_{r,s,c} x[n, g·Cg + c, p·sh − top + r·dh, q·sw − left + s·dw] w[k,c,r,s], where
g = k // Kg is the output channel's group of Cg input and Kg output channels.

A matrix product over 4 or 8 channels would leave most of a tensor core idle and read its operands
in pieces of 8 bytes. So a block of neighbouring groups, together at most BLOCK channels wide, is
one dense product: the weights are packed (K, R·S·B), B = groups per block · Cg, with zeros where
input and output channel belong to different groups. One loop over the taps, a tile of B channels
in each.

Zero times infinity is NaN: where an input is not finite, the zeros would carry it into the other
groups of its block. Such a tile has NaN in it and is computed again, group by group, with the other
groups' inputs set to zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
import triton
import triton.language as tl

from ..contract import cost_model
from ..contract import epilogue as ep
from ..contract.op import Config, Launch, Problem, W, X, Y, config, operand_refs, power_of_two
from ..contract.targets import Target
from ..tile import choice, space
from ..tile.conv_geometry import Conv2d

BLOCK = 32
"""Channels of a block. With 64 the zeros double the products and 128x64 tiles need 194 registers;
with 16 the weight tiles are too small for 128-bit copies."""


def applies(attributes: Conv2d, weight: tuple[int, ...]) -> bool:
    """Whether several groups fit a block; one channel per group is depthwise."""
    k, per_group = weight[:2]
    groups = attributes.groups
    return per_group > 1 and groups_per_block(groups, per_group, k // groups) > 1


def groups_per_block(groups: int, per_group: int, per_group_out: int) -> int:
    """How many neighbouring groups are multiplied together; 1 where that would be no gain."""
    return max(1, min(groups, BLOCK // max(per_group, per_group_out)))


@triton.jit
def tap_tiles(
    x_tile,
    w_tile,
    top,
    left,
    tap,
    live,
    column_mask,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    S: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    WIDTH_IN: tl.constexpr,
):
    """Input and weight tile of one tap."""
    r = tap // S * DILATION_H
    s = tap % S * DILATION_W
    inside = ((top + r).to(tl.uint32, bitcast=True) < H) & (
        (left + s).to(tl.uint32, bitcast=True) < WIDTH
    )
    a_mask = inside[:, None] & live[None, :]
    a = tl.load(x_tile + (r * WIDTH + s) * X_PITCH, mask=a_mask, other=0.0)
    b_mask = column_mask[:, None] & live[None, :]
    b = tl.load(w_tile + tap * WIDTH_IN, mask=b_mask, other=0.0)
    return a, b


@triton.jit
def grouped_kernel(
    x,
    w,
    y,
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
    PER_GROUP: tl.constexpr,
    PER_GROUP_OUT: tl.constexpr,
    GROUPS_PER_BLOCK: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # Channels of a block, in and out; the last block may have fewer.
    WIDTH_IN: tl.constexpr = GROUPS_PER_BLOCK * PER_GROUP
    WIDTH_OUT: tl.constexpr = GROUPS_PER_BLOCK * PER_GROUP_OUT
    blocks: tl.constexpr = (K + WIDTH_OUT - 1) // WIDTH_OUT
    row_tile, block = space.tile_index(tl.program_id(0), tl.cdiv(m, BLOCK_M), blocks, GROUP_M)
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
    within = tl.arange(0, BLOCK_N)
    columns = block * WIDTH_OUT + within
    column_mask = (within < WIDTH_OUT) & (columns < K)
    channels = block * WIDTH_IN + depth
    live = (depth < WIDTH_IN) & (channels < C)
    x_tile = x + X_OFFSET + (corner * X_PITCH)[:, None] + channels[None, :]
    w_tile = w + (columns * (R * S * WIDTH_IN))[:, None] + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(R * S):
        a, b = tap_tiles(
            x_tile, w_tile, top, left, tap, live, column_mask,
            H, WIDTH, S, DILATION_H, DILATION_W, X_PITCH, WIDTH_IN,
        )  # fmt: skip
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    again = tl.max((acc != acc).to(tl.int32))
    if again > 0:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # The number of steps is no constant, so that this loop is not unrolled.
        for step in tl.range(again * (GROUPS_PER_BLOCK * R * S), num_stages=1):
            group = step // (R * S)
            mine = live & (depth // PER_GROUP == group)
            a, b = tap_tiles(
                x_tile, w_tile, top, left, step % (R * S), mine, column_mask,
                H, WIDTH, S, DILATION_H, DILATION_W, X_PITCH, WIDTH_IN,
            )  # fmt: skip
            whole = tl.dot(a, b.T, acc, input_precision=PRECISION)
            acc = tl.where((within // PER_GROUP_OUT == group)[None, :], whole, acc)
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


def pack(groups: int, w: torch.Tensor) -> torch.Tensor:
    """(K, Cg, R, S) -> (K, R·S·B), block-diagonal: zero for the block's other groups."""
    k, per_group, r, s = w.shape
    together = groups_per_block(groups, per_group, k // groups)
    packed = w.new_zeros(k, r * s, together, per_group)
    position = torch.arange(k, device=w.device) // (k // groups) % together
    rows = torch.arange(k, device=w.device)
    packed[rows, :, position] = w.permute(0, 2, 3, 1).reshape(k, r * s, per_group)
    return packed.reshape(k, -1)


def _sizes(problem: Problem) -> tuple[int, int, int]:
    """Channels per group, in and out, and groups per block."""
    attributes = cast("Conv2d", problem.attributes)
    k, per_group, _, _ = problem.inputs[1].shape
    out = k // attributes.groups
    return per_group, out, groups_per_block(attributes.groups, per_group, out)


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    """The one launch of the kernel."""
    attributes = cast("Conv2d", problem.attributes)
    x, out = problem.inputs[0], problem.output
    n, k, p, q = out.shape
    _, c, h, width = x.shape
    r, s = problem.inputs[1].shape[2:]
    per_group, per_group_out, together = _sizes(problem)
    return Launch(
        kernel=grouped_kernel,
        pointers={"x": X, "w": W, "y": Y},
        extras=operand_refs(problem),
        rows=n * p * q,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=-(-attributes.groups // together),
        constexprs={
            "H": h, "WIDTH": width, "C": c, "K": k, "P": p, "Q": q, "R": r, "S": s,
            "STRIDE_H": attributes.stride[0], "STRIDE_W": attributes.stride[1],
            "TOP": attributes.padding[0], "LEFT": attributes.padding[2],
            "DILATION_H": attributes.dilation[0], "DILATION_W": attributes.dilation[1],
            "PER_GROUP": per_group, "PER_GROUP_OUT": per_group_out,
            "GROUPS_PER_BLOCK": together,
            "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, out.spec),
            "PRECISION": choice.dot_precision(problem, per_group * r * s),
            "WIDE": problem.is_wide,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=choice.l2_bytes(problem, tile, together * per_group * r * s),
        steps=r * s,
        step_instructions=choice.step_instructions(tile, x.spec.dtype, r * s),
    )  # fmt: skip


def _tile(problem: Problem, block_m: int, warps: int, stages: int) -> Config:
    per_group, per_group_out, together = _sizes(problem)
    return config(
        warps,
        stages,
        BLOCK_M=block_m,
        BLOCK_N=max(16, power_of_two(together * per_group_out)),
        BLOCK_K=max(16, power_of_two(together * per_group)),
        GROUP_M=8,
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """The block gives the columns and the depth; rows and stages are free."""
    for block_m in (64, 128):
        for stages in (2, 3, 4):
            tile = _tile(problem, block_m, 4, stages)
            if legal(problem, tile, target) is None:
                yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return choice.legal_tile(problem.inputs[0].spec.dtype, tile, target)


def default(problem: Problem, target: Target) -> Config:
    """128 pixels by one block of groups (118 registers on sm_90 for 32 groups of 4); 64 where that
    leaves multiprocessors without work, before sm_90, where it spills up to 16 bytes, and in fp32
    (56 bytes on sm_80, 244 registers on sm_90)."""
    n, _, p, q = problem.output.shape
    rows = n * p * q
    if target.name == "interpreter":
        return _tile(problem, max(16, min(4096, power_of_two(rows))), 1, 1)
    attributes = cast("Conv2d", problem.attributes)
    blocks = -(-attributes.groups // _sizes(problem)[2])
    tile = _tile(problem, 128, 4, 4)
    enough = rows // 128 * blocks >= cost_model.MULTIPROCESSORS
    fits = target.capability >= 90 and problem.inputs[0].spec.dtype is not torch.float32
    return tile if enough and fits else _tile(problem, 64, 4, 4)
