"""What each level of fusion buys, per zoo model: `python -m benchmarks.fusion`.

fp16, sm_90, heuristic configurations, no GPU needed: kernels launched (input conversion included),
bytes that the kernels read and write if every tensor is touched once, and the modelled time
(`kernels/contract/cost_model.py`; a ranking, not a promise), beside the bounds of `bounds.py`.
Measured times stay empty until a GPU measured them. Results go to benchmarks/results/fusion.json
and fusion.md.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from convloom import zoo
from convloom.compiler.capture.capture import capture
from convloom.compiler.graph.ir import CompileTarget, Graph
from convloom.compiler.graph.ledger import Event, Ledger
from convloom.compiler.passes import LABELS, NAMES, run_passes
from convloom.compiler.plan.lower import Options, lower
from convloom.compiler.plan.plan import KernelStep, Plan
from convloom.kernels import registry
from convloom.kernels.contract import cost_model, targets
from convloom.kernels.contract.op import X, Y
from convloom.kernels.fused.pool_conv import PoolConv

from .bounds import BOUNDS
from .machine_info import git_hash

RESULTS = Path(__file__).resolve().parent / "results"
MODELS = (
    "lenet5", "alexnet", "vgg_d", "googlenet", "inception_v3", "resnet18", "resnet50",
    "resnext50_32x4d", "mobilenet_v1", "mobilenet_v2", "densenet121",
)  # fmt: skip
BATCHES = (1, 32, 256)
FUSIONS = (
    "choose_partition", "sink_prologues", "project_before_averaging", "fuse_small_nets",
    "fuse_stem",
)  # fmt: skip
EPILOGUES = tuple(name for name in NAMES if name not in FUSIONS)
LEVELS: dict[str, str | tuple[str, ...]] = {
    "unfused": "none",
    "epilogues": EPILOGUES,
    "all": "default",
}
CONVOLUTIONS = ("conv2d", "stem", "conv_sum")
TARGET_BATCH = 32
"""The batch at which the launches wanted of a model are counted."""
BYTES_TARGETS = {"resnet50": "t_gb", "googlenet": "t_gb", "inception_v3": "t_gb"}
"""Models whose DRAM traffic at batch 256 should be within 10% of a bound; for the Inceptions
level T is level EP."""


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
    pools: Pools | None = None


@dataclass(frozen=True)
class Pools:
    """3x3 poolings with stride 2 that read a convolution's result which nobody else reads: what
    their place in the convolution's epilogue would save. Windows overlap there, so that a tile must
    compute a row and a column of blocks for its neighbours' sake: of 64 blocks 15."""

    launches: int
    memory_mb: float


@dataclass(frozen=True)
class Refusal:
    """A fusion that the cost model declined: modelled times of one kernel and of several."""

    model: str
    batch: int
    label: str
    nodes: tuple[str, ...]
    reason: str


def captured_model(name: str, batch: int) -> Graph:
    """The captured graph with seeded weights."""
    torch.manual_seed(0)
    x = torch.zeros(batch, *zoo.entry(name).input_shape)
    return capture(zoo.build(name).eval(), (x,))


def plan_at(
    captured: Graph,
    passes: str | tuple[str, ...],
    force: tuple[str, ...] = (),
    ledger: Ledger | None = None,
) -> Plan:
    """The plan for sm_90 in fp16 under a choice of passes."""
    target = targets.parse("cuda:sm_90")
    captured.goal = CompileTarget(target, torch.float16, force)
    ledger = Ledger() if ledger is None else ledger
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
        time_us += cost_model.problem_us(op, step.problem, plan.target)
    count, memory_mb = len(plan.kernels), round(memory / 1e6, 2)
    return Row(name, batch, level, count, memory_mb, round(time_us, 1), pools=pools_of(plan))


