"""Convolutions that pool their own result: what the generic tests of ops and rules do not ask."""

from __future__ import annotations

import re
from dataclasses import replace

import convloom
import pytest
import torch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Problem, Ref
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import Target
from convloom.kernels.devices import offline
from convloom.kernels.fused import conv_mean, conv_pool, conv_tile
from convloom.kernels.fused.conv_mean import ConvMean
from convloom.kernels.fused.conv_pool import ConvPool, is_monotone, split_stages
from convloom.kernels.fused.conv_tile import StagedConv
from convloom.kernels.pooling.pool_window import AvgPool2d, MaxPool2d
from convloom.kernels.tile.conv_geometry import Conv2d
from torch import nn

from . import harness, nets
from .test_offline import by_generation

HALF, FLOAT = torch.float16, torch.float32
BIAS = (Stage("add"), Stage("relu"))
RESIDUAL = (Stage("add"), Stage("add"), Stage("relu"))
PAIR = (2, 2)
SAME = Conv2d((1, 1), (1,) * 4)
SM_90 = targets.parse("cuda:sm_90")


def image(*shape: int, dtype: torch.dtype = FLOAT) -> TensorSpec:
    return TensorSpec(shape, dtype, Layout.NHWC)


def dense(*shape: int, dtype: torch.dtype = FLOAT) -> TensorSpec:
    return TensorSpec(shape, dtype)


def problem(attributes: StagedConv, *specs: TensorSpec) -> Problem:
    op = conv_pool.OP if isinstance(attributes, ConvPool) else conv_mean.OP
    return harness.problem_for(op, attributes, specs)


X, W = image(2, 16, 8, 6), dense(24, 16, 3, 3)
GROUPED = replace(SAME, groups=2)
MESSAGES = (
    (ConvPool(SAME, pool=MaxPool2d((3, 3), PAIR)), (X, W), "window is 3x3, not 2x2"),
    (ConvPool(SAME, pool=MaxPool2d(PAIR, (1, 2))), (X, W), "stride is 1x2, not 2x2"),
    (ConvPool(SAME, pool=MaxPool2d(PAIR, PAIR, (1, 1))), (X, W), "padding is 1x1, not 0x0"),
    (ConvPool(SAME, pool=MaxPool2d(PAIR, PAIR, dilation=PAIR)), (X, W), "dilation is 2x2"),
    (ConvPool(GROUPED), (X, dense(24, 8, 3, 3)), "the convolution has 2 groups"),
    (
        ConvPool(pool=AvgPool2d(PAIR, PAIR, ceil_mode=True)),
        (X, W),
        "averages over windows that overhang",
    ),
    (ConvPool(SAME, stages=BIAS), (X, W), "expected 3 inputs, got 2"),
    (ConvPool(SAME, stages=BIAS), (X, W, dense(5, 1, 1)), "does not broadcast to"),
    (ConvPool(SAME, before=BIAS), (X, W, X), "is not one number per channel of"),
    (ConvMean(SAME), (image(1, 16, 16, 17), W), "16x17 pixels do not fit one tile (at most 256)"),
    (ConvMean(GROUPED), (X, dense(24, 8, 3, 3)), "the convolution has 2 groups"),
    (ConvMean(SAME, stages=BIAS), (X, W), "expected 3 inputs, got 2"),
)


@pytest.mark.parametrize(("attributes", "specs", "message"), MESSAGES)
def test_what_the_kernels_cannot_do_is_said(
    attributes: StagedConv, specs: tuple[TensorSpec, ...], message: str
) -> None:
    op = conv_pool.OP if isinstance(attributes, ConvPool) else conv_mean.OP
    if "overhang" in message:
        specs = (image(2, 16, 9, 6), dense(24, 16, 1, 1))
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        op.infer(attributes, specs)
    assert str(raised.value).startswith(f"{op.name}: ")


def test_only_what_commutes_moves_behind_the_maximum() -> None:
    leaky, falling = Stage("leaky_relu", (0.1,)), Stage("leaky_relu", (-0.1,))
    assert is_monotone(leaky) and not is_monotone(falling) and not is_monotone(Stage("silu"))
    chain = (Stage("add"), Stage("silu"), Stage("relu"), leaky)
    assert split_stages(ConvPool(SAME, stages=chain)) == (chain[:2], chain[2:])
    assert split_stages(ConvPool(SAME, stages=(*chain, falling))) == ((*chain, falling), ())
    average = ConvPool(SAME, stages=BIAS, pool=AvgPool2d(PAIR, PAIR, divisor_override=3))
    assert split_stages(average) == (BIAS, (Stage("div", literal=3.0),))


