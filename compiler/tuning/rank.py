"""Which configurations are worth trying, and in which order: a model of one launch on one GPU.

For each launch, with what the compiler reports where it is known:

    resident = blocks that one multiprocessor holds at a time (shared memory, registers, threads)
    work     = max(matrix products with padding, traffic with L2, other instructions) of one tile,
               and the loop's own instructions for each of its steps
    chain    = steps of the loop * latency of a step, of which stages - 1 are under way at once
    time     = max(tiles per multiprocessor * work, waves * chain) + waves * start
               + adding up the parts of a split sum

and the problem takes the longer of this and its DRAM traffic, plus what launches cost. The figures
of the machines, measured and assumed, are in `kernels/machine.py`. The result ranks; it promises
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from ...kernels import gemm_persistent, offline, registry, residual
from ...kernels import machine as machines
from ...kernels.machine import Machine
from ...kernels.offline import CompileRequest, Resources
from ...kernels.op import Config, Launch, Op, Problem, Ref
from ...kernels.targets import Target

REGISTERS = 65_536
"""32-bit registers of one multiprocessor, on every supported generation."""
BLOCK_SHARED = 1_024
"""Bytes of shared memory that the system keeps for itself in every block."""
TF32_RATE = 0.5
"""Of plain tf32 products, of the half-precision rate."""
ASSUMED_RESIDENT = 2
"""Blocks held at a time where no report tells."""
INTERPRETED_PROGRAM_US = 1_000.0
"""One program in the interpreter, whatever its tile holds (assumed; only the order matters)."""
ALIKE = 4
"""Candidates with tiles of one size that are taken before other sizes have had theirs; of each kind
one."""
KINDS = (gemm_persistent.BLOCK, residual.BLOCK, "BOX_W", "TMA")
"""Blocks of which the first that a configuration has is its kind: the model does not tell programs
that stay, residuals that are read first and descriptors from what is usual."""
WASTE_FACTOR = 2.0
"""A candidate may pad this many times as much as the one that pads least."""


@dataclass(frozen=True)
class Ranked:
    """A configuration with its modelled time."""

    config: Config
    time_us: float


def space(op: Op, problem: Problem, target: Target) -> tuple[Config, ...]:
    """The default and then the tuning space of the op, each configuration once."""
    return tuple(dict.fromkeys([op.default(problem, target), *op.configs(problem, target)]))


def misfit(op: Op, problem: Problem, config: Config, target: Target) -> str | None:
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
    """The configurations by modelled time, the fastest first; equal ones keep their order.

    reports: what the compiler made of each launch of a configuration, for those compiled already.
    """
    known = reports or {}
    timed = [
        Ranked(config, modelled_us(op, problem, target, config, known.get(config)))
        for config in configs
    ]
    return sorted(timed, key=lambda each: each.time_us)


def modelled_us(
    op: Op,
    problem: Problem,
    target: Target,
    config: Config,
    reports: Sequence[Resources] | None = None,
) -> float:
    """Microseconds of a problem in a configuration; in the interpreter the number of programs
    counts and nothing else."""
    launches = op.launches(problem, config, target)
    if not target.is_gpu:
        programs = sum(launch.grid_at(launch.batch or 1)[0] for launch in launches)
        return programs * INTERPRETED_PROGRAM_US
    machine = machines.machine_for(target)
    cost = op.cost(problem)
    compute = 0.0
    for at, launch in enumerate(launches):
        flops = cost.flops / len(launches) * padding(launch, config, problem)
        report = reports[at] if reports is not None else None
        loop = _loop(launch, config, problem, flops)
        compute += _launch_us(machine, launch, flops / _rate(machine, problem), loop, report)
    memory = machines.memory_time_us(machine, problem, cost.size_bytes)
    return max(compute, memory) + machine.launch_us * len(launches)


def _rate(machine: Machine, problem: Problem) -> float:
    """Floating-point operations of all tensor cores together in one microsecond."""
    # Products are computed in the dtype of the weights: an image may enter in another one.
    weights = next(iter(registry.get(problem.op).packs(problem.attributes)), 0)
    dtype = problem.inputs[weights].spec.dtype
    tf32 = dtype is torch.float32 and problem.precision == "tf32"
    return machine.tensor_tflops * 1e6 * (TF32_RATE if tf32 else machines.RATE[dtype])


@dataclass(frozen=True)
class _Loop:
    """What one tile's loop does: bytes it reads through L2, and steps."""

    moved: float
    steps: float


