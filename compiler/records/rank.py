"""Which configurations are worth trying, and in which order, by the model of time
(`kernels/contract/cost_model.py`) and by what the compiler reports of those compiled already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...kernels.contract import cost_model
from ...kernels.contract.op import Config, Launch, Op, Problem, Ref
from ...kernels.contract.targets import Target
from ...kernels.devices import offline
from ...kernels.devices.offline import CompileRequest, Resources
from ...kernels.hopper import core

INTERPRETED_PROGRAM_US = 1_000.0
"""One program in the interpreter, whatever its tile holds (assumed; only the order matters)."""
WASTE_FACTOR = 2.0
"""A candidate may pad this many times as much as the one that pads least."""


@dataclass(frozen=True)
class Ranked:
    config: Config
    time_us: float


def space(op: Op, problem: Problem, target: Target) -> tuple[Config, ...]:
    """The default and then the tuning space of the op, each configuration once."""
    return tuple(dict.fromkeys([op.default(problem, target), *op.configs(problem, target)]))


def illegal_reason(op: Op, problem: Problem, config: Config, target: Target) -> str | None:
    """Why a configuration from elsewhere cannot be used for the problem, or None.

    Only what the op itself would choose or try is known to be right for this shape.
    """
    if config not in space(op, problem, target):
        return f"{config} is not in the tuning space of {op.name} for this shape"
    return op.legal(problem, config, target)


def rank(
    op: Op,
    problem: Problem,
    target: Target,
    configs: Iterable[Config],
    reports: Mapping[Config, Sequence[Resources]] | None = None,
) -> list[Ranked]:
    """The configurations by modelled time, the fastest first; equal ones keep their order. Those
    that are expected to spill, and of which no report says that they do not, come last.

    reports: what the compiler made of each launch of a configuration, for those compiled already.
    """
    known, timed = reports or {}, []
    for config in configs:
        crowded = config not in known and op.crowded(problem, config, target) is not None
        us = modelled_us(op, problem, target, config, known.get(config))
        timed.append((crowded, us, Ranked(config, us)))
    return [ranked for _, _, ranked in sorted(timed, key=lambda each: each[:2])]


def modelled_us(
    op: Op,
    problem: Problem,
    target: Target,
    config: Config,
    reports: Sequence[Resources] | None = None,
) -> float:
    """Microseconds of a problem in a configuration; in the interpreter the number of programs
    counts and nothing else."""
    if not target.is_gpu:
        launches = op.launches(problem, config, target)
        programs = sum(launch.grid_at(launch.batch or 1)[0] for launch in launches)
        return programs * INTERPRETED_PROGRAM_US
    return cost_model.problem_us(op, problem, target, config, reports)


def varied(
    op: Op, problem: Problem, target: Target, ranked: Sequence[Ranked], most: int
) -> list[Config]:
    """At most so many configurations, from the front but of each tile size and core one first: the
    model tells sizes apart better than what is tried within one."""
    sizes: dict[object, dict[object, Config]] = {}
    for config in (each.config for each in ranked):
        blocks = dict(config.blocks)
        size: object = blocks.get("BLOCK_M"), blocks.get("BLOCK_N")
        if not {"BLOCK_M", "BLOCK_N"} <= blocks.keys():
            launches = op.launches(problem, config, target)
            size = tuple((launch.block_rows, launch.columns) for launch in launches)
        sizes.setdefault(size, {}).setdefault(core.uses_core(config), config)
    first = [config for alike in sizes.values() for config in alike.values()]
    return list(dict.fromkeys([*first, *(each.config for each in ranked)]))[:most]


def screened(
    op: Op, problem: Problem, target: Target
) -> tuple[list[Config], dict[Config, tuple[str, str]]]:
    """The configurations of the space that are worth compiling, and the others with the stage they
    fall out at and the reason: "illegal", or "waste" where they pad far more than others do."""
    rejected: dict[Config, tuple[str, str]] = {}
    padded: dict[Config, float] = {}
    for config in space(op, problem, target):
        if (reason := op.legal(problem, config, target)) is not None:
            rejected[config] = "illegal", reason
        else:
            launches = op.launches(problem, config, target)
            padded[config] = max(cost_model.padding(each, config, problem) for each in launches)
    least = min(padded.values(), default=1.0)
    for config, waste in padded.items():
        if waste > WASTE_FACTOR * least:
            reason = f"its tiles are {waste:.1f} times what they compute; {least:.1f} is possible"
            rejected[config] = "waste", reason
    return [config for config in padded if config not in rejected], rejected


def refused(
    target: Target, launches: Sequence[Launch], reports: Sequence[Resources]
) -> tuple[str, str] | None:
    """(stage, reason) where compiled code cannot run on the target or uses the stack."""
    for launch, report in zip(launches, reports, strict=True):
        name = launch.kernel.fn.__name__
        if report.shared_bytes > target.shared_bytes:
            return "resources", (
                f"{name} needs {report.shared_bytes} bytes of shared memory; {target.name} has "
                f"{target.shared_bytes}"
            )
        if report.registers * 32 * launch.num_warps > cost_model.REGISTERS:
            return "resources", f"{name} needs {report.registers} registers in every thread"
        if report.spill_bytes:
            return "spills", (
                f"{name} keeps {report.spill_bytes} bytes per thread on the stack, beside "
                f"{report.registers} registers of {target.registers_per_thread}"
            )
    return None


def requests(
    op: Op, problem: Problem, launches: Iterable[Launch], target: Target
) -> list[CompileRequest]:
    """What must be compiled for launches of a problem, in order."""
    packs = op.packs(problem.attributes)

    def dtype_of(ref: Ref) -> torch.dtype:
        spec = problem.groups[ref.kind][ref.index].spec
        if ref.kind == "input" and ref.index in packs:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            return packs[ref.index](problem.attributes, tensor).dtype
        return spec.dtype

    return [offline.request(launch, dtype_of, target) for launch in launches]
