"""Properties that every op of the registry has: an op is tested by being in the table."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.epilogue import Stage, apply_reference
from convloom.kernels.contract.op import Attributes
from convloom.kernels.contract.spec import FLOAT_DTYPES, Layout, TensorSpec
from convloom.kernels.contract.targets import GPU_TARGETS, parse
from convloom.kernels.contract.tolerance import is_untouched
from convloom.kernels.movement.movement import Concat, Permute, Relayout, Slice
from convloom.kernels.movement.pointwise import Pointwise
from convloom.kernels.movement.rearrangement import Expand, Reshape
from convloom.kernels.normalisation.batch_norm import BatchNorm
from convloom.kernels.normalisation.reduce import Reduce
from convloom.kernels.normalisation.softmax import Softmax
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile.conv_geometry import Conv2d
from hypothesis import assume, given
from hypothesis import strategies as st

from . import harness
from .domains import domain_of
from .harness import Case

every_op = pytest.mark.parametrize("name", registry.BY_NAME)
every_dtype = pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
SM_90 = parse("cuda:sm_90")


@every_op
@given(data=st.data())
def test_infer_agrees_with_reference(name: str, data: st.DataObject) -> None:
    op = registry.get(name)
    case = data.draw(harness.cases(op, data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs)
    results = harness.eager(op, problem, case.tensors())
    described = [(spec.shape, spec.dtype) for spec in case.outputs]
    assert described == [(tuple(result.shape), result.dtype) for result in results]


@every_op
@given(data=st.data())
def test_infer_refuses_what_the_reference_refuses(name: str, data: st.DataObject) -> None:
    """The attributes of one draw with the inputs of another: mostly impossible geometry."""
    op = registry.get(name)
    attributes = data.draw(harness.cases(op)).attributes
    case = replace(data.draw(harness.cases(op)), attributes=attributes)
    try:
        outputs = case.outputs
    except InvalidInputError as error:
        assert str(error).partition(":")[0] in registry.BY_NAME
        return
    problem = harness.problem_for(op, attributes, case.specs)
    results = harness.expected(op, problem, case.tensors())
    assert [spec.shape for spec in outputs] == [tuple(result.shape) for result in results]


@pytest.mark.interpreter
@every_dtype
@every_op
@given(data=st.data(), seed=harness.seeds, pad=harness.pads)
def test_kernel_agrees_with_reference(
    name: str, dtype: torch.dtype, data: st.DataObject, seed: int, pad: int
) -> None:
    op = registry.get(name)
    case = data.draw(harness.cases(op, dtype))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    harness.check(op, problem, case.tensors(seed))


INTERESTING = [
    pytest.param(op.name, draw, id=f"{op.name}-{index}")
    for op in registry.OPS
    for index, draw in enumerate(domain_of(op).interesting)
]


@pytest.mark.interpreter
@every_dtype
@pytest.mark.parametrize(("name", "draw"), INTERESTING)
def test_interesting_draws(name: str, draw: Any, dtype: torch.dtype) -> None:
    op = registry.get(name)
    case = harness.case_of(op, draw, dtype)
    assert case is not None, f"{op.name} lists the impossible draw {draw}"
    problem = harness.problem_for(op, case.attributes, case.specs, pad=3)
    harness.check(op, problem, case.tensors())
    if dtype is not torch.float16:
        return  # Tiles differ in their indices, which no dtype changes; half types have most tiles.
    tiles = list(op.configs(problem, SM_90))
    for tile in {tiles[0], tiles[-1], op.default(problem, SM_90)}:
        harness.check(op, problem, case.tensors(), tile=tile)


@pytest.mark.interpreter
@pytest.mark.parametrize("first", ["negative", "positive"])
@pytest.mark.parametrize(("name", "draw"), INTERESTING)
def test_what_stands_for_no_element_is_not_seen(name: str, draw: Any, first: str) -> None:
    """A border or the end of a tile must not win a maximum: the first input is of one sign, all
    others are negative, and so is what a convolution of positive pixels makes of them."""
    op = registry.get(name)
    case = harness.case_of(op, draw)
    low, high = op.input_range
    if case is None or low >= 0:
        return
    drawn = [
        harness.make_tensor(spec, at, low, low / 4) for at, spec in enumerate(case.specs)
    ]
    if first == "positive":
        drawn[0] = harness.make_tensor(case.specs[0], 0, high / 4, high)
    tensors = op.prepare(case.attributes, tuple(drawn))
    # Rows that lie apart and rows that do not may take different kernels.
    for pad in (3, 0):
        problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
        harness.check(op, problem, tensors, tile=None if pad else op.default(problem, SM_90))


@pytest.mark.interpreter
@every_op
@given(data=st.data(), seed=harness.seeds, pad=harness.pads)
def test_gpu_configurations_agree_with_reference(
    name: str, data: st.DataObject, seed: int, pad: int
) -> None:
    op = registry.get(name)
    case = data.draw(harness.cases(op, data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    tile = data.draw(
        st.one_of(
            st.sampled_from(list(op.configs(problem, SM_90))),
            st.sampled_from(GPU_TARGETS).map(lambda target: op.default(problem, target)),
        )
    )
    harness.check(op, problem, case.tensors(seed), tile=tile)


@every_op
@given(data=st.data())
def test_configurations_are_legal(name: str, data: st.DataObject) -> None:
    """The whole tuning space and the default may run on the target they are meant for."""
    op = registry.get(name)
    case = data.draw(harness.cases(op, data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs)
    for target in GPU_TARGETS:
        tiles = [*op.configs(problem, target), op.default(problem, target)]
        assert len(tiles) > 1, "no tuning space"
        for tile in tiles:
            assert op.legal(problem, tile, target) is None, tile


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [op.name for op in registry.OPS if op.takes_epilogue])
@given(data=st.data(), seed=harness.seeds, pad=harness.pads)
def test_epilogue_equals_kernel_then_epilogue(
    name: str, data: st.DataObject, seed: int, pad: int
) -> None:
    op = registry.get(name)
    case = data.draw(harness.cases(op, data.draw(harness.dtypes)))
    stages, specs = data.draw(harness.epilogues(case.outputs[0]))
    problem = harness.problem_for(op, case.attributes, case.specs, stages, specs, pad)
    operands = tuple(
        harness.make_tensor(spec, seed + 100 + index, -1.5, 1.5) for index, spec in enumerate(specs)
    )
    tile = data.draw(st.sampled_from((None, *op.configs(problem, SM_90))))
    harness.check(op, problem, case.tensors(seed), operands, tile)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [op.name for op in registry.OPS if op.takes_prologue])
@given(data=st.data(), seed=harness.seeds, pad=harness.pads)
def test_prologue_equals_stages_then_kernel(
    name: str, data: st.DataObject, seed: int, pad: int
) -> None:
    """Stages on the first input, with operands per channel; what lies outside it stays zero."""
    op = registry.get(name)
    case = data.draw(harness.cases(op, data.draw(harness.dtypes)))
    assume(getattr(case.attributes, "groups", 1) == 1)
    x = case.specs[0]
    channel = x.layout.order(x.rank)[-1]
    shape = tuple(size if dim == channel else 1 for dim, size in enumerate(x.shape))
    vector = TensorSpec(shape, x.dtype, x.layout)
    problem = replace(
        harness.problem_for(op, case.attributes, case.specs, pad=pad),
        prologue=(Stage("mul"), Stage("add"), Stage("relu")),
        prologue_operands=(harness.place(vector), harness.place(vector)),
    )
    before = tuple(harness.make_tensor(vector, seed + 50 + at, -1.0, 1.0) for at in (0, 1))
    tile = data.draw(st.sampled_from((None, *op.configs(problem, SM_90))))
    results = harness.run_interpreted(op, problem, case.tensors(seed), tile=tile, before=before)
    first, *others = case.tensors(seed)
    # Kernels round the prologue's result to the input's dtype once.
    applied = apply_reference(problem.prologue, first.double(), tuple(t.double() for t in before))
    harness.compare(op, problem, results, (applied.to(first.dtype), *others))


@pytest.mark.interpreter
@every_op
@given(data=st.data(), seed=harness.seeds, pad=harness.pads)
def test_nan_and_infinity(name: str, data: st.DataObject, seed: int, pad: int) -> None:
    """NaN and infinities come out exactly where they do in torch."""
    op = registry.get(name)
    case = data.draw(harness.cases(op, data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    constants = op.packs(case.attributes)
    tensors = tuple(
        tensor if index in constants else harness.with_special_values(tensor, seed + index)
        for index, tensor in enumerate(case.tensors(seed))
    )
    harness.check(op, problem, tensors)


@pytest.mark.interpreter
@every_op
@given(data=st.data(), seed=harness.seeds)
def test_whole_numbers_are_exact(name: str, data: st.DataObject, seed: int) -> None:
    """Where small whole numbers give whole numbers there is nothing to round."""
    op = registry.get(name)
    case = data.draw(harness.cases(op))
    problem = harness.problem_for(op, case.attributes, case.specs)
    drawn = tuple(
        harness.make_integers(spec, seed + index, *op.input_range)
        for index, spec in enumerate(case.specs)
    )
    tensors = op.prepare(case.attributes, drawn)
    exact = harness.expected(op, problem, tensors)
    if not all(torch.equal(truth.double(), truth.double().round()) for truth in exact):
        return
    results = harness.run_interpreted(op, problem, tensors)
    for result, truth in zip(results, exact, strict=True):
        assert torch.equal(result.double(), truth.double())


@pytest.mark.interpreter
@every_op
@given(data=st.data(), seed=harness.seeds, pad=harness.pads)
def test_wide_offsets_change_nothing(name: str, data: st.DataObject, seed: int, pad: int) -> None:
    op = registry.get(name)
    case = data.draw(harness.cases(op))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    tensors = case.tensors(seed)
    narrow = harness.run_interpreted(op, problem, tensors)
    wide = harness.run_interpreted(op, problem, tensors, wide=True)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def batched(case: Case) -> Case:
    """The case with dimension 0 of its variable inputs as the batch; of those that are spread over
    others it is none."""
    packs = case.op.packs(case.attributes)
    variable = (spec for index, spec in enumerate(case.specs) if index not in packs)
    batch = max(variable, key=lambda spec: spec.rank).shape[0]
    return replace(
        case,
        specs=tuple(
            spec.with_(batch=batch)
            if index not in packs and spec.rank and spec.shape[0] == batch
            else spec
            for index, spec in enumerate(case.specs)
        ),
    )


def first_samples(spec: TensorSpec, tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """The tensor of a call with a smaller batch."""
    return tensor if spec.batch is None else tensor[: spec.at(batch)[0]]


@pytest.mark.interpreter
@every_op
@given(data=st.data(), seed=harness.seeds, pad=harness.pads)
def test_smaller_batch(name: str, data: st.DataObject, seed: int, pad: int) -> None:
    """A plan for the largest batch serves a smaller one, and leaves the other samples alone."""
    op = registry.get(name)
    case = batched(data.draw(harness.cases(op, data.draw(harness.dtypes))))
    batch = case.specs[0].shape[0]
    try:
        outputs = case.outputs
    except InvalidInputError as error:
        assert "batch" in str(error)
        return
    if batch == 1 or any(spec.batch is None for spec in outputs):
        return
    smaller = data.draw(st.integers(1, batch - 1))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    tile = data.draw(st.sampled_from((None, *op.configs(problem, SM_90))))
    tensors = case.tensors(seed)
    results = harness.run_interpreted(op, problem, tensors, tile=tile, batch=smaller)
    counts = [spec.at(smaller)[0] for spec in outputs]
    written = tuple(result[:count] for result, count in zip(results, counts, strict=True))
    left = [result[count:] for result, count in zip(results, counts, strict=True)]
    assert all(is_untouched(rest).all() for rest in left), "samples beyond the batch were written"
    given_now = tuple(
        first_samples(spec, tensor, smaller)
        for spec, tensor in zip(case.specs, tensors, strict=True)
    )
    harness.compare(op, problem, written, given_now)


def image(*shape: int, batch: int | None = None) -> TensorSpec:
    return TensorSpec(shape, torch.float32, Layout.NHWC, batch)


def dense(*shape: int, batch: int | None = None) -> TensorSpec:
    return TensorSpec(shape, torch.float32, batch=batch)


MESSAGES = (
    ("conv2d", Conv2d(), (dense(3, 8), dense(8, 8, 1, 1)), "expected x (N,C,H,W) and w"),
    ("conv2d", Conv2d(groups=3), (image(1, 8, 5, 5), dense(9, 2, 3, 3)), "into 3 groups"),
    ("conv2d", Conv2d(), (image(1, 8, 5, 5), dense(9, 8, 7, 7)), "does not fit dimension 2"),
    ("linear", Linear(), (dense(2, 5), dense(3, 4)), "expected x (..., C) and weight (K, C)"),
    ("relu", Pointwise(), (dense(2), dense(2)), "relu: expected 1 tensors, got 2"),
    ("add", Pointwise(), (dense(2, 3), dense(4)), "do not broadcast together"),
    ("reshape", Reshape((5,)), (dense(2, 3),), "has 6 elements"),
    ("reshape", Reshape((6,)), (dense(4, 3, batch=4),), "reshape: "),
    ("permute", Permute((0, 0)), (dense(2, 3),), "does not permute the dims"),
    ("expand", Expand((4, 3)), (dense(2, 3),), "does not broadcast to (4, 3)"),
    ("expand", Expand((4, 3)), (dense(4, 3, batch=4),), "the batch of float32[N, 3] must stay"),
    ("slice", Slice(2, 0, 1), (dense(2, 3),), "has no dimension 2"),
    ("slice", Slice(1, 0, 4), (dense(2, 3),), "0:4 is outside dimension 1"),
    ("slice", Slice(0, 0, 1), (dense(2, 3, batch=2),), "the batch dimension"),
    ("concat", Concat(1), (dense(2, 3), dense(3, 3)), "differ outside dimension 1"),
    ("concat", Concat(2), (dense(2, 3), dense(2, 3)), "has no dimension 2"),
    ("relayout", Relayout(Layout.NHWC), (dense(2, 3),), "only ranks 4 and 5 can be NHWC"),
    ("softmax", Softmax(2), (dense(2, 3),), "softmax: float32[2, 3] has no dimension 2"),
    ("log_softmax", Softmax(0), (dense(2, 3, batch=2),), "over the batch dimension"),
    ("mean", Reduce((1, 0)), (dense(2, 3),), "are not ascending dimensions"),
    ("sum", Reduce((0,)), (dense(2, 3, batch=2),), "its samples must stay apart"),
    ("batch_norm", BatchNorm(), (dense(2, 3),), "expected x, weight, bias, mean, var, got 1"),
    ("batch_norm", BatchNorm(), (dense(2), *[dense(2)] * 4), "expected x of rank 2 or more"),
    ("batch_norm", BatchNorm(), (dense(2, 3), *[dense(2)] * 4), "expected weight of shape (3,)"),
)


@pytest.mark.parametrize(("name", "attributes", "specs", "message"), MESSAGES)
def test_messages_of_impossible_geometry(
    name: str, attributes: Attributes, specs: tuple[TensorSpec, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        registry.get(name).infer(attributes, specs)
    assert str(raised.value).startswith(f"{name}: ")
