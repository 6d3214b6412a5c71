"""convloom against its peers over the zoo: `python -m benchmarks.zoo`, or `convloom bench`.

Writes zoo.json, zoo.csv, zoo.md and plots (speed-ups of a GPU only) after each model, and goes on
where an earlier run stopped. The defaults are the full benchmark of a GPU; without one, `--target
interpreter` or `--target reference` times the CPU, so that everything but the figures can be tried.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from convloom.errors import ConvloomError

from . import measure, report
from .machine_info import git_hash
from .measure import Choices, Other, Row
from .options import MODELS, add_options, peers_of

RESULTS = Path(__file__).resolve().parent / "results"


def bench(
    names: Sequence[str],
    choices: Choices,
    folder: Path | None = None,
    *,
    resume: bool = False,
    tell: Callable[[str], None] = lambda text: None,
    others: Mapping[str, Other] = {},
) -> list[Row]:
    """A row for each model and batch; with a folder, the report is rewritten after each. others:
    what names stand for that are not of the zoo.

    resume: rows of the folder's report that were measured on this device with these choices and
    these sources are taken over; others are measured again.

    Raises: InvalidInputError and TargetUnavailableError before anything is measured; ArtifactError
    where the report cannot be read or written.
    """
    measure.check(names, choices, others)
    device = measure.device_for(choices.target)
    before = report.read_rows(folder / "zoo.json") if folder is not None and resume else []
    kept = {_key(row): row for row in before if _fits(row, choices, device.name)}
    rows = []
    for name in dict.fromkeys(names):
        for batch in choices.batches:
            row = kept.get((name, batch))
            if row is None:
                row = measure.measured(name, batch, choices, device, tell, others.get(name))
            kept[_key(row)] = row
            rows.append(row)
            if folder is not None:
                report.write(folder, list(kept.values()), choices)
    return rows


def _key(row: Row) -> tuple[str, int]:
    return row.model, row.batch


def _fits(row: Row, choices: Choices, device: str) -> bool:
    """Whether a row may stand in one table with what is measured now."""
    # Records and reports are files of the repository: writing them makes it differ from its commit.
    had = (row.dtype, row.target, row.device, row.tuning, row.git.removesuffix("-dirty"))
    commit = git_hash().removesuffix("-dirty")
    asked = (choices.kind, choices.target, device, choices.tuning, commit)
    return had == asked and tuple(each.name for each in row.results[1:]) == choices.against


def choices_of(options: argparse.Namespace) -> Choices:
    """The parsed options."""
    return Choices(
        tuple(dict.fromkeys(options.batch)),
        getattr(torch, options.dtype),
        options.target,
        peers_of(options.against),
        options.tuning,
        options.seconds,
        options.precision,
    )


def main() -> int:
    """Measures, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser)
    parser.add_argument("--output", type=Path, help="folder (default: results/DEVICE)")
    options = parser.parse_args()
    choices = choices_of(options)
    names = options.names or MODELS
    try:
        measure.check(names, choices)
        device = measure.device_for(choices.target)
        folder = options.output or RESULTS / report.slug(device.name)
        rows = bench(names, choices, folder, resume=options.resume, tell=_tell)
    except ConvloomError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report.as_markdown(rows))
    return 0


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
