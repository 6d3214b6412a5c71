"""What each level of fusion buys, per zoo model: `python -m benchmarks.fusion`.

fp16, sm_90, heuristic configurations, no GPU needed: kernels launched (input conversion included),
bytes that the kernels read and write if every tensor is touched once, and the modelled time
(`kernels/machine.py`; a ranking, not a promise). Measured times stay empty until a GPU measured
them. Results go to benchmarks/results/fusion.json and fusion.md.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from convloom import zoo
from convloom.compiler.capture import capture
from convloom.compiler.ir import Goal, Graph
from convloom.compiler.ledger import Ledger
from convloom.compiler.lower import Options, lower
from convloom.compiler.passes import NAMES, run_passes
from convloom.compiler.plan import KernelStep, Plan
from convloom.kernels import machine, registry, targets

from .machine_info import git_hash

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = (
    "lenet5", "alexnet", "vgg_d", "googlenet", "inception_v3", "resnet18", "resnet50",
    "resnext50_32x4d", "mobilenet_v1", "mobilenet_v2", "densenet121",
)  # fmt: skip
BATCHES = (1, 32, 256)
EPILOGUES = tuple(
    name for name in NAMES if name not in ("merge_siblings", "choose_partition", "sink_prologues")
)
LEVELS: dict[str, str | tuple[str, ...]] = {
    "unfused": "none",
    "epilogues": EPILOGUES,
    "all": "default",
}


@dataclass(frozen=True)
class Row:
    """One model at one batch and one level of fusion."""

    model: str
    batch: int
    level: str
    kernels: int
    memory_mb: float
    modelled_us: float
    measured_us: float | None = None


def captured_model(name: str, batch: int) -> Graph:
    """The captured graph with seeded weights."""
    torch.manual_seed(0)
    x = torch.randn(batch, *zoo.entry(name).input_shape)
    return capture(zoo.build(name).eval(), (x,))


def plan_at(captured: Graph, passes: str | tuple[str, ...]) -> Plan:
    """The plan for sm_90 in fp16 under a choice of passes."""
    target = targets.parse("cuda:sm_90")
    captured.goal = Goal(target, torch.float16)
    ledger = Ledger()
    graph = run_passes(captured, ledger, passes)
    options = Options(target, dtype=torch.float16, elide_concats=passes == "default")
    return lower(graph, captured, options, ledger)


def row(name: str, batch: int, level: str, plan: Plan) -> Row:
    """The figures of one plan."""
    memory, time_us = 0, 0.0
    for step in plan.steps:
        assert isinstance(step, KernelStep), step
        op = registry.get(step.op)
        memory += op.cost(step.problem).size_bytes
        time_us += machine.modelled_time_us(op, step.problem, plan.target)
    return Row(name, batch, level, len(plan.kernels), round(memory / 1e6, 2), round(time_us, 1))


def measure(models: tuple[str, ...], batches: tuple[int, ...]) -> list[Row]:
    """Every model at every batch and level."""
    rows = []
    for name in models:
        for batch in batches:
            captured = captured_model(name, batch)
            for level, passes in LEVELS.items():
                rows.append(row(name, batch, level, plan_at(captured, passes)))
            shown = ", ".join(f"{r.level} {r.kernels}" for r in rows[-len(LEVELS) :])
            print(f"{name:<18} batch {batch:>3}: kernels {shown}", flush=True)
    return rows


def losses(rows: list[Row]) -> list[str]:
    """Where all fusions together are modelled slower than epilogues alone."""
    by_key = {(r.model, r.batch, r.level): r for r in rows}
    found = []
    for r in rows:
        rival = by_key[(r.model, r.batch, "epilogues")]
        if r.level == "all" and r.modelled_us > rival.modelled_us:
            found.append(
                f"- {r.model}, batch {r.batch}: modelled {r.modelled_us} us with all fusions, "
                f"{rival.modelled_us} us with epilogues alone"
            )
    return found


def markdown(rows: list[Row]) -> str:
    """The table, and where fusion loses."""
    lines = [
        "# What fusion buys (fp16, sm_90; modelled, not measured)",
        "",
        f"Made by `python -m benchmarks.fusion` at {git_hash()}. Kernels include the conversion of "
        "the input. Times are modelled on an H200 and only rank; measured times: not measured.",
        "",
        "| model | batch | kernels unfused / epilogues / all | memory traffic MB | modelled us |",
        "|---|---|---|---|---|",
    ]
    for at in range(0, len(rows), len(LEVELS)):
        group = rows[at : at + len(LEVELS)]
        cells = [
            " / ".join(str(r.kernels) for r in group),
            " / ".join(f"{r.memory_mb:.1f}" for r in group),
            " / ".join(f"{r.modelled_us:.0f}" for r in group),
        ]
        lines.append(f"| {group[0].model} | {group[0].batch} | {' | '.join(cells)} |")
    lines += ["", "## Where fusion loses", "", *(losses(rows) or ["Nowhere, by the model."])]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Plans everything and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    arguments = parser.parse_args()
    rows = measure(tuple(arguments.models), tuple(arguments.batch))
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "fusion.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")
    (RESULTS / "fusion.md").write_text(markdown(rows))


if __name__ == "__main__":
    main()
