"""`convloom bench`: models against PyTorch and torch.compile, measured in turns."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..benchmarks.options import MODELS, add_options
from . import output
from .options import json_option

if TYPE_CHECKING:
    from rich.table import Table

    from ..benchmarks.measure import Row
    from .options import SubParsers


def configure(commands: SubParsers) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "bench",
        help="time models against PyTorch and torch.compile",
        description="Times zoo models on this machine's GPU against peers that are set up at their "
        "best, all in turns: median and spread with a cold and a warm L2 cache, images per second, "
        "the ratio to each peer, the share of what the hardware allows, memory, compile time, and "
        "errors against fp64. Without a GPU, --target interpreter or reference times the CPU.",
        parents=[json_option()],
    )
    add_options(parser)
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="write JSON, CSV, Markdown and plots there"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measures, and prints the table and where we lose."""
    from ..benchmarks import report
    from ..benchmarks import zoo as benchmark

    choices = benchmark.choices_of(options)
    names = options.names or MODELS
    # Compilers print; --json answers with JSON and nothing else.
    with _telling() as tell, redirect_stdout(sys.stderr):
        rows = benchmark.bench(names, choices, options.output, resume=options.resume, tell=tell)
    if options.json:
        output.print_json(report.as_json(rows, choices))
        return 0
    _print(rows)
    return 0


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """Shows on stderr what is being done."""
    notes = output.console(stderr=True)
    if not notes.is_terminal:
        yield lambda text: notes.print(text, markup=False)
        return
    with notes.status("starting") as status:
        yield status.update


def _print(rows: list[Row]) -> None:
    from ..benchmarks import report

    console = output.console()
    console.print(report.note(rows[0]).replace("**", ""), markup=False)
    console.print(_table(rows, report, details=False))
    console.print(_table(rows, report, details=True))
    for each in report.absences(rows):
        console.print(f"not measured: {each}", markup=False)
    losses = report.losses(rows)
    console.print("Where we lose:" if losses else "Where we lose: nowhere", markup=False)
    for line in losses:
        console.print(f"  {line}", markup=False)


def _table(rows: list[Row], report: Any, details: bool) -> Table:
    """The figures, or the details behind them; columns without any figure are left out."""
    from rich.table import Table

    lines = [report.headings(rows), *(report.cells(row) for row in rows)]
    columns = [
        column
        for at, column in enumerate(zip(*lines, strict=True))
        if at < 2 or ((column[0] in report.DETAILS) == details and set(column[1:]) != {"-"})
    ]
    table = Table(*(column[0] for column in columns))
    for line in list(zip(*columns, strict=True))[1:]:
        table.add_row(*line)
    return table
