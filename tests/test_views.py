"""Views: results that need no kernel, because they lie in what was computed already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import convloom
import pytest
import torch
from convloom.kernels import registry
from convloom.kernels.contract.op import Op
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, Operand, TensorSpec
from convloom.kernels.movement import movement, rearrangement
from convloom.kernels.movement.rearrange import Rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from . import harness, nets

KINDS = (
    rearrangement.Reshape,
    movement.FlattenPixels,
    movement.Permute,
    movement.Slice,
    movement.Relayout,
    Rearrange,
)
MOVEMENTS = [op for op in registry.OPS if op.attributes in KINDS]


@pytest.mark.parametrize("op", MOVEMENTS, ids=lambda op: op.name)
@settings(max_examples=200)
@given(data=st.data(), pad=harness.pads, offset=harness.pads, seed=harness.seeds)
def test_a_view_is_the_result(op: Op, data: Any, pad: int, offset: int, seed: int) -> None:
    """Whatever the pitch and the offset of the input, and the layout that the result is given."""
    case = data.draw(harness.cases(op, data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    x, out = replace(problem.inputs[0], offset=offset), problem.output.spec
    if isinstance(case.attributes, (movement.Permute, Rearrange)) and out.rank in MEMORY_FORMATS:
        out = out.with_(layout=data.draw(st.sampled_from(Layout)))
    view = movement.view_of(case.attributes, x, out)
    if view is None:
        return
    assert view.spec.with_(batch=None) == out.with_(batch=None)
    (tensor,) = case.tensors(seed)
    got = harness.view_of(harness.buffer_for(x, tensor), view)
    torch.testing.assert_close(got, op.reference(case.attributes, tensor), rtol=0, atol=0)


def test_rows_are_a_view_and_columns_are_not() -> None:
    """Of one image with channels innermost: columns lie apart in every row."""
    x = Operand.dense(TensorSpec((1, 5, 4, 6), torch.float32, Layout.NHWC))
    rows = movement.slice_operand(x, 2, 1, 2)
    assert rows is not None and (rows.offset, rows.strides) == (30, (60, 1, 30, 5))
    assert movement.slice_operand(x, 3, 1, 2) is None


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "move",
    [
        lambda x: x[:, :4],
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x.flatten(2).transpose(1, 2),
        lambda x: x.flatten(2).transpose(1, 2).reshape(2, 5, 4, 8).permute(0, 3, 1, 2),
    ],
)
def test_what_computes_is_no_view(move: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A view with an activation behind it is a kernel."""
    conv = nn.Conv2d(6, 8, 1)
    module, inputs = nets.make(lambda m, x: torch.relu(move(m.conv(x))), (2, 6, 5, 4), conv=conv)
    exe = convloom.compile(module, inputs, target="interpreter", tuning="heuristic")
    nets.check(exe(*inputs), module, inputs)
