"""Who computes a plain product: tiles, or streamed weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convloom.compiler.records import rank
from convloom.kernels import registry
from convloom.kernels.contract import cost_model
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Launch, Problem, config
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import GPU_TARGETS, INTERPRETER, Target, parse
from convloom.kernels.devices import offline
from convloom.kernels.products import gemv
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile import choice, gemm
from convloom.kernels.tile.conv_geometry import Conv2d

from . import harness, machine_code

SM_90 = parse("cuda:sm_90")
HALF = torch.float16


def linear(rows: int, depth: int, columns: int, dtype: torch.dtype = HALF) -> Problem:
    """A linear layer with bias and ReLU."""
    x, w = TensorSpec((rows, depth), dtype), TensorSpec((columns, depth), dtype)
    bias = TensorSpec((columns,), torch.float32)
    stages = (Stage("add"), Stage("relu"))
    return harness.problem_for(registry.get("linear"), Linear(), (x, w), stages, (bias,))


def pointwise(n: int, c: int, k: int, size: int) -> Problem:
    """A 1x1 convolution."""
    x = TensorSpec((n, c, size, size), HALF, Layout.NHWC)
    return harness.problem_for(
        registry.get("conv2d"), Conv2d(), (x, TensorSpec((k, c, 1, 1), HALF))
    )


def launch_of(problem: Problem, tile: Config, target: Target = SM_90) -> Launch:
    (launch,) = registry.get(problem.op).launches(problem, tile, target)
    return launch


def report_of(problem: Problem, tile: Config, target: Target) -> offline.KernelReport:
    op = registry.get(problem.op)
    (wanted,) = rank.requests(op, problem, [launch_of(problem, tile, target)], target)
    return offline.report(wanted)


def streaming(problem: Problem, target: Target = SM_90) -> list[Config]:
    """The configurations that stream the weights."""
    return [c for c in registry.get(problem.op).configs(problem, target) if gemv.uses_gemv(c)]


@pytest.mark.parametrize("columns", [1000, 4096])
def test_one_row_is_streamed_by_default(columns: int) -> None:
    problem = linear(1, 4096, columns)
    tile = registry.get("linear").default(problem, SM_90)
    assert gemv.uses_gemv(tile), tile
    tiles = choice.default_tile(gemm.problem_size(problem), SM_90)
    gpu, size = cost_model.machine_for(SM_90), gemm.problem_size(problem)
    launches = gemv.launch_for_cost_model(size, tile), choice.launch_for_cost_model(size, tiles)
    streamed, tiled = (cost_model.launch_us(gpu, launch, *size.work) for launch in launches)
    assert streamed < tiled


@pytest.mark.parametrize("problem", [linear(64, 4096, 1000), pointwise(8, 64, 64, 14)], ids=str)
def test_more_rows_are_not_streamed(problem: Problem) -> None:
    assert not streaming(problem)
    assert not gemv.uses_gemv(registry.get(problem.op).default(problem, SM_90))


def test_a_convolution_of_one_pixel_is_a_product_of_few_rows() -> None:
    """As in squeeze-and-excitation, or a classifier written as a 1x1 convolution."""
    assert streaming(pointwise(4, 512, 100, 1))


def test_weights_are_read_once() -> None:
    """All programs together: the weights, and x once for each of them."""
    problem = linear(2, 4096, 1000)
    for tile in streaming(problem):
        launch = launch_of(problem, tile)
        programs = launch.grid_at(1)[0]
        assert programs == -(-1000 // tile["BLOCK_N"])
        whole = 2 * 4096 * (programs * tile["BLOCK_N"] + programs * 2)
        assert launch.l2_bytes * programs == whole


def test_the_interpreter_keeps_its_tiles() -> None:
    """It pays for programs, not for rows."""
    op = registry.get("linear")
    assert not gemv.uses_gemv(op.default(linear(1, 4096, 1000), INTERPRETER))


def test_streaming_is_refused_with_a_reason() -> None:
    problem = linear(3, 4096, 1000)
    op = registry.get("linear")
    good = config(4, 1, ROWS=4, BLOCK_N=2, BLOCK_K=1024)
    assert op.legal(problem, good, SM_90) is None
    for tile, reason in (
        (replace(good, blocks=(("ROWS", 2), ("BLOCK_N", 2), ("BLOCK_K", 1024))), "3 rows; the"),
        (replace(good, blocks=(("ROWS", 4), ("BLOCK_N", 2), ("BLOCK_K", 512))), "4 warps load"),
    ):
        assert reason in str(op.legal(problem, tile, SM_90))


def test_what_may_spill_is_legal_but_comes_last() -> None:
    """Whether it does the compiler's report tells."""
    op, one, sm_100 = registry.get("linear"), linear(1, 4096, 9), parse("cuda:sm_100")
    four = config(4, 1, ROWS=1, BLOCK_N=4, BLOCK_K=1024)
    assert op.legal(one, four, sm_100) is None
    assert four in streaming(one, sm_100) and op.crowded(one, four, SM_90) is None
    assert op.crowded(one, four, sm_100) == "4 columns; more than 2 spill"
    ranked = [each.config for each in rank.rank(op, one, sm_100, streaming(one, sm_100))]
    roomy = [op.crowded(one, config_, sm_100) is None for config_ in ranked]
    assert roomy == sorted(roomy, reverse=True) and not all(roomy)
    many = config(4, 1, ROWS=4, BLOCK_N=8, BLOCK_K=1024)
    assert op.legal(linear(3, 4096, 9), many, SM_90) is None
    assert "sums per thread" in str(op.crowded(linear(3, 4096, 9), many, SM_90))


