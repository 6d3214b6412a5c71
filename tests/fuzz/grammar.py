"""How a seed becomes a case: a program, and what it is called with."""

from __future__ import annotations

import torch

from .builder import Builder, UnsuitableError
from .contract import Case
from .lines import LINES
from .motifs import MOTIFS

GROUP = 20
"""Seeds side by side that share their batch, their dtype and how thoroughly they are checked, so
that they can be checked as one network."""
DTYPES = (None, None, None, torch.float16, None, None, torch.bfloat16)
MOST_LINES = 7
TRIES = 12
KINDS = (4, 4, 4, 5, 4, 4, 3, 5, 2, 4)
"""Ranks of the first input."""
SIDES = (2, 4, 5, 6, 7)


def generate(seed: int) -> Case:
    """The network of a seed, and how it is called; always the same for the same seed.

    Neighbouring seeds begin with different lines, so that some hundreds of them reach all.
    """
    b = Builder(seed, batch=seed // GROUP % 3 + 1)
    starts = (*LINES, *MOTIFS)
    first = starts[seed % len(starts)]
    if first in LINES or b.chance(0.3):
        _inputs(b, 4 if first not in LINES else KINDS[(seed // len(starts) + seed) % len(KINDS)])
    else:
        b.input(b.one(3, 8), b.one(6, 7), b.one(5, 8))
    _write(b, first)
    wanted = min(len(b.statements) + b.random.randint(1, 3), max(MOST_LINES, len(b.statements)))
    for _ in range(TRIES):
        if len(b.statements) >= wanted:
            break
        _write(b, b.one(*LINES, b.one(*MOTIFS)))
    if not b.statements:
        b.let(f"torch.relu({b.inputs[0][0]})")
    _results(b)
    dtype = b.dtype or DTYPES[seed // GROUP % len(DTYPES)]
    return Case(
        b.program(),
        seed=seed,
        dtype=dtype,
        special=b.special and dtype is None and seed // GROUP % 3 == 1,
        strided=seed % 3 == 0,
        full=seed // GROUP % 5 == 0,
        dynamic=b.dynamic,
        again=seed // GROUP % 2 == 0,
    )


def _write(b: Builder, line: object) -> None:
    """Tries a line; what a motif had written before it failed stays."""
    assert callable(line)
    for _ in range(3):
        try:
            line(b)
            return
        except UnsuitableError:
            continue


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


def _results(b: Builder) -> None:
    """The last value, what motifs wanted, and sometimes another one, an input even."""
    b.results.append(b.pick(2, 3, 4, 5) if b.chance(0.1) else b.statements[-1].targets[0])
    if b.chance(0.25):
        b.results.append(b.pick(2, 3, 4, 5))
