"""What the compiler makes of every op, held against a committed snapshot: `make gate`.

Run before and after a change that should not touch machine code, such as a move of files. For every
op at its typical shape (`ops.py`) and at the draws that its tests call interesting, and for the
kernels of a few networks, whose sizes choose other configurations, in half precision and in the
default configuration: registers, bytes spilled, shared memory and SASS instructions, on sm_80 and
sm_90. Differences are printed and end with exit status 1; `--update` writes the snapshot,
results/gate.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
from convloom import zoo
from convloom.compiler.api import plan
from convloom.compiler.records import rank
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.op import Op, Operand, Problem
from convloom.kernels.devices import offline
from convloom.kernels.devices.offline import CompileRequest
from convloom.tests.domains import domain_of

from . import ops, report

SNAPSHOT = Path(__file__).resolve().parent / "results" / "gate.json"
GENERATIONS = ("sm_80", "sm_90")
NETWORKS, BATCH = ("mobilenet_v2", "inception_v3"), 32
Figures = dict[str, Any]
"""Of one launch: the configuration, and what the compiler reports."""


def problems() -> Iterator[tuple[str, Op, Problem]]:
    """(name, op, problem) for every op of the registry."""
    for op in registry.OPS:
        typical = ops.problem_of(op, {})
        if typical is not None:
            yield op.name, op, typical
        for index, draw in enumerate(domain_of(op).interesting):
            yield f"{op.name} interesting {index}", op, _drawn(op, draw)
    for name, (op_name, values) in ops.VARIANTS.items():
        op = registry.get(op_name)
        variant = ops.problem_of(op, values)
        assert variant is not None, name
        yield name, op, variant
    for name in NETWORKS:
        yield from of_network(name)


@cache
def of_network(name: str) -> tuple[tuple[str, Op, Problem], ...]:
    """The kernels of a network's plan, those of equal sizes and epilogue once."""
    x = torch.zeros(BATCH, *zoo.entry(name).input_shape)
    planned = plan(zoo.build(name).eval(), x, target="cuda:sm_90", dtype=torch.float16).plan
    found: dict[str, tuple[str, Op, Problem]] = {}
    for step, _ in planned.kernels:
        sizes = " ".join(str(operand.spec.shape) for operand in step.problem.inputs[:2])
        stages = " ".join(stage.name for stage in step.problem.epilogue)
        results = " ".join(str(operand.spec.shape) for operand in step.problem.outputs)
        label = f"{step.op} of {name} {sizes} {stages} -> {results}"
        found.setdefault(label, (label, registry.get(step.op), step.problem))
    return tuple(found.values())


def _drawn(op: Op, draw: Mapping[str, Any]) -> Problem:
    built = domain_of(op).build(draw)
    assert built is not None, (op.name, draw)
    attributes, specs = built
    half = tuple(
        spec.with_(dtype=torch.float16) if spec.dtype is torch.float32 else spec for spec in specs
    )
    outputs = op.infer(attributes, half)
    return Problem(
        op.name, attributes, tuple(map(Operand.dense, half)), tuple(map(Operand.dense, outputs))
    )


def measured(names: Sequence[str] = ()) -> dict[str, list[Figures]]:
    """The figures of each launch by problem and generation; of all ops, or of some."""
    wanted: dict[str, tuple[str, list[CompileRequest]]] = {}
    for name, op, problem in problems():
        if names and op.name not in names:
            continue
        for generation in GENERATIONS:
            target = targets.parse(f"cuda:{generation}")
            config = op.default(problem, target)
            launches = op.launches(problem, config, target)
            requests = rank.requests(op, problem, launches, target)
            wanted[f"{name}, {generation}"] = str(config), requests
    offline.compile_all([each for _, requests in wanted.values() for each in requests])
    return {
        key: [_figures(config, each) for each in requests]
        for key, (config, requests) in wanted.items()
    }


def _figures(config: str, wanted: CompileRequest) -> Figures:
    found = offline.report(wanted)
    return {
        "config": config,
        "registers": found.registers,
        "spill_bytes": found.spill_bytes,
        "shared_bytes": found.shared_bytes,
        "instructions": sum(found.instructions.values()),
    }


def differences(
    before: Mapping[str, list[Figures]], after: Mapping[str, list[Figures]]
) -> list[str]:
    """What changed, a line for each figure, and problems that came or went."""
    lines = [f"{key}: gone" for key in before if key not in after]
    for key, launches in after.items():
        known = before.get(key)
        if known is None:
            lines.append(f"{key}: new")
        elif len(known) != len(launches):
            lines.append(f"{key}: {len(known)} launches -> {len(launches)}")
        else:
            for old, new in zip(known, launches, strict=True):
                changed = [name for name in new if old.get(name) != new[name]]
                shown = ", ".join(f"{name} {old.get(name)} -> {new[name]}" for name in changed)
                lines += [f"{key}: {shown}"] if changed else []
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares or updates; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="only these ops")
    parser.add_argument("--update", action="store_true", help="write the snapshot")
    given = parser.parse_args(arguments)
    if given.update:
        if given.ops:
            parser.error("--update measures every op; leave out their names")
        text = json.dumps({"triton": triton.__version__, "figures": measured()}, indent=1)
        report.write_text(SNAPSHOT, text + "\n")
        return 0
    if not SNAPSHOT.exists():
        print(f"there is no {SNAPSHOT}; take a snapshot with --update", file=sys.stderr)
        return 2
    snapshot = json.loads(SNAPSHOT.read_text())
    if snapshot["triton"] != triton.__version__:
        print(
            f"{SNAPSHOT.name} was made with triton {snapshot['triton']}; this is "
            f"{triton.__version__}, whose machine code differs. Install that one, or take a "
            "snapshot of the tree before your change with --update",
            file=sys.stderr,
        )
        return 2
    known = snapshot["figures"]
    if given.ops:
        known = {key: value for key, value in known.items() if _op_of(key) in given.ops}
    lines = differences(known, measured(given.ops))
    print("\n".join(lines) if lines else f"{len(known)} problems: nothing changed")
    return int(bool(lines))


def _op_of(key: str) -> str:
    """The op of a snapshot's key: "conv2d depthwise, sm_90" is one of conv2d."""
    name = key.rsplit(",", 1)[0]
    return ops.VARIANTS[name][0] if name in ops.VARIANTS else name.split(" ")[0]


if __name__ == "__main__":
    sys.exit(main())
