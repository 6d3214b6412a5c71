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

import triton
import triton.language as tl

from ..contract import programmatic_launch
from ..contract.op import Config, Launch, Problem, Target, TmaDescriptor, W, Y, config, power_of_two
from ..hopper.boxes import Pixels, boxes, refusal, view
from ..tile import choice, residual
from ..tile.finish import put
from ..tile.geometry import Image, Window, tile_launch
from . import gemm_tma

TILES = (
    (128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (256, 64, 8), (128, 64, 4),
    (64, 128, 4), (64, 64, 4),
)  # fmt: skip
"""Pixels and output channels of a program, and its warps."""
STEP_INSTRUCTIONS = 130
"""Of a warp beside the products (127 to 138 from 128x128 to 256x128)."""


@triton.jit
def conv_tma_kernel(
    x, w, y, extras, m, IMAGE: tl.constexpr, WINDOW: tl.constexpr, PIXELS: tl.constexpr,
    RESIDUAL: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # m counts images. Programs of the same pixels follow each other: they find x in the L2 cache.
    BLOCK_M: tl.constexpr = TILE.M
    BLOCK_K: tl.constexpr = TILE.K
    column_tiles: tl.constexpr = (OUTPUT.K + TILE.N - 1) // TILE.N
    tiles_q: tl.constexpr = (OUTPUT.Q + PIXELS.W - 1) // PIXELS.W
    tiles_p: tl.constexpr = (OUTPUT.P + PIXELS.H - 1) // PIXELS.H
    column = tl.program_id(0) % column_tiles * TILE.N
    box = tl.program_id(0) // column_tiles
    q0 = box % tiles_q * PIXELS.W
    p0 = box // tiles_q % tiles_p * PIXELS.H
    n0 = box // (tiles_q * tiles_p) * PIXELS.N
    blocks: tl.constexpr = IMAGE.C // BLOCK_K
    # Even numbers that make the positions of all taps positive: division rounds towards zero.
    rise: tl.constexpr = (WINDOW.top + 1) // 2 * 2
    drift: tl.constexpr = (WINDOW.left + 1) // 2 * 2
    pixel = tl.arange(0, BLOCK_M)
    image = n0 + pixel // (PIXELS.H * PIXELS.W)
    p = p0 + pixel // PIXELS.W % PIXELS.H
    q = q0 + pixel % PIXELS.W
    row_mask = (image < m) & (p < OUTPUT.P) & (q < OUTPUT.Q)
    if TILE.wide:
        image = image.to(tl.int64)
    rows = (image * OUTPUT.P + p) * OUTPUT.Q + q
    columns = column + tl.arange(0, TILE.N)
    column_mask = columns < OUTPUT.K
    programmatic_launch.grid_dependency_wait(PDL)
    acc = residual.begin(rows, columns, row_mask, column_mask, extras, RESIDUAL, TILE)
    for step in range(WINDOW.R * WINDOW.S * blocks):
        tap = step // blocks
        start = step % blocks * BLOCK_K
        top = tap // WINDOW.S * WINDOW.dilation_h - WINDOW.top
        left = tap % WINDOW.S * WINDOW.dilation_w - WINDOW.left
        if WINDOW.stride_h == 1:
            a = x.load([n0, p0 + top, q0 + left, start])
        else:
            half_row = p0 + (top + rise) // 2 - rise // 2
            half_column = q0 + (left + drift) // 2 - drift // 2
            inner = (left + drift) % 2 * IMAGE.row_stride + start
            a = x.load([n0, half_row, (top + rise) % 2, half_column, inner])
        b = w.load([column, tap * IMAGE.C + start])
        a = tl.reshape(a, (BLOCK_M, BLOCK_K))
        acc = tl.dot(a, b.T, acc, input_precision=TILE.precision)
    programmatic_launch.launch_dependents(PDL)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def uses_boxes(tile: Config) -> bool:
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
    x, w, pixels = problem.inputs[0], problem.inputs[1].shape, Pixels.of(tile)
    k, c, r, s = w
    output, first = residual.output_of(problem, tile)
    return tile_launch(
        problem,
        tile,
        conv_tma_kernel,
        pointers={"y": Y},
        boxes={
            "x": view(problem, pixels, tile["BLOCK_K"]),
            "w": TmaDescriptor(
                W, (k, r * s * c), (r * s * c, 1), (tile["BLOCK_N"], tile["BLOCK_K"])
            ),
        },
        constexprs={
            "IMAGE": Image.of(x), "WINDOW": Window.of((r, s), problem.attributes),
            "PIXELS": pixels, "RESIDUAL": first, "PDL": False,
        },
        precision=choice.dot_precision(problem, c * r * s),
        output=output,
        rows=x.shape[0],
        block_rows=pixels.N,
        programs=pixels.of_image(output),
        l2_bytes=choice.l2_bytes(problem, tile, c * r * s),
        steps=r * s * c // tile["BLOCK_K"],
        step_instructions=STEP_INSTRUCTIONS,
    )  # fmt: skip
