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

    tensor_tflops: dense half-precision products; memory_gbps: DRAM; cache_gbps: L2, all
    multiprocessors together; cache_mb: its size; clock_ghz: under load; launch_us: what one
    dependent kernel adds inside a CUDA graph; start_us: filling and draining one tile. shared_kb,
    threads, blocks: what one multiprocessor holds at a time, 1,024 bytes to the kB; loop_us: what a
    step of a loop costs beside its products and copies.
    """

    name: str
    multiprocessors: int
    tensor_tflops: float
    memory_gbps: float
    cache_gbps: float
    cache_mb: float
    clock_ghz: float
    launch_us: float = 2.0
    start_us: float = 0.6
    shared_kb: int = 228
    threads: int = 2048
    blocks: int = 32
    loop_us: float = 0.02


# Multiprocessors, cache sizes and clocks are the vendors' specifications, and so are the tensor and
# memory rates but the H200's, which are what a copy and a large matrix product reached in published
# measurements; shared_kb, threads and blocks are those of the CUDA C++ Programming Guide. Assumed,
# until a device has been measured: cache_gbps, launch_us, start_us, loop_us (35 cycles: a barrier
# and the addresses).
MACHINES = {
    80: Machine("A100", 108, 280.0, 1_800.0, 4_000.0, 40.0, 1.41, shared_kb=164),
    86: Machine(
        "A40", 84, 130.0, 600.0, 2_500.0, 6.0, 1.74, shared_kb=100, threads=1536, blocks=16
    ),
    89: Machine(
        "L40S", 142, 330.0, 780.0, 4_500.0, 96.0, 2.52, shared_kb=100, threads=1536, blocks=24
    ),
    90: Machine("H200", 132, 790.0, 4_300.0, 5_500.0, 50.0, 1.755),
    100: Machine("B200", 148, 1_900.0, 7_000.0, 9_000.0, 126.0, 1.9),
}
DEFAULT = MACHINES[90]
LANES = 128
"""Thread instructions that one multiprocessor issues per cycle."""
LOAD_CYCLES = 350
"""From a load's issue to its data, out of the L2 cache (assumed)."""
COMBINE_US = 1.0
"""What the end of a split sum takes beside adding up: a fence, a ticket, the first load
(assumed)."""
COMBINE_BYTES = 32
"""What one program reads per cycle while it adds up parts: half of what its multiprocessor could,
two parts being under way at once (assumed)."""
RESIDENT = 0.25
"""The part of the L2 cache in which a tensor surely survives until the next kernel reads it."""
# fp32 by three tf32 products runs at a sixth of the half-precision rate, plain tf32 at a half.
RATE = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 1.0 / 6.0}


def machine_for(target: Target) -> Machine:
    """The machine a target stands for; the H200 where it is no GPU."""
    return MACHINES.get(target.capability, DEFAULT)


def launch_time_us(machine: Machine, launch: Launch, flops: int, dtype: torch.dtype) -> float:
    """Time of a launch if DRAM were free: whole waves of tiles, padding included.

    A tile takes as long as the slowest of its matrix products, its traffic with the L2 cache and
    its other instructions; no program is faster than its loads follow each other.
    """
    tiles = launch.tiles_at(launch.batch or 1)
    rows = max(launch.rows, 1)
    padded = -(-rows // launch.block_rows) * launch.block_rows / rows
    rate = machine.tensor_tflops * 1e6 * RATE[dtype] / machine.multiprocessors
    products_us = flops * padded / tiles / rate
    cache_us = launch.l2_bytes * machine.multiprocessors / (machine.cache_gbps * 1e3)
    issue_us = launch.instructions / (LANES * machine.clock_ghz * 1e3)
    waves = -(-tiles // machine.multiprocessors)
    busy_us = waves * (max(products_us, cache_us, issue_us) + machine.start_us)
    waiting_us = launch.steps * step_us(machine, launch.num_stages) + machine.start_us
    return max(busy_us, waiting_us) + combine_us(machine, launch)


def combine_us(machine: Machine, launch: Launch) -> float:
    """What the last programs of split sums take to add them up, after all the others."""
    if not launch.combine_bytes:
        return 0.0
    return COMBINE_US + launch.combine_bytes / (COMBINE_BYTES * machine.clock_ghz * 1e3)


def step_us(machine: Machine, num_stages: int) -> float:
    """What a step of a pipelined loop takes at least: the loads of num_stages - 1 steps are under
    way at once."""
    return LOAD_CYCLES / max(num_stages - 1, 1) / (machine.clock_ghz * 1e3)


def memory_time_us(machine: Machine, problem: Problem, moved_bytes: int) -> float:
    """Time to move a problem's tensors once; those that stay in the L2 cache move at its speed.

    moved_bytes: what the op really moves of them (a slice reads only a part).
    """
    everything = (
        *problem.inputs, *problem.outputs, *problem.operands, *problem.prologue_operands,
    )  # fmt: skip
    near = far = 0
    for operand in everything:
        if operand.spec.size_bytes <= RESIDENT * machine.cache_mb * 1e6:
            near += operand.spec.size_bytes
        else:
            far += operand.spec.size_bytes
    share = moved_bytes / max(near + far, 1)
    return share * (near / machine.cache_gbps + far / machine.memory_gbps) * 1e-3


def modelled_time_us(op: Op, problem: Problem, target: Target) -> float:
    """Microseconds for a problem in its default configuration, launches included."""
    machine = machine_for(target)
    shown = target if target.is_gpu else parse("cuda:sm_90")
    launches = op.launches(problem, op.default(problem, shown), shown)
    cost = op.cost(problem)
    # Products are computed in the dtype of the weights: an image may enter in another one.
    weights = next(iter(op.packs(problem.attributes)), 0)
    dtype = problem.inputs[weights].spec.dtype
    compute = sum(launch_time_us(machine, x, cost.flops // len(launches), dtype) for x in launches)
    memory = memory_time_us(machine, problem, cost.size_bytes)
    return max(compute, memory) + machine.launch_us * len(launches)
