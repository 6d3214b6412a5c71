"""`python -m tests.fuzz --seeds 0:10000`: random networks, in the root of the project.

Each broken promise is shrunk and printed as a module that shows it; exit status 1 where there is
one. `--full` holds every network to the whole contract, with all batches and with one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..harness import Interpreter
    from .contract import Case

Job = tuple[range, bool, bool, str | None]
"""Seeds; whether to hold them to everything, whether to shrink; a generation to emulate."""
GENERATIONS = ("sm_80", "sm_86", "sm_89", "sm_90")


def main(arguments: list[str] | None = None) -> int:
    """Runs the seeds; 1 where a network broke a promise."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("CONVLOOM_CHECK", "2")
    work = [
        (group, options.full, not options.no_shrink, options.emulate)
        for group in _groups(*options.seeds)
    ]
    total, done, broken = options.seeds[1] - options.seeds[0], 0, 0
    started = time.monotonic()
    for count, reports in _results(work, options.jobs):
        done += count
        broken += len(reports)
        for report in reports:
            print(report, flush=True)
        left = (time.monotonic() - started) / done * (total - done)
        note = f"{done} of {total} networks, {broken} broken, {left:.0f} s left"
        print(f"\r{note}   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{done} networks in {time.monotonic() - started:.0f} s, {broken} broken")
    return int(broken > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seeds", type=_seeds, default=(0, 500), metavar="FIRST:LAST",
                        help="the last one is not run (default: 0:500)")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--full", action="store_true", help="the whole contract for every seed")
    parser.add_argument("--emulate", metavar="GENERATION", choices=GENERATIONS,
                        help="compile for these GPUs and emulate them: " + ", ".join(GENERATIONS)
                        + " (default: interpret)")  # fmt: skip
    parser.add_argument("--no-shrink", action="store_true", help="print networks as they are")
    return parser


def _seeds(text: str) -> tuple[int, int]:
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise argparse.ArgumentTypeError(f"expected FIRST:LAST, such as 0:10000; got {text!r}")
    return int(first), int(last)


def _groups(first: int, last: int) -> Iterator[range]:
    """Seeds that are checked as one network."""
    from .grammar import GROUP

    while first < last:
        stop = min(last, (first // GROUP + 1) * GROUP)
        yield range(first, stop)
        first = stop


def _results(
    work: list[Job], jobs: int
) -> Iterator[tuple[int, list[str]]]:
    if jobs == 1:
        yield from map(_run, work)
        return
    # Under its own name: a spawned process does not run `__main__` of a package again.
    from . import __main__ as module

    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(module._run, work)


def _run(job: Job) -> tuple[int, list[str]]:
    """How many networks were run, and what is wrong with some of them."""
    import torch

    from ..harness import INTERPRETED, Emulator
    from .contract import BrokenError, check_many
    from .grammar import generate

    seeds, full, shrinks, generation = job
    device = Emulator(generation) if generation else INTERPRETED
    torch.set_num_threads(1)
    reports = []
    for cases in _held(list(map(generate, seeds)), full):
        try:
            check_many(cases, device)
        except BrokenError as error:
            reports += list(_broken(cases, shrinks, device)) or [f"only together: {error}"]
    return len(seeds), reports


def _held(cases: list[Case], full: bool) -> list[list[Case]]:
    """The cases as they are; or all with everything, compiled for one batch and for a range."""
    from .contract import BATCHES, CHECKS, OPTIONAL
    from .grammar import GROUP

    if not full:
        return [cases]
    left = OPTIONAL[cases[0].seed // GROUP % len(OPTIONAL)]
    rest = tuple(check for check in CHECKS if check != BATCHES)
    ways = (rest, CHECKS)
    return [[replace(case, checks=way, without=left) for case in cases] for way in ways]


def _broken(cases: list[Case], shrinks: bool, device: Interpreter) -> Iterator[str]:
    from .contract import BrokenError, check
    from .shrink import shrink

    for case in cases:
        try:
            check(case, device)
        except BrokenError as error:
            smallest = shrink(case, device=device) if shrinks else case
            yield f"\n# seed {case.seed}: {error}\n{smallest.source()}"


if __name__ == "__main__":
    sys.exit(main())
