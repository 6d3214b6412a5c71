"""A residual that is read before the loop of a matrix product instead of behind it.

    y = act(x wᵀ + b + r)

Behind the loop a tile has nothing else to do while it waits for its part of r. A configuration may
have it read earlier, in one of two ways:

- `BEGIN`: the sums begin with it, acc = r; acc += x wᵀ. It leaves no registers to hold (through
  descriptors on sm_90, 128x256 with 8 warps: 227 where the usual epilogue takes 244), but is waited
  for before the first copies of x and w are even asked for: it is one more latency in front.
- `HOLD`: it is loaded before the loop and added behind it. Its loads and those copies are under way
  together and nothing waits for it; it costs half a register for each accumulator (128x128 with 8
  warps: 146 instead of 128).

Sums are the same in another fp32 order. No model here tells which of the three is faster: a block
of the configuration for the tuner, and never a default. The order of loads is that of sm_90 code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from . import epilogue as ep
from .op import Config, Problem

BLOCK = "RESIDUAL_FIRST"
BEGIN = tl.constexpr(1)
HOLD = tl.constexpr(2)
WAYS = (HOLD.value, BEGIN.value)
MOST_HELD = {torch.float32: 16}
"""Accumulators of one thread beside which the residual can be held; 64 where it is not in this
table (fp32 with 64 through descriptors spills 96 bytes on sm_90, with 32 on sm_100 8 bytes)."""
STAGES = 3
"""Of the configurations that are also tried with the residual first: one number of stages is enough
to tell whether it helps."""


@triton.jit
def load(rows, columns, row_mask, column_mask, extras, RESIDUAL: tl.constexpr):
    """The residual's part of a tile in its own dtype; something small where it is not read first.
    Another kernel wrote it: this comes behind `dependent.wait`."""
    part = tl.zeros((1, 1), tl.float32)
    if RESIDUAL is not None:
        part = RESIDUAL(rows, columns, row_mask, column_mask, extras)
    return part


@triton.jit
def begin(part, FIRST: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What the sums of a tile begin with: fp32 [BLOCK_M, BLOCK_N]."""
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if FIRST == BEGIN:
        acc += part.to(tl.float32)
    return acc


@triton.jit
def end(acc, part, FIRST: tl.constexpr):
    """The sums of a tile with the part that was held meanwhile."""
    if FIRST == HOLD:
        acc += part.to(tl.float32)
    return acc


def way_of(tile: Config) -> int:
    """How a configuration reads the residual: 0 behind the loop, else one of `WAYS`."""
    return dict(tile.blocks).get(BLOCK, 0)


def operand_of(problem: Problem) -> int | None:
    """The first operand of the epilogue that has the output's shape and is added before anything
    but additions happens; None where there is none."""
    index = 0
    for stage in problem.epilogue:
        if stage.name != "add" or stage.channels is not None:
            return None
        if stage.takes_operand:
            if problem.operands[index].shape == problem.output.shape:
                return index
            index += 1
    return None


def legal(problem: Problem, tile: Config) -> str | None:
    """Why a configuration cannot read the residual first, or None; also where it does not."""
    way, split = way_of(tile), dict(tile.blocks).get("SPLIT", 1)
    if not way:
        return None
    if way not in WAYS:
        return f"{BLOCK}={way}; it is {BEGIN.value} (begin with it) or {HOLD.value} (hold it)"
    if operand_of(problem) is None:
        return (
            f"{BLOCK}: the epilogue does not begin with additions among which there is a tensor of "
            "the output's shape"
        )
    if split > 1:
        return f"{BLOCK}: {split} programs share each sum, and each of them would read all of it"
    sums = tile["BLOCK_M"] * tile["BLOCK_N"] // (32 * tile.num_warps)
    most = MOST_HELD.get(problem.inputs[0].spec.dtype, 64)
    if way == HOLD.value and sums > most:
        return f"{BLOCK}: {sums} accumulators per thread; beside more than {most} it cannot be held"
    return None


def variants(problem: Problem, tiles: Iterable[Config]) -> Iterator[Config]:
    """Those of the configurations that may read the residual first, so."""
    for tile in tiles:
        for way in WAYS if tile.num_stages == STAGES else ():
            early = replace(tile, blocks=(*tile.blocks, (BLOCK, way)))
            if legal(problem, early) is None:
                yield early


def constants(problem: Problem, tile: Config) -> dict[str, Any]:
    """What a kernel needs to know: how the residual is read, and the epilogue without it."""
    out = problem.output.spec
    reads = tuple(ep.access(operand, out) for operand in problem.operands)
    sizes, way = ep.memory_sizes(out), way_of(tile)
    index = operand_of(problem) if way else None
    return {
        "EPILOGUE": ep.generate(problem.epilogue, reads, sizes, without=index),
        "RESIDUAL": None if index is None else ep.loader("residual", index, sizes, reads[index]),
        BLOCK: way,
    }