@pytest.mark.parametrize("target", [t for t in GPU_TARGETS if t.capability % 10 == 0], ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_streaming_kernels_compile_without_spills(dtype: torch.dtype, target: Target) -> None:
    """The largest configurations in both directions; 16-byte loads, no barrier between them."""
    for rows in (1, 8):
        problem = linear(rows, 4096, 1000, dtype)
        roomy = [c for c in streaming(problem, target) if gemv.crowded(c, target) is None]
        tile = max(roomy, key=lambda c: (c["BLOCK_N"], c["BLOCK_K"]))
        report = report_of(problem, tile, target)
        assert report.spill_bytes == 0 and report.count("LDG.128"), (tile, report)
        assert report.registers <= 128, (tile, report)


# Prologues.

PER_CHANNEL, PER_SAMPLE = (72,), (21, 1)
PROLOGUES: dict[str, tuple[tuple[Stage, ...], tuple[tuple[int, ...], ...], bool]] = {
    "none": ((), (), True),
    "batch norm": ((Stage("mul"), Stage("add"), Stage("relu")), (PER_CHANNEL, PER_CHANNEL), True),
    "quotient": ((Stage("div"),), (PER_CHANNEL,), False),
    "logarithm": ((Stage("abs"), Stage("log")), (), False),
    "scaled samples": ((Stage("mul"),), (PER_SAMPLE,), False),
    "overflow": ((Stage("add", literal=1e6), Stage("add", literal=-1e6)), (), True),
    "overflow of halves": ((Stage("add", literal=1e6),), (), False),
}
"""Stages, the shapes of what they read, and whether channels that do not exist stay finite."""


def prepared(name: str) -> Problem:
    """A linear layer of 72 channels, which fill no step of 64, behind a prologue."""
    stages, shapes, _ = PROLOGUES[name]
    read = tuple(harness.place(TensorSpec(shape, HALF)) for shape in shapes)
    return replace(linear(21, 72, 40), prologue=stages, prologue_operands=read)


@pytest.mark.parametrize("name", PROLOGUES)
def test_channels_that_do_not_exist_are_selected_away_only_where_needed(name: str) -> None:
    assert gemm.is_finite_at_zero(prepared(name)) is PROLOGUES[name][2]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [name for name in PROLOGUES if not name.startswith("overflow")])
def test_channels_that_do_not_exist_change_nothing(name: str) -> None:
    """Infinities in what a row is scaled by stay in that row."""
    problem, op = prepared(name), registry.get("linear")
    x, w = (
        harness.make_tensor(operand.spec, at, 0.5, 2.0) for at, operand in enumerate(problem.inputs)
    )
    before = [
        harness.make_tensor(operand.spec, 5 + at, 0.5, 2.0)
        for at, operand in enumerate(problem.prologue_operands)
    ]
    if name == "scaled samples":
        before[0][3], before[0][4] = float("inf"), float("nan")
    bias = harness.make_tensor(problem.operands[0].spec, 9, -1.0, 1.0)
    tiles = [c for c in op.configs(problem, SM_90) if dict(c.blocks).get("BLOCK_K") == 64]
    results = harness.run_interpreted(op, problem, (x, w), (bias,), tiles[0], before=tuple(before))
    applied = ep.apply_reference(problem.prologue, x.double(), tuple(t.double() for t in before))
    harness.compare(op, problem, results, (applied.to(HALF), w), (bias,))


def test_a_prologue_does_not_decide_the_loop() -> None:
    """Each element is scaled, shifted, clamped and rounded, and not selected: 1.41 instructions for
    each cycle of the tensor cores at 128x64x64 with 4 warps; with selects it was 2.27."""
    problem, op = pointwise(32, 288, 128, 14), registry.get("conv2d")
    vector = harness.place(TensorSpec((288, 1, 1), torch.float32))
    stages = PROLOGUES["batch norm"][0]
    problem = replace(problem, prologue=stages, prologue_operands=(vector, vector))
    tile = config(4, 3, BLOCK_M=128, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, SPLIT=1)
    (wanted,) = rank.requests(op, problem, [launch_of(problem, tile)], SM_90)
    assert offline.report(wanted).spill_bytes == 0
    loop = machine_code.hot_loop(offline.disassembly(offline.compile_request(wanted)))
    assert loop is not None and loop.issue_ratio < 1.5 and loop.count("BAR") <= 3


@pytest.mark.parametrize(("rows", "multiplies"), [(1, False), (64, True)])
def test_a_vector_times_a_matrix_is_no_block_of_tensor_cores(rows: int, multiplies: bool) -> None:
    """As such it would be modelled with sixteen times its products, through shared memory."""
    problem = linear(rows, 512, 512)
    launch = launch_of(problem, registry.get("linear").default(problem, SM_90))
    assert (cost_model.block_of(launch) is not None) == multiplies
