"""What is asked of every op on a device; each check is a function of the device.

The draws are fixed by the op's name: what fails on a machine that is lent for minutes fails again.
Truth is fp64 on the CPU, and PyTorch's own error that of the CPU too, where no TF32 slips in.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract import tolerance
from convloom.kernels.contract.epilogue import Stage, apply_reference
from convloom.kernels.contract.op import Config, Op, Problem
from convloom.kernels.contract.spec import TensorSpec

from . import harness
from .domains import domain_of
from .fuzz.contract import NOISE_RUNS, Noise, same
from .harness import Case, Interpreter

PRECISIONS = ("float16", "float32", "bfloat16", "tf32")
"""How products are computed; "tf32" is fp32 with the operands of products rounded."""
DRAWS = 2
"""Random draws per op and precision, beside two that its domain always tries."""
TRIES = 200


def dtype_of(precision: str) -> torch.dtype:
    """What tensors hold."""
    found: torch.dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    return found


def drawn(op: Op, precision: str, count: int = DRAWS, interesting: int = 2) -> list[Case]:
    """The first draws that the domain always tries, and random ones that the op's name decides."""
    chosen = random.Random(f"{op.name} {precision}")
    dtype = dtype_of(precision)
    draws: list[Any] = list(domain_of(op).interesting[:interesting])
    cases = [case for draw in draws if (case := harness.case_of(op, draw, dtype)) is not None]
    wanted = len(cases) + count
    for _ in range(TRIES):
        if len(cases) == wanted:
            break
        draw = {name: chosen.choice(list(values)) for name, values in domain_of(op).ranges.items()}
        if (case := harness.case_of(op, draw, dtype)) is not None:
            cases.append(case)
    assert cases, f"{op.name}: no draw of its domain is possible"
    return cases


def problem_of(case: Case, precision: str, pad: int = 0, **more: Any) -> Problem:
    """The case's problem, computed with that precision."""
    problem = harness.problem_for(case.op, case.attributes, case.specs, pad=pad, **more)
    return replace(problem, precision="tf32" if precision == "tf32" else "ieee")


def other_tile(op: Op, problem: Problem, device: Interpreter) -> Config:
    """One of the tuning space, chosen by the problem."""
    tiles = [
        tile
        for tile in op.configs(problem, device.target)
        if op.legal(problem, tile, device.target) is None
    ]
    return random.Random(str(problem)).choice(tiles)


def uses_precision(op: Op, problem: Problem, device: Interpreter) -> bool:
    """Whether TF32 makes another kernel of the problem."""
    ieee, tf32 = (
        [
            launch.constexprs
            for launch in op.launches(asked, op.default(asked, device.target), device.target)
        ]
        for asked in (replace(problem, precision=precision) for precision in ("ieee", "tf32"))
    )
    return ieee != tf32


def compare(
    problem: Problem,
    results: tuple[torch.Tensor, ...],
    tensors: tuple[torch.Tensor, ...],
    operands: tuple[torch.Tensor, ...] = (),
) -> None:
    """`harness.compare`; where a value is further off than eager's, rounding otherwise decides: of
    so many draws some are ill-conditioned, and eager's own error says little about them."""
    op = registry.get(problem.op)
    try:
        harness.compare(op, problem, results, tensors, operands)
    except AssertionError as error:
        if ": element" not in str(error) or problem.precision == "tf32":
            raise
        peers = _noisy(op, problem, tensors, operands)
        harness.compare(op, problem, results, tensors, operands, peers)


