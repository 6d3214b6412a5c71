"""Tensors beyond 2^31 elements, in the interpreter: rows that lie so far apart that every offset
but the first needs 64 bits, in memory that is only reserved.

A kernel that computes a row's offset in 32 bits reads and writes elsewhere; what lies within 2^31
elements in front of a buffer is reserved too, so that it does so without a crash.
"""

from __future__ import annotations

import mmap
from dataclasses import replace

import pytest
import torch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.op import Op, Problem, Ref
from convloom.kernels.contract.spec import Operand, rows_and_columns
from convloom.kernels.devices import execute

from . import gpu_checks, harness
from .harness import INTERPRETED, Case

FAR = 2**31
DTYPE = torch.float16
RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)


def far(operand: Operand) -> Operand:
    """The operand with its last row more than 2^31 elements behind its first one."""
    rows, columns = rows_and_columns(operand.spec)
    if rows < 2 or operand.spec.dtype not in (DTYPE, torch.bool):
        return operand
    pitch = -(-FAR // (rows - 1)) + columns
    return replace(operand, pitch=-(-pitch // 8) * 8)


def reserved(operand: Operand) -> torch.Tensor:
    """Zeros to the operand's end, and as many in front of them as a lost bit leads back."""
    dtype, before = operand.spec.dtype, FAR if operand.extent > FAR else 0
    size = (before + operand.extent + 4096) * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=RESERVED)
    return torch.frombuffer(memory, dtype=dtype, offset=before * dtype.itemsize)


def far_problem(op: Op, case: Case) -> Problem | None:
    """The case with the rows of its images, not of what is small beside them, far apart; None where
    it has but one row."""
    problem = harness.problem_for(op, case.attributes, case.specs)
    packs = op.packs(case.attributes)
    inputs = tuple(
        operand if index in packs or operand.spec.rank != case.specs[0].rank else far(operand)
        for index, operand in enumerate(problem.inputs)
    )
    problem = replace(problem, inputs=inputs, outputs=tuple(map(far, problem.outputs)))
    return problem if problem.is_wide else None


def problems(op: Op) -> tuple[Case, Problem]:
    """The draw of most samples, and of those one with rows in its input and its output: what lies
    within a window of one sample is addressed from there in 32 bits, which no window exceeds."""
    drawn = []
    for case in gpu_checks.drawn(op, "float16", 30, 4):
        try:
            problem = far_problem(op, case)
        except InvalidInputError:
            continue
        if problem is not None:
            drawn.append((case, problem))

    def value(pair: tuple[Case, Problem]) -> tuple[int, bool]:
        _, problem = pair
        x, y = problem.inputs[0], problem.output
        return x.shape[0] if x.shape else 1, min(x.extent, y.extent) > FAR

    return max(drawn, key=value)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", sorted(registry.BY_NAME))
def test_rows_beyond_32_bits_are_found(name: str) -> None:
    op = registry.get(name)
    case, problem = problems(op)
    tensors, packs = case.tensors(), op.packs(case.attributes)
    buffers: dict[Ref, torch.Tensor] = {}
    for index, (operand, tensor) in enumerate(zip(problem.inputs, tensors, strict=True)):
        if index in packs:
            buffers[Ref("input", index)] = packs[index](case.attributes, tensor)
            continue
        buffers[Ref("input", index)] = reserved(operand)
        harness.view_of(buffers[Ref("input", index)], operand).copy_(tensor)
    for index, operand in enumerate(problem.outputs):
        buffers[Ref("output", index)] = reserved(operand)
    tile = op.default(problem, INTERPRETED.target)
    for launch in op.launches(problem, tile, INTERPRETED.target):
        assert harness.is_wide(launch)
        scratch = execute.scratch(launch)
        INTERPRETED.run(launch, {**buffers, **scratch}.__getitem__, 1)
    results = tuple(
        harness.view_of(buffers[Ref("output", index)], operand).clone()
        for index, operand in enumerate(problem.outputs)
    )
    harness.compare(op, problem, results, tensors)
