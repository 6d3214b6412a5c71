"""Guards of speed that need no GPU: what the compiler makes of the zoo's kernels, how many of them
a model launches, and a cost model that keeps to what is possible.

A sample runs by default, every model under `slow`. Exceptions are tables here, each with a reason.
`CONVLOOM_UPDATE_GOLDEN=1 pytest tests/test_guards.py -m 'slow or not slow' -k launches` rewrites
`golden/launches.json`; read the difference afterwards.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom import zoo
from convloom.benchmarks.measure import roofline_us
from convloom.compiler.api import lowered
from convloom.compiler.plan.plan import KernelStep, Plan
from convloom.compiler.records import rank
from convloom.compiler.run.runtime import compile_requests
from convloom.kernels import registry
from convloom.kernels.contract import cost_model, targets
from convloom.kernels.contract.op import Launch
from convloom.kernels.devices import kernel_hash, offline
from convloom.kernels.devices.offline import CompileRequest, KernelReport

from . import machine_code

TARGET = targets.parse("cuda:sm_90")
LAUNCHES = Path(__file__).parent / "golden" / "launches.json"
SAMPLE = ("lenet5", "resnet18", "mobilenet_v2")
BATCHES = (1, 32)
PINNED_BATCH = 32

TENSOR_CORES = ("HGMMA", "HMMA")
PRODUCTS = ("tl.dot(", "warpgroup_mma(")
NARROW = {
    "separable": "taps of the depthwise part are read between products, not pipelined",
    "pool_conv": "windows are pooled while they are read, which needs them in registers",
    "head_kernel": "rows of the hidden layer, which may be shorter than a tile",
}
"""Kernels with matrix products whose loads need no asynchronous copies, and why."""

ONE_STEP: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "conv_chain_kernel": lambda has: has["FRONT"] is None and has["Y"].K <= has["TILE"].N,
    "resident_kernel": lambda has: has["SPAN"] <= has["TILE"].N,
}
"""Kernels whose loop has a single step with these constants, though their launch does not say so:
there is nothing to pipeline, and operands are loaded directly, 16 bytes at a time."""

ISSUE_LIMIT = 0.75
"""Instructions per tensor-core cycle; above it a loop is bound by issuing. At 128x64x64 with 4
warps a step of a 3x3 filter takes 173, or 189 where bias and ReLU follow the loop: the assembler
then keeps 9 of its masks in logical instructions. Where programs share a sum it takes 184."""
ISSUE_LIMITS = {
    "conv_chain_kernel": (1.3, "two products with different tiles share each of its loops"),
    "conv_pool": (0.8, "pixels come window by window: their masks are 20 more instructions"),
    "separable": (None, "depthwise taps on the CUDA cores decide, not the products"),
    "pool_conv": (None, "pooling on the CUDA cores decides, not the products"),
    "head_kernel": (None, "a few rows: waits for weights"),
}
NARROW_CHAIN_LIMIT = 1.8
"""Where a chain takes 32 columns at a time: as many addresses for half of the products. Memory
decides there: the first chains of ResNet-50 move 128 MB at batch 32, 30 us by the model, for
products that take 16 us."""
UNEVEN_LIMIT = 0.77
"""Where a filter's tap takes no power of two of steps: which tap a step belongs to is a division,
14 instructions more in each step (188 to 194 for 448 channels at 128x64x64 with 4 warps)."""
PROLOGUE_LIMIT = 1.5
"""Where stages are applied to every element of an operand on its way to the tensor cores: scaling,
shifting and clamping take 190 instructions in each step of 128x64x64 with 4 warps."""
SHALLOW_LIMIT = 1.0
"""Where a step is less than 64 channels deep: as many masks and barriers for half the products."""
SHALLOW_MASKED_LIMIT = 1.2
"""Where it is, and channels do not fill the last step of BLOCK_K."""
MASKED_LIMIT = 0.9
"""Where channels do not fill the last step of BLOCK_K: its masks are in the loop."""
DEEP = 64
LEAST_ROWS, LEAST_COLUMNS = 128, 64
"""Smaller tiles are chosen where few pixels leave multiprocessors idle: there latency decides."""

MOST_REPLACED = 2
"""Kernels of a model whose default spills, so that the next configuration is taken."""

LOOP_BARRIERS = 3
LOOP_BARRIERS_OF = {
    "conv_chain_kernel": (12, "each of two products waits for the tile of the other"),
    "separable": (4, "each step's depthwise result goes through shared memory"),
    "resident_kernel": (4, "each step stores results, which go through shared memory in two parts"),
    "pool_conv": (8, "each step's pooled windows go through shared memory"),
}
HALVES, BARRIERS_OF_A_HALF = 256, 2
"""From so many rows on, what a prologue makes of a step goes through shared memory in two halves,
with so many barriers more: a twentieth of the products of 256x128x64."""


@dataclass(frozen=True)
class Kernel:
    """One launch of a plan, with what must be compiled for it."""

    model: str
    batch: int
    step: KernelStep
    launch: Launch
    request: CompileRequest

    @property
    def name(self) -> str:
        """Of the function; of the op where it is the tile kernel, which is a kernel for each."""
        return self.step.op if self.request.name == "tile_kernel" else self.request.name

    @property
    def multiplies(self) -> bool:
        """Whether its source has matrix products, which belong on tensor cores."""
        reached = kernel_hash.reachable((self.launch.kernel, self.launch.constexprs))
        return any(product in each.src for each in reached.values() for product in PRODUCTS)

    @property
    def channels(self) -> int:
        """Of the first input, in each group."""
        shape = self.step.problem.inputs[0].spec.shape
        groups = getattr(self.step.problem.attributes, "groups", 1)
        return int(shape[1]) // int(groups)

    @property
    def is_even(self) -> bool:
        """Whether rows of channels are multiples of 16 bytes, in and out."""
        tensors = (*self.step.problem.inputs[:1], *self.step.problem.outputs)
        return self.channels % 8 == 0 and all(int(t.spec.shape[1]) % 8 == 0 for t in tensors)

    def __str__(self) -> str:
        inputs = ", ".join(str(operand.spec) for operand in self.step.problem.inputs[:2])
        return f"{self.model} batch {self.batch} {self.step.name}: {self.name}({inputs})"


@lru_cache(maxsize=8)
def plan_of(model: str, batch: int, compiled: bool = False) -> Plan:
    """The plan in fp16 for sm_90, in default configurations; compiled: what spills gives way."""
    x = torch.zeros(batch, *zoo.entry(model).input_shape)
    torch.manual_seed(0)
    return lowered(
        zoo.build(model).eval(), (x,), target=TARGET.name, dtype=torch.float16, fallback="torch",
        compiled=compiled,
    )[1]  # fmt: skip


def kernels_of(model: str, batch: int, compiled: bool = False) -> list[Kernel]:
    """The plan's launches, each distinct one once."""
    plan = plan_of(model, batch, compiled)
    found: dict[CompileRequest, Kernel] = {}
    for (step, launch), wanted in zip(plan.kernels, compile_requests(plan, TARGET), strict=True):
        found.setdefault(wanted, Kernel(model, batch, step, launch, wanted))
    return list(found.values())


