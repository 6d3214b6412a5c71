"""`convloom profile NAME`: where a model's time goes, kernel by kernel."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from .. import zoo
from . import models, output
from . import options as shared

if TYPE_CHECKING:
    from rich.table import Table

    from ..benchmarks.profile import Profile
    from .options import SubParsers

REPEATS = 5


def configure(commands: SubParsers) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "profile",
        help="time each kernel of a model",
        description="Times every kernel of a zoo model by itself: its share, GB/s, TFLOP/s and the "
        "share of what the hardware allows. In the interpreter the times are those of the CPU; for "
        "a GPU that is not here they are modelled, and say so.",
        parents=[shared.compile_options(), shared.json_option()],
    )
    parser.add_argument("name", metavar="NAME", help=models.NAME_HELP)
    parser.add_argument(
        "--repeats", metavar="N", type=_count, default=REPEATS, help=f"(default: {REPEATS})"
    )
    parser.add_argument(
        "--trace", metavar="FILE", type=Path, help="write a trace for chrome://tracing"
    )
    parser.set_defaults(run=run)


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text!r}")
    return int(text)


def run(options: argparse.Namespace) -> int:
    """Profiles, and prints the kernels, the slowest first."""
    found = _profile(options)
    if options.trace is not None:
        text = json.dumps(found.trace(), indent=1)
        output.write_file(options.trace, lambda file: file.write(text.encode()))
    if options.json:
        output.print_json(found.as_json())
        return 0
    console = output.console()
    console.print(_table(found))
    console.print(
        f"{found.model}, batch {found.batch}: {found.total_us:,.1f} us in {len(found.lines)} steps "
        f"({found.timed_on})",
        markup=False,
    )
    return 0


def _profile(options: argparse.Namespace) -> Profile:
    """Raises: ConvloomError as compiling does; KernelError for a target without kernels."""
    import torch

    from ..benchmarks import profile
    from ..compiler.tuning.judges import can_measure
    from ..kernels.contract import targets

    entry = zoo.entry(options.name)
    target = targets.parse(shared.target(options))
    if target.is_gpu and not can_measure(target):
        _, plan, _ = models.lower_model(options, options.batch)
        return profile.modelled(entry.name, options.batch, plan)
    with output.working(f"compiling {entry.name}"):
        executable = models.compile_model(options, options.batch, weights=None)
    generator = torch.Generator().manual_seed(models.SEED)
    x = torch.randn(options.batch, *entry.input_shape, generator=generator)
    with output.working(f"timing {entry.name}"):
        where = "cuda" if target.is_gpu else "cpu"
        return profile.measured(entry.name, executable, x.to(where), options.repeats)


def _table(found: Profile) -> Table:
    from rich.table import Table

    right = ("us", "share", "GB/s", "TFLOP/s", "of bound")
    table = Table("kernel", "op", "configuration")
    for heading in right:
        table.add_column(heading, justify="right")
    for line in found.by_time():
        table.add_row(
            line.name,
            line.op,
            line.config,
            f"{line.time_us:,.1f}",
            f"{line.share:.1%}",
            f"{line.gbps:,.1f}",
            f"{line.tflops:,.2f}",
            "-" if line.of_bound is None else f"{line.of_bound:.0%}",
        )
    return table
