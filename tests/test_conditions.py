"""Comparisons, logic, choices and masks: as kernels, as stages, and as modules spell them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.errors import UnsupportedOpError
from convloom.kernels import registry
from convloom.kernels.contract.epilogue import Epilogue, Stage
from convloom.kernels.contract.op import Op
from convloom.kernels.contract.spec import FLOAT_DTYPES, TensorSpec
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from . import harness, nets

Body = Callable[..., Any]
SHAPES = ((2, 3, 4, 5), (2, 3, 4, 5))


class Masks(nn.Module):
    """Booleans that belong to a module."""

    border: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("border", torch.arange(20).reshape(4, 5) % 3 == 1)


SPELLINGS: dict[str, Body] = {
    "where": lambda m, x, y: torch.where(x > 0, x, y),
    "where of one number": lambda m, x, y: torch.where(x > y, 0.5, y),
    "where of another": lambda m, x, y: torch.where(x.ge(y), y, -0.5),
    "where of two": lambda m, x, y: torch.where(x > y, 1.0, 0.0) + y,
    "where of booleans": lambda m, x, y: torch.where(x > 0, x > 1, y > 0),
    "broadcast": lambda m, x, y: torch.where(x[:, :1] > 0, y, x.mean((2, 3), keepdim=True)),
    "masked fill": lambda m, x, y: x.masked_fill(y > 0.1, -1e4),
    "filled with a tensor": lambda m, x, y: x.masked_fill(x > y, torch.tensor(2.0)),
    "filled by a constant": lambda m, x, y: x.masked_fill(m.masks.border, float("-inf")),
    "constant mask": lambda m, x, y: torch.where(m.masks.border & (y > 0), x, y),
    "mask of ones": lambda m, x, y: x * (torch.ones(4, 5).tril() > 0),
    "logic": lambda m, x, y: ~(x > 0) | (y == 1) & (x <= y) ^ (y != 0),
    "logic of numbers": lambda m, x, y: torch.logical_xor(x.relu(), y.relu()),
    "sum of booleans": lambda m, x, y: ((x > 0) + (y > 0)) & ((x < 1) * (y < 1)),
    "float": lambda m, x, y: (x < 0).float() * y,
    "to half": lambda m, x, y: (x > 0).half().float() + y,
    "type as": lambda m, x, y: (x > 0).type_as(y),
    "times": lambda m, x, y: (x > 0) * y - (y > 0) * 2.5,
    "one minus": lambda m, x, y: 1.0 - (x > 0).type_as(x),
    "boolean": lambda m, x, y: torch.where(x.relu().bool(), y, x),
    "not a number": lambda m, x, y: torch.where(((x.relu() / x.relu()) + x).isnan(), y, x),
    "infinite": lambda m, x, y: (1.0 / x.relu()).isinf() ^ (y / y.relu()).isneginf(),
    "finite": lambda m, x, y: (1.0 / x.relu()).isfinite() | (1.0 / x.relu()).isposinf(),
    "permuted": lambda m, x, y: torch.where((x > 0).mT.mT, y, 0.5),
    "joined": lambda m, x, y: torch.cat([x > 0, y > 0], 1).flip(1)[:, 1:4],
    "convolved": lambda m, x, y: m.conv((x > 0).type_as(x)),
    "one side convolved": lambda m, x, y: torch.where(x > 0, m.conv(x), y),
    "other side convolved": lambda m, x, y: torch.where(x > 0, y, m.conv(x)),
    "slope": lambda m, x, y: m.conv(torch.where(x > 0, x, 0.1 * x)),
    "pooled": lambda m, x, y: (torch.max_pool2d(x, 3, 1, 1) == x).type_as(x) * y,
    "whole or not": lambda m, x, y: torch.where(x > 0, y, x.argmax(1, keepdim=True)),
    "whole": lambda m, x, y: torch.where(x > 0, 3, -1).float() + y,
    "written": lambda m, x, y: x.clone().index_put((y > 0,), torch.tensor(0.5)),
    "written rows": lambda m, x, y: x.clone().index_put((y[:, :, 0, 0] > 0,), torch.tensor(-1.0)),
    "full of booleans": lambda m, x, y: torch.full_like(x, True, dtype=torch.bool) & (x > 0),
}  # fmt: skip


def made(name: str) -> nets.Made:
    return nets.make(SPELLINGS[name], *SHAPES, masks=Masks(), conv=nn.Conv2d(3, 3, 1))


@pytest.mark.interpreter
@pytest.mark.parametrize("passes", ["default", pytest.param("none", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", SPELLINGS)
def test_as_modules_spell_them(name: str, passes: str) -> None:
    module, inputs = made(name)
    exe = convloom.compile(module, inputs, target="interpreter", passes=passes)
    nets.check(exe(*inputs), module, inputs)


BATCHED = ("where", "broadcast", "constant mask", "sum of booleans", "full of booleans")


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [
    name if name in BATCHED else pytest.param(name, marks=pytest.mark.slow) for name in SPELLINGS
])  # fmt: skip
def test_with_any_batch(name: str) -> None:
    module, inputs = made(name)
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 3))
    for batch in (1, 3):
        given = nets.inputs_of(*((batch, *shape[1:]) for shape in SHAPES), seed=batch)
        nets.check(exe(*given), module, given)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", FLOAT_DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", ["where", "masked fill", "constant mask", "type as", "slope"])
def test_in_halves(name: str, dtype: torch.dtype) -> None:
    """As the module computes in halves, with inputs that are such numbers already."""
    module, inputs = made(name)
    inputs = tuple(x.to(dtype).float() for x in inputs)
    exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
    nets.check(exe(*inputs), module, inputs, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_number_is_rounded_as_what_it_is_compared_with(dtype: torch.dtype) -> None:
    """As torch does: 0.1 of halves is equal to 0.1."""
    x = torch.tensor([[0.1, 0.2, 0.3]]).to(dtype)
    module, _ = nets.make(lambda m, x: (x == 0.1, x > 0.2, torch.where(x <= 0.3, x, 0.0)), (1, 3))
    exe = convloom.compile(module.to(dtype), (x,), target="interpreter")
    for got, expected in zip(exe(x), module(x), strict=True):
        assert got.dtype is expected.dtype and torch.equal(got, expected)


COUNTS = {
    "where": 1, "where of two": 1, "masked fill": 1, "float": 1, "type as": 1, "one minus": 1,
    "constant mask": 1, "convolved": 1, "one side convolved": 2, "slope": 3, "not a number": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_comparison_and_choice_are_one_kernel(name: str) -> None:
    exe = convloom.compile(*made(name), target="reference")
    computing = [step.op for step in exe.plan.steps if step.op not in ("relayout", "stem_input")]
    assert len(computing) == COUNTS[name], computing


def test_booleans_travel_as_bytes() -> None:
    exe = convloom.compile(*made("one side convolved"), target="reference")
    masks = [buffer for buffer in exe.plan.buffers.values() if buffer.dtype is torch.bool]
    assert [buffer.size_bytes for buffer in masks] == [256], "120 elements, in whole lines"


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["where", "constant mask", "logic", "joined", "where of two"])
def test_as_compiled_for_a_gpu(name: str) -> None:
    module, inputs = made(name)
    exe = convloom.compile(module, inputs, target="emulator:sm_90")
    nets.check(exe(*inputs), module, inputs)


@pytest.mark.interpreter
def test_masks_are_saved(tmp_path: Path) -> None:
    """A constant of booleans, and booleans between kernels."""
    module, inputs = nets.make(
        lambda m, x, y: (torch.where(m.masks.border, x, y), (x > y)), *SHAPES, masks=Masks()
    )
    exe = convloom.compile(module, inputs, target="interpreter")
    exe.save(tmp_path / "masks.loom")
    loaded = convloom.load(tmp_path / "masks.loom")
    for got, expected in zip(loaded(*inputs), module(*inputs), strict=True):
        assert torch.equal(got, expected)


REFUSED: dict[str, tuple[Body, str]] = {
    "whole numbers": (lambda m, x, y: (x > 0) * 2, "convert with .float() first"),
    "written by a mask": (
        lambda m, x, y: x.clone().index_put((x[0, 0, 0, 0].isnan(), ), y[0, 0]),
        "write others with torch.where",
    ),
    "mixed": (
        lambda m, x, y: torch.where(x > 0, x > 1, y), "a choice between booleans and numbers",
    ),
    "sizes of values": (lambda m, x, y: x[x > 0], "mask with torch.where"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_says_what_to_do(name: str) -> None:
    body, reason = REFUSED[name]
    with pytest.raises(UnsupportedOpError, match=re.escape(reason)):
        convloom.compile(*nets.make(body, *SHAPES), target="reference")


# ---------------------------------------------------------------------------------- as stages

MASKED = (
    Stage("where_else", (2.0,)), Stage("masked_fill", (-1.0,)),
    Stage("where_else", (2.0,), reverse=True), Stage("masked_fill", (-1.0,), reverse=True),
)  # fmt: skip


@st.composite
def decisions(draw: Any, output: TensorSpec) -> tuple[Epilogue, tuple[TensorSpec, ...]]:
    """A chain that decides by what it is given, and chooses numbers in the end."""
    full = output.with_(dtype=torch.float32)
    mask = output.with_(dtype=torch.bool)
    decided = draw(st.sampled_from((
        (Stage("gt", literal=0.0),), (Stage("eq"),), (Stage("le", literal=1.0, reverse=True),),
        (Stage("ne"), Stage("logical_not")), (Stage("lt"), Stage("logical_or")), (Stage("isnan"),),
        (Stage("ge", literal=0.0), Stage("logical_xor")),
    )))  # fmt: skip
    operands = [full if stage.name in ("eq", "ne", "lt") else mask
                for stage in decided if stage.operands]  # fmt: skip
    chosen, read = draw(st.sampled_from((
        ((Stage("where"),), [full, full]), ((Stage("choose", (2.0, -1.0)),), []),
        ((MASKED[2],), [full]), ((MASKED[3],), [full]),
        ((Stage("identity"), Stage("mul")), [full]),
    )))  # fmt: skip
    before, needed = draw(st.sampled_from((
        ((Stage("where_first"),), [mask, full]), ((Stage("where_second"),), [mask, full]),
        ((MASKED[0],), [mask]), ((MASKED[1],), [mask]), ((), []),
    )))  # fmt: skip
    return (*before, *decided, *chosen), (*needed, *operands, *read)


WITH_STAGES = (
    "conv2d", "conv3d", "conv_transpose2d", "linear", "bmm", "max_pool2d", "sum", "permute",
    "relayout", "conv_pool", "add", "gt", "logical_not", "where",
)  # fmt: skip
"""Of every kind of kernel one; the chain is the same function in all of them."""


@pytest.mark.interpreter
@pytest.mark.parametrize("name", WITH_STAGES)
@given(data=st.data(), seed=harness.seeds, pad=harness.pads)
def test_decisions_in_an_epilogue_are_exact(
    name: str, data: st.DataObject, seed: int, pad: int
) -> None:
    """Of whole numbers, from which the step to another decision is far."""
    op: Op = registry.get(name)
    case = data.draw(harness.cases(op))
    stages, specs = data.draw(decisions(case.outputs[0]))
    problem = harness.problem_for(op, case.attributes, case.specs, stages, specs, pad)
    drawn = [
        harness.make_integers(s, seed + at, *op.input_range) for at, s in enumerate(case.specs)
    ]
    tensors = op.prepare(case.attributes, tuple(drawn))
    bare = harness.problem_for(op, case.attributes, case.specs)
    whole = harness.expected(op, bare, tensors)[0].double()
    if not torch.equal(whole, whole.round()):
        return
    operands = tuple(
        harness.make_tensor(spec, seed + 50 + at, 0, 1) if spec.dtype is torch.bool
        else harness.make_integers(spec, seed + 50 + at, -2, 2)
        for at, spec in enumerate(specs)
    )  # fmt: skip
    results = harness.run_interpreted(op, problem, tensors, operands)
    exact = harness.expected(op, problem, tensors, operands)
    assert torch.equal(results[0].double(), exact[0].double())
