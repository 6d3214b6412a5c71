"""Tile sizes of `separable`: the search space, what is refused and why, and what a program costs.

Two algorithms, told apart by SPAN (`separable.py`): 0 accumulates over channel blocks; else
a program keeps the whole depthwise result of its pixels as operands, for SPAN output channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...contract import cost_model
from ...contract.op import Config, Target, config, power_of_two

if TYPE_CHECKING:
    from ...tile.conv_geometry import Conv2d


@dataclass(frozen=True)
class Block:
    """The sizes of a problem.

    widths: channels of t, of y, and of z (0 without an expansion); operands: how many tensors as
    large as each of them the stages read; pixels: of the output, over the whole batch.
    """

    conv: Conv2d
    filter: tuple[int, ...]
    widths: tuple[int, ...]
    operands: tuple[int, ...]
    pixels: int
    dtype: torch.dtype

    def rows_read(self, tile_rows: int) -> int:
        """Input rows under a band of output rows."""
        reach = (self.filter[0] - 1) * self.conv.dilation[0]
        return (tile_rows - 1) * self.conv.stride[0] + reach + 1


def make_tile(
    rows: int, m: int, k: int, n: int, span: int = 0, warps: int = 4, stages: int = 1
) -> Config:
    return config(warps, stages, TILE_ROWS=rows, BLOCK_M=m, BLOCK_K=k, BLOCK_N=n, SPAN=span)


MOST_ACCUMULATORS = 64
"""Accumulators per thread of the products; twice that leaves no register for anything else."""
MOST_SUMS, MOST_RESIDENT_SUMS = 16, 32
"""Partial sums per thread of the depthwise part, beside accumulators and without them: 144 -> 24
channels take 236 registers with 32 sums, 118 with 16 (sm_90)."""
MOST_INPUTS = 108
"""Registers per thread for a block's input if all its loads are in flight, which is how they are
scheduled: 5x5 stride 2 spills 48 bytes on sm_80 at 140, and takes 255 registers at 110."""
MOST_BLOCKS = 8
"""Channel blocks kept as operands: each is unrolled, and the code grows with them."""
BLOCK_LAST = 64
"""Columns of the expansion per step."""
BANDS = ((4, 16), (2, 32), (4, 32), (4, 8), (2, 16))
"""TILE_ROWS and BLOCK_M: 64 or 128 pixels, as many as fill a tensor core instruction of sm_90, or
32 where there are few pixels. An expansion of 32 pixels is left to fp32: 960 -> 160 -> 960 channels
spill one register in half precision."""


def accumulating(block: Block) -> Iterator[Config]:
    """Tiles of the accumulating algorithm, most output channels first."""
    channels, results, last = block.widths
    whole = max(16, power_of_two(results))
    halves = block.dtype is not torch.float32
    for rows, m in BANDS[: 3 if last and halves else None]:
        for k in (32, 64) if channels > 16 else (16,):
            for warps in (4, 8):
                for n in sorted({min(whole, most) for most in (64, 128, 256)}, reverse=True):
                    yield make_tile(rows, m, k, n, warps=warps)


def resident(block: Block) -> Iterator[Config]:
    """Tiles of the algorithm that keeps its operands; fewer columns per program fill the machine
    where there are few pixels."""
    channels, results, _ = block.widths
    k = min(64, max(16, power_of_two(channels)))
    for rows, m in BANDS:
        for warps in (4, 8):
            for n in (64, 32):
                spans = {-(-results // (parts * n)) * n for parts in (1, 2, 4, 8)}
                for span in sorted(spans, reverse=True):
                    yield make_tile(rows, m, k, n, span, warps, 2)


def legal(block: Block, tile: Config, target: Target) -> str | None:
    """What the algorithm cannot express or never pays, then shared memory."""
    _, results, last = block.widths
    n, span = tile["BLOCK_N"], tile["SPAN"]
    if last and (span or n < results):
        return f"the expansion needs all {results} channels of the projection in one tile, not {n}"
    if target.name == "interpreter":
        return None
    if tile["TILE_ROWS"] == 1:
        return "one row per program: the operand's conversion moves to every tap (40 barriers)"
    width = tile["BLOCK_M"] * tile["BLOCK_K"] * block.dtype.itemsize // (32 * tile.num_warps)
    if width < 4:
        return f"{width} bytes of a row of inputs per thread; loads of less than 4 are slow"
    if span and block.widths[0] > MOST_BLOCKS * tile["BLOCK_K"]:
        return f"{block.widths[0]} channels are more than {MOST_BLOCKS} blocks of {tile['BLOCK_K']}"
    return target.shared_shortage(shared_bytes(block, tile))


def crowded(block: Block, tile: Config, target: Target) -> str | None:
    """Registers for the sums, the operands and the loads under way."""
    if target.name == "interpreter":
        return None
    last, n, share = block.widths[2], tile["BLOCK_N"], 2 if block.dtype is torch.float32 else 1
    if last and n > 256 // share:
        return f"an fp32 expansion of a tile of {n} channels spills; at most {256 // share}"
    if last and target.capability < 90 and (pixels := _pixels(tile)) > 64 // share:
        return f"{pixels} pixels and an expansion spill on {target.name}"
    if (reason := _spilling(block, tile, target)) is not None:
        return reason
    if tile["SPAN"] and block.dtype is torch.float32:
        return "fp32 operands of all channels do not fit the registers"
    return _registers(block, tile, share)


def _spilling(block: Block, tile: Config, target: Target) -> str | None:
    """Tiles that fit the registers by their counts, and of which ptxas still keeps a few words in
    memory to let one more program onto a multiprocessor."""
    rows, warps = tile["TILE_ROWS"], tile.num_warps
    if block.dtype is torch.float32:
        taps, each = math.prod(block.filter), _pixels(tile) * tile["BLOCK_K"] // (32 * warps)
        # By Triton 3.6 alone: 2x3 filters of 72 channels, 33 columns: 8 bytes, 2x2 up to 24.
        if target.capability >= 100 and taps < 9 and max(block.conv.stride) > 1 and each > 4:
            return f"{each} sums per thread of {taps} taps of a stride spill on {target.name}"
        return None
    if tile["SPAN"]:
        return None
    if rows < 4:
        # By Triton 3.6 alone: 144 -> 24 -> 144 channels and a shortcut, 4 and 8 warps.
        held = block.widths[2] and block.operands[1] and tile["BLOCK_K"] == 32
        if held and target.capability == 80:
            return f"{rows} rows, an expansion and a shortcut spill on {target.name}"
        return None
    if target.capability < 90 and warps == 4:
        return f"{rows} rows and {warps} warps spill on {target.name}"
    if target.capability >= 100 and block.conv.stride[0] > 1 and _pixels(tile) == 128:
        return f"{rows} rows of stride {block.conv.stride[0]} spill on {target.name}"
    return None


def _pixels(tile: Config) -> int:
    return tile["TILE_ROWS"] * tile["BLOCK_M"]


def shared_bytes(block: Block, tile: Config) -> int:
    """Shared memory of one program: operands, pipelined weights, and a result on its way out."""
    pixels, n, k = _pixels(tile), tile["BLOCK_N"], tile["BLOCK_K"]
    if tile["SPAN"]:
        channels = power_of_two(block.widths[0])
        area = (pixels + tile.num_stages * n) * channels + pixels * n
    else:
        area = max((pixels + n) * k, (pixels + BLOCK_LAST) * n)
    return block.dtype.itemsize * area


def _registers(block: Block, tile: Config, share: int) -> str | None:
    """Why a tile needs too many registers; fp32 operands take twice their `share`."""
    pixels, threads, block_k = _pixels(tile), 32 * tile.num_warps, tile["BLOCK_K"]
    # An expansion holds the finished tile as an operand too; in fp32 that is the tile twice over.
    most = MOST_ACCUMULATORS // (4 if block.widths[2] and share == 2 else share)
    if (each := pixels * tile["BLOCK_N"] // threads) > most:
        return f"{each} accumulators per thread; more than {most} spill"
    most = MOST_RESIDENT_SUMS if tile["SPAN"] else MOST_SUMS // share
    if (each := pixels * block_k // threads) > most:
        return f"{each} depthwise sums per thread; more than {most} leave too few registers"
    width = tile["BLOCK_M"] * block_k * block.dtype.itemsize // threads
    reads = block.rows_read(tile["TILE_ROWS"]) * block.filter[1]
    if (each := reads * width // 4) > MOST_INPUTS:
        return f"{each} registers per thread for the filter's input; more than {MOST_INPUTS} spill"
    return None


def interpreter_tile(block: Block) -> Config:
    """Few, large programs: the interpreter pays per tile operation."""
    m = max(16, min(2048, power_of_two(block.pixels)))
    k = max(16, min(512, power_of_two(block.widths[0])))
    return make_tile(1, m, k, max(16, power_of_two(block.widths[1])), warps=1)


def l2_bytes(block: Block, tile: Config) -> int:
    """Of one program: the input under its band once (neighbouring taps hit the first-level cache),
    all weights, and operands as large as a result."""
    channels, results, last = block.widths
    size = block.dtype.itemsize
    span = min(results, tile["SPAN"] or tile["BLOCK_N"])
    reach = (block.filter[1] - 1) * block.conv.dilation[1]
    width = (tile["BLOCK_M"] - 1) * block.conv.stride[1] + reach + 1
    inputs = block.rows_read(tile["TILE_ROWS"]) * width * channels
    weights = span * channels + results * last
    taps = block.filter[0] * block.filter[1] * channels
    columns = zip(block.operands, (channels, span, last), strict=True)
    operands = _pixels(tile) * sum(count * each for count, each in columns)
    return (inputs + weights + operands) * size + 4 * taps


def shared_traffic(block: Block, tile: Config) -> int:
    """Bytes of shared memory that products read and copies write, of one program: the depthwise
    sums become operands there, results change their places on the way out."""
    channels, results, last = block.widths
    n, k, pixels = tile["BLOCK_N"], tile["BLOCK_K"], _pixels(tile)
    steps = -(-channels // k)
    columns = min(results, tile["SPAN"]) if tile["SPAN"] else n
    traffic = 2 * steps * pixels * k * block.dtype.itemsize
    product = cost_model.Block(pixels, n, k)
    for _ in range(-(-columns // n)):
        traffic += steps * cost_model.product_traffic(product, tile.num_warps, block.dtype, True)
    if last:
        wide = cost_model.Block(pixels, BLOCK_LAST, n)
        each = cost_model.product_traffic(wide, tile.num_warps, block.dtype, True)
        traffic += -(-last // BLOCK_LAST) * each
    return traffic + 2 * pixels * (columns + last) * block.dtype.itemsize


def registers(block: Block, tile: Config) -> int:
    """Of one thread, as the cost model assumes them: sums of both kinds, and half of the loads of a
    block under way (144 -> 24 channels, 3x3, on sm_90: 118 with 16 depthwise sums)."""
    threads, pixels, k = 32 * tile.num_warps, _pixels(tile), tile["BLOCK_K"]
    width = tile["BLOCK_M"] * k * block.dtype.itemsize // threads
    loads = block.rows_read(tile["TILE_ROWS"]) * block.filter[1] * width // 4
    return min(255, pixels * (tile["BLOCK_N"] + k) // threads + loads // 2 + 60)


PER_STEP, PER_SUM, PER_RESULT = 60, 4.3, 6
"""Thread instructions: per channel block and thread, per depthwise sum beside its multiply-adds and
input, per stored result (that one is estimated)."""


def instructions(block: Block, tile: Config) -> int:
    """Of one program. A depthwise sum takes a multiply-add per tap and, per input it reads, a
    conversion and half a load, mask and address.

    Counted on sm_90, 3x3 stride 1, per sum by rows per program and sums per thread, 2 and 16, 2 and
    32, 4 and 16, 4 and 32: 26.1, 24.8, 23.9, 21.9; by this rule 26.1, 24.2, 23.8, 21.9.
    """
    channels, results, last = block.widths
    rows, block_k = tile["TILE_ROWS"], tile["BLOCK_K"]
    r, s = block.filter
    reads = block.rows_read(rows) * s / rows
    step = 32.0 * tile.num_warps * PER_STEP
    step += _pixels(tile) * block_k * (r * s + 1.5 * reads + PER_SUM)
    stored = min(results, tile["SPAN"] or tile["BLOCK_N"]) + last
    return int(-(-channels // block_k) * step + _pixels(tile) * stored * PER_RESULT)
