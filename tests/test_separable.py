"""What the generic tests of ops and rules do not ask of the separable convolution: which algorithm
is chosen, why configurations are refused, what the machine code looks like, whole MobileNets.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from typing import Any

import convloom
import pytest
import torch
from convloom import zoo
from convloom.compiler.capture.capture import capture
from convloom.compiler.graph.ir import CompileTarget
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.passes import run_passes
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Problem
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import Target
from convloom.kernels.fused.chains import separable
from convloom.kernels.fused.chains.separable import Separable
from convloom.kernels.fused.chains.separable_tiles import Block
from convloom.kernels.fused.chains.separable_tiles import make_tile as tile
from convloom.kernels.tile.conv_geometry import Conv2d
from torch import nn

from . import harness, nets
from .domains.fused.separable import RELU6
from .properties.compiled import SPILLING_DEFAULTS, assert_gives_way, assert_healthy, spilled
from .test_offline import TENSOR_CORES, by_generation, channels

SM_80, SM_90 = targets.parse("cuda:sm_80"), targets.parse("cuda:sm_90")


def problem(
    c: int,
    k: int,
    side: int,
    *,
    last: int | None = None,
    residual: bool = False,
    keep: bool = True,
    stride: int = 1,
    r: int = 3,
    n: int = 8,
    dtype: torch.dtype = torch.float16,
) -> Problem:
    """A block of MobileNet: ReLU6 after the depthwise part, and at the end."""
    conv = Conv2d((stride, stride), (r // 2,) * 4, groups=c)
    x = TensorSpec((n, c, side, side), dtype, Layout.NHWC)
    specs = [x, TensorSpec((c, 1, r, r), dtype), channels(c), TensorSpec((k, c, 1, 1), dtype)]
    specs.append(channels(k))
    linear = (Stage("add"), Stage("add")) if residual else (Stage("add"),)
    attributes = Separable(conv, (Stage("add"), RELU6), linear, keep=keep)
    if residual:
        specs.append(TensorSpec((n, k, side // stride, side // stride), dtype, Layout.NHWC))
    if last is not None:
        attributes = replace(attributes, has_expand=True, after_expand=(Stage("add"), RELU6))
        specs += [TensorSpec((last, k, 1, 1), dtype), channels(last)]
    else:
        attributes = replace(attributes, after_project=(*linear, RELU6))
    return harness.problem_for(registry.get("separable"), attributes, tuple(specs))


BLOCKS = {
    "mobilenet_v1 64-128 stride 2": problem(64, 128, 112, stride=2),
    "mobilenet_v1 128-256 stride 2": problem(128, 256, 56, stride=2),
    "mobilenet_v2 96-24-144 stride 2": problem(96, 24, 112, last=144, stride=2),
    "mobilenet_v2 144-24-144": problem(144, 24, 56, last=144, residual=True, keep=False),
    "mobilenet_v2 960-160-960": problem(960, 160, 7, last=960, residual=True, n=32),
    "mobilenet_v3 120-40 5x5": problem(120, 40, 28, r=5),
    "fp32 384-64-384": problem(384, 64, 14, last=384, residual=True, dtype=torch.float32),
}


@by_generation
@pytest.mark.parametrize("name", BLOCKS)
def test_machine_code(name: str, target: Target) -> None:
    """No spills, tensor cores, wide loads, and few barriers: when the compiler moves the operand's
    layout conversion up to the loads of the taps, there are forty in a channel block."""
    if name == "mobilenet_v3 120-40 5x5" and SPILLING_DEFAULTS and spilled(BLOCKS[name], target):
        assert_gives_way(BLOCKS[name], target)
        return
    (report,) = assert_healthy(BLOCKS[name], target)
    assert any(report.count(opcode) for opcode in TENSOR_CORES), report.instructions
    assert report.count("LDG.128") or report.count("LDG.64"), report.instructions
    taps = BLOCKS[name].inputs[1].spec.numel // BLOCKS[name].inputs[0].shape[1]
    narrow = report.count("LDG.U16") + report.count("STG.U16")
    assert narrow < taps, report.instructions
    halves = BLOCKS[name].inputs[0].spec.dtype is torch.float16
    most = 88 if SPILLING_DEFAULTS else 48 if halves else 64  # Triton 3.9 moves it: 77 to 86.
    assert report.count("BAR") <= most, report.instructions


def chosen(made: Problem, target: Target = SM_90) -> Config:
    tile = separable.default(made, target)
    assert separable.legal(made, tile, target) is None
    return tile


def test_operands_stay_where_many_channels_come_out() -> None:
    assert chosen(problem(256, 512, 28, stride=2, n=32))["SPAN"] >= 256
    assert chosen(problem(960, 160, 7, last=960))["SPAN"] == 0
    assert chosen(problem(1024, 1024, 7))["SPAN"] == 0


def test_rows_under_a_band_overlap() -> None:
    conv = Conv2d((2, 2), (2,) * 4, (1, 3), groups=8)
    block = Block(conv, (5, 3), (8, 8, 0), (0, 0, 0), 9, torch.float16)
    assert block.rows_read(1) == 5 and block.rows_read(3) == 9
    tall = replace(block, conv=replace(conv, dilation=(3, 1)))
    assert tall.rows_read(1) == 13


def test_few_pixels_are_split_by_columns() -> None:
    """A batch of one fills the machine although the depthwise part is then computed again."""
    (one,) = separable.launches(
        problem(512, 512, 14, n=1), chosen(problem(512, 512, 14, n=1)), SM_90
    )
    assert one.columns > 1 and one.grid_at(1)[0] > 30


SM_86, SM_100 = targets.parse("cuda:sm_86"), targets.parse("cuda:sm_100")
REFUSED: dict[str, tuple[Problem, Config, Target]] = {
    "needs all 320 channels of the projection in one tile, not 256": (
        problem(960, 320, 7, last=64), tile(4, 16, 32, 256, warps=8), SM_90),
    "needs all 24 channels of the projection in one tile": (
        problem(96, 24, 14, last=64), tile(4, 16, 32, 32, span=32), SM_90),
    "one row per program": (problem(64, 64, 14), tile(1, 64, 32, 64), SM_90),
    "128 pixels and an expansion spill": (
        problem(96, 24, 14, last=64), tile(4, 32, 32, 32, warps=8), SM_80),
    "2 rows, an expansion and a shortcut spill": (
        problem(144, 24, 56, last=144, residual=True), tile(2, 32, 32, 32), SM_80),
    "4 rows and 4 warps spill": (problem(960, 64, 7), tile(4, 16, 32, 64), SM_80),
    "4 rows of stride 2 spill": (
        problem(64, 64, 56, stride=2), tile(4, 32, 32, 64, warps=8), SM_100),
    "8 sums per thread of 4 taps of a stride spill on cuda:sm_100": (
        problem(72, 33, 8, r=2, stride=2, dtype=torch.float32), tile(2, 16, 32, 64), SM_100),
    "an fp32 expansion of a tile of 256 channels": (
        problem(64, 160, 7, last=64, dtype=torch.float32), tile(4, 8, 32, 256, warps=8), SM_90),
    "fp32 operands of all channels": (
        problem(64, 64, 14, dtype=torch.float32), tile(4, 16, 32, 32, 64), SM_90),
    "1024 channels are more than 8 blocks of 64": (
        problem(1024, 64, 7), tile(4, 16, 64, 32, 64), SM_90),
    "bytes of shared memory": (problem(512, 64, 14), tile(4, 32, 64, 64, 64, 8), SM_86),
    "128 accumulators per thread": (problem(64, 256, 14), tile(4, 16, 32, 256), SM_90),
    "32 depthwise sums per thread": (problem(64, 64, 14), tile(4, 16, 64, 64), SM_90),
    "registers per thread for the filter's input": (
        problem(64, 64, 14, r=7), tile(4, 16, 32, 64), SM_90),
    "2 bytes of a row of inputs per thread": (
        problem(64, 64, 14), tile(4, 8, 32, 64, warps=8), SM_90),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_reasons_of_refused_configurations(reason: str) -> None:
    asked = REFUSED[reason]
    assert reason in str(separable.legal(*asked) or separable.crowded(*asked))


def test_what_fits_no_configuration_is_refused_with_the_reason() -> None:
    made = problem(960, 320, 7, last=1280)
    assert not list(separable.configs(made, SM_90))
    assert "all 320 channels" in str(separable.legal(made, separable.default(made, SM_90), SM_90))


X = TensorSpec((2, 8, 5, 5), torch.float32, Layout.NHWC)
W1, W2 = TensorSpec((8, 1, 3, 3), torch.float32), TensorSpec((4, 8, 1, 1), torch.float32)
CONV = Conv2d(groups=8)
MESSAGES: tuple[tuple[Separable, tuple[TensorSpec, ...], str], ...] = (
    (Separable(CONV), (X, W1), "expected 3 inputs, got 2"),
    (Separable(CONV, keep=False), (X, W1, W2), "without an expansion, expected keep=True"),
    (Separable(CONV), (X, W1.with_(shape=(16, 1, 3, 3)), W2), "one filter per channel"),
    (Separable(CONV), (X, W1, W2.with_(shape=(4, 8, 3, 3))), "a weight (K,8,1,1) as w2"),
    (Separable(CONV, (Stage("add"),)), (X, W1, channels(3), W2), "read after depthwise"),
    (Separable(CONV, (), (Stage("add"),)), (X, W1, W2, channels(3)), "read after project"),
)


@pytest.mark.parametrize(("attributes", "specs", "message"), MESSAGES)
def test_messages_of_impossible_geometry(
    attributes: Separable, specs: tuple[TensorSpec, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        separable.infer(attributes, specs)
    assert str(raised.value).startswith("separable: ")


class Inverted(nn.Module):
    """Depthwise, projection (whose result is read again, or not), expansion."""

    def __init__(self, again: bool) -> None:
        super().__init__()
        self.again = again
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.project, self.expand = nn.Conv2d(16, 24, 1), nn.Conv2d(24, 40, 1)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.project(torch.relu(self.depthwise(x)))
        z = torch.relu(self.expand(y))
        return (z, y) if self.again else z


@pytest.mark.parametrize("again", [False, True])
def test_the_projection_is_stored_only_for_who_reads_it(again: bool) -> None:
    module, inputs = nets.randomise(Inverted(again)), nets.inputs_of((1, 16, 6, 5))
    graph = run_passes(capture(module, inputs), Ledger())
    (fused,) = (node for node in graph.compute_nodes() if node.op == "separable")
    assert isinstance(fused.attributes, Separable) and fused.attributes.keep is again
    assert len(fused.outputs) == 1 + again


MODELS = {"mobilenet_v1": 13, "mobilenet_v2": 17}
"""Blocks that are one kernel each."""


@cache
def model(name: str) -> nn.Module:
    return nets.randomise(zoo.build(name, num_classes=10), seed=1)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MODELS)
def test_every_block_of_a_network_is_one_kernel(name: str) -> None:
    """In half precision, against fp64 and beside the same network without passes."""
    inputs = nets.inputs_of((2, 3, 64, 64))
    truth = nets.Truth(model(name), inputs, torch.float16)
    with nets.exporting_once():
        for passes in ("default", "none"):
            exe = convloom.compile(
                model(name), inputs, target="interpreter", dtype=torch.float16, passes=passes
            )
            truth.check(exe(*inputs))
            fused = sum(step.op == "separable" for step in exe.plan.steps)
            assert fused == (MODELS[name] if passes == "default" else 0)


def test_fusing_is_chosen_by_the_model_on_a_gpu() -> None:
    """At a batch of 32 the wide maps are fused; forcing fuses what the model would not."""
    inputs = (torch.empty(32, 3, 224, 224),)
    captured = nets.captured(model("mobilenet_v1"), inputs)
    for force, least in (((), 9), (("separable",), 13)):
        captured.goal = CompileTarget(SM_90, torch.float16, force)
        graph = run_passes(captured, Ledger())
        fused = sum(node.op == "separable" for node in graph.compute_nodes())
        assert least <= fused <= 13
