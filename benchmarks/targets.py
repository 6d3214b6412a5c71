"""The speeds convloom is built for, beside what was measured: `python -m benchmarks.targets`.

fp16. A goal is a ratio to torch.compile with max-autotune at batch 256, or microseconds at batch 1,
on an H200. Measured figures are those of the reports below `results/` (`python -m benchmarks.zoo`
on a GPU), with the device they were measured on; until then a cell says so. Modelled times only
rank (`kernels/contract/cost_model.py`). Writes results/targets.md.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from convloom.compiler.plan.plan import KernelStep, Plan
from convloom.kernels import registry
from convloom.kernels.contract import cost_model

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
        "| model | batch | goal | measured | on | verdict | modelled us (H200) | bound T us |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for goal in GOALS:
        row = next((r for r in rows if (r.model, r.batch) == (goal.model, goal.batch)), None)
        plan = fusion.plan_at(fusion.captured_model(goal.model, goal.batch), "default")
        modelled_us = fusion.row(goal.model, goal.batch, "all", plan).modelled_us
        cells = (
            goal.model, str(goal.batch), str(goal), *verdict(goal, row), f"{modelled_us:.0f}",
            f"{BOUNDS[goal.model].at(goal.batch)['T']:.3g}",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, *_where_time_goes()]) + "\n"


MODELLED_LIMITS_MS = {"vgg_d": 14.5, "resnet18": 2.1, "resnet50": 5.3}
"""Milliseconds that the plan at batch 256 may take by the model."""
SHOWN = 4
"""Kernels of a model that are named, those that take longest."""


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
        plan = fusion.plan_at(fusion.captured_model(model, 256), "default")
        kernels = [_Kernel.of(step, plan) for step in plan.steps if isinstance(step, KernelStep)]
        bounds: Counter[str] = Counter()
        for kernel in kernels:
            bounds[kernel.bound] += round(kernel.time_us)
        longest = sorted(kernels, key=lambda kernel: -kernel.time_us)[:SHOWN]
        limit = MODELLED_LIMITS_MS.get(model)
        cells = (
            model, str(len(kernels)), f"{sum(k.time_us for k in kernels) / 1e3:.2f}",
            str(limit or "-"), ", ".join(f"{name} {us}" for name, us in bounds.most_common()),
            ", ".join(f"{k.module} {k.time_us:.0f} ({k.bound})" for k in longest),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return lines


@dataclass(frozen=True)
class _Kernel:
    """A kernel of a plan with its modelled time."""

    module: str
    time_us: float
    bound: str

    @staticmethod
    def of(step: KernelStep, plan: Plan) -> _Kernel:
        op = registry.get(step.op)
        time_us = cost_model.problem_us(op, step.problem, plan.target, step.config)
        bound = cost_model.bound(op, step.problem, plan.target, step.config)
        return _Kernel(step.name, time_us, bound)


def main() -> None:
    """Writes the table."""
    text = markdown(measured_rows())
    report.write_text(RESULTS / "targets.md", text)
    print(text)


if __name__ == "__main__":
    main()
