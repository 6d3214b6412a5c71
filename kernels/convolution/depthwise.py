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

from ..contract import epilogue as ep
from ..contract.op import Config, Launch, Problem, W, X, Y, config, operand_refs, power_of_two
from ..contract.targets import Target
from ..tile.conv_geometry import Conv2d


def applies(attributes: Conv2d, filters: tuple[int, ...]) -> bool:
    """Whether every group has one input channel."""
    return attributes.groups > 1 and filters[1] == 1


@triton.jit
def depthwise_kernel(
    x,
    w,
    y,
    extras,
    m,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
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
    MULTIPLIER: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # m counts columns of output tiles: N * ceil(P / TILE_ROWS) * Q.
    bands: tl.constexpr = (P + TILE_ROWS - 1) // TILE_ROWS
    column_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    index = program // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = program % column_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    live = index < m
    column_mask = columns < K
    if WIDE:
        index = index.to(tl.int64)
    image = index // (bands * Q)
    first = (index // Q % bands).to(tl.int32) * TILE_ROWS
    q = (index % Q).to(tl.int32)
    top = first * STRIDE_H - TOP
    left = q * STRIDE_W - LEFT
    base = x + X_OFFSET + (((image * H + top) * WIDTH + left) * X_PITCH)[:, None]
    base = base + (columns // MULTIPLIER)[None, :]
    top = tl.where(live, top, -1048576)
    accs = ()
    for j in tl.static_range(TILE_ROWS):
        accs = accs + (tl.zeros((BLOCK_M, BLOCK_N), tl.float32),)
    # Walk the input rows of the tile; row i feeds output row j through tap (i - j*stride)/dilation.
    for i in tl.static_range((TILE_ROWS - 1) * STRIDE_H + (R - 1) * DILATION_H + 1):
        row_inside = (top + i).to(tl.uint32, bitcast=True) < H
        for s in tl.static_range(S):
            inside = row_inside & ((left + s * DILATION_W).to(tl.uint32, bitcast=True) < WIDTH)
            mask = inside[:, None] & column_mask[None, :]
            offset = (i * WIDTH + s * DILATION_W) * X_PITCH
            value = tl.load(base + offset, mask=mask, other=0.0).to(tl.float32)
            updated = ()
            for j in tl.static_range(TILE_ROWS):
                if (
                    (i - j * STRIDE_H >= 0)
                    and ((i - j * STRIDE_H) % DILATION_H == 0)
                    and ((i - j * STRIDE_H) // DILATION_H < R)
                ):
                    tap = (i - j * STRIDE_H) // DILATION_H * S + s
                    weight = tl.load(w + tap * K + columns, mask=column_mask, other=0.0)
                    updated = updated + (accs[j] + value * weight[None, :],)
                else:
                    updated = updated + (accs[j],)
            accs = updated
    for j in tl.static_range(TILE_ROWS):
        p = first + j
        rows = (image * P + p) * Q + q
        row_mask = live & (p < P)
        acc = EPILOGUE(accs[j], rows, columns, row_mask, column_mask, extras)
        address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


def pack(w: torch.Tensor) -> torch.Tensor:
    """(K, 1, R, S) -> (R·S, K) in fp32: weights are few, and fp32 saves a conversion per tap."""
    return w.reshape(w.shape[0], -1).t().contiguous().float()


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    """The one launch of the kernel."""
    attributes: Conv2d = problem.attributes
    x, out = problem.inputs[0], problem.output
    n, k, p, q = out.shape
    _, c, h, width = x.shape
    r, s = problem.inputs[1].shape[2:]
    bands = -(-p // tile["TILE_ROWS"])
    results = tile["TILE_ROWS"] * tile["BLOCK_M"] * tile["BLOCK_N"]
    # The L1 cache serves the taps of one program: it fetches each pixel of its window once.
    window = (tile["TILE_ROWS"] - 1) * attributes.stride[0] + (r - 1) * attributes.dilation[0] + 1
    fetched = window * tile["BLOCK_M"] * attributes.stride[1] * tile["BLOCK_N"]
    return Launch(
        kernel=depthwise_kernel,
        pointers={"x": X, "w": W, "y": Y},
        extras=operand_refs(problem),
        rows=n * bands * q,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=-(-k // tile["BLOCK_N"]),
        constexprs={
            "H": h, "WIDTH": width, "K": k, "P": p, "Q": q, "R": r, "S": s,
            "STRIDE_H": attributes.stride[0], "STRIDE_W": attributes.stride[1],
            "TOP": attributes.padding[0], "LEFT": attributes.padding[2],
            "DILATION_H": attributes.dilation[0], "DILATION_W": attributes.dilation[1],
            "MULTIPLIER": k // c,
            "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, out.spec),
            "WIDE": problem.is_wide,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=1,
        l2_bytes=fetched * x.spec.dtype.itemsize,
        instructions=int(results * instructions_per_result(r * s, tile["TILE_ROWS"])),
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
    """Every configuration can run."""
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
    attributes: Conv2d = problem.attributes
    taps = problem.inputs[1].shape[2]
    tile_rows = 1
    if attributes.dilation == (1, 1) and taps <= 5:
        tile_rows = 4 if taps <= 3 and attributes.stride[0] == 1 else 2
    block_n = 64 if k % 64 == 0 or k > 256 else 32
    return config(
        4, 1, TILE_ROWS=min(tile_rows, power_of_two(p)), BLOCK_M=1024 // block_n, BLOCK_N=block_n
    )
