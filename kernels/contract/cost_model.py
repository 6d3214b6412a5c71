"""How long a launch should take on a GPU: the one model behind defaults, fusions and the tuner's
order where nothing has been measured.

A program (one tile) keeps its multiprocessor busy, in cycles, for the slowest of

    tensor cores   products, padding included / FLOP per cycle
    L2             bytes its loop reads / (cache_gbps / multiprocessors / clock)
    shared memory  (bytes its products read + bytes copied there) / 128
    instructions   those beside the products / 4 warps per cycle

and then for its end: the bytes of its results / 22, or where the copy engine moves them while the
next tile is multiplied, what threads issue for it or exchange with shared memory, as above; the
engine moves as many bytes there once more, beside the loop. A multiprocessor that holds one program
at a time waits for each end, and for the first loads of the next program; of several, one's end is
hidden behind the others' loops, as are those of a program that multiplies one tile while it
finishes another. No program is faster than its loads follow each other, of which stages - 1 are
under way at once. A problem takes the longer of that and of its traffic with DRAM, and what
launches cost.

The figures are NVIDIA's where they are specifications; the rest is fitted to public measurements on
H100 and H200, which `benchmarks/public_figures.py` holds the model against, or assumed, as each
says. The model ranks; it promises nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from . import programmatic_launch
from .op import Config, Launch, Op, Problem
from .targets import Target, parse


@dataclass(frozen=True)
class Machine:
    """One GPU.

    clock_ghz: under load; tensor_tflops: dense half-precision products at that clock; memory_gbps:
    DRAM; cache_gbps: L2 to all multiprocessors together; cache_mb: its size; launch_us: what one
    dependent kernel adds inside a CUDA graph; early_us: how much of that a programmatic launch
    saves. Of one multiprocessor: shared_kb, threads, blocks: what it holds at a time, 1,024 bytes
    to the kB; store_bytes: of results, per cycle; end_cycles: the end of a tile beside them;
    fill_cycles: from a program's start to its first products, beside the time in which what these
    multiply leaves L2, and what drains behind it.
    """

    name: str
    multiprocessors: int
    tensor_tflops: float
    memory_gbps: float
    cache_gbps: float
    cache_mb: float
    clock_ghz: float
    launch_us: float = 2.0
    early_us: float = 0.0
    shared_kb: int = 228
    threads: int = 2048
    blocks: int = 32
    store_bytes: float = 22.0
    end_cycles: float = 400.0
    fill_cycles: float = 750.0

    def per_cycle(self, per_second_giga: float) -> float:
        """A rate of the whole GPU in 10^9 per second as one multiprocessor's share per cycle."""
        return per_second_giga / self.multiprocessors / self.clock_ghz


