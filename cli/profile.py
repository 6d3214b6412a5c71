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
    from ..benchmarks.profile import Profile

REPEATS = 5
HEADINGS = ("kernel", "op", "configuration", ">us", ">share", ">GB/s", ">TFLOP/s", ">of bound")


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "profile", shared.compile_options(), help="time each kernel of a model",
        description="Times every kernel of a zoo model by itself: its share, GB/s, TFLOP/s and the "
        "share of what the hardware allows. In the interpreter the times are those of the CPU; for "
        "a GPU that is not here they are modelled, and say so.",
    )
    parser.add_argument("name", metavar="NAME", help=shared.MODEL)
    parser.add_argument("--repeats", metavar="N", type=shared.positive, default=REPEATS,
                        help=f"(default: {REPEATS})")
    parser.add_argument("--trace", metavar="FILE", type=Path,
                        help="write a trace for chrome://tracing")


def run(options: argparse.Namespace) -> int:
    """Profiles, and prints the kernels, the slowest first."""
    profile = _profile(options)
    if options.trace is not None:
        output.write_file(options.trace, json.dumps(profile.trace(), indent=1))
    if options.json:
        output.print_json(profile.as_json())
        return 0
    rows = [
        (line.name, line.op, line.config, f"{line.time_us:,.1f}", f"{line.share:.1%}",
         f"{line.gbps:,.1f}", f"{line.tflops:,.2f}",
         "-" if line.of_bound is None else f"{line.of_bound:.0%}")
        for line in profile.by_time()
    ]
    output.say(
        output.table(HEADINGS, rows),
        f"{profile.model}, batch {profile.batch}: {profile.total_us:,.1f} us in "
        f"{len(profile.lines)} steps ({profile.timed_on})",
    )
    return 0


def _profile(options: argparse.Namespace) -> Profile:
    """Raises: ConvloomError as compiling does; KernelError for a target without kernels."""
    import torch

    from ..benchmarks import profile
    from ..compiler.tuning.timers import can_measure
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
