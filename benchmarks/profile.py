"""Where a network's time goes, kernel by kernel: measured on a device, or modelled where there is
none. Tables, and traces for chrome://tracing and Perfetto.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from convloom.compiler.artifact.load import LoadedExecutable
from convloom.compiler.plan.plan import KernelStep, Plan
from convloom.compiler.records import rank
from convloom.compiler.run.executable import Executable
from convloom.kernels import registry

from .measure import roofline_us

MODELLED = "modelled, not measured"


@dataclass(frozen=True)
class Line:
    """One step of a plan. share: of the sum of all; bound_us: the longer of its products and its
    DRAM traffic at the machine's full rate, None where the time is not that machine's."""

    name: str
    op: str
    module_path: str
    config: str
    chosen_by: str
    time_us: float
    share: float
    flops: int
    size_bytes: int
    launches: int
    bound_us: float | None

    @property
    def gbps(self) -> float:
        """Gigabytes per second, each tensor touched once."""
        return self.size_bytes / max(self.time_us, 1e-9) / 1e3

    @property
    def tflops(self) -> float:
        """Achieved TFLOP/s."""
        return self.flops / max(self.time_us, 1e-9) / 1e6

    @property
    def of_bound(self) -> float | None:
        """Bound over time; 1 is all that the machine allows."""
        return None if self.bound_us is None else self.bound_us / max(self.time_us, 1e-9)

    def as_json(self) -> dict[str, Any]:
        """Plain data, rates included."""
        return {
            **asdict(self), "gbps": self.gbps, "tflops": self.tflops, "of_bound": self.of_bound,
        }  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """The steps in the order in which they run. timed_on: what the times are those of, in words."""

    model: str
    batch: int
    timed_on: str
    lines: tuple[Line, ...]

    @property
    def total_us(self) -> float:
        """The sum of all steps: without what lies between them, and what overlaps."""
        return sum(line.time_us for line in self.lines)

    def by_time(self) -> list[Line]:
        """The slowest first."""
        return sorted(self.lines, key=lambda line: -line.time_us)

    def as_json(self) -> dict[str, Any]:
        """Plain data, in the order of the plan."""
        return {
            "model": self.model,
            "batch": self.batch,
            "timed_on": self.timed_on,
            "total_us": self.total_us,
            "kernels": [line.as_json() for line in self.lines],
        }

    def trace(self) -> dict[str, Any]:
        """The steps end to end, in Chrome's trace event format, which Perfetto reads too."""
        names = {"process_name": f"{self.model}, batch {self.batch}", "thread_name": self.timed_on}
        events: list[dict[str, Any]] = [
            {"name": kind, "ph": "M", "pid": 0, "tid": 0, "args": {"name": name}}
            for kind, name in names.items()
        ]
        at = 0.0
        for line in self.lines:
            events.append(
                {
                    "name": line.name,
                    "cat": line.op,
                    "ph": "X",
                    "ts": at,
                    "dur": line.time_us,
                    "pid": 0,
                    "tid": 0,
                    "args": line.as_json(),
                }
            )
            at += line.time_us
        about = {"model": self.model, "batch": self.batch, "timed_on": self.timed_on}
        return {"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}


def measured(
    name: str,
    batch: int,
    executable: Executable | LoadedExecutable,
    plan: Plan,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    repeats: int,
) -> Profile:
    """The median of several runs of each step by itself, after one to warm up. plan: of the
    executable; inputs: arguments and keywords of a call.

    Raises: KernelError for a target whose steps cannot be timed.
    """
    arguments, keywords = inputs
    executable.profile(*arguments, **keywords)
    runs = [_summed(executable.profile(*arguments, **keywords)) for _ in range(repeats)]
    times = {step: statistics.median(run[step] for run in runs) for step in runs[0]}
    where = executable.ledger.measured_on
    return _profile(name, batch, where, plan, times, executable.target.has_times)


def modelled(name: str, batch: int, plan: Plan) -> Profile:
    """The modelled time of each step in its configuration, for a GPU that need not be here."""
    times = {
        step.name: rank.modelled_us(registry.get(step.op), step.problem, plan.target, step.config)
        for step in plan.steps
        if isinstance(step, KernelStep)
    }
    return _profile(name, batch, f"{MODELLED}, for {plan.target.name}", plan, times, True)


def _summed(times: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Steps of several launches as one."""
    found: dict[str, float] = {}
    for name, time_us in times:
        found[name] = found.get(name, 0.0) + time_us
    return found


def _profile(
    name: str, batch: int, where: str, plan: Plan, times: dict[str, float], bounded: bool
) -> Profile:
    total = sum(times.values()) or 1.0
    lines = []
    for step in plan.steps:
        time_us = times.get(step.name, 0.0)
        if not isinstance(step, KernelStep):
            lines.append(
                Line(step.name, "torch", step.module_path, "", "", time_us, time_us / total,
                     0, 0, 0, None)
            )  # fmt: skip
            continue
        cost = registry.get(step.op).cost(step.problem)
        lines.append(
            Line(
                step.name,
                step.op,
                step.module_path,
                str(step.config),
                step.chosen_by,
                time_us,
                time_us / total,
                cost.flops,
                cost.size_bytes,
                len(step.launches),
                roofline_us(step, plan) if bounded else None,
            )
        )
    return Profile(name, batch, where, tuple(lines))