@pytest.mark.interpreter
def test_an_infinite_bias_is_added_before_the_maximum() -> None:
    """inf + (-inf) of one member is NaN, though the window's maximum plus inf is not."""
    asked = problem(ConvPool(stages=BIAS), image(1, 1, 2, 2), dense(1, 1, 1, 1), dense(1, 1, 1))
    x = torch.tensor([[[[1.0, 2.0], [float("-inf"), 3.0]]]])
    tensors = (x, torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), float("inf")))
    (result,) = harness.run_interpreted(conv_pool.OP, asked, tensors)
    assert result.isnan().all()
    harness.check(conv_pool.OP, asked, tensors)


@pytest.mark.interpreter
def test_a_transition_pools_behind_its_prologue() -> None:
    """DenseNet's: normalisation and ReLU while x is read, 1x1 convolution, average pooling."""
    module, inputs = nets.make(
        lambda m, x: m.pool(m.conv(torch.relu(m.norm(x)))) * 2.0,
        (2, 16, 7, 6),
        norm=nn.BatchNorm2d(16),
        conv=nn.Conv2d(16, 8, 1, bias=False),
        pool=nn.AvgPool2d(2),
    )
    exe = convloom.compile(module, inputs, target="interpreter")
    (node,) = [node for node in exe.graph.compute_nodes() if node.op == "conv_pool"]
    assert isinstance(node.attributes, ConvPool) and len(node.attributes.before) == 3
    assert [stage.name for stage in node.epilogue] == ["mul"]
    nets.check(exe(*inputs), module, inputs)


def report(asked: Problem, target: Target) -> offline.KernelReport:
    """What the compiler made of the default configuration."""
    op = registry.get(asked.op)
    tile = op.default(asked, target)
    assert op.legal(asked, tile, target) is None
    (launch,) = op.launches(asked, tile, target)

    def dtype_of(ref: Ref) -> torch.dtype:
        group = asked.outputs if ref.kind == "output" else asked.inputs
        return group[ref.index].spec.dtype

    return offline.report(offline.request(launch, dtype_of, target))


def pooled(c: int, k: int, size: int) -> Problem:
    specs = image(8, c, size, size, dtype=HALF), dense(k, c, 3, 3, dtype=HALF), dense(k, 1, 1)
    return problem(ConvPool(SAME, stages=BIAS), *specs)


def averaged(c: int, k: int, size: int, n: int = 8) -> Problem:
    return problem(
        ConvMean(stages=RESIDUAL),
        image(n, c, size, size, dtype=HALF),
        dense(k, c, 1, 1, dtype=HALF),
        image(n, k, size, size, dtype=HALF),
        dense(k, 1, 1),
    )


@by_generation
@pytest.mark.parametrize("shape", [(64, 64, 224), (256, 256, 56)], ids=str)
def test_pooling_exchanges_nothing_and_stores_wide(
    shape: tuple[int, int, int], target: Target
) -> None:
    made = report(pooled(*shape), target)
    assert made.spill_bytes == 0
    assert made.count("SHFL") == 0
    assert made.count("STG") == made.count("STG.128") > 0
    assert made.count("LDGSTS") == made.count("LDGSTS.128") > 0


@by_generation
def test_averaging_does_not_spill(target: Target) -> None:
    made = report(averaged(512, 2048, 7), target)
    assert made.spill_bytes == 0 and made.registers <= 160
    assert made.count("LDGSTS") == made.count("LDGSTS.128") > 0


def test_many_channels_are_summed_tap_by_tap() -> None:
    assert conv_tile.runs_by_tap(pooled(64, 64, 7)) and not conv_tile.runs_by_tap(pooled(3, 8, 7))


def test_one_image_is_averaged_by_many_programs() -> None:
    asked = averaged(512, 2048, 7, n=1)
    (launch,) = conv_mean.OP.launches(asked, conv_mean.OP.default(asked, SM_90), SM_90)
    assert launch.grid_at(1)[0] >= 100


@pytest.mark.parametrize("target", targets.GPU_TARGETS, ids=lambda target: target.name)
def test_illegal_tiles_are_refused(target: Target) -> None:
    asked = pooled(64, 64, 56)
    deep = replace(conv_pool.OP.default(asked, target), num_stages=16)
    assert "bytes of shared memory" in str(conv_pool.OP.legal(asked, deep, target))
    asked = averaged(64, 64, 9)
    tile = conv_mean.OP.default(asked, target)
    blocks = tuple((name, 64 if name == "BLOCK_M" else size) for name, size in tile.blocks)
    reason = conv_mean.OP.legal(asked, replace(tile, blocks=blocks), target)
    assert reason == "tiles of 64 pixels do not hold whole images of 128"


def test_the_cost_model_is_told_what_a_program_moves() -> None:
    for asked in (pooled(64, 64, 56), averaged(512, 2048, 7)):
        op = registry.get(asked.op)
        (launch,) = op.launches(asked, op.default(asked, SM_90), SM_90)
        weights = asked.inputs[1].spec.size_bytes // launch.columns
        assert launch.l2_bytes > weights and launch.instructions > 0
