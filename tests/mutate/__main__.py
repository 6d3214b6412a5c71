"""`python -m tests.mutate`: mutants of this project, and whether its tests notice them.

Four mutants in five are changes of one line of host code that Cosmic Ray's operators make, the rest
are entries of the table of kernel edits. Each is judged by the tests that run the changed lines,
the fastest of each test function first, until one fails or the budget is used up. Which tests those
are is collected first, by one run of all tests (some 10 minutes of two cores), and kept in the
folder `--map`; afterwards only test files that changed are run again. Results are appended to the
file `--results`, and what is there is not judged again. The mutants in `equivalent.json` are left
out of the score.

    pip install -e '.[test,mutate]'
    python -m tests.mutate --jobs 2 --report benchmarks/results/mutation.md
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .mutant import Mutant
    from .score import Result

INSTALL = "tests.mutate needs Cosmic Ray and coverage.py: pip install -e '.[test,mutate]'"


def main(arguments: list[str] | None = None) -> int:
    """Judges mutants and prints the score; 1 where it is below `--at-least`."""
    options = _parser().parse_args(arguments)
    try:
        from . import covering, score
    except ImportError as error:
        if error.name not in ("cosmic_ray", "parso", "coverage"):
            raise
        raise SystemExit(INSTALL) from error
    for line in covering.collect(options.map, options.judges, options.jobs):
        print(line, file=sys.stderr, flush=True)
    mutants = _mutants(options)
    results = _judged(mutants, options)
    report = score.report([results[mutant.key] for mutant in mutants], options.seed)
    print(report)
    if options.report:
        options.report.write_text(report)
    return int(score.percent(results.values()) < options.at_least)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.mutate", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--mutants", type=int, default=300, metavar="N", help="how many (default: 300)")
    add("--seed", type=int, default=0, help="which ones (default: 0)")
    add("--only", default="", metavar="PATH", help="of files whose path starts like this")
    add("--judges", default="test_*.py", metavar="GLOB", help="files of tests/ (default: all)")
    add("--budget", type=float, default=60.0, metavar="SECONDS", help="of tests for one mutant")
    add("--jobs", type=int, default=1, metavar="N", help="processes (default: 1)")
    add("--map", type=Path, default=Path(".mutate/map"), metavar="FOLDER", help="of test runs")
    add("--results", type=Path, default=Path(".mutate/results.jsonl"), metavar="FILE")
    add("--again", action="store_true", help="judge those again that are alive in --results")
    add("--report", type=Path, metavar="FILE", help="where to write the score")
    add("--at-least", type=float, default=90.0, metavar="PERCENT", help="(default: 90)")
    return parser


def _mutants(options: argparse.Namespace) -> list[Mutant]:
    """Every fifth is a kernel's, as long as there are some."""
    from . import edits, sites

    kernel = edits.mutants(options.seed, options.only)[: options.mutants // 5]
    host = sites.host_mutants(options.seed, options.only)
    return [*kernel, *itertools.islice(host, options.mutants - len(kernel))]


def _judged(mutants: list[Mutant], options: argparse.Namespace) -> dict[str, Result]:
    """Results by the mutants' keys; each is appended to the file when it is there."""
    from . import covering, judge, score

    results = score.read(options.results)
    waiting = [
        mutant
        for mutant in mutants
        if mutant.key not in results
        or (options.again and results[mutant.key].outcome == score.ALIVE)
    ]
    tests = covering.Map(options.map, options.judges)
    excused = score.equivalents()
    started = time.monotonic()
    with judge.copies(options.jobs) as free, ThreadPoolExecutor(options.jobs) as pool:

        def run(mutant: Mutant) -> Result:
            if mutant.key in excused:
                return score.excused(mutant, excused[mutant.key])
            copy = free.get()
            groups = tests.judges(mutant, options.budget)
            verdict = judge.verdict_on(mutant, copy, groups, tests.seconds)
            free.put(copy)
            return score.result_of(mutant, verdict)

        for count, task in enumerate(as_completed(pool.submit(run, m) for m in waiting), 1):
            result = task.result()
            results[result.key] = result
            score.append(options.results, result)
            note = f"{count} of {len(waiting)}, {time.monotonic() - started:.0f} s: "
            print(f"{note}{result.outcome} {result.key}", file=sys.stderr, flush=True)
    return results


if __name__ == "__main__":
    sys.exit(main())