@lru_cache(maxsize=1)
def sample() -> tuple[Kernel, ...]:
    """Of each kernel function the application with most work, at the larger batch."""
    best: dict[str, tuple[int, Kernel]] = {}
    for model in SAMPLE:
        for kernel in kernels_of(model, max(BATCHES)):
            cost = registry.get(kernel.step.op).cost(kernel.step.problem)
            work = cost.flops + cost.size_bytes
            if kernel.name not in best or work > best[kernel.name][0]:
                best[kernel.name] = work, kernel
    found = tuple(kernel for _, kernel in best.values())
    offline.compile_all([kernel.request for kernel in found], kind=KernelReport)
    return found


# What the compiler made of a kernel.


def complaints(kernel: Kernel) -> Iterator[str]:
    """What is wrong with the machine code, in words."""
    report = offline.report(kernel.request)
    if report.spill_bytes:
        yield f"spills {report.spill_bytes} bytes"
    if report.shared_bytes > TARGET.shared_bytes:
        yield f"{report.shared_bytes} bytes of shared memory, {TARGET.shared_bytes} are there"
    if report.registers > TARGET.registers_per_thread:
        yield f"{report.registers} registers"
    if not kernel.multiplies:
        return
    if not any(report.count(opcode) for opcode in TENSOR_CORES):
        yield f"no tensor-core instructions: {dict(report.instructions)}"
        return
    yield from _loads(kernel, report)
    loop = machine_code.hot_loop(offline.disassembly(offline.compile_request(kernel.request)))
    if loop is not None:
        yield from _loop(kernel, loop)


