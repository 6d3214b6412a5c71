"""How a seed becomes a case: a program, what it is called with, and what it is held to.

Every seed's network is compiled with all passes, and what is always promised is checked: shapes,
dtypes, values and the places of NaN and Inf against fp64, inputs untouched, results that share no
memory with anything. Of the groups of GROUP seeds, one in every

    2  is called again, for the same bits;          4  is compiled without passes;
    4  is called with other inputs;
    4  is compiled for a range of batches, and called with three of them;

six of 8 are compiled with one pass left out, in turn; two of 5 are called with strided inputs,
two of 5 with NaN and Inf (in fp32, and where no line spreads them), two of 7 compute in half
precision, and batches are 1, 2 and 3 in turn. The periods 8, 5, 7 and 3 have no common factor, so
that all combinations come up; 500 seeds leave out every pass.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from . import motifs, tokens
from .builder import Builder, UnsuitableError
from .contract import AGAIN, BATCHES, OPTIONAL, OTHER, UNFUSED, Case
from .lines import LINES

MOTIFS = (*motifs.MOTIFS, *tokens.MOTIFS)
GROUP = 20
"""Seeds side by side that share their batch, their dtype and how thoroughly they are checked, so
that they can be checked as one network."""
DTYPES = (None, None, None, torch.float16, None, None, torch.bfloat16)
MOST_LINES = 7
TRIES = 12
MOST_BEGINNINGS = 200
KINDS = (4, 4, 4, 5, 4, 4, 3, 5, 2, 4)
"""Ranks of the first input."""
SIDES = (2, 4, 5, 6, 7)
LEAVING_OUT = (0, 1, 2, 4, 5, 7)
"""Which of 8 groups do without a pass: some of each kind of checks."""
CHECKED = ((AGAIN,), (BATCHES,), (), (AGAIN, OTHER, UNFUSED))


def generate(seed: int) -> Case:
    """The network of a seed, and how it is called; always the same for the same seed.

    Neighbouring seeds begin with different lines, and those that begin with the same one take its
    alternatives in turn, so that some hundreds of them have all there are.
    """
    b = _begun(seed)
    leading = b.statements[-1].targets[0]
    wanted = min(len(b.statements) + b.random.randint(1, 3), max(MOST_LINES, len(b.statements)))
    for _ in range(TRIES):
        if len(b.statements) >= wanted:
            break
        _write(b, b.one(*LINES, b.one(*MOTIFS)))
    _results(b, leading)
    group = seed // GROUP
    dtype = b.dtype or DTYPES[group % len(DTYPES)]
    return Case(
        b.program(),
        seed=seed,
        dtype=dtype,
        special=b.special and dtype is None and group % 5 in (1, 2),
        strided=group % 5 in (0, 2),
        checks=CHECKED[group % len(CHECKED)],
        without=_left_out(group),
        dynamic=b.dynamic,
    )


def _left_out(group: int) -> str | None:
    """The pass that a group does without."""
    turn, place = divmod(group, 8)
    if place not in LEAVING_OUT:
        return None
    return OPTIONAL[(turn * len(LEAVING_OUT) + LEAVING_OUT.index(place)) % len(OPTIONAL)]


def _begun(seed: int) -> Builder:
    """The inputs and the first line; other inputs where the line does not suit them."""
    starts = (*LINES, *MOTIFS)
    rounds, place = divmod(seed, len(starts))
    first = starts[place]
    turn = rounds * starts.count(first) + starts[:place].count(first)
    chosen = random.Random(seed)
    for at in range(MOST_BEGINNINGS):
        b = Builder(chosen, seed // GROUP % 3 + 1, turn)
        if first in LINES or b.chance(0.3):
            _inputs(b, KINDS[(rounds + seed + at) % len(KINDS)] if first in LINES else 4)
        else:
            b.input(b.one(3, 8), b.one(6, 7), b.one(5, 8))
        if _write(b, first):
            b.turn = None
            return b
    raise AssertionError(f"seed {seed}: no inputs suit {first}")


def _write(b: Builder, line: Callable[[Builder], None]) -> bool:
    """Tries a line; what a motif had written before it failed stays."""
    for _ in range(3):
        try:
            line(b)
            return True
        except UnsuitableError:
            continue
    return False


def _inputs(b: Builder, rank: int) -> None:
    if rank == 2:
        shape: tuple[int, ...] = (b.one(5, 16),)
    elif rank == 3:
        shape = (b.one(1, 4, 6), b.one(7, 12, 19))
    elif rank == 5:
        shape = (b.one(1, 4), b.one(3, 4), b.one(3, 5), b.one(2, 4))
    else:
        shape = (b.one(1, 3, 5, 6, 8), b.one(*SIDES), b.one(*SIDES))
    b.input(*shape)
    if b.chance(0.3):
        b.input(*shape)


def _results(b: Builder, leading: str) -> None:
    """The last value, what motifs wanted, and sometimes another one, an input even. What the first
    line made is never dead: it is what the seed is for."""
    b.results.append(b.pick(2, 3, 4, 5) if b.chance(0.1) else b.statements[-1].targets[0])
    if b.chance(0.25):
        b.results.append(b.pick(2, 3, 4, 5))
    needed = b.program().pruned().statements
    if leading not in (name for statement in needed for name in statement.targets):
        b.results.append(leading)
