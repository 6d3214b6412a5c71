"""What the compiler makes of an op's kernels, for GPUs that need not be there."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
import triton
from convloom.compiler.tuning import fit
from convloom.kernels import registry
from convloom.kernels.contract.op import Config, Launch, Op, Problem, Ref
from convloom.kernels.contract.targets import Target
from convloom.kernels.devices import offline

from . import harness
from .domain import Domain

SPILLING_DEFAULTS = 1 if triton.__version__.startswith("3.9.") else 0
"""Of one problem of every op, per target; docs/limits.md names them."""


def launch_requests(
    problem: Problem, target: Target, config: Config | None = None
) -> list[tuple[Launch, offline.CompileRequest]]:
    """A configuration's launches, the default's if none is given, with what must be compiled."""
    op = registry.get(problem.op)
    packs = op.packs(problem.attributes)
    packed = {}
    for slot, pack in packs.items():
        spec = problem.inputs[slot].spec
        packed[slot] = pack(problem.attributes, torch.zeros(spec.shape, dtype=spec.dtype)).dtype

    def dtype_of(ref: Ref) -> torch.dtype:
        group = {"input": problem.inputs, "output": problem.outputs}.get(ref.kind, problem.operands)
        if ref.kind == "input" and ref.index in packed:
            return packed[ref.index]
        return group[ref.index].spec.dtype

    launches = op.launches(problem, config or op.default(problem, target), target)
    return [(launch, offline.request(launch, dtype_of, target)) for launch in launches]


def reports(
    problem: Problem, target: Target, config: Config | None = None
) -> list[offline.KernelReport]:
    """What the compiler made of the problem's launches."""
    return [offline.report(wanted) for _, wanted in launch_requests(problem, target, config)]


def spilled(problem: Problem, target: Target, config: Config | None = None) -> int:
    """Bytes that all of its kernels keep on the stack, per thread."""
    return sum(report.spill_bytes for report in reports(problem, target, config))


def assert_gives_way(problem: Problem, target: Target) -> None:
    """A default that spills has another configuration behind it, which compiling takes."""
    others = fit.candidates(registry.get(problem.op), problem, target)
    config = next((each for each in others if not spilled(problem, target, each)), None)
    assert config is not None, f"{problem.op} {problem.attributes} on {target.name}: all spill"
    assert_healthy(problem, target, config)


def assert_healthy(
    problem: Problem, target: Target, config: Config | None = None
) -> list[offline.KernelReport]:
    """No spills, and no more shared memory than the machine has."""
    made = reports(problem, target, config)
    for report in made:
        where = f"{problem.op} {problem.attributes} on {target.name}"
        assert report.spill_bytes == 0, f"{where} spills {report.spill_bytes} bytes"
        assert report.shared_bytes <= target.shared_bytes, where
        assert report.registers <= target.registers_per_thread, where
    return made


def samples(op: Op, domain: Domain, dtypes: Sequence[torch.dtype]) -> Iterator[Problem]:
    """One problem of an op for each dtype, always the same."""
    generator = random.Random(op.name)
    for dtype in dtypes:
        for _ in range(100):
            draw = {name: generator.choice(list(v)) for name, v in domain.ranges.items()}
            if (case := harness.case_of(op, domain, draw, dtype)) is not None:
                yield harness.problem_for(op, case.attributes, case.specs)
                break