def _loads(kernel: Kernel, report: KernelReport) -> Iterator[str]:
    """Operands arrive 16 bytes at a time where channels allow."""
    if not kernel.is_even:
        return
    asynchronous = report.count("LDGSTS.128") + report.count("UTMALDG")
    wide = asynchronous + report.count("LDG.128")
    if not (wide if kernel.name in NARROW or has_one_step(kernel) else asynchronous):
        yield f"no 16-byte asynchronous copies: {dict(report.instructions)}"


def has_one_step(kernel: Kernel) -> bool:
    """Whether the main loop runs once: nothing to pipeline, operands are loaded directly."""
    once = ONE_STEP.get(kernel.name)
    return kernel.launch.steps == 1 or (once is not None and once(kernel.launch.constexprs))


def _loop(kernel: Kernel, loop: machine_code.Loop) -> Iterator[str]:
    """The hot loop issues little beside its products, waits rarely, and loads no elements."""
    # A prologue's halves, one per channel, are two bytes per thread: less than a copy's least, 4.
    single = loop.count("LDG.E.U16") - len(kernel.step.problem.prologue_operands)
    if kernel.is_even and single > 0:
        yield f"{single} two-byte loads in the hot loop"
    allowed = LOOP_BARRIERS_OF.get(kernel.name, (LOOP_BARRIERS,))[0]
    block = cost_model.block_of(kernel.launch)
    if prologue_of(kernel.step) and block is not None and block.m >= HALVES:
        allowed += BARRIERS_OF_A_HALF
    if loop.count("BAR") > allowed:
        yield f"{loop.count('BAR')} barriers in the hot loop, allowed {allowed}"
    limit = issue_limit(kernel)
    if limit is not None and loop.issue_ratio > limit:
        yield (
            f"{len(loop.opcodes)} instructions for {loop.tensor_cycles:.0f} tensor-core cycles in "
            f"the hot loop: {loop.issue_ratio:.2f}, allowed {limit}"
        )


def prologue_of(step: KernelStep) -> object:
    """What is computed of each step's rows; a fused op has it among its attributes."""
    return step.problem.prologue or getattr(step.problem.attributes, "before", ())


def issue_limit(kernel: Kernel) -> float | None:
    """Instructions per tensor-core cycle that the kernel's hot loop may take."""
    stages = prologue_of(kernel.step)
    usual = ISSUE_LIMITS.get(kernel.name, (ISSUE_LIMIT,))[0]
    blocks = dict(kernel.step.config.blocks)
    if kernel.name == "conv_chain_kernel" and blocks["BLOCK_N"] < LEAST_COLUMNS:
        return NARROW_CHAIN_LIMIT
    is_small = blocks.get("BLOCK_M", 0) < LEAST_ROWS or blocks.get("BLOCK_N", 0) < LEAST_COLUMNS
    if usual is None or (is_small and kernel.name != "conv_chain_kernel"):
        return None
    if kernel.name in ISSUE_LIMITS and not stages:
        return usual
    if not kernel.is_even:
        return None
    if stages:
        return PROLOGUE_LIMIT
    is_masked = kernel.channels % blocks.get("BLOCK_K", 1) != 0
    if blocks.get("BLOCK_K", 0) < DEEP:
        return SHALLOW_MASKED_LIMIT if is_masked else SHALLOW_LIMIT
    if is_masked:
        return MASKED_LIMIT
    steps = kernel.channels // blocks["BLOCK_K"]
    is_uneven = kernel.name == "conv2d" and steps & (steps - 1)
    return UNEVEN_LIMIT if is_uneven else ISSUE_LIMIT