# Multiprocessors, cache sizes, shared_kb, threads and blocks are specifications (CUDA C++
# Programming Guide). H200: 4,096 half-precision FLOP per cycle and multiprocessor (989.5 TFLOP/s =
# 132 x 1.83 GHz x 4,096) at the 1.6 GHz that long products settle at (fitted: 790 to 808 TFLOP/s
# published); 8,300 GB/s out of L2 (fitted: products of 192x192 tiles at 777 TFLOP/s and of 128x256
# at 689 both read 8,100), store_bytes, end_cycles and fill_cycles fitted to Triton's persistent and
# plain kernels of 512 terms (527 and 450 TFLOP/s: 2,000 cycles between tiles of 128x256, 1,250 of
# them until the operands of the first step are there); memory_gbps is what large copies reach. For
# H100 are published: launch_us of a chain of empty kernels (Hazy Research, "Look Ma, No Bubbles!",
# 2025) and early_us of a pair of them (pegainfer issue 569, which calls it the most there is to
# gain: no more of a program's start is taken to be hidden, nor its first loads). Of the others the
# tensor and memory rates are specifications or published copies, the rest is assumed.
MACHINES = {
    80: Machine("A100", 108, 280.0, 1_800.0, 4_000.0, 40.0, 1.41, shared_kb=164),
    86: Machine(
        "A40", 84, 130.0, 600.0, 2_500.0, 6.0, 1.74, shared_kb=100, threads=1536, blocks=16
    ),
    89: Machine(
        "L40S", 142, 330.0, 780.0, 4_500.0, 96.0, 2.52, shared_kb=100, threads=1536, blocks=24
    ),
    90: Machine("H200", 132, 865.0, 4_300.0, 8_300.0, 50.0, 1.6, launch_us=1.3, early_us=0.96),
    100: Machine("B200", 148, 1_900.0, 7_000.0, 9_000.0, 126.0, 1.9),
}
DEFAULT = MACHINES[90]
WARP = 32
WARPS_PER_CYCLE = 4
"""Instructions of warps that one multiprocessor issues per cycle."""
LEAST_ROWS = 16
"""Of a product of tensor cores: kernels that take fewer at a time add up by themselves."""
SHARED_BYTES = 128
"""What shared memory gives or takes per cycle."""
REGISTERS = 65_536
"""32-bit registers of one multiprocessor, on every supported generation."""
BLOCK_SHARED = 1_024
"""Bytes of shared memory that the system keeps for itself in every block."""
LOAD_CYCLES = 350
"""From a load's issue to its data, out of the L2 cache (assumed)."""
COMBINE_US = 1.0
"""What the end of a split sum takes beside adding up: a fence, a ticket, the first load
(assumed)."""
COMBINE_BYTES = 32
"""What one program reads per cycle while it adds up parts: half of what its multiprocessor could,
two parts being under way at once (assumed)."""
CLUSTER_CYCLES = 180
"""From a load's issue to its data, out of the shared memory of another multiprocessor (H800: Luo
et al., "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture", arXiv 2402.13499); a
barrier of a cluster takes as long (assumed)."""
CLUSTER_BYTES = {2: 16, 4: 13, 8: 13}
"""What one program reads there per cycle, by the size of the cluster: 3.27 and 2.65 TB/s in
clusters of 2 and 4 on 114 multiprocessors at 1.755 GHz (the same source; of 8 assumed)."""
RESIDENT = 0.25
"""The part of the L2 cache in which a tensor surely survives until the next kernel reads it."""
COPY_BYTES = 16
"""What one thread copies to shared memory with one instruction."""
# fp32 by three tf32 products runs at a sixth of the half-precision rate, plain tf32 at a half.
RATE = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 1.0 / 6.0}
TF32_RATE = 0.5
FEW_REGISTERS = 40
"""Of a thread without accumulators, where no report tells (assumed)."""
FIRST_CYCLES = 1_250.0
"""Until the first operands are there, where a launch does not say what its steps are: as of the
tile that `fill_cycles` was fitted to."""


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel needs of a multiprocessor.

    registers: per thread; spill_bytes: stack per thread (0 when nothing spilled); shared_bytes: per
    block.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int


def product_rate(dtype: torch.dtype, precision: str) -> float:
    """How fast products of this dtype are, as a share of the machine's half-precision rate."""
    if dtype is torch.float32 and precision == "tf32":
        return TF32_RATE
    # Whole numbers are only moved: nothing is multiplied at this rate.
    return RATE.get(dtype, RATE[torch.float32])


def machine_for(target: Target) -> Machine:
    """The machine a target stands for; the H200 where it is not a GPU."""
    return MACHINES.get(target.capability, DEFAULT)


class Block(NamedTuple):
    """What one step of a matrix product multiplies: m x k by k x n."""

    m: int
    n: int
    k: int


