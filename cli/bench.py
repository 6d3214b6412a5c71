"""`convloom bench`: models against PyTorch and torch.compile, measured in turns."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from .. import zoo
from ..benchmarks.options import MODELS, add_options
from . import files, networks, output
from . import options as shared

if TYPE_CHECKING:
    from rich.table import Table

    from ..benchmarks.measure import Other, Row


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "bench", help="time models against PyTorch and torch.compile",
        description="Times models on this machine's GPU against peers that are set up at their "
        "best, all in turns: median and spread with a cold and a warm L2 cache, images per second, "
        "the ratio to each peer, the share of what the hardware allows, memory, compile time, and "
        "errors against fp64. Without a GPU, --target interpreter or reference times the CPU.",
    )
    add_options(parser, f"{shared.MODEL_OR_FILE}, by itself")
    shared.add_input(parser)
    parser.add_argument(
        "--output", metavar="FOLDER", type=Path, help="write JSON, CSV, Markdown and plots there"
    )


def run(options: argparse.Namespace) -> int:
    from ..benchmarks import report
    from ..benchmarks import zoo as benchmark

    choices = benchmark.choices_of(options)
    names = options.names or MODELS
    others = {name: _other(name, options) for name in names if name not in zoo.names()}
    # Compilers print; --json answers with JSON and nothing else.
    with output.working("the benchmark") as work, redirect_stdout(sys.stderr):

        def tell(text: str) -> None:
            work.what = text
            if not sys.stderr.isatty():
                output.say(f"{text} ...", stderr=True)

        rows = benchmark.bench(
            names, choices, options.output, resume=options.resume, tell=tell, others=others
        )
    output.answer(
        options,
        report.as_json(rows, choices),
        report.note(rows[0]).replace("**", ""),
        *(_table(rows, details) for details in (False, True)),
        *(f"not measured: {reason}" for reason in report.absences(rows)),
        *report.where_we_lose(rows, "  ", "Where we lose:", "  nowhere"),
    )
    return 0


def _other(name: str, options: argparse.Namespace) -> Other:
    """What is measured under a name that is no model of the zoo."""
    import torch

    from ..benchmarks.measure import GraphModule, OfTensors, Other

    if not shared.is_file(name):
        network = networks.find(name, options)
        is_plain = not network.keywords and all(map(torch.is_tensor, network.arguments))
        model = network.model if is_plain else OfTensors(network.model, network.example())
        return Other(model, network.tensors)
    executable, *_ = files.loaded(shared.changed(options, name=name))
    planned = files.replanned(executable.artifact, executable.plan)
    given = [port.spec for port in executable.inputs]
    example = tuple(torch.zeros(spec.shape, dtype=spec.dtype) for spec in given)
    saved = networks.Network(name, GraphModule(planned.graph, executable.interface), example)
    floats = [spec.dtype for spec in given if spec.dtype.is_floating_point]
    return Other(saved.model, saved.tensors, executable, planned.plan, *floats[:1])


def _table(rows: list[Row], details: bool) -> Table:
    """The figures, or the details behind them; columns without any figure are left out."""
    from ..benchmarks import report

    columns = [
        column
        for at, column in enumerate(
            zip(report.headings(rows), *map(report.cells, rows), strict=True)
        )
        if at < 2 or ((column[0] in report.DETAILS) == details and set(column[1:]) != {"-"})
    ]
    headings, *lines = zip(*columns, strict=True)
    return output.table(headings, lines)