def assert_healthy(kernels: list[Kernel]) -> None:
    offline.compile_all([kernel.request for kernel in kernels], kind=KernelReport)
    found = [f"{kernel}: {reason}" for kernel in kernels for reason in complaints(kernel)]
    assert not found, "\n".join(found)


def test_a_sample_of_the_zoos_kernels_is_healthy() -> None:
    names = {kernel.name for kernel in sample()}
    assert len(names) >= 6 and any(kernel.multiplies for kernel in sample()), names
    assert_healthy(list(sample()))


@pytest.mark.slow
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", zoo.names())
def test_every_kernel_of_the_zoo_is_healthy(model: str, batch: int) -> None:
    """Of the plan that `compile` makes. A default that gives way is compiled in vain: few may."""
    kernels = kernels_of(model, batch, compiled=True)
    assert_healthy(kernels)
    replaced = [kernel for kernel in kernels if kernel.step.chosen_by.startswith("next by")]
    assert len(replaced) <= MOST_REPLACED, "\n".join(
        f"{kernel}: {kernel.step.chosen_by}" for kernel in replaced
    )


def test_exceptions_say_why() -> None:
    assert all(len(reason) > 10 for reason in NARROW.values())
    for _, reason in (*ISSUE_LIMITS.values(), *LOOP_BARRIERS_OF.values()):
        assert len(reason) > 10


# The guards themselves: they see what they guard against.

