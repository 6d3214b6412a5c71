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
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..contract import cost_model
from ..contract.op import Config, Launch, Problem, Target, config, power_of_two
from ..hopper import core
from ..hopper.boxes import GROUPED as BLOCK
from ..tile import choice, space
from ..tile.conv_geometry import Conv2d
from ..tile.finish import put
from ..tile.geometry import Image, Window, tile_launch
from ..tile.source import inside


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
    x_tile, w_tile, top, left, tap, live, column_mask,
    IMAGE: tl.constexpr, WINDOW: tl.constexpr, WIDTH_IN: tl.constexpr,
):  # fmt: skip
    """Input and weight tile of one tap."""
    r = tap // WINDOW.S * WINDOW.dilation_h
    s = tap % WINDOW.S * WINDOW.dilation_w
    a_mask = inside(top + r, left + s, IMAGE)[:, None] & live[None, :]
    a = tl.load(x_tile + (r * IMAGE.W + s) * IMAGE.row_stride, mask=a_mask, other=0.0)
    b_mask = column_mask[:, None] & live[None, :]
    b = tl.load(w_tile + tap * WIDTH_IN, mask=b_mask, other=0.0)
    return a, b


class Groups(NamedTuple):
    """Channels per group, in and out, and groups per block."""

    C: int
    K: int
    per_block: int


@triton.jit
def grouped_kernel(
    x, w, y, extras, m, IMAGE: tl.constexpr, WINDOW: tl.constexpr, GROUPS: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    TAPS: tl.constexpr = WINDOW.R * WINDOW.S
    # Channels of a block, in and out; the last block may have fewer.
    WIDTH_IN: tl.constexpr = GROUPS.per_block * GROUPS.C
    WIDTH_OUT: tl.constexpr = GROUPS.per_block * GROUPS.K
    blocks: tl.constexpr = (OUTPUT.K + WIDTH_OUT - 1) // WIDTH_OUT
    row_tile, block = space.tile_index(tl.program_id(0), tl.cdiv(m, BLOCK_M), blocks, TILE.GROUP_M)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    if TILE.wide:
        rows = rows.to(tl.int64)
    image = rows // (OUTPUT.P * OUTPUT.Q)
    top = (rows // OUTPUT.Q % OUTPUT.P).to(tl.int32) * WINDOW.stride_h - WINDOW.top
    left = (rows % OUTPUT.Q).to(tl.int32) * WINDOW.stride_w - WINDOW.left
    corner = (image * IMAGE.H + top) * IMAGE.W + left
    # Rows past the end get a position that no tap brings inside the image: one mask serves both.
    top = tl.where(row_mask, top, -1048576)
    depth = tl.arange(0, TILE.K)
    within = tl.arange(0, BLOCK_N)
    columns = block * WIDTH_OUT + within
    column_mask = (within < WIDTH_OUT) & (columns < OUTPUT.K)
    channels = block * WIDTH_IN + depth
    live = (depth < WIDTH_IN) & (channels < IMAGE.C)
    x_tile = x + IMAGE.offset + (corner * IMAGE.row_stride)[:, None] + channels[None, :]
    w_tile = w + (columns * (TAPS * WIDTH_IN))[:, None] + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tap in range(TAPS):
        a, b = tap_tiles(
            x_tile, w_tile, top, left, tap, live, column_mask,
            IMAGE, WINDOW, WIDTH_IN,
        )  # fmt: skip
        acc = tl.dot(a, b.T, acc, input_precision=TILE.precision)
    again = tl.max((acc != acc).to(tl.int32))
    if again > 0:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        # The number of steps is no constant, so that this loop is not unrolled.
        for step in tl.range(again * (GROUPS.per_block * TAPS), num_stages=1):
            group = step // TAPS
            mine = live & (depth // GROUPS.C == group)
            a, b = tap_tiles(
                x_tile, w_tile, top, left, step % TAPS, mine, column_mask,
                IMAGE, WINDOW, WIDTH_IN,
            )  # fmt: skip
            whole = tl.dot(a, b.T, acc, input_precision=TILE.precision)
            acc = tl.where((within // GROUPS.K == group)[None, :], whole, acc)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def pack(groups: int, w: torch.Tensor) -> torch.Tensor:
    """(K, Cg, R, S) -> (K, R·S·B), block-diagonal: zero for the block's other groups."""
    k, per_group, r, s = w.shape
    together = groups_per_block(groups, per_group, k // groups)
    packed = w.new_zeros(k, r * s, together, per_group)
    position = torch.arange(k, device=w.device) // (k // groups) % together
    rows = torch.arange(k, device=w.device)
    packed[rows, :, position] = w.permute(0, 2, 3, 1).reshape(k, r * s, per_group)
    return packed.reshape(k, -1)


def _groups(problem: Problem) -> Groups:
    k, per_group, _, _ = problem.inputs[1].shape
    groups = problem.attributes.expect(Conv2d).groups
    return Groups(per_group, k // groups, groups_per_block(groups, per_group, k // groups))


def _blocks(problem: Problem) -> int:
    return -(-problem.attributes.expect(Conv2d).groups // _groups(problem).per_block)


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    """The one launch of the kernel, or of the Hopper core's."""
    if core.uses_core(tile):
        return core.launch(problem, tile, target)
    x, groups = problem.inputs[0], _groups(problem)
    window = Window.of(problem.inputs[1].shape[2:], problem.attributes)
    taps = window.R * window.S
    return tile_launch(
        problem, tile, grouped_kernel,
        constexprs={"IMAGE": Image.of(x), "WINDOW": window, "GROUPS": groups},
        precision=choice.dot_precision(problem, groups.C * taps),
        columns=1,
        programs=_blocks(problem),
        l2_bytes=choice.l2_bytes(problem, tile, groups.per_block * groups.C * taps),
        steps=taps,
        step_instructions=choice.step_instructions(tile, x.spec.dtype, taps),
    )  # fmt: skip


def _tile(problem: Problem, block_m: int, warps: int, stages: int) -> Config:
    groups = _groups(problem)
    return config(
        warps,
        stages,
        BLOCK_M=block_m,
        BLOCK_N=max(16, power_of_two(groups.per_block * groups.K)),
        BLOCK_K=max(16, power_of_two(groups.per_block * groups.C)),
        GROUP_M=8,
    )


def _configs(problem: Problem, target: Target) -> Iterator[Config]:
    """The block gives the columns and the depth; rows and stages are free."""
    for block_m in (64, 128):
        for stages in (2, 3, 4):
            tile = _tile(problem, block_m, 4, stages)
            if _legal(problem, tile, target) is None:
                yield tile


def _legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return choice.legal_tile(problem.inputs[0].spec.dtype, tile, target)


def _default(problem: Problem, target: Target) -> Config:
    """128 pixels by one block of groups (118 registers on sm_90 for 32 groups of 4); 64 where that
    leaves multiprocessors without work, before sm_90, where it spills up to 16 bytes, and in fp32
    (56 bytes on sm_80, 244 registers on sm_90)."""
    n, _, p, q = problem.output.shape
    rows = n * p * q
    if target.name == "interpreter":
        return _tile(problem, max(16, min(4096, power_of_two(rows))), 1, 1)
    tile = _tile(problem, 128, 4, 4)
    enough = rows // 128 * _blocks(problem) >= cost_model.MULTIPROCESSORS
    fits = target.capability >= 90 and problem.inputs[0].spec.dtype is not torch.float32
    return tile if enough and fits else _tile(problem, 64, 4, 4)


configs, default, legal = core.beside(
    {"configs": _configs, "default": _default, "legal": _legal}, launch
)
