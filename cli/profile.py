"""`convloom profile NAME`: where a model's time goes, kernel by kernel."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from . import files, networks, output
from . import options as shared

if TYPE_CHECKING:
    from ..benchmarks.profile import Profile

REPEATS = 5
HEADINGS = ("kernel", "op", "configuration", ">us", ">share", ">GB/s", ">TFLOP/s", ">of bound")


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "profile", shared.compile_options(), help="time each kernel of a model",
        description="Times every kernel of a model by itself: its share, GB/s, TFLOP/s and the "
        "share of what the hardware allows. In the interpreter and the emulator the times are "
        "those of the CPU; for a GPU that is not here they are modelled, and say so.",
    )
    parser.add_argument("name", metavar="NAME", help=shared.MODEL_OR_FILE)
    parser.add_argument("--repeats", metavar="N", type=shared.positive, default=REPEATS,
                        help=f"how often each kernel is timed (default: {REPEATS})")
    parser.add_argument("--trace", metavar="FILE", type=Path,
                        help="write a trace for ui.perfetto.dev")


def run(options: argparse.Namespace) -> int:
    profile = _profile(options)
    if options.trace is not None:
        output.write_file(options.trace, json.dumps(profile.trace(), indent=1))
    rows = [
        (line.name, line.op, line.config, f"{line.time_us:,.1f}", f"{line.share:.1%}",
         f"{line.gbps:,.1f}", f"{line.tflops:,.2f}",
         "-" if line.of_bound is None else f"{line.of_bound:.0%}")
        for line in profile.by_time()
    ]
    output.answer(
        options, profile.as_json(), output.table(HEADINGS, rows),
        f"{profile.model}, batch {profile.batch}: {profile.total_us:,.1f} us in "
        f"{len(profile.lines)} steps ({profile.timed_on})",
    )  # fmt: skip
    return 0


def _profile(options: argparse.Namespace) -> Profile:
    """Raises: ConvloomError as compiling does; KernelError for a target without kernels."""
    import torch

    from ..benchmarks import profile
    from ..compiler.tuning.timers import can_measure
    from ..kernels.contract import targets

    if shared.is_file(options.name):
        return _profile_file(options)
    network = networks.find(options.name, options)
    batch = network.batch(options.batch)
    target = targets.parse(shared.target(options))
    if target.has_times and not can_measure(target):
        _, plan, _ = networks.lower_for(network, batch, options)
        return profile.modelled(network.name, batch, plan)
    with output.working(f"compiling {network.name}"):
        executable = networks.compile_model(network, options, batch)
    x, keywords = networks.placed(executable)
    values = iter(networks.drawn(filter(torch.is_tensor, x)))
    x = tuple(next(values) if torch.is_tensor(each) else each for each in x)
    with output.working(f"timing {network.name}"):
        return profile.measured(
            network.name, batch, executable, executable.plan, (x, keywords), options.repeats
        )


def _profile_file(options: argparse.Namespace) -> Profile:
    """The kernels of a saved executable, in its configurations."""
    from ..benchmarks import profile
    from ..compiler.artifact.read import open_artifact
    from ..compiler.tuning.timers import can_measure
    from ..kernels.contract import targets

    shared.refuse_choices(options, "batch")
    artifact = open_artifact(options.name)
    if options.target in (None, *(each.target for each in artifact.programs)):
        program = files.pick(artifact, options)
        target = targets.parse(program.target)
        if target.is_gpu and not can_measure(target):
            plan = files.replanned(artifact, program).plan
            return profile.modelled(options.name, files.largest_batch(program), plan)
    executable, x, keywords = files.loaded(options, options.batch)
    again = executable.executables or (files.replanned(artifact, executable.plan),)
    plan = again[-1].plan
    batch = files.largest_batch(executable.plan)
    if executable.plan.batch is not None:
        batch = min(options.batch or batch, batch)
    with output.working(f"timing {options.name}"):
        given = (x, keywords)
        return profile.measured(options.name, batch, executable, plan, given, options.repeats)
