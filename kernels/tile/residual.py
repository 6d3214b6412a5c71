"""A residual that is read before the loop of a matrix product instead of behind it.

    y = act(x wᵀ + b + r)

Behind the loop a tile has nothing else to do while it waits for its part of r. A configuration may
have the sums begin with it instead: acc = r; acc += x wᵀ. What holds r is then what holds the sums,
so that no register is taken (through descriptors on sm_90, 128x256 with 8 warps: 227 where the
usual epilogue takes 244), and it is waited for while the first copies of x and w are made ready.
(To hold it beside the sums and add it behind the loop would hide it better, and costs half a
register for each: 128x128 with 8 warps takes 146 instead of 128, and one program instead of two
fits a multiprocessor; larger tiles spill.)

Sums are the same in another fp32 order. No model here tells which is faster: a block of the
configuration for the tuner, and never a default. The order of loads is that of sm_90 code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import triton
import triton.language as tl

from ..contract import epilogue as ep
from ..contract.op import Config, Problem
from .geometry import Output

BLOCK = "RESIDUAL_FIRST"
STAGES = 3
"""Of the configurations that are also tried with the residual first: one number of stages is enough
to tell whether it helps."""


@triton.jit
def begin(rows, columns, row_mask, column_mask, extras, RESIDUAL: tl.constexpr, TILE: tl.constexpr):
    """What the sums of a tile begin with: fp32 [M, N]. Another kernel wrote the residual: this
    comes behind the wait for it (`programmatic_launch.py`)."""
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    acc = tl.zeros((M, N), tl.float32)
    if RESIDUAL is not None:
        acc += RESIDUAL(rows, columns, row_mask, column_mask, extras).to(tl.float32)
    return acc


def comes_first(tile: Config) -> bool:
    """Whether a configuration's sums begin with the residual."""
    return bool(dict(tile.blocks).get(BLOCK, 0))


def operand_of(problem: Problem) -> int | None:
    """The first operand of the epilogue that has the output's shape and is added before anything
    but additions happens; None where there is none."""
    index = 0
    for at, stage in enumerate(problem.epilogue):
        if stage.name != "add" or stage.channels is not None:
            return None
        if stage.operands:
            if problem.operands[index].shape == problem.output.shape:
                # What the chain was before is no longer there to be read.
                return None if ep.read_before(problem.epilogue, at + 1) else index
            index += 1
    return None


def legal(problem: Problem, tile: Config) -> str | None:
    """Why a configuration cannot read the residual first, or None; also where it does not."""
    split = dict(tile.blocks).get("SPLIT", 1)
    if not comes_first(tile):
        return None
    if operand_of(problem) is None:
        return (
            f"{BLOCK}: the epilogue does not begin with additions among which there is a tensor of "
            "the output's shape"
        )
    if split > 1:
        return f"{BLOCK}: {split} programs share each sum, and each of them would read all of it"
    return None


def variants(problem: Problem, tiles: Iterable[Config]) -> Iterator[Config]:
    """Those of the configurations that may read the residual first, so."""
    for tile in tiles:
        early = replace(tile, blocks=(*tile.blocks, (BLOCK, 1)))
        if tile.num_stages == STAGES and legal(problem, early) is None:
            yield early


def output_of(problem: Problem, tile: Config) -> tuple[Output, ep.GeneratedFunction | None]:
    """The output with its epilogue and, where the residual comes first, how it is read; the
    epilogue is without it then."""
    out = problem.output.spec
    reads = tuple(ep.access(operand, out) for operand in problem.operands)
    sizes = ep.memory_sizes(out)
    index = operand_of(problem) if comes_first(tile) else None
    epilogue = ep.generate(problem.epilogue, reads, sizes, without=index)
    first = None if index is None else ep.loader("residual", index, sizes, reads[index])
    return Output.of(problem.output, epilogue), first