def pools_of(plan: Plan) -> Pools | None:
    """The overlapping poolings behind convolutions, or None."""
    launches = saved = 0
    steps = [step for step in plan.steps if isinstance(step, KernelStep)]
    writers = {step.buffers[Y]: step for step in steps}
    for step in steps:
        attributes = step.problem.attributes
        pool = attributes.pool if isinstance(attributes, PoolConv) else attributes
        window = getattr(pool, "kernel", None), getattr(pool, "stride", None)
        writer = writers.get(step.buffers.get(X, ""))
        readers = sum(step.buffers[X] in each.buffers.values() for each in steps)
        if window != ((3, 3), (2, 2)) or writer is None or writer.op not in CONVOLUTIONS:
            continue
        if readers != 2:  # the writer and this step
            continue
        saved += 2 * writer.problem.output.spec.size_bytes
        if not isinstance(attributes, PoolConv):
            launches += 1
        elif not attributes.keep:
            pair = step.problem.output, step.problem.inputs[0]
            pooled, whole = (math.prod(operand.shape[2:]) for operand in pair)
            saved -= 2 * writer.problem.output.spec.size_bytes * pooled // whole
    return Pools(launches, round(saved / 1e6, 2)) if saved else None


def measure(models: tuple[str, ...], batches: tuple[int, ...]) -> tuple[list[Row], list[Refusal]]:
    """Every model at every batch and level, and what the last level refused."""
    rows, refusals = [], []
    for name in models:
        for batch in batches:
            captured = captured_model(name, batch)
            for level, passes in LEVELS.items():
                ledger = Ledger()
                rows.append(row(name, batch, level, plan_at(captured, passes, ledger=ledger)))
            refusals += refused(name, batch, captured, ledger)
            shown = ", ".join(f"{r.level} {r.kernels}" for r in rows[-len(LEVELS) :])
            print(f"{name:<18} batch {batch:>3}: kernels {shown}", flush=True)
    return rows, refusals


def refused(name: str, batch: int, captured: Graph, ledger: Ledger) -> list[Refusal]:
    """The refusals of fusions of several heavy ops, at the end of the choice."""
    paths = {node.name: node.module_path for node in captured.nodes()}
    found = []
    for event in ledger.events:
        if event.accepted or event.rule not in LABELS.heavy | {SIBLINGS}:
            continue
        modules = tuple(dict.fromkeys(paths[n] for n in event.nodes if paths.get(n)))
        found.append(Refusal(name, batch, LABELS.all[event.rule], modules, reason_of(event)))
    return found


SIBLINGS = next(rule for rule, label in LABELS.all.items() if label == "siblings")


def reason_of(event: Event) -> str:
    """The reason with ops for nodes ("conv2d" for "conv2d_4"), so that equal ones are counted."""
    return re.sub(r"%?\b(?!sm_)([a-z][a-z0-9_]*?)(_\d+)+(\.\d+)?\b", r"\1", event.reason)


MODELLED = re.compile(r"modelled ([\d.]+) us together, ([\d.]+) us apart")


def losses(refusals: list[Refusal]) -> list[str]:
    """Fusions that would lose by the model, worst first, at most eight per model and batch."""
    found: dict[tuple[str, int], list[tuple[float, Refusal]]] = {}
    for refusal in refusals:
        if (times := MODELLED.match(refusal.reason)) is not None:
            loss_us = float(times[1]) - float(times[2])
            found.setdefault((refusal.model, refusal.batch), []).append((loss_us, refusal))
    lines = []
    for (model, batch), group in found.items():
        labels = ", ".join(sorted({refusal.label for _, refusal in group}))
        lines.append(f"- **{model}, batch {batch}**: {len(group)} refused ({labels})")
        for loss_us, refusal in sorted(group, key=lambda item: -item[0])[:3]:
            where = ", ".join(refusal.nodes[:3])
            lines.append(f"  - {refusal.label} at {where}: {refusal.reason}, {loss_us:.1f} us lost")
    return lines


def missed(rows: list[Row], refusals: list[Refusal]) -> list[str]:
    """Targets that are missed, with what was refused there and what forcing it would cost."""
    lines = []
    for r in rows:
        wanted = BOUNDS[r.model].launches if r.model in BOUNDS else None
        if r.level != "all" or r.batch != TARGET_BATCH or wanted is None or r.kernels <= wanted:
            continue
        lines.append(f"- **{r.model}**: {r.kernels} launches, wanted at most {wanted}.")
        mine = [x for x in refusals if (x.model, x.batch) == (r.model, r.batch)]
        lines += _reasons(mine)
        lines += [*_forced(r, {x.label for x in mine if _is_cost(x)}), *_pools(r)]
    for r in rows:
        if r.level != "all" or r.batch != 256 or r.model not in BYTES_TARGETS:
            continue
        bound_gb = getattr(BOUNDS[r.model], BYTES_TARGETS[r.model])
        if r.memory_mb / 1e3 > 1.1 * bound_gb:
            lines.append(
                f"- **{r.model}**: {r.memory_mb / 1e3:.2f} GB at batch 256, wanted at most 1.1 x "
                f"{bound_gb} GB."
            )
            mine = [x for x in refusals if (x.model, x.batch) == (r.model, r.batch)]
            lines += [*_reasons(mine), *_forced(r, {x.label for x in mine if _is_cost(x)})]
            lines += _pools(r)
    return lines


