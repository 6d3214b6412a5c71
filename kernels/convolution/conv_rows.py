"""Convolution over runs of few channels, an algorithm of conv2d for 4 or 8 channels.

y[n,k,p,q] = sum_r sum_{i < S·C} x[n, p·sh − top + r·dh, q·sw·C + i] w[k, r, i]: without padding at
the left and right, the S pixels of one filter row lie side by side in NHWC memory, S·C elements
that are copied whole, 128 bits at a time where a run starts at a multiple of that. Nothing but
whole input rows is ever outside the image.

A run is cut into blocks. What the last block holds beyond the filter are real neighbours, whose
NaN and infinities would survive a multiplication by zero, so they are masked: there only, which
costs 3% of the instructions; a mask on every block costs 20%, zeroing after the copy 59%.

Source of the idea: the first layers of cuDNN and TensorRT, which take images of 4 channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..contract import cost_model
from ..contract.op import Config, Launch, Problem, Target, config, power_of_two
from ..tile import choice, gemm, space
from ..tile.conv_geometry import Conv2d
from ..tile.finish import put
from ..tile.geometry import Image, Window, tile_launch

CHANNELS = (4, 8)
BLOCK = 16
"""Elements that runs are padded to a multiple of: the depth of one tensor-core product."""


def applies(attributes: Conv2d, filters: tuple[int, ...]) -> bool:
    """Whether a weight of that shape is read as runs."""
    _, per_group, _, s = filters
    inner = attributes.padding[2:] == (0, 0) and attributes.dilation[1] == 1
    return inner and attributes.groups == 1 and per_group in CHANNELS and s > 1


def run_length(filters: tuple[int, ...]) -> int:
    """Elements of one filter row in the packed weight."""
    return -(-filters[1] * filters[3] // BLOCK) * BLOCK


def pack(w: torch.Tensor) -> torch.Tensor:
    """(K, C, R, S) -> (K, R·run), each run filled up with zeros."""
    runs = w.permute(0, 2, 3, 1).flatten(2)
    return F.pad(runs, (0, run_length(tuple(w.shape)) - runs.shape[2])).flatten(1).contiguous()


@triton.jit
def conv_rows_kernel(
    x, w, y, extras, m, IMAGE: tl.constexpr, WINDOW: tl.constexpr, RUN: tl.constexpr,
    PROLOGUE: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_N: tl.constexpr = TILE.N
    BLOCK_K: tl.constexpr = TILE.K
    C: tl.constexpr = IMAGE.C
    X_PITCH: tl.constexpr = IMAGE.row_stride
    column_tiles: tl.constexpr = (OUTPUT.K + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = space.tile_index(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), column_tiles, TILE.GROUP_M
    )
    rows, columns, row_mask, column_mask = space.rows_and_columns(
        row_tile, column_tile, m, OUTPUT, TILE
    )
    image = rows // (OUTPUT.P * OUTPUT.Q)
    top = (rows // OUTPUT.Q % OUTPUT.P).to(tl.int32) * WINDOW.stride_h - WINDOW.top
    # In this order the compiler sees what the offsets are multiples of.
    corner = (image * IMAGE.H + top) * (IMAGE.W * X_PITCH)
    corner += (rows % OUTPUT.Q) * (WINDOW.stride_w * X_PITCH)
    # Rows past the end get a position that no filter row brings inside the image.
    top = tl.where(row_mask, top, -1048576)
    depth = tl.arange(0, BLOCK_K)
    w_tile = w + (columns * (WINDOW.R * RUN))[:, None] + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r in range(WINDOW.R):
        inside = ((top + r * WINDOW.dilation_h).to(tl.uint32, bitcast=True) < IMAGE.H)[:, None]
        x_row = x + IMAGE.offset + r * (WINDOW.dilation_h * IMAGE.W * X_PITCH) + corner[:, None]
        for start in tl.static_range(0, RUN, BLOCK_K):
            index = start + depth
            step = index if X_PITCH == C else index // C * X_PITCH + index % C
            a_mask = inside
            b_mask = column_mask[:, None]
            if start + BLOCK_K > WINDOW.S * C:
                a_mask = inside & (index < WINDOW.S * C)[None, :]
            if start + BLOCK_K > RUN:
                b_mask = b_mask & (index < RUN)[None, :]
            a = tl.load(x_row + step[None, :], mask=a_mask, other=0.0)
            b = tl.load(w_tile + (r * RUN + start), mask=b_mask, other=0.0)
            if PROLOGUE is not None:
                # The border is zero after the prologue, not before it.
                value = PROLOGUE(a.to(tl.float32), rows, index % C, row_mask, index < RUN, extras)
                a = tl.where(a_mask, value, 0.0).to(a.dtype)
            acc = tl.dot(a, b.T, acc, input_precision=TILE.precision)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    filters = problem.inputs[1].shape
    terms = filters[2] * run_length(filters)
    return tile_launch(
        problem, tile, conv_rows_kernel,
        constexprs={
            "IMAGE": Image.of(problem.inputs[0]),
            "WINDOW": Window.of(filters[2:], problem.attributes),
            "RUN": run_length(filters), "PROLOGUE": gemm.prologue_of(problem),
        },
        precision=choice.dot_precision(problem, terms),
        l2_bytes=choice.l2_bytes(problem, tile, terms),
        instructions=_instructions(problem, tile),
        steps=filters[2],
    )  # fmt: skip


def _instructions(problem: Problem, tile: Config) -> int:
    """Of one program, as counted in sm_90 code for half precision: 12 for every 16 bytes that are
    copied, 5 for each result and 170 for each thread."""
    filters = problem.inputs[1].shape
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    elements = (block_m + block_n) * filters[2] * run_length(filters)
    copies = elements * problem.inputs[0].spec.dtype.itemsize // 16
    return 12 * copies + 5 * block_m * block_n + 170 * 32 * tile.num_warps


def size(problem: Problem) -> choice.Size:
    """A matrix product with the runs of all filter rows, one after the other."""
    n, k, p, q = problem.output.shape
    filters = problem.inputs[1].shape
    dtype = problem.inputs[0].spec.dtype
    return choice.Size(n * p * q, k, run_length(filters), dtype, taps=filters[2])


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Those of a matrix product whose blocks are at most one run, and the wide tile."""
    product = size(problem)
    longest = min(32, power_of_two(run_length(problem.inputs[1].shape)))
    tiles = (tile for tile in choice.tile_configs(product, target) if tile["BLOCK_K"] <= longest)
    for tile in dict.fromkeys((*tiles, *_wide_tiles(product))):
        if choice.legal_tile(product.dtype, tile, target) is None:
            yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return choice.legal(size(problem), tile, target)


def _wide_tiles(product: choice.Size) -> tuple[Config, ...]:
    """128x64 with 4 warps in half precision: in short blocks it fits registers everywhere.

    7x7 with a residual: 140 registers at most, on sm_89; in blocks of 32 already 188.
    """
    if product.dtype is torch.float32:
        return ()
    sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": BLOCK, "GROUP_M": 8}
    return tuple(config(4, stages, **sizes) for stages in (2, 3, 4))


def default(problem: Problem, target: Target) -> Config:
    """The wide tile where that fills the machine, else that of a matrix product, in blocks of 16:
    most of a run then needs no mask.

    7x7, 4 channels, 128x64 w4 on sm_90: 832 instructions in all, in blocks of 32 928.
    """
    product = size(problem)
    tile = choice.default_tile(product, target)
    if target.name == "interpreter":
        return tile
    tiles = -(-product.rows // 128) * -(-product.columns // 64)
    if product.columns > 32 and tiles >= cost_model.MULTIPROCESSORS and _wide_tiles(product):
        return _wide_tiles(product)[1]
    return replace(tile, blocks=tuple((dict(tile.blocks) | {"BLOCK_K": BLOCK}).items()))
