"""Depthwise convolution, an algorithm of conv2d: every output channel reads one input channel.

y[n,k,p,q] = sum_{r,s} x[n, k // M, p·sh − top + r·dh, q·sw − left + s·dw] w[k,r,s], where M is the
channel multiplier. No matrix product: one program computes TILE_ROWS output rows of BLOCK_M pixel
columns by BLOCK_N channels, so that each input row is read once for all the output rows it feeds
(without that reuse the kernel is bound by instructions, not by memory).

Weights are packed (R·S, K) in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ..contract import programmatic_launch
from ..contract.op import Config, Launch, Problem, Target, config, power_of_two
from ..tile.conv_geometry import Conv2d
from ..tile.finish import put
from ..tile.geometry import Image, Window, tile_launch
from ..tile.space import band_columns, of_bands


def applies(attributes: Conv2d, filters: tuple[int, ...]) -> bool:
    """Whether every group has one input channel."""
    return attributes.groups > 1 and filters[1] == 1


@triton.jit
def band_corner(
    first, stop, IMAGE: tl.constexpr, WINDOW: tl.constexpr, SPACE: tl.constexpr, TILE: tl.constexpr
):
    """Of every column of the bands from `first` on (`space.bands`): image, p and q of its first
    output pixel and whether it exists; the index of the first pixel which that sees, and its row
    and column in the image. Columns past the end have no row inside any image."""
    image, p, q, live = band_columns(first, stop, SPACE, TILE)
    top = p * WINDOW.stride_h - WINDOW.top
    left = q * WINDOW.stride_w - WINDOW.left
    pixel = (image * IMAGE.H + top) * IMAGE.W + left
    return image, p, q, live, pixel, tl.where(live, top, -1048576), left


@triton.jit
def band_sums(
    base, w, top, left, columns, column_mask, IMAGE: tl.constexpr, WINDOW: tl.constexpr,
    CHANNELS: tl.constexpr, HEIGHT: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """fp32 [M, N] for each of the HEIGHT rows of a band, over the pixels from `base` on.

    w: (R·S, CHANNELS) in fp32. Every input row is read once for all the output rows it feeds.
    """
    STRIDE: tl.constexpr = WINDOW.stride_h
    DILATION: tl.constexpr = WINDOW.dilation_h
    S: tl.constexpr = WINDOW.S
    sums = ()
    for j in tl.static_range(HEIGHT):
        sums = sums + (tl.zeros((M, N), tl.float32),)
    # Walk the input rows of the band; row i feeds output row j by tap (i - j*stride) / dilation.
    for i in tl.static_range((HEIGHT - 1) * STRIDE + (WINDOW.R - 1) * DILATION + 1):
        row_inside = (top + i).to(tl.uint32, bitcast=True) < IMAGE.H
        for s in tl.static_range(S):
            column = s * WINDOW.dilation_w
            inside = row_inside & ((left + column).to(tl.uint32, bitcast=True) < IMAGE.W)
            mask = inside[:, None]
            if CHANNELS % N != 0:
                mask = mask & column_mask[None, :]
            address = base + (i * IMAGE.W + column) * IMAGE.row_stride
            value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for j in tl.static_range(HEIGHT):
                if (
                    (i - j * STRIDE >= 0)
                    and ((i - j * STRIDE) % DILATION == 0)
                    and ((i - j * STRIDE) // DILATION < WINDOW.R)
                ):
                    tap = (i - j * STRIDE) // DILATION * S + s
                    weight = tl.load(w + tap * CHANNELS + columns, mask=column_mask, other=0.0)
                    updated = updated + (sums[j] + value * weight[None, :],)
                else:
                    updated = updated + (sums[j],)
            sums = updated
    return sums


@triton.jit
def depthwise_kernel(
    x, w, y, extras, m, IMAGE: tl.constexpr, WINDOW: tl.constexpr, MULTIPLIER: tl.constexpr,
    SPACE: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BLOCK_M: tl.constexpr = SPACE.per_tile
    BLOCK_N: tl.constexpr = TILE.N
    HEIGHT: tl.constexpr = TILE.M // BLOCK_M
    column_tiles: tl.constexpr = (OUTPUT.K + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    columns = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    column_mask = columns < OUTPUT.K
    image, first, q, live, pixel, top, left = band_corner(
        program // column_tiles * BLOCK_M, m, IMAGE, WINDOW, SPACE, TILE
    )
    base = x + IMAGE.offset + (pixel * IMAGE.row_stride)[:, None]
    base = base + (columns // MULTIPLIER)[None, :]
    programmatic_launch.grid_dependency_wait(PDL)
    sums = band_sums(
        base, w, top, left, columns, column_mask, IMAGE, WINDOW, OUTPUT.K, HEIGHT, BLOCK_M, BLOCK_N
    )
    for j in tl.static_range(HEIGHT):
        p = first + j
        rows = (image * OUTPUT.P + p) * OUTPUT.Q + q
        put(sums[j], y, rows, live & (p < OUTPUT.P), columns, column_mask, extras, OUTPUT)


def pack(w: torch.Tensor) -> torch.Tensor:
    """(K, 1, R, S) -> (R·S, K) in fp32: weights are few, and fp32 saves a conversion per tap."""
    return w.reshape(w.shape[0], -1).t().contiguous().float()


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    attributes = problem.attributes.expect(Conv2d)
    x, out = problem.inputs[0], problem.output
    filters, height = problem.inputs[1].shape[2:], tile["TILE_ROWS"]
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    space = of_bands(out.spec, block_m, height)
    # The L1 cache serves the taps of one program: it fetches each pixel of its window once.
    window = (height - 1) * attributes.stride[0] + (filters[0] - 1) * attributes.dilation[0] + 1
    fetched = window * block_m * attributes.stride[1] * block_n
    each = instructions_per_result(filters[0] * filters[1], height)
    return tile_launch(
        problem, tile, depthwise_kernel,
        constexprs={
            "IMAGE": Image.of(x), "WINDOW": Window.of(filters, attributes), "SPACE": space,
            "MULTIPLIER": out.shape[1] // x.shape[1], "PDL": False,
        },
        rows=out.shape[0] * space.down * space.across,
        block_rows=block_m,
        l2_bytes=fetched * x.spec.dtype.itemsize,
        instructions=int(height * block_m * block_n * each),
    )  # fmt: skip


def instructions_per_result(taps: int, tile_rows: int) -> float:
    """Thread instructions per result, read from machine code for 3x3 filters at stride 1 and taken
    in proportion for others."""
    return {1: 47.0, 2: 29.0}.get(tile_rows, 21.5) * taps / 9


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """1024 results per output row and program; more rows reuse more but cost registers."""
    for tile_rows in (1, 2, 4):
        for block_n in (32, 64, 128):
            yield config(4, 1, TILE_ROWS=tile_rows, BLOCK_M=1024 // block_n, BLOCK_N=block_n)


def legal(problem: Problem, tile: Config, target: Target) -> None:
    return


def default(problem: Problem, target: Target) -> Config:
    """Four output rows for 3x3 stride 1, two for 5x5 or stride 2, else one.

    Thread instructions per output, 3x3 stride 1, by rows per program 1 / 2 / 4: 47 / 29 / 21.5.
    """
    n, k, p, q = problem.output.shape
    if target.name == "interpreter":
        block_n = min(256, power_of_two(k))
        block_m = min(power_of_two(n * p * q), (1 << 20) // block_n)
        return config(1, 1, TILE_ROWS=1, BLOCK_M=block_m, BLOCK_N=block_n)
    attributes = problem.attributes.expect(Conv2d)
    taps = problem.inputs[1].shape[2]
    tile_rows = 1
    if attributes.dilation == (1, 1) and taps <= 5:
        tile_rows = 4 if taps <= 3 and attributes.stride[0] == 1 else 2
    block_n = 64 if k % 64 == 0 or k > 256 else 32
    return config(
        4, 1, TILE_ROWS=min(tile_rows, power_of_two(p)), BLOCK_M=1024 // block_n, BLOCK_N=block_n
    )
