"""Convolutions that read boxes of pixels through descriptors."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convloom.compiler.records import rank
from convloom.kernels import registry
from convloom.kernels.contract import cost_model
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Problem, Ref, config
from convloom.kernels.contract.spec import FLOAT_DTYPES, Layout, TensorSpec
from convloom.kernels.contract.targets import Target, parse
from convloom.kernels.devices import execute, offline
from convloom.kernels.hopper import boxes
from convloom.kernels.tile.conv_geometry import Conv2d
from convloom.kernels.unmeasured import conv_tma

from . import harness
from .test_offline import sums_of

SM_90 = parse("cuda:sm_90")
OP = registry.get("conv2d")
HALF = torch.float16
SAME = (1, 1, 1, 1)


def problem(
    attributes: Conv2d,
    image: tuple[int, int],
    filters: tuple[int, int] = (3, 3),
    channels: tuple[int, int] = (32, 24),
    n: int = 3,
    dtype: torch.dtype = HALF,
) -> Problem:
    """A convolution with residual and ReLU, of a batch that may be smaller."""
    x = TensorSpec((n, channels[0], *image), dtype, Layout.NHWC, batch=n)
    w = TensorSpec((channels[1], channels[0] // attributes.groups, *filters), dtype)
    (y,) = OP.infer(attributes, (x, w))
    return harness.problem_for(OP, attributes, (x, w), (Stage("add"), Stage("relu")), (y,))


def in_boxes(asked: Problem, target: Target = SM_90) -> list[Config]:
    return [c for c in OP.configs(asked, target) if conv_tma.uses_boxes(c)]


GEOMETRIES = {
    "3x3": problem(Conv2d((1, 1), SAME), (7, 9)),
    "3x3 stride 2": problem(Conv2d((2, 2), SAME), (8, 14)),
    "1x1 stride 2": problem(Conv2d((2, 2)), (8, 12), (1, 1)),
    "5x5 stride 2": problem(Conv2d((2, 2), (2, 2, 3, 1)), (6, 8), (5, 5), n=2),
    "1x7 uneven padding": problem(Conv2d((1, 1), (0, 1, 2, 3)), (5, 9), (1, 7)),
    "dilated": problem(Conv2d((1, 1), (2, 2, 3, 3), (2, 3)), (9, 11)),
    "dilated stride 2": problem(Conv2d((2, 2), (2, 1, 3, 3), (2, 3)), (10, 12)),
    "one pixel": problem(Conv2d((1, 1), SAME), (1, 1)),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", GEOMETRIES)
def test_boxes_agree_with_the_reference(name: str) -> None:
    """Boxes of several forms, also inside a wider buffer and for a smaller batch."""
    asked = GEOMETRIES[name]
    x = asked.inputs[0]
    wider = replace(asked, inputs=(replace(x, pitch=x.pitch + 16, offset=8), asked.inputs[1]))
    batch = x.spec.shape[0]
    specs = [operand.spec for operand in asked.inputs]
    tensors = tuple(harness.make_tensor(spec, at, -1, 1) for at, spec in enumerate(specs))
    operands = (harness.make_tensor(asked.output.spec, 7, -1, 1),)
    for at, tile in enumerate(all_boxes(asked)):
        placed = wider if at % 2 else asked
        assert OP.legal(placed, tile, SM_90) is None
        results = harness.run_interpreted(OP, placed, tensors, operands, tile, batch)
        harness.compare(OP, placed, results, tensors, operands)
    results = harness.run_interpreted(OP, wider, tensors, operands, tile, batch - 1)
    assert results[0][batch - 1 :].isnan().all() and not results[0][: batch - 1].isnan().any()


def all_boxes(asked: Problem) -> list[Config]:
    """Small images pad every box: the search space may be empty, the kernel must still be right."""
    shapes = ((1, 8, 8), (4, 4, 4), (2, 2, 16), (16, 1, 4))
    made = [
        config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BOX_N=a, BOX_H=b, BOX_W=c)
        for a, b, c in shapes
    ]
    return [*in_boxes(asked)[:1], *made]


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_special_values_stay_where_they_are(dtype: torch.dtype) -> None:
    asked = replace(problem(Conv2d((2, 2), SAME), (8, 8), dtype=dtype), epilogue=(), operands=())
    x, w = (harness.make_tensor(operand.spec, at, -1, 1) for at, operand in enumerate(asked.inputs))
    x[0, 3, 2, 5], x[1, 0, 7, 7], x[2, 31, 0, 0] = float("nan"), float("inf"), float("-inf")
    for tile in all_boxes(asked)[-2:]:
        results = harness.run_interpreted(OP, asked, (x, w), (), tile, 3)
        harness.compare(OP, asked, results, (x, w))


def test_views_of_stride_2_follow_batch_and_slice() -> None:
    asked = problem(Conv2d((2, 2), SAME), (8, 14))
    asked = replace(asked, inputs=(replace(asked.inputs[0], pitch=48, offset=8), asked.inputs[1]))
    (launch,) = OP.launches(asked, all_boxes(asked)[-4], SM_90)
    names = ("input", 0), ("input", 1), ("output", 0), ("operand", 0)
    flat = {Ref(*name): torch.zeros(99_999, dtype=HALF) for name in names}
    x = execute.bind(launch, flat.__getitem__, 2)["x"]
    assert x.shape == [2, 4, 2, 7, 48 + 32]
    assert x.strides == [8 * 14 * 48, 2 * 14 * 48, 14 * 48, 2 * 48, 1]
    assert x.block_shape == [1, 8, 1, 8, 32]
    assert launch.m_at(2) == 2 and launch.grid_at(2)[0] == 2


def test_boxes_of_little_waste_are_tried() -> None:
    asked = problem(Conv2d((1, 1), SAME), (56, 56), channels=(64, 64), n=32)
    assert {c["BLOCK_M"] for c in in_boxes(asked)} == {64, 128, 256}
    assert boxes.waste(asked, (1, 8, 8)) == 1.0
    assert boxes.waste(asked, (1, 8, 16)) == pytest.approx(64 / 56)
    for tile in in_boxes(asked):
        (launch,) = OP.launches(asked, tile, SM_90)
        box = (tile["BOX_N"], tile["BOX_H"], tile["BOX_W"])
        assert cost_model.padding(launch, tile, asked) == pytest.approx(boxes.waste(asked, box))
    # 7x7 at batch 1: whatever the box, half of it is empty or more.
    assert boxes.boxes(problem(Conv2d((1, 1), SAME), (7, 7), n=1), 128) == []


def test_boxes_are_refused_with_a_reason() -> None:
    good = problem(Conv2d((1, 1), SAME), (16, 16))
    tile = all_boxes(good)[-4]
    assert OP.legal(good, tile, SM_90) is None
    for asked, chosen, target, reason in (
        (good, tile, "cuda:sm_86", "cuda:sm_86 has no such copies"),
        (problem(Conv2d((1, 1), SAME, groups=2), (16, 16), channels=(64, 128)), tile, "cuda:sm_90",
         "2 groups"),
        (problem(Conv2d((1, 2), SAME), (16, 16)), tile, "cuda:sm_90", "stride (1, 2)"),
        (problem(Conv2d((2, 2), SAME), (15, 16)), tile, "cuda:sm_90", "15x16 has no halves"),
        (problem(Conv2d((1, 1), SAME), (16, 16), channels=(40, 8)), tile, "cuda:sm_90",
         "40 channels are no multiple of BLOCK_K=32"),
        (good, replace(tile, blocks=(*tile.blocks[:-1], ("BOX_W", 4))), "cuda:sm_90", "BLOCK_M=64"),
        (replace(good, prologue=(Stage("relu"),)), tile, "cuda:sm_90", "a prologue needs"),
    ):  # fmt: skip
        assert reason in str(OP.legal(asked, chosen, parse(target)))
    assert not in_boxes(good, parse("cuda:sm_80"))


@pytest.mark.parametrize("target", ["cuda:sm_90", "cuda:sm_100"])
@pytest.mark.parametrize("stride", [1, 2])
def test_boxes_compile_to_tma_copies(stride: int, target: str) -> None:
    """The largest tile of 64 sums per thread: no copies by threads, no spills."""
    asked = problem(Conv2d((stride, stride), SAME), (28, 28), channels=(128, 128), n=32)
    tiles = [tile for tile in in_boxes(asked, parse(target)) if sums_of(tile) <= 64]
    tile = max(tiles, key=lambda c: c["BLOCK_M"] * c["BLOCK_N"])
    launches = OP.launches(asked, tile, parse(target))
    (wanted,) = rank.requests(OP, asked, launches, parse(target))
    report = offline.report(wanted)
    assert report.spill_bytes == 0 and report.count("UTMALDG"), (tile, report)
    assert not report.count("LDGSTS") and report.count("STG.128"), (tile, report)
