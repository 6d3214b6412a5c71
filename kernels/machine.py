"""What a GPU can do, and how long a launch should take there: the model that ranks alternatives
when nothing has been measured.

Every constant says whether it was measured or assumed; the model is for ranking, not for promises.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .op import Launch, Op, Problem
from .targets import Target, parse


@dataclass(frozen=True)
class Machine:
    """One GPU.

    tensor_tflops: dense half-precision products; memory_gbps: DRAM; launch_us: what one dependent
    kernel adds inside a CUDA graph (assumed); start_us: filling and draining one tile (assumed).
    """

    name: str
    multiprocessors: int
    tensor_tflops: float
    memory_gbps: float
    launch_us: float = 2.0
    start_us: float = 0.6


# Vendor specifications, except for the H200's memory and tensor rate, which are what a copy and a
# large matrix product reached in published measurements; launch_us and start_us are assumptions.
MACHINES = {
    80: Machine("A100", 108, 280.0, 1_800.0),
    86: Machine("A40", 84, 130.0, 600.0),
    89: Machine("L40S", 142, 330.0, 780.0),
    90: Machine("H200", 132, 790.0, 4_300.0),
    100: Machine("B200", 148, 1_900.0, 7_000.0),
}
DEFAULT = MACHINES[90]
# fp32 by three tf32 products runs at a sixth of the half-precision rate, plain tf32 at a half.
RATE = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 1.0 / 6.0}


def machine_for(target: Target) -> Machine:
    """The machine a target stands for; the H200 where it is no GPU."""
    return MACHINES.get(target.capability, DEFAULT)


def launch_time_us(machine: Machine, launch: Launch, flops: int, dtype: torch.dtype) -> float:
    """Time of a launch if its memory traffic were free: whole waves of tiles, padding included."""
    programs = launch.grid_at(launch.batch or 1)[0]
    rows = max(launch.rows, 1)
    padded = -(-rows // launch.block_rows) * launch.block_rows / rows
    rate = machine.tensor_tflops * 1e6 * RATE[dtype] / machine.multiprocessors
    waves = -(-programs // machine.multiprocessors)
    return waves * (flops * padded / programs / rate + machine.start_us)


def modelled_time_us(op: Op, problem: Problem, target: Target) -> float:
    """Microseconds for a problem in its default configuration, launches included."""
    machine = machine_for(target)
    shown = target if target.is_gpu else parse("cuda:sm_90")
    launches = op.launches(problem, op.default(problem, shown), shown)
    cost = op.cost(problem)
    dtype = problem.inputs[0].spec.dtype
    compute = sum(launch_time_us(machine, x, cost.flops // len(launches), dtype) for x in launches)
    memory = cost.size_bytes / machine.memory_gbps * 1e-3
    return max(compute, memory) + machine.launch_us * len(launches)