def _is_cost(refusal: Refusal) -> bool:
    return MODELLED.match(refusal.reason) is not None


def _pools(r: Row) -> list[str]:
    if r.pools is None:
        return []
    return [
        "  - would take: 3x3 poolings with stride 2 in the epilogues of their convolutions, which "
        f"no kernel does ({r.pools.launches} launches and {r.pools.memory_mb / 1e3:.2f} GB less; "
        "their windows overlap, so that 64 blocks of a tile give 49 results)"
    ]


def _reasons(refusals: list[Refusal]) -> list[str]:
    counts: dict[tuple[str, str], int] = {}
    for refusal in refusals:
        reason = re.sub(r"modelled .* on", "modelled slower together on", refusal.reason)
        key = refusal.label, reason
        counts[key] = counts.get(key, 0) + 1
    common = sorted(counts.items(), key=lambda item: -item[1])[:6]
    return [f"  - refused {count}x {label}: {reason}" for (label, reason), count in common]


def _forced(r: Row, labels: set[str]) -> list[str]:
    lines = []
    for label in sorted(labels):
        plan = plan_at(captured_model(r.model, r.batch), "default", (label,))
        forced = row(r.model, r.batch, "forced", plan)
        lines.append(
            f"  - with force=[{label!r}]: {forced.kernels} launches, "
            f"{forced.memory_mb / 1e3:.2f} GB, modelled {forced.modelled_us:.0f} us instead of "
            f"{r.modelled_us:.0f}"
        )
    return lines


def markdown(rows: list[Row], refusals: list[Refusal]) -> str:
    """The table, the targets missed, and where fusion loses."""
    lines = [
        "# What fusion buys (fp16, sm_90; modelled, not measured)",
        "",
        f"Made by `python -m benchmarks.fusion` at {git_hash()}. Kernels include the conversion of "
        "the input. Times are modelled on an H200 and only rank. Bounds are what the hardware "
        "allows at a level of fusion (`benchmarks/bounds.py`); a dash: no bound was computed.",
        "",
        "| model | batch | kernels unfused / epilogues / all | wanted | memory traffic MB "
        "| bound T MB | modelled us | bounds U / E / EP / T us | measured us |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for at in range(0, len(rows), len(LEVELS)):
        group = rows[at : at + len(LEVELS)]
        model, batch = group[0].model, group[0].batch
        bounds = BOUNDS.get(model)
        wanted = bounds.launches if bounds and batch == TARGET_BATCH else None
        measured = group[-1].measured_us
        cells = [
            " / ".join(str(r.kernels) for r in group),
            str(wanted or "-"),
            " / ".join(f"{r.memory_mb:.1f}" for r in group),
            f"{bounds.t_gb * 1e3 * batch / 256:.1f}" if bounds else "-",
            " / ".join(f"{r.modelled_us:.0f}" for r in group),
            " / ".join(f"{us:.3g}" for us in bounds.at(batch).values()) if bounds else "-",
            f"{measured:.0f}" if measured is not None else "not measured",
        ]
        lines.append(f"| {model} | {batch} | {' | '.join(cells)} |")
    lines += ["", "## Targets missed", "", *(missed(rows, refusals) or ["None."])]
    lines += [
        "",
        "## Where fusion loses",
        "",
        "Fusions that the kernels could do and the cost model refused, the three worst per model "
        "and batch.",
        "",
        *(losses(refusals) or ["Nowhere, by the model."]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Plans everything and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES)
    arguments = parser.parse_args()
    rows, refusals = measure(tuple(arguments.models), tuple(arguments.batch))
    RESULTS.mkdir(parents=True, exist_ok=True)
    plain = {"rows": [asdict(r) for r in rows], "refusals": [asdict(r) for r in refusals]}
    (RESULTS / "fusion.json").write_text(json.dumps(plain, indent=1) + "\n")
    (RESULTS / "fusion.md").write_text(markdown(rows, refusals))


if __name__ == "__main__":
    main()
