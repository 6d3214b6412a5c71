"""A convolution whose input is read in boxes of pixels through TMA descriptors (sm_90 and later).

x: (N, C, H, W) NHWC; w packed as (K, R·S·C); y: (N, K, P, Q) NHWC; fp32 accumulation. A program
computes a box of BOX_N images x BOX_H x BOX_W pixels; tap (r, s) reads the same box of x moved by
(r·dh − top, s·dw − left). What lies outside of the image arrives as zero, which is the padding: no
masks and no addresses in the loop. On sm_90 a step of a 3x3 filter has 136 instructions where
pointers take 171 (128x64x64, 4 warps; 142 with stride 2), and 128x128 fits 4 warps (238 registers).

Boxes are powers of two: where they do not fit the image they pad it (`hopper/boxes.py`). The idea
of the views is that of im2col by TMA as CUTLASS has it, with tiles instead of the engine's own
im2col.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import triton
import triton.language as tl

from ..contract import programmatic_launch
from ..contract.op import Box, Config, Launch, Problem, Target, W, Y, config, power_of_two
from ..hopper.boxes import boxes, refusal, view
from ..products import gemm, gemm_tma
from ..tile import choice, residual
from ..tile.geometry import problem_extras

TILES = (
    (128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (256, 64, 8), (128, 64, 4),
    (64, 128, 4), (64, 64, 4),
)  # fmt: skip
"""Pixels and output channels of a program, and its warps."""
STEP_INSTRUCTIONS = 130
"""Of a warp beside the products (127 to 138 from 128x128 to 256x128)."""


@triton.jit
def conv_tma_kernel(
    x,
    w,
    y,
    extras,
    m,
    C: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    EPILOGUE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    RESIDUAL_FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BOX_N: tl.constexpr,
    BOX_H: tl.constexpr,
    BOX_W: tl.constexpr,
    PDL: tl.constexpr,
):
    # m counts images. Programs of the same pixels follow each other: they find x in the L2 cache.
    column_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    tiles_q: tl.constexpr = (Q + BOX_W - 1) // BOX_W
    tiles_p: tl.constexpr = (P + BOX_H - 1) // BOX_H
    column = tl.program_id(0) % column_tiles * BLOCK_N
    box = tl.program_id(0) // column_tiles
    q0 = box % tiles_q * BOX_W
    p0 = box // tiles_q % tiles_p * BOX_H
    n0 = box // (tiles_q * tiles_p) * BOX_N
    blocks: tl.constexpr = C // BLOCK_K
    # Even numbers that make the positions of all taps positive: division rounds towards zero.
    rise: tl.constexpr = (TOP + 1) // 2 * 2
    drift: tl.constexpr = (LEFT + 1) // 2 * 2
    pixel = tl.arange(0, BLOCK_M)
    image = n0 + pixel // (BOX_H * BOX_W)
    p = p0 + pixel // BOX_W % BOX_H
    q = q0 + pixel % BOX_W
    row_mask = (image < m) & (p < P) & (q < Q)
    if WIDE:
        image = image.to(tl.int64)
    rows = (image * P + p) * Q + q
    columns = column + tl.arange(0, BLOCK_N)
    column_mask = columns < K
    programmatic_launch.wait(PDL)
    acc = residual.begin(
        rows, columns, row_mask, column_mask, extras, RESIDUAL, RESIDUAL_FIRST, BLOCK_M, BLOCK_N
    )
    for step in range(R * S * blocks):
        tap = step // blocks
        start = step % blocks * BLOCK_K
        top = tap // S * DILATION_H - TOP
        left = tap % S * DILATION_W - LEFT
        if STRIDE == 1:
            a = x.load([n0, p0 + top, q0 + left, start])
        else:
            half_row = p0 + (top + rise) // 2 - rise // 2
            half_column = q0 + (left + drift) // 2 - drift // 2
            inner = (left + drift) % 2 * X_PITCH + start
            a = x.load([n0, half_row, (top + rise) % 2, half_column, inner])
        b = w.load([column, tap * C + start])
        acc = tl.dot(tl.reshape(a, (BLOCK_M, BLOCK_K)), b.T, acc, input_precision=PRECISION)
    programmatic_launch.release(PDL)
    gemm.finish_tile(
        acc, y, rows, columns, row_mask, column_mask, extras, EPILOGUE, Y_PITCH, Y_OFFSET
    )


def is_one(tile: Config) -> bool:
    """Whether a configuration of a convolution is this algorithm's."""
    return "BOX_W" in dict(tile.blocks)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """The search space; empty where boxes cannot be used."""
    x = problem.inputs[0].spec
    widest = 128 // x.dtype.itemsize
    block_k = next((k for k in (widest, widest // 2, widest // 4) if x.shape[1] % k == 0), widest)
    for pixels, columns, warps in TILES:
        if columns > max(64, power_of_two(problem.output.shape[1])):
            continue
        for box in boxes(problem, pixels):
            for stages in (3, 4):
                tile = config(
                    warps, stages, BLOCK_M=pixels, BLOCK_N=columns, BLOCK_K=block_k,
                    BOX_N=box[0], BOX_H=box[1], BOX_W=box[2],
                )  # fmt: skip
                if legal(problem, tile, target) is None:
                    yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Why a configuration cannot compute the problem on the target, or None."""
    c = problem.inputs[0].shape[1]
    if (refused := refusal(problem)) is not None:
        return refused
    if c % tile["BLOCK_K"]:
        return f"TMA: {c} channels are no multiple of BLOCK_K={tile['BLOCK_K']}"
    if tile["BOX_N"] * tile["BOX_H"] * tile["BOX_W"] != tile["BLOCK_M"]:
        return f"the box does not hold BLOCK_M={tile['BLOCK_M']} pixels"
    return gemm_tma.legal(problem, tile, target)


def launch(problem: Problem, tile: Config) -> Launch:
    """One program for each box of pixels and block of output channels."""
    attributes: Any = problem.attributes
    x, out, w = problem.inputs[0], problem.output, problem.inputs[1]
    n, c, _, _ = x.shape
    k, _, r, s = w.shape
    _, _, p, q = out.shape
    box = (tile["BOX_N"], tile["BOX_H"], tile["BOX_W"])
    return Launch(
        kernel=conv_tma_kernel,
        pointers={"y": Y},
        boxes={
            "x": view(problem, box, tile["BLOCK_K"]),
            "w": Box(W, (k, r * s * c), (r * s * c, 1), (tile["BLOCK_N"], tile["BLOCK_K"])),
        },
        extras=problem_extras(problem),
        rows=n,
        batch=out.spec.batch,
        block_rows=box[0],
        columns=-(-p // box[1]) * -(-q // box[2]) * -(-k // tile["BLOCK_N"]),
        constexprs={
            "C": c, "K": k, "P": p, "Q": q, "R": r, "S": s, "STRIDE": attributes.stride[0],
            "TOP": attributes.padding[0], "LEFT": attributes.padding[2],
            "DILATION_H": attributes.dilation[0], "DILATION_W": attributes.dilation[1],
            "X_PITCH": x.pitch, "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
            "PRECISION": choice.dot_precision(problem, c * r * s),
            "WIDE": problem.is_wide, "PDL": False,
            **dict(tile.blocks), **residual.constants(problem, tile),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=choice.l2_bytes(problem, tile, c * r * s),
        steps=r * s * c // tile["BLOCK_K"],
        step_instructions=STEP_INSTRUCTIONS,
    )  # fmt: skip
