"""Kernels that only move memory read and write every element once in their default configuration:
the accesses of all programs are counted. Where windows overlap, programs share their borders."""

from __future__ import annotations

import pytest
import torch
from convloom.benchmarks import ops, traffic
from convloom.benchmarks.traffic import READ, WRITE, Traffic
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Attributes, Ref
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.movement.pointwise import Pointwise
from convloom.kernels.normalisation.batch_norm import BatchNorm
from convloom.kernels.normalisation.softmax import Softmax
from convloom.kernels.pooling.max_unpool import MaxUnpool2d
from convloom.kernels.pooling.pool_window import AvgPool2d, LpPool2d, MaxPool2d
from convloom.kernels.tile.conv_geometry import Conv2d

from . import harness

SM_90 = targets.parse("cuda:sm_90")
IMAGE, HALVED = (2, 72, 20, 18), {"kernel": (2, 2), "stride": (2, 2)}


def image(*shape: int, dtype: torch.dtype = torch.float16) -> TensorSpec:
    return TensorSpec(shape, dtype, Layout.NHWC)


def channels(count: int = 72) -> TensorSpec:
    return TensorSpec((count,), torch.float32)


def touched(
    name: str, attributes: Attributes, specs: tuple[TensorSpec, ...], stages: tuple[Stage, ...] = ()
) -> Traffic:
    op = registry.get(name)
    problem = harness.problem_for(op, attributes, specs, stages)
    return traffic.traffic(problem, op.default(problem, SM_90), SM_90)


POOL = MaxPool2d((2, 2), (2, 2))
POOLED = (2, 72, 10, 9)
ONCE: dict[str, tuple[str, Attributes, tuple[TensorSpec, ...]]] = {
    "relu": ("relu", Pointwise(), (image(*IMAGE),)),
    "add": ("add", Pointwise(), (image(*IMAGE), image(*IMAGE))),
    "batch_norm": ("batch_norm", BatchNorm(), (image(*IMAGE), *[channels()] * 4)),
    "softmax": ("softmax", Softmax(1), (image(*IMAGE),)),
    "max pooling": ("max_pool2d", POOL, (image(*IMAGE),)),
    "average pooling": ("avg_pool2d", AvgPool2d((2, 2), (2, 2)), (image(*IMAGE),)),
    "norm pooling": ("lp_pool2d", LpPool2d(2.0, (2, 2), (2, 2)), (image(*IMAGE),)),
    "indices": ("max_pool2d_with_indices", POOL, (image(*IMAGE),)),
    "unpooling": (
        "max_unpool2d",
        MaxUnpool2d((20, 18), (20, 18), POOL),
        (image(*POOLED), image(*POOLED, dtype=torch.int64)),
    ),
    "depthwise 1x1": (
        "conv2d",
        Conv2d(groups=72),
        (image(*IMAGE), TensorSpec((72, 1, 1, 1), torch.float16)),
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ONCE)
def test_every_element_is_read_and_written_once(name: str) -> None:
    op, attributes, specs = ONCE[name]
    seen = touched(op, attributes, specs, (Stage("relu"),))
    packs = registry.get(op).packs(attributes)
    for slot, spec in enumerate(specs):
        if slot not in packs and spec.rank == 4:
            read = seen[READ, Ref("input", slot)]
            assert (read.accesses, read.distinct) == (spec.numel, spec.numel), f"input {slot}"
    for index, spec in enumerate(registry.get(op).infer(attributes, specs)):
        written = seen[WRITE, Ref("output", index)]
        assert (written.accesses, written.distinct) == (spec.numel, spec.numel), f"output {index}"


BORDERS = {
    "depthwise 3x3": ("conv2d", Conv2d((1, 1), (1,) * 4, groups=64), 1.8),
    "depthwise 3x3, stride 2": ("conv2d", Conv2d((2, 2), (1,) * 4, groups=64), 1.6),
    "max 3x3, stride 2": ("max_pool2d", MaxPool2d((3, 3), (2, 2), (1, 1)), 1.6),
    "average 3x3": ("avg_pool2d", AvgPool2d((3, 3), (1, 1), (1, 1)), 1.8),
}
"""Overlapping windows, and how often an element may cross the L2 cache at most, on average."""


@pytest.mark.interpreter
@pytest.mark.parametrize("name", BORDERS)
def test_overlapping_windows_share_what_programs_hold(name: str) -> None:
    """Every element leaves memory once; a program fetches it once, neighbours again its border."""
    op, attributes, most = BORDERS[name]
    specs = [image(1, 64, 56, 56)]
    if op == "conv2d":
        specs.append(TensorSpec((64, 1, 3, 3), torch.float16))
    definition = registry.get(op)
    large = harness.problem_for(definition, attributes, (image(32, 64, 56, 56), *specs[1:]))
    tile = definition.default(large, SM_90)
    problem = harness.problem_for(definition, attributes, tuple(specs))
    seen = traffic.traffic(problem, tile, SM_90)
    read, written = seen[READ, Ref("input", 0)], seen[WRITE, Ref("output", 0)]
    numel = problem.output.spec.numel
    assert read.distinct == specs[0].numel
    assert read.fetched <= most * specs[0].numel, read.fetched / specs[0].numel
    assert (written.accesses, written.distinct) == (numel, numel)


def test_every_op_has_a_typical_shape() -> None:
    """The table of ops needs a row for each; shapes alone are quick to make."""
    for op in registry.OPS:
        problem = ops.typical(op, {})
        assert problem.op == op.name and op.cost(problem).size_bytes > 0
    for name, (of, values) in ops.VARIANTS.items():
        assert ops.typical(registry.get(of), values) != ops.typical(registry.get(of), {}), name


@pytest.mark.interpreter
def test_a_row_says_what_is_modelled_and_what_was_not_measured() -> None:
    row = ops.row("max_pool2d")
    assert row.measured_us is None and row.modelled_us > 0
    assert row.writes == 1.0 and 1.0 < row.reads < 1.6
    table = ops.markdown([row])
    assert "| not measured |" in table and "modelled" in table