SASS = """
.L_x_0:
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], [R2.64] ;
        /*0020*/                   HGMMA.64x64x16.F32 R24, gdesc[UR4], R24, gsb0 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0040*/             @!P0  BRA `(.L_x_1) ;
        /*0050*/                   HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0060*/              @P1  BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""


def test_the_hot_loop_is_the_innermost_one_with_most_products() -> None:
    loop = machine_code.hot_loop(SASS)
    assert loop is not None and len(loop.opcodes) == 4
    assert loop.tensor_cycles == 32 and loop.issue_ratio == 4 / 32
    assert loop.count("BAR") == 1 and loop.count("LDGSTS") == 1
    assert len(machine_code.loops(SASS)) == 2
    assert machine_code.hot_loop(SASS.replace("HGMMA.64x64x16", "FADD")) is not None
    assert machine_code.hot_loop("EXIT ;") is None


BAD = KernelReport(255, 0, 0, {"HGMMA": 4, "LDG.U16": 64})
FAULTS: dict[str, tuple[KernelReport, str, str]] = {
    "spills": (KernelReport(255, 64, 0, {"HGMMA": 4, "LDGSTS.128": 4}), SASS, "spills 64 bytes"),
    "shared": (KernelReport(64, 0, 1 << 19, {"HGMMA": 4, "LDGSTS.128": 4}), SASS, "shared memory"),
    "products": (KernelReport(64, 0, 0, {"FFMA": 4, "LDGSTS.128": 4}), SASS, "no tensor-core"),
    "loads": (BAD, SASS, "no 16-byte"),
    "single": (BAD, SASS.replace("LDGSTS.E.BYPASS.128", "LDG.E.U16"), "1 two-byte loads"),
    "issue": (BAD, SASS.replace("64x64x16", "64x8x16"), r"4 instructions for 4 .*: 1.00"),
    "barriers": (
        BAD,
        SASS.replace("        /*0030", "        /*0028*/ BAR.SYNC 0x0 ;\n" * 4 + "        /*0030"),
        "5 barriers in the hot loop",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    report, sass, complaint = FAULTS[fault]
    kernels = (k for k in kernels_of("resnet18", 32) if k.name == "conv2d" and k.is_even)
    kernel = next(k for k in kernels if k.step.config["BLOCK_K"] >= DEEP)
    monkeypatch.setattr(offline, "report", lambda wanted: report)
    monkeypatch.setattr(offline, "compile_request", lambda wanted: None)
    monkeypatch.setattr(offline, "disassembly", lambda compiled: sass)
    with pytest.raises(AssertionError, match=complaint):
        offline_checked(kernel)


@pytest.mark.parametrize("copies", ["LDGSTS.128", "UTMALDG"])
def test_copies_by_threads_and_by_tma_are_asynchronous(copies: str) -> None:
    kernel = next(k for k in kernels_of("resnet18", 32) if k.name == "conv2d" and k.is_even)
    assert not list(_loads(kernel, KernelReport(64, 0, 0, {"HGMMA": 4, copies: 6, "LDG.128": 8})))
    assert list(_loads(kernel, KernelReport(64, 0, 0, {"HGMMA": 4, "LDG.128": 8})))


def offline_checked(kernel: Kernel) -> None:
    """`assert_healthy` without compiling."""
    found = list(complaints(kernel))
    assert not found, "\n".join(found)


# Launches.


def pinned() -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = json.loads(LAUNCHES.read_text()) if LAUNCHES.exists() else {}
    return found


def check_launches(model: str) -> None:
    plan = plan_of(model, PINNED_BATCH)
    now = {"kernels": len(plan.kernels), "torch": plan.torch_fallbacks}
    table = pinned()
    if os.environ.get("CONVLOOM_UPDATE_GOLDEN"):
        table[model] = now
        ordered = {name: table[name] for name in zoo.names() if name in table}
        lines = ",\n".join(f'  "{name}": {json.dumps(row)}' for name, row in ordered.items())
        LAUNCHES.write_text(f"{{\n{lines}\n}}\n")
        return
    assert model in table, f"{model} is not in {LAUNCHES}: see the head of this file"
    assert now == table[model], f"{model}: launches {table[model]} -> {now}: wanted?"


@pytest.mark.parametrize("model", SAMPLE)
def test_launches_of_a_sample(model: str) -> None:
    check_launches(model)


@pytest.mark.slow
@pytest.mark.parametrize("model", [name for name in zoo.names() if name not in SAMPLE])
def test_launches_of_every_model(model: str) -> None:
    check_launches(model)


def test_pinned_launches_are_those_of_models_of_the_zoo() -> None:
    """That each has some is asked above, where every model is planned."""
    command = "see the head of this file for the command that writes golden/launches.json"
    assert list(pinned()) == [name for name in zoo.names() if name in pinned()], command


# The cost model.


def modelled_us(plan: Plan, step: KernelStep) -> float:
    return rank.modelled_us(registry.get(step.op), step.problem, plan.target, step.config)


def steps_of(plan: Plan) -> list[KernelStep]:
    return [step for step in plan.steps if isinstance(step, KernelStep)]


TOTALS: dict[str, Callable[[Plan], float]] = {
    "tuner": lambda plan: sum(modelled_us(plan, step) for step in steps_of(plan)),
    "fusions": lambda plan: sum(
        cost_model.problem_us(registry.get(step.op), step.problem, plan.target)
        for step in steps_of(plan)
    ),
}


@pytest.mark.parametrize("model", ["lenet5", "resnet18"])
@pytest.mark.parametrize("total", TOTALS)
def test_more_images_take_longer_by_the_model(total: str, model: str) -> None:
    times = [TOTALS[total](plan_of(model, batch)) for batch in (1, 32, 256)]
    assert times == sorted(times) and times[0] > 0, times


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("model", SAMPLE)
def test_no_modelled_time_is_below_the_roofline(model: str, batch: int) -> None:
    plan = plan_of(model, batch)
    for step in steps_of(plan):
        bound = roofline_us(step, plan)
        assert modelled_us(plan, step) >= bound, (step.name, bound)
        op = registry.get(step.op)
        assert cost_model.problem_us(op, step.problem, plan.target) >= bound, step.name