def block_of(launch: Launch) -> Block | None:
    """The block of a launch's products; None where its kernel has none."""
    sizes = launch.constexprs
    if (tile := sizes.get("TILE")) is not None:
        multiplies = tile.K and tile.M >= LEAST_ROWS
        return Block(tile.M, tile.N, tile.K) if multiplies else None
    if not {"BLOCK_M", "BLOCK_N", "BLOCK_K"} <= sizes.keys():
        return None
    return Block(sizes["BLOCK_M"], sizes["BLOCK_N"], sizes["BLOCK_K"])


class TileCycles(NamedTuple):
    """What one program asks of its multiprocessor, in cycles. latency: of its loads, one after the
    other; end: its results; stall: how long the end keeps its threads; first: until the operands of
    its first step are there, from when they are on their way."""

    tensor: float
    cache: float
    shared: float
    instructions: float
    latency: float
    end: float
    stall: float
    first: float

    @property
    def loop(self) -> float:
        """Cycles for which the loop keeps the multiprocessor from others."""
        return max(self.tensor, self.cache, self.shared, self.instructions)


def tile_cycles(
    machine: Machine, launch: Launch, flops: float, dtype: torch.dtype, end_bytes: float,
    rate: float | None = None,
) -> TileCycles:  # fmt: skip
    """flops: of one program, padding included where its launch does not count steps; end_bytes:
    what it moves at its end; rate: of its products as a share of the half-precision rate."""
    block, steps, shared = block_of(launch), float(launch.steps), float(launch.shared_traffic)
    if block is not None and not shared:
        terms = 2 * block.m * block.n * block.k
        steps = steps or max(1.0, flops / terms)
        flops = steps * terms
        shared = steps * product_traffic(block, launch.num_warps, dtype)
    products = machine.per_cycle(machine.tensor_tflops * 1e3) * (rate or RATE[dtype])
    end = end_bytes / machine.store_bytes
    issued = launch.end_instructions * launch.num_warps / WARPS_PER_CYCLE
    warp_steps = steps * launch.step_instructions * launch.num_warps
    cache = launch.l2_bytes / machine.per_cycle(machine.cache_gbps)
    return TileCycles(
        flops / products,
        cache,
        (shared + launch.end_shared) / SHARED_BYTES,
        (warp_steps + launch.instructions / WARP) / WARPS_PER_CYCLE,
        steps * LOAD_CYCLES / max(launch.num_stages - 1, 1),
        end,
        max(launch.end_shared / SHARED_BYTES, issued) if launch.end_shared else end,
        cache / steps if steps else FIRST_CYCLES,
    )


