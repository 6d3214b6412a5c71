"""The speeds convloom is built for, beside what was measured: `python -m benchmarks.targets`.

fp16. A goal is a ratio to torch.compile with max-autotune at batch 256, or microseconds at batch 1,
on an H200. Measured figures are those of the reports below `results/` (`python -m benchmarks.zoo`
on a GPU), with the device they were measured on; until then a cell says so. Modelled times only
rank (`kernels/contract/cost_model.py`). Writes results/targets.md, and results/hopper.md: layer by
layer what the Hopper core and programmatic launches, only there where asked for, make of the plan.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from convloom.compiler.plan.plan import KernelStep
from convloom.kernels import registry
from convloom.kernels.contract import cost_model
from convloom.kernels.hopper import core

from . import fusion, report
from .bounds import BOUNDS
from .machine_info import git_hash
from .measure import Row

RESULTS = Path(__file__).resolve().parent / "results"
PEER = "inductor-max"
MISSING = "not measured"


@dataclass(frozen=True)
class Goal:
    """What is wanted of a model at a batch: at least `ratio` times the peer's speed, at least
    `share` of bound T, at most `time_us`."""

    model: str
    batch: int
    ratio: float | None = None
    share: float | None = None
    time_us: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.ratio is not None:
            parts.append(f"{self.ratio:g}x {PEER}")
        if self.share is not None:
            parts.append(f"{self.share:.0%} of bound T")
        if self.time_us is not None:
            parts.append(f"at most {self.time_us:g} us")
        return ", ".join(parts)


GOALS = (
    Goal("resnet50", 256, ratio=1.7, share=0.75),
    Goal("resnet18", 256, ratio=1.28),
    Goal("resnext50_32x4d", 256, ratio=1.9),
    Goal("inception_v3", 256, ratio=1.5),
    Goal("vgg_d", 256, ratio=1.19),
    Goal("googlenet", 256, ratio=1.9),
    Goal("mobilenet_v1", 256, ratio=1.9),
    Goal("mobilenet_v2", 256, ratio=3.5),
    Goal("resnet50", 1, time_us=135.0),
    Goal("mobilenet_v2", 1, time_us=88.0),
    Goal("vgg_d", 1, time_us=196.0),
)


def measured_rows(results: Path = RESULTS) -> list[Row]:
    """The fp16 rows of every report that a GPU wrote."""
    rows = [row for path in sorted(results.glob("*/zoo.json")) for row in report.read_rows(path)]
    return [row for row in rows if row.on_gpu and row.dtype == "float16"]


def verdict(goal: Goal, row: Row | None) -> tuple[str, str, str]:
    """What was measured, where, and whether it is what was wanted."""
    if row is None or row.ours.median_us is None:
        return MISSING, "-", MISSING
    told, reached = [f"{row.ours.median_us:.1f} us"], []
    peer = row.result(PEER)
    if goal.ratio is not None:
        ratio = peer.ratio if peer else None
        told.append(f"{ratio:.2f}x" if ratio else f"{PEER} {MISSING}")
        reached.append(ratio and ratio >= goal.ratio)
    if goal.share is not None:
        share = row.share_of(BOUNDS[goal.model].at(goal.batch)["T"])
        told.append(f"{share:.0%} of bound T" if share else f"bound {MISSING}")
        reached.append(share and share >= goal.share)
    if goal.time_us is not None:
        reached.append(row.ours.median_us <= goal.time_us)
    return ", ".join(told), row.device, "reached" if all(reached) else "missed"


def markdown(rows: list[Row]) -> str:
    """The table."""
    lines = [
        "# Targets (fp16)",
        "",
        f"Made by `python -m benchmarks.targets` at {git_hash()}. Goals are for an H200; modelled "
        "times are no measurements.",
        "",
        "| model | batch | goal | measured | on | verdict | modelled us (H200) | with the Hopper "
        "core, programmatic launches and clusters asked for | bound T us |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        row = next((r for r in rows if (r.model, r.batch) == (goal.model, goal.batch)), None)
        modelled = (sum(k.time_us for k in kernels(goal.model, goal.batch, way)) for way in CORES)
        cells = (
            goal.model, str(goal.batch), str(goal), *verdict(goal, row),
            *(f"{time_us:.0f}" for time_us in modelled),
            f"{BOUNDS[goal.model].at(goal.batch)['T']:.3g}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_where_time_goes()]) + "\n"


MODELLED_LIMITS_MS = {"vgg_d": 14.5, "resnet18": 2.1, "resnet50": 5.3}
"""Milliseconds that the plan at batch 256 may take by the model."""


def _where_time_goes() -> list[str]:
    """For each model at batch 256 what bounds its kernels by the model: where the next millisecond
    is."""
    lines = [
        "",
        "## Where the time goes (batch 256, by the model)",
        "",
        "What the slowest part of the machine is for each kernel, in microseconds of all of them: "
        "tensor cores, L2 (tiles read out of it), shared memory, instructions, memory (DRAM), "
        "latency, ends of tiles, launch.",
        "",
        "| model | kernels | modelled ms | at most | of which, us | longest kernels |",
        "|---|--:|--:|--:|---|---|",
    ]
    for model in dict.fromkeys(goal.model for goal in GOALS):
        made = kernels(model, 256)
        bounds: Counter[str] = Counter()
        for kernel in made:
            bounds[kernel.bound] += round(kernel.time_us)
        longest = sorted(made, key=lambda kernel: -kernel.time_us)[:4]
        limit = MODELLED_LIMITS_MS.get(model)
        cells = (
            model, str(len(made)), f"{sum(k.time_us for k in made) / 1e3:.2f}",
            str(limit or "-"), ", ".join(f"{name} {us}" for name, us in bounds.most_common()),
            ", ".join(f"{k.step.name} {k.time_us:.0f} ({k.bound})" for k in longest),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


CORES, EARLY = ("", "hopper"), "programmatic,clusters"
"""Values of CONVLOOM_CORE: as it comes, and asked for; and of CONVLOOM_LAUNCH in the latter."""
WAYS = ("", "cooperative", "ping-pong", "halo", "chain")


class Kernel(NamedTuple):
    """A kernel of a plan: its modelled time, that of its problem in plain Triton's default tile,
    what products or DRAM alone would take (`bounds.py`), and what it waits for."""

    step: KernelStep
    time_us: float
    plain_us: float
    bound_us: float
    bound: str


@lru_cache
def kernels(model: str, batch: int, asked: str = "") -> list[Kernel]:
    """Those of the plan for sm_90, with CONVLOOM_CORE as `asked`."""
    with mock.patch.dict(os.environ, CONVLOOM_CORE=asked, CONVLOOM_LAUNCH=asked and EARLY):
        plan = fusion.plan_at(fusion.captured_model(model, batch), "default")
    found: list[Kernel] = []
    for step in plan.steps:
        assert isinstance(step, KernelStep), step
        op, given = registry.get(step.op), (step.problem, plan.target)
        cost = op.cost(step.problem)
        early = EARLY if found else "clusters"  # No kernel runs before the first.
        with mock.patch.dict(os.environ, CONVLOOM_CORE="", CONVLOOM_LAUNCH=asked and early):
            plain_us = cost_model.problem_us(op, *given)
            time_us = cost_model.problem_us(op, *given, step.config)
            bound_us = max(cost.flops / 790e6, cost.size_bytes / 4.3e6)
            bound = cost_model.bound(op, *given, step.config)
            found.append(Kernel(step, time_us, plain_us, bound_us, bound))
    return found


def core_markdown() -> str:
    """What the Hopper core makes of each layer at batch 256, and of ResNet-50 at batch 1."""
    lines = [
        "# The Hopper core by the model (fp16, sm_90)\n",
        "Made by `python -m benchmarks.targets`. Microseconds by the cost model for an H200, not "
        "measured: no GPU has run the core, used only with `CONVLOOM_CORE=hopper`, here also with "
        "`CONVLOOM_LAUNCH=programmatic,clusters`. Plain: Triton's default tile. Bound: products at "
        "790 TFLOP/s or DRAM at 4.3 TB/s, whichever is more; the model's tensor cores reach 865, "
        "which no published kernel does (808), so that some layers are modelled below their bound.",
    ]
    for model, batch in [*((name, 256) for name in MODELLED_LIMITS_MS), ("resnet50", 1)]:
        columns = "| kernel | result | plain | planned | core | bound | waits for |"
        lines += [f"\n## {model}, batch {batch}\n", columns, "|---|---|--:|--:|---|--:|---|"]
        found = kernels(model, batch, "hopper")
        for step, time_us, plain_us, bound_us, bound in found:
            way = WAYS[dict(step.config.blocks).get(core.BLOCK, 0)]
            why = way or step.chosen_by.partition("; ")[2] or "plain core: nothing is multiplied"
            result = "x".join(map(str, step.problem.output.shape[1:]))
            lines.append(
                f"| {step.name} | {result} | {plain_us:.0f} | {time_us:.0f} | {why} "
                f"| {bound_us:.0f} | {bound} |"
            )
        time_us, plain_us, bound_us = (sum(k[at] for k in found) for at in (1, 2, 3))
        lines.append(f"| all | | {plain_us:.0f} | {time_us:.0f} | | {bound_us:.0f} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes the tables."""
    for name, text in (("targets", markdown(measured_rows())), ("hopper", core_markdown())):
        report.write_text(RESULTS / f"{name}.md", text)
        print(text)


if __name__ == "__main__":
    main()
