"""Properties that every op of the registry has: an op is tested by being in the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.spec import FLOAT_DTYPES, TensorSpec
from convloom.kernels.targets import GPU_TARGETS, parse
from hypothesis import given
from hypothesis import strategies as st

from . import harness
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
        assert ": " in str(error), "the message starts with the op's name"
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
    for index, draw in enumerate(op.domain.interesting)
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
    tiles = list(op.configs(problem, SM_90))
    for tile in {tiles[0], tiles[-1], op.default(problem, SM_90)}:
        harness.check(op, problem, case.tensors(), tile=tile)


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
    tensors = tuple(
        harness.make_integers(spec, seed + index, *op.domain.range)
        for index, spec in enumerate(case.specs)
    )
    exact = harness.expected(op, problem, tensors)
    if not all(torch.equal(truth, truth.round()) for truth in exact):
        return
    results = harness.run_interpreted(op, problem, tensors)
    for result, truth in zip(results, exact, strict=True):
        assert torch.equal(result.double(), truth)


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
    """The case with dimension 0 of its variable inputs as the batch."""
    batch = case.specs[0].shape[0]
    packs = case.op.packs(case.attributes)
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
    assert all(rest.isnan().all() for rest in left), "samples beyond the batch were written"
    given_now = tuple(
        first_samples(spec, tensor, smaller)
        for spec, tensor in zip(case.specs, tensors, strict=True)
    )
    harness.compare(op, problem, written, given_now)