def product_traffic(block: Block, warps: int, dtype: torch.dtype, rows_held: bool = False) -> int:
    """Bytes of shared memory that one step reads and writes: four warps multiply 64 rows at a time
    and read both operands from there, each column's once for every 64 rows (sm_90's wgmma; older
    code reads as much). rows_held: the rows are in registers, and only columns are copied."""
    if rows_held:
        return (-(-block.m // 64) + 1) * block.n * block.k * dtype.itemsize
    groups = max(1, warps // 4)
    along = max(1, groups * 64 // max(block.m, 64))  # Groups side by side over the columns.
    read = -(-block.m // 64) * (64 * along + block.n) * block.k
    return (read + (block.m + block.n) * block.k) * dtype.itemsize


def resident(
    machine: Machine, launch: Launch, dtype: torch.dtype, report: Resources | None = None
) -> int:
    """Programs of the launch that one multiprocessor holds at a time; at least 1."""
    threads = WARP * launch.num_warps
    limit = min(machine.blocks, machine.threads // threads)
    if report is None:
        registers = launch.registers or _registers(launch, dtype)
        shared = launch.shared_held or _staged_bytes(launch, dtype)
    else:
        registers, shared = report.registers, report.shared_bytes
    by_shared = machine.shared_kb * 1024 // (shared + BLOCK_SHARED)
    # Registers are given out in eights.
    by_registers = REGISTERS // (max(-(-registers // 8), 1) * 8 * threads)
    return max(1, min(limit, by_shared, by_registers))


def _staged_bytes(launch: Launch, dtype: torch.dtype) -> int:
    """Shared memory of a pipelined product: one A and one B block per stage."""
    block = block_of(launch)
    if block is None:
        return 0
    staged = launch.num_stages * (block.m + block.n) * block.k * dtype.itemsize
    return staged + launch.cluster_bytes


def _registers(launch: Launch, dtype: torch.dtype) -> int:
    """Registers of one thread where no report tells: accumulators, and addresses for the rows it
    copies (fitted to seven tiles of 3x3 convolutions on sm_90, within 12)."""
    block = block_of(launch)
    if block is None:
        return FEW_REGISTERS
    threads = WARP * launch.num_warps
    copies = block.m * block.k * dtype.itemsize / (threads * COPY_BYTES)
    return int(block.m * block.n / threads + 30 + 7 * copies)


def launch_us(
    machine: Machine, launch: Launch, flops: float, dtype: torch.dtype, end_bytes: float = 0.0,
    rate: float | None = None, report: Resources | None = None,
) -> float:  # fmt: skip
    """Microseconds of a launch if DRAM were free, and without what launching costs.

    flops: of all its programs; end_bytes: what all of them move at their ends together.
    """
    tiles = launch.tiles_at(launch.batch or 1)
    cycles = tile_cycles(machine, launch, flops / tiles, dtype, end_bytes / tiles, rate)
    per_multiprocessor = -(-tiles // machine.multiprocessors)
    held = resident(machine, launch, dtype, report)
    fill = machine.fill_cycles + cycles.first
    start = fill + machine.end_cycles
    alone = max(cycles.loop, cycles.latency) + cycles.stall
    if launch.hides_ends:
        # Two tiles at a time, each of them first in its loop and then at its end.
        each = max(cycles.loop, cycles.latency, cycles.end, (alone + machine.end_cycles) / 2)
        busy = per_multiprocessor * each + cycles.end + start
    elif held == 1:
        stays = launch.most_programs is not None
        each = max(alone + machine.end_cycles, cycles.end)
        starts = fill + cycles.end - cycles.stall
        busy = per_multiprocessor * (each if stays else alone + start) + stays * starts
    else:
        shared_out = per_multiprocessor * max(cycles.loop, cycles.end) + cycles.end + start
        waves = -(-per_multiprocessor // held)
        busy = max(shared_out, waves * (alone + machine.end_cycles) + fill)
    return busy / (machine.clock_ghz * 1e3) + combine_us(machine, launch)


def combine_us(machine: Machine, launch: Launch) -> float:
    """What the last programs of split sums take to add them up, after all the others; or all of a
    cluster together, between two barriers of which a store hides the second."""
    if not launch.combine_bytes:
        return 0.0
    if launch.cluster > 1:
        cycles = 2 * CLUSTER_CYCLES + launch.combine_bytes / CLUSTER_BYTES[launch.cluster]
        return cycles / (machine.clock_ghz * 1e3)
    return COMBINE_US + launch.combine_bytes / (COMBINE_BYTES * machine.clock_ghz * 1e3)


def memory_us(machine: Machine, problem: Problem, moved_bytes: int) -> float:
    """Time to move a problem's tensors once; those that stay in the L2 cache move at its speed.

    moved_bytes: what the op really moves of them (a slice reads only a part).
    """
    sizes = [operand.spec.size_bytes for group in problem.groups.values() for operand in group]
    near = sum(size for size in sizes if size <= RESIDENT * machine.cache_mb * 1e6)
    far = sum(sizes) - near
    share = moved_bytes / max(near + far, 1)
    return share * (near / machine.cache_gbps + far / machine.memory_gbps) * 1e-3


def end_bytes(problem: Problem) -> int:
    """What all programs move at their ends: results, and what the epilogue reads in full."""
    outputs = [operand.spec for operand in problem.outputs]
    operands = [operand.spec for operand in problem.operands]
    whole = [spec for spec in operands if spec.numel == problem.output.spec.numel]
    return sum(spec.size_bytes for spec in (*outputs, *whole))


def problem_us(
    op: Op,
    problem: Problem,
    target: Target,
    config: Config | None = None,
    reports: Sequence[Resources] | None = None,
) -> float:
    """Microseconds of a problem, launches included.

    config: the default where None is given; reports: what the compiler made of each launch.
    """
    return _Modelled(op, problem, target, config, reports).time_us


def bound(op: Op, problem: Problem, target: Target, config: Config | None = None) -> str:
    """What a problem's time is mostly made of: "tensor cores", "L2", "shared memory",
    "instructions", "latency", "ends of tiles", "launch" or "memory"."""
    return _Modelled(op, problem, target, config, None).bound


class _Modelled:
    """A problem in a configuration, and what each part of the machine would take for it alone."""

    def __init__(
        self,
        op: Op,
        problem: Problem,
        target: Target,
        config: Config | None,
        reports: Sequence[Resources] | None,
    ) -> None:
        shown = target if target.is_gpu else parse("cuda:sm_90")
        self.machine = machine_for(shown)
        tile = op.default(problem, shown) if config is None else config
        launches = op.launches(problem, tile, shown)
        cost = op.cost(problem)
        # Products are computed in the dtype of the weights: an image may enter in another one.
        weights = next(iter(op.packs(problem.attributes)), 0)
        dtype = problem.inputs[weights].spec.dtype
        rate = product_rate(dtype, problem.precision)
        ends = end_bytes(problem) / len(launches)
        self.memory_us = memory_us(self.machine, problem, cost.size_bytes)
        early = sum(programmatic_launch.is_early(launch, shown) for launch in launches)
        self.launched_us = self.machine.launch_us * len(launches) - self.machine.early_us * early
        self.compute_us = 0.0
        self.cycles: dict[str, float] = dict.fromkeys(TileCycles._fields, 0.0)
        for at, launch in enumerate(launches):
            flops = cost.flops / len(launches) * padding(launch, tile, problem)
            report = reports[at] if reports is not None else None
            self.compute_us += launch_us(self.machine, launch, flops, dtype, ends, rate, report)
            tiles = launch.tiles_at(launch.batch or 1)
            cycles = tile_cycles(self.machine, launch, flops / tiles, dtype, ends / tiles, rate)
            held = resident(self.machine, launch, dtype, report)
            hidden = cycles._replace(latency=cycles.latency / held)
            for name, value in zip(TileCycles._fields, hidden, strict=True):
                self.cycles[name] += value * -(-tiles // self.machine.multiprocessors)

    @property
    def time_us(self) -> float:
        return max(self.compute_us, self.memory_us) + self.launched_us

    @property
    def bound(self) -> str:
        if self.launched_us >= max(self.compute_us, self.memory_us):
            return "launch"
        if self.memory_us >= self.compute_us:
            return "memory"
        names = {
            "tensor": "tensor cores", "cache": "L2", "shared": "shared memory",
            "instructions": "instructions", "latency": "latency",
        }  # fmt: skip
        slowest = max(names, key=lambda name: self.cycles[name])
        loop_us = self.cycles[slowest] / (self.machine.clock_ghz * 1e3)
        return names[slowest] if 2 * loop_us >= self.compute_us else "ends of tiles"


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
        made = launch.constexprs["PIXELS"]
        pooled: int = made.side**2 or made.pool.P * made.pool.Q
        return computed / max(problem.output.spec.numel * pooled, 1)
    spec = problem.output.spec
    columns = spec.shape[spec.layout.order(spec.rank)[-1]] if spec.rank else 1
    tiles = launch.columns / blocks.get("SPLIT", 1)
    return max(rows, 1.0) * max(tiles * width / max(columns, 1), 1.0)


MULTIPROCESSORS = 132