def _noisy(
    op: Op, problem: Problem, tensors: tuple[torch.Tensor, ...], operands: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """The exact results, off by as much as rounding each value on the way does."""
    exact = harness.expected(op, problem, tensors, operands)
    worst = [torch.zeros_like(truth) for truth in exact]
    for seed in range(NOISE_RUNS):
        with Noise(tolerance.UNIT_ROUNDOFF[tensors[0].dtype], seed):
            found = harness.expected(op, problem, tensors, operands)
        for at, (got, truth) in enumerate(zip(found, exact, strict=True)):
            worst[at] = worst[at].maximum((got - truth).abs().nan_to_num(0.0, 0.0, 0.0))
    return tuple(
        (truth + far).to(operand.spec.dtype)
        for truth, far, operand in zip(exact, worst, problem.outputs, strict=True)
    )


def check_op(
    device: Interpreter, name: str, precision: str, count: int = DRAWS, tiles: bool = True,
    interesting: int = 2,
) -> int:  # fmt: skip
    """Draws by the default configuration; in half precision each by another configuration too, and
    one with 64-bit offsets, bit for bit. The number of problems that were run."""
    op = registry.get(name)
    ran = 0
    for at, case in enumerate(drawn(op, precision, count, interesting)):
        problem = problem_of(case, precision, pad=3 * (at % 2))
        if precision == "tf32" and not uses_precision(op, problem, device):
            continue
        tensors = case.tensors(10 * at)
        results = harness.run_on(device, op, problem, tensors)
        compare(problem, results, tensors)
        ran += 1
        if precision != "float16" or not tiles:
            continue
        tile = other_tile(op, problem, device)
        others = harness.run_on(device, op, problem, tensors, tile=tile)
        compare(problem, others, tensors)
        if at == 0:
            wide = harness.run_on(device, op, problem, tensors, wide=True)
            same(f"{name} with 64-bit offsets", wide, results)
    return ran


def check_special_values(device: Interpreter, name: str, precision: str) -> None:
    """NaN and infinities come out exactly where they do in torch."""
    op = registry.get(name)
    case = drawn(op, precision, 1, 0)[0]
    problem = problem_of(case, precision)
    packs = op.packs(case.attributes)
    tensors = tuple(
        tensor if index in packs else harness.with_special_values(tensor, index)
        for index, tensor in enumerate(case.tensors())
    )
    results = harness.run_on(device, op, problem, tensors)
    compare(problem, results, tensors)


def check_epilogue(device: Interpreter, name: str, precision: str) -> None:
    """A full operand added, a ReLU, and a factor per channel, in the kernel."""
    op = registry.get(name)
    case = drawn(op, precision, 1, 0)[0]
    y = case.outputs[0]
    channel = tuple(size if dim == 1 else 1 for dim, size in enumerate(y.shape))
    stages, specs = (Stage("add"), Stage("relu")), (y.with_(batch=None),)
    if y.rank > 1:
        stages, specs = (*stages, Stage("mul")), (*specs, TensorSpec(channel, y.dtype, y.layout))
    problem = problem_of(case, precision, 3, epilogue=stages, operands=specs)
    operands = tuple(harness.make_tensor(spec, at, -1.5, 1.5) for at, spec in enumerate(specs))
    tensors = case.tensors()
    results = harness.run_on(device, op, problem, tensors, operands)
    compare(problem, results, tensors, operands)


def check_prologue(device: Interpreter, name: str, precision: str) -> None:
    """A factor and an offset per channel and a ReLU on the first input while it is read."""
    op = registry.get(name)
    case = next(
        case for case in drawn(op, precision, 12, 0) if getattr(case.attributes, "groups", 1) == 1
    )
    x = case.specs[0]
    channel = x.layout.order(x.rank)[-1]
    shape = tuple(size if dim == channel else 1 for dim, size in enumerate(x.shape))
    vector = TensorSpec(shape, x.dtype, x.layout)
    problem = replace(
        problem_of(case, precision, 3),
        prologue=(Stage("mul"), Stage("add"), Stage("relu")),
        prologue_operands=(harness.place(vector), harness.place(vector)),
    )
    before = tuple(harness.make_tensor(vector, at, -1.0, 1.0) for at in (1, 2))
    first, *others = case.tensors()
    results = harness.run_on(device, op, problem, (first, *others), before=before)
    applied = apply_reference(problem.prologue, first.double(), tuple(t.double() for t in before))
    compare(problem, results, (applied.to(first.dtype), *others))


def check_smaller_batch(device: Interpreter, name: str) -> bool:
    """A launch for the largest batch serves one sample less, and leaves the last one alone; whether
    the op has such a case."""
    from .properties.ops import batched, first_samples

    op = registry.get(name)
    for drawn_case in drawn(op, "float16", 8, 8):
        case = batched(drawn_case)
        batch = case.specs[0].shape[0] if case.specs[0].rank else 1
        try:
            outputs = case.outputs
        except InvalidInputError:
            continue
        if batch == 1 or any(spec.batch is None for spec in outputs):
            continue
        problem, tensors = problem_of(case, "float16"), case.tensors()
        results = harness.run_on(device, op, problem, tensors, batch=batch - 1)
        counts = [spec.at(batch - 1)[0] for spec in outputs]
        left = (result[n:] for result, n in zip(results, counts, strict=True))
        assert all(tolerance.is_untouched(rest).all() for rest in left), f"{name} wrote too much"
        given = tuple(
            first_samples(spec, tensor, batch - 1)
            for spec, tensor in zip(case.specs, tensors, strict=True)
        )
        kept = tuple(result[:n] for result, n in zip(results, counts, strict=True))
        compare(problem, kept, given)
        return True
    return False