def _loop(launch: Launch, config: Config, problem: Problem, flops: float) -> _Loop:
    """The loop of one tile, by what the launch says of itself; where it says nothing, that of a
    matrix product. flops: of all tiles, padding included."""
    blocks = dict(config.blocks)
    if not {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= blocks.keys():
        return _Loop(launch.l2_bytes, launch.steps)
    m, n, k = blocks["BLOCK_M"], blocks["BLOCK_N"], blocks["BLOCK_K"]
    depth = flops / launch.tiles_at(launch.batch or 1) / (2 * m * n)
    moved = launch.l2_bytes or (m + n) * depth * problem.inputs[0].spec.dtype.itemsize
    return _Loop(moved, launch.steps or max(1.0, depth / k))


def _launch_us(
    machine: Machine,
    launch: Launch,
    products_us: float,
    loop: _Loop,
    report: Resources | None,
) -> float:
    """products_us: of all tiles on the whole machine."""
    tiles = launch.tiles_at(launch.batch or 1)
    per_multiprocessor = -(-tiles // machine.multiprocessors)
    waves = -(-per_multiprocessor // resident(machine, launch, report))
    work = loop.steps * machine.loop_us + max(
        products_us / tiles * machine.multiprocessors,
        loop.moved * machine.multiprocessors / (machine.cache_gbps * 1e3),
        launch.instructions / (machines.LANES * machine.clock_ghz * 1e3),
    )
    chain = loop.steps * machines.step_us(machine, launch.num_stages)
    busy = max(per_multiprocessor * work, waves * chain) + waves * machine.start_us
    return busy + machines.combine_us(machine, launch)


def resident(machine: Machine, launch: Launch, report: Resources | None) -> int:
    """Blocks of the launch that one multiprocessor holds at a time; at least 1."""
    threads = 32 * launch.num_warps
    limit = min(machine.blocks, machine.threads // threads)
    if report is None:
        return max(1, min(limit, ASSUMED_RESIDENT))
    shared = machine.shared_kb * 1024 // (report.shared_bytes + BLOCK_SHARED)
    # Registers are given out in eights.
    registers = REGISTERS // (max(-(-report.registers // 8), 1) * 8 * threads)
    return max(1, min(limit, shared, registers))


def varied(
    op: Op, problem: Problem, target: Target, ranked: Sequence[Ranked], most: int
) -> list[Config]:
    """At most so many configurations, from the front but with few of the same tile size first: the
    model tells sizes apart better than what is tried within one."""
    sizes: dict[object, dict[object, Config]] = {}
    for each in ranked:
        blocks = dict(each.config.blocks)
        kinds = sizes.setdefault(_tile_size(op, problem, target, each.config), {})
        kinds.setdefault(next((block for block in KINDS if blocks.get(block)), ""), each.config)
    first = [config for kinds in sizes.values() for config in list(kinds.values())[:ALIKE]]
    return list(dict.fromkeys([*first, *(each.config for each in ranked)]))[:most]


def _tile_size(op: Op, problem: Problem, target: Target, config: Config) -> object:
    """What configurations of one size have in common."""
    blocks = dict(config.blocks)
    if {"BLOCK_M", "BLOCK_N"} <= blocks.keys():
        return blocks["BLOCK_M"], blocks["BLOCK_N"]
    launches = op.launches(problem, config, target)
    return tuple((launch.block_rows, launch.columns) for launch in launches)


def padding(launch: Launch, config: Config, problem: Problem) -> float:
    """How much larger the tiles are together than what they compute; at least 1."""
    rows = -(-launch.rows // launch.block_rows) * launch.block_rows / max(launch.rows, 1)
    blocks = dict(config.blocks)
    width = blocks.get("BLOCK_N")
    if width is None:
        return max(rows, 1.0)
    if "BOX_W" in blocks:
        # Boxes of pixels: rows are images, and a program has a part of each.
        computed = launch.tiles_at(launch.batch or 1) * blocks["BLOCK_M"] * width
        return computed / max(problem.output.spec.numel, 1)
    spec = problem.output.spec
    columns = spec.shape[spec.layout.order(spec.rank)[-1]] if spec.rank else 1
    tiles = launch.columns / blocks.get("SPLIT", 1)
    return max(rows, 1.0) * max(tiles * width / max(columns, 1), 1.0)


def wasteful(
    op: Op, problem: Problem, target: Target, configs: Sequence[Config]
) -> dict[Config, str]:
    """The configurations that pad far more than others do, with the reason in words."""
    padded = {
        config: max(padding(each, config, problem) for each in op.launches(problem, config, target))
        for config in configs
    }
    least = min(padded.values(), default=1.0)
    return {
        config: f"its tiles are {waste:.1f} times what they compute; {least:.1f} is possible"
        for config, waste in padded.items()
        if waste > WASTE_FACTOR * least
    }


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
        if report.registers * 32 * launch.num_warps > REGISTERS:
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
    groups = {
        "input": problem.inputs,
        "output": problem.outputs,
        "operand": problem.operands,
        "prologue": problem.prologue_operands,
    }

    def dtype_of(ref: Ref) -> torch.dtype:
        spec = groups[ref.kind][ref.index].spec
        if ref.kind == "input" and ref.index in packs:
            tensor = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
            return packs[ref.index](problem.attributes, tensor).dtype
        return spec.dtype

    return [offline.request(launch, dtype_of, target) for launch in launches]


