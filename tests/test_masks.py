"""Lanes outside a tensor: what they read and compute reaches no result, and they read nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from convloom.kernels import registry
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Problem
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.convolution import conv_rows
from convloom.kernels.pooling.mixed_pool import MixedPool2d
from convloom.kernels.products import gemv
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile.conv_geometry import Conv2d

from . import harness

DTYPE = torch.float32


def inputs_of(problem: Problem, low: float, high: float) -> tuple[torch.Tensor, ...]:
    return tuple(
        harness.make_tensor(each.spec, at, low, high) for at, each in enumerate(problem.inputs)
    )


def check_prologue(problem: Problem, tile: Config) -> None:
    """The op on x after its prologue, in this configuration."""
    op = registry.get(problem.op)
    inputs = inputs_of(problem, 1, 3)
    results = harness.run_on(harness.INTERPRETED, op, problem, inputs, tile=tile)
    first = ep.apply_reference(problem.prologue, inputs[0], ())
    harness.compare(op, problem, results, (first, *inputs[1:]))


@pytest.mark.interpreter
def test_streamed_weights_meet_zeros_behind_the_last_channel() -> None:
    """1 / 0 is infinite, and so would be its product with a weight of zero: NaN."""
    x, w = TensorSpec((3, 100), DTYPE), TensorSpec((5, 100), DTYPE)
    problem = replace(
        harness.problem_for(registry.get("linear"), Linear(), (x, w)),
        prologue=(Stage("div", literal=1.0, reverse=True),),
    )
    tile = next(c for c in registry.get("linear").configs(problem, harness.INTERPRETED.target)
                if gemv.uses_gemv(c))  # fmt: skip
    assert 100 % tile["BLOCK_K"] != 0
    check_prologue(problem, tile)


@pytest.mark.interpreter
def test_rows_above_an_image_are_zero_after_the_prologue() -> None:
    x, w = TensorSpec((2, 4, 6, 9), DTYPE, Layout.NHWC), TensorSpec((5, 4, 3, 3), DTYPE)
    attributes = Conv2d(padding=(1, 1, 0, 0))
    problem = replace(
        harness.problem_for(registry.get("conv2d"), attributes, (x, w)),
        prologue=(Stage("add", literal=2.0),),
    )
    assert conv_rows.applies(attributes, w.shape)
    check_prologue(problem, registry.get("conv2d").default(problem, harness.INTERPRETED.target))


def test_a_blend_of_poolings_reads_its_own_channels_only() -> None:
    """In the emulator, which refuses addresses behind a tensor's last element."""
    op = registry.get("mixed_pool2d")
    x, weight = TensorSpec((1, 5, 4, 6), DTYPE, Layout.NHWC), TensorSpec((5, 1, 1), DTYPE)
    problem = harness.problem_for(op, MixedPool2d((2, 2), (2, 2)), (x, weight, weight))
    inputs = inputs_of(problem, -2, 2)
    results = harness.run_on(harness.Emulator("sm_90"), op, problem, inputs)
    harness.compare(op, problem, results, inputs)
