"""Who computes a plain product: tiles, or the weights streamed for a few rows."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convloom.compiler.tuning import rank
from convloom.kernels import gemm, gemv, machine, offline, registry
from convloom.kernels.conv2d import Conv2d
from convloom.kernels.epilogue import Stage
from convloom.kernels.linear import Linear
from convloom.kernels.op import Config, Launch, Problem, config
from convloom.kernels.spec import Layout, TensorSpec
from convloom.kernels.targets import GPU_TARGETS, INTERPRETER, Target, parse

from . import harness

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
    return [c for c in registry.get(problem.op).configs(problem, target) if gemv.is_one(c)]


@pytest.mark.parametrize("columns", [1000, 4096])
def test_one_row_is_streamed_by_default(columns: int) -> None:
    problem = linear(1, 4096, columns)
    tile = registry.get("linear").default(problem, SM_90)
    assert gemv.is_one(tile), tile
    tiles = gemm.default_tile(gemm.problem_size(problem), SM_90)
    gpu, flops = machine.machine_for(SM_90), 2 * 4096 * columns
    streamed, tiled = (
        machine.launch_time_us(gpu, launch_of(problem, each), flops, HALF) for each in (tile, tiles)
    )
    assert streamed < tiled


@pytest.mark.parametrize("problem", [linear(64, 4096, 1000), pointwise(8, 64, 64, 14)], ids=str)
def test_more_rows_are_not_streamed(problem: Problem) -> None:
    assert not streaming(problem)
    assert not gemv.is_one(registry.get(problem.op).default(problem, SM_90))


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
    assert not gemv.is_one(op.default(linear(1, 4096, 1000), INTERPRETER))


def test_streaming_is_refused_with_a_reason() -> None:
    problem = linear(3, 4096, 1000)
    op = registry.get("linear")
    good = config(4, 1, ROWS=4, BLOCK_N=2, BLOCK_K=1024)
    assert op.legal(problem, good, SM_90) is None
    for tile, reason in (
        (replace(good, blocks=(("ROWS", 2), ("BLOCK_N", 2), ("BLOCK_K", 1024))), "3 rows; the"),
        (replace(good, blocks=(("ROWS", 4), ("BLOCK_N", 8), ("BLOCK_K", 1024))), "256 sums per"),
        (replace(good, blocks=(("ROWS", 4), ("BLOCK_N", 2), ("BLOCK_K", 512))), "4 warps load"),
    ):
        assert reason in str(op.legal(problem, tile, SM_90))
    four = config(4, 1, ROWS=1, BLOCK_N=4, BLOCK_K=1024)
    assert "spill on sm_100" in str(op.legal(linear(1, 512, 9), four, parse("cuda:sm_100")))
    assert op.legal(linear(1, 512, 9), four, SM_90) is None


@pytest.mark.parametrize("target", [t for t in GPU_TARGETS if t.capability % 10 == 0], ids=str)
@pytest.mark.parametrize("dtype", [HALF, torch.float32], ids=str)
def test_streaming_kernels_compile_without_spills(dtype: torch.dtype, target: Target) -> None:
    """The largest configurations in both directions; 16-byte loads, no barrier between them."""
    for rows in (1, 8):
        problem = linear(rows, 4096, 1000, dtype)
        tile = max(streaming(problem, target), key=lambda c: (c["BLOCK_N"], c["BLOCK_K"]))
        report = report_of(problem, tile, target)
        assert report.spill_bytes == 0 and report.count("LDG.128"), (tile, report)
        assert report.registers <= 128, (tile, report)
