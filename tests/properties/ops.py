"""Properties of ops: what holds for each of them, by its domain alone.

A property is a function of a `Subject`; `with_draws` makes a test of it that draws the other
arguments.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.epilogue import Stage, apply_reference
from convloom.kernels.contract.op import Op
from convloom.kernels.contract.spec import FLOAT_DTYPES, TensorSpec
from convloom.kernels.contract.targets import GPU_TARGETS, parse
from convloom.kernels.contract.tolerance import is_untouched
from hypothesis import assume, given
from hypothesis import strategies as st

from . import compiled, harness
from .domain import Domain
from .harness import Case

SM_90 = parse("cuda:sm_90")
DRAWN = {"data": st.data(), "seed": harness.seeds, "pad": harness.pads}


FEWEST_FINITE = 16
"""Results with special values among them that are also compared as numbers."""


@dataclass(frozen=True)
class Subject:
    """An op and where its problems are drawn from."""

    op: Op
    domain: Domain

    def case_of(self, draw: Any, dtype: torch.dtype = torch.float32) -> Case | None:
        """As `harness.case_of`."""
        return harness.case_of(self.op, self.domain, draw, dtype)

    def cases(self, dtype: torch.dtype = torch.float32) -> st.SearchStrategy[Case]:
        """As `harness.cases`."""
        return harness.cases(self.op, self.domain, dtype)


def with_draws(check: Callable[..., None]) -> Callable[..., None]:
    """The property with what it draws as a test of hypothesis."""
    names = inspect.signature(check).parameters
    drawn = {name: strategy for name, strategy in DRAWN.items() if name in names}
    return given(**drawn)(check) if drawn else check


def infer_agrees_with_reference(subject: Subject, data: st.DataObject) -> None:
    op = subject.op
    case = data.draw(subject.cases(data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs)
    results = harness.eager(op, problem, case.tensors())
    described = [(spec.shape, spec.dtype) for spec in case.outputs]
    assert described == [(tuple(result.shape), result.dtype) for result in results]


def infer_refuses_what_the_reference_refuses(subject: Subject, data: st.DataObject) -> None:
    """The attributes of one draw with the inputs of another: mostly impossible geometry."""
    op = subject.op
    attributes = data.draw(subject.cases()).attributes
    case = replace(data.draw(subject.cases()), attributes=attributes)
    try:
        outputs = case.outputs
    except InvalidInputError as error:
        assert str(error).partition(":")[0] in registry.BY_NAME
        return
    problem = harness.problem_for(op, attributes, case.specs)
    results = harness.expected(op, problem, case.tensors())
    assert [spec.shape for spec in outputs] == [tuple(result.shape) for result in results]


def kernel_agrees_with_reference(
    subject: Subject, dtype: torch.dtype, data: st.DataObject, seed: int, pad: int
) -> None:
    op = subject.op
    case = data.draw(subject.cases(dtype))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    harness.check(op, problem, case.tensors(seed))


def interesting_draws(subject: Subject, draw: Any, dtype: torch.dtype) -> None:
    op = subject.op
    case = subject.case_of(draw, dtype)
    assert case is not None, f"{op.name} lists the impossible draw {draw}"
    problem = harness.problem_for(op, case.attributes, case.specs, pad=3)
    harness.check(op, problem, case.tensors())
    if dtype is not torch.float16:
        return  # Tiles differ in their indices, which no dtype changes; half types have most tiles.
    tiles = list(op.configs(problem, SM_90))
    for tile in {tiles[0], tiles[-1], op.default(problem, SM_90)}:
        harness.check(op, problem, case.tensors(), tile=tile)


def what_stands_for_no_element_is_not_seen(subject: Subject, draw: Any, first: str) -> None:
    """A border or the end of a tile must not win a maximum: the first input is of one sign, all
    others are negative, and so is what a convolution of positive pixels makes of them."""
    op = subject.op
    case = subject.case_of(draw)
    low, high = op.input_range
    if case is None or low >= 0:
        return
    drawn = [harness.make_tensor(spec, at, low, low / 4) for at, spec in enumerate(case.specs)]
    if first == "positive":
        drawn[0] = harness.make_tensor(case.specs[0], 0, high / 4, high)
    tensors = op.prepare(case.attributes, tuple(drawn))
    # Rows that lie apart and rows that do not may take different kernels.
    for pad in (3, 0):
        problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
        harness.check(op, problem, tensors, tile=None if pad else op.default(problem, SM_90))


def gpu_configurations_agree_with_reference(
    subject: Subject, data: st.DataObject, seed: int, pad: int
) -> None:
    op = subject.op
    case = data.draw(subject.cases(data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    tile = data.draw(
        st.one_of(
            st.sampled_from(list(op.configs(problem, SM_90))),
            st.sampled_from(GPU_TARGETS).map(lambda target: op.default(problem, target)),
        )
    )
    harness.check(op, problem, case.tensors(seed), tile=tile)


def configurations_are_legal(subject: Subject, data: st.DataObject) -> None:
    """The whole tuning space and the default may run on the target they are meant for; the default
    is expected to spill only where all others are."""
    op = subject.op
    case = data.draw(subject.cases(data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs)
    for target in GPU_TARGETS:
        tiles, default = list(op.configs(problem, target)), op.default(problem, target)
        assert tiles, "no tuning space"
        if any(op.crowded(problem, tile, target) is None for tile in tiles):
            assert (reason := op.crowded(problem, default, target)) is None, reason
        tiles.append(default)
        for tile in tiles:
            assert op.legal(problem, tile, target) is None, tile


def epilogue_equals_kernel_then_epilogue(
    subject: Subject, data: st.DataObject, seed: int, pad: int
) -> None:
    op = subject.op
    case = data.draw(subject.cases(data.draw(harness.dtypes)))
    stages, specs = data.draw(harness.epilogues(case.outputs[0]))
    problem = harness.problem_for(op, case.attributes, case.specs, stages, specs, pad)
    operands = tuple(
        harness.make_tensor(spec, seed + 100 + index, -1.5, 1.5) for index, spec in enumerate(specs)
    )
    tile = data.draw(st.sampled_from((None, *op.configs(problem, SM_90))))
    harness.check(op, problem, case.tensors(seed), operands, tile)


def prologue_equals_stages_then_kernel(
    subject: Subject, data: st.DataObject, seed: int, pad: int
) -> None:
    """Stages on the first input, with operands per channel; what lies outside it stays zero."""
    op = subject.op
    case = data.draw(subject.cases(data.draw(harness.dtypes)))
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


def nan_and_infinity(subject: Subject, data: st.DataObject, seed: int, pad: int) -> None:
    """NaN and infinities come out exactly where they do in torch."""
    op = subject.op
    case = data.draw(subject.cases(data.draw(harness.dtypes)))
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    constants = op.packs(case.attributes)
    tensors = tuple(
        tensor if index in constants else harness.with_special_values(tensor, seed + index)
        for index, tensor in enumerate(case.tensors(seed))
    )
    results = harness.run_interpreted(op, problem, tensors)
    harness.compare(op, problem, results, tensors, fewest=FEWEST_FINITE)


def whole_numbers_are_exact(subject: Subject, data: st.DataObject, seed: int) -> None:
    """Where small whole numbers give whole numbers there is nothing to round."""
    op = subject.op
    case = data.draw(subject.cases())
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


def wide_offsets_change_nothing(subject: Subject, data: st.DataObject, seed: int, pad: int) -> None:
    op = subject.op
    case = data.draw(subject.cases())
    problem = harness.problem_for(op, case.attributes, case.specs, pad=pad)
    tensors = case.tensors(seed)
    narrow = harness.run_interpreted(op, problem, tensors)
    wide = harness.run_interpreted(op, problem, tensors, wide=True)
    assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def batched(case: Case) -> Case:
    """The case with dimension 0 of its variable inputs as the batch; of those that are spread over
    others it is none, as of what a fused convolution reads for each of its channels: (C, 1, 1)."""
    packs = case.op.packs(case.attributes)
    variable = (spec for index, spec in enumerate(case.specs) if index not in packs)
    widest = max(variable, key=lambda spec: spec.rank)
    batch = widest.shape[0]

    def has_batch(index: int, spec: TensorSpec) -> bool:
        by_channel = bool(packs) and spec.rank < widest.rank and math.prod(spec.shape[1:]) == 1
        return index not in packs and spec.shape[:1] == (batch,) and not by_channel

    specs = enumerate(case.specs)
    return replace(
        case,
        specs=tuple(s.with_(batch=batch) if has_batch(at, s) else s for at, s in specs),
    )


def first_samples(spec: TensorSpec, tensor: torch.Tensor, batch: int) -> torch.Tensor:
    """The tensor of a call with a smaller batch."""
    return tensor if spec.batch is None else tensor[: spec.at(batch)[0]]


def smaller_batch(subject: Subject, data: st.DataObject, seed: int, pad: int) -> None:
    """A plan for the largest batch serves a smaller one, and leaves the other samples alone."""
    op = subject.op
    case = batched(data.draw(subject.cases(data.draw(harness.dtypes))))
    # Of the first input it is none where that is spread over others.
    batch = max(spec.batch or 1 for spec in case.specs)
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


def compiles_without_spills(subject: Subject) -> None:
    """For GPUs with and without what sm_90 has, within what a multiprocessor has."""
    for target in (parse("cuda:sm_80"), SM_90):
        for problem in compiled.samples(subject.op, subject.domain, (torch.float16,)):
            compiled.assert_healthy(problem, target)


EVERY = (
    compiles_without_spills,
    infer_agrees_with_reference, infer_refuses_what_the_reference_refuses,
    gpu_configurations_agree_with_reference, configurations_are_legal, nan_and_infinity,
    whole_numbers_are_exact, wide_offsets_change_nothing, smaller_batch,
)  # fmt: skip


def of(subject: Subject) -> list[tuple[str, Callable[..., None], tuple[Any, ...]]]:
    """All that holds of an op: a name, the property, and its arguments."""
    found: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = []
    checks = [*EVERY]
    checks += [epilogue_equals_kernel_then_epilogue] * subject.op.takes_epilogue
    checks += [prologue_equals_stages_then_kernel] * subject.op.takes_prologue
    found += [(check.__name__, check, (subject,)) for check in checks]
    for dtype in FLOAT_DTYPES:
        kind = str(dtype).removeprefix("torch.")
        same = kernel_agrees_with_reference
        found.append((f"{same.__name__}-{kind}", same, (subject, dtype)))
        for at, draw in enumerate(subject.domain.interesting):
            name = f"interesting_draws-{at}-{kind}"
            found.append((name, interesting_draws, (subject, draw, dtype)))
    for at, draw in enumerate(subject.domain.interesting):
        for first in ("negative", "positive"):
            check = what_stands_for_no_element_is_not_seen
            found.append((f"{check.__name__}-{at}-{first}", check, (subject, draw, first)))
    return found
