"""Pointwise functions of numbers that are none, infinite, zeros of either sign, or extreme: NaN,
infinities and the signs of zeros are those of torch."""

from __future__ import annotations

import math

import convloom
import pytest
import torch
from convloom.kernels import registry
from convloom.kernels.contract.scalars import BY_NAME, SCALARS, Scalar
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.movement.pointwise import Pointwise

from . import harness, nets

INFINITY = math.inf
VALUES = (
    -INFINITY, -1e10, -1000.0, -3.0, -2.0, -1.5, -1.0, -0.5, -1e-30, -0.0,
    INFINITY, 1e10, 1000.0, 3.0, 2.0, 1.5, 1.0, 0.5, 1e-30, 0.0, math.nan,
)  # fmt: skip
LITERALS = (-INFINITY, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, INFINITY, math.nan)
UNARY = [scalar for scalar in SCALARS if scalar.operands == 1]
EITHER_ZERO = ("relu", "clamp", "maximum", "minimum", "softshrink", "lerp_by")
"""The larger and the smaller of two zeros is either, as what is shrunk to zero is and the sum of a
zero and a product too small: with torch it depends on the instructions that a tensor of that size
is computed by."""
VECTORISED = ("gelu", "fmod", "remainder")
"""In fp32, torch's code for vectors of a CPU gives NaN for gelu of infinity and for remainders of
far smaller divisors; in fp64 it does not."""
BINARY = [scalar for scalar in SCALARS if scalar.operands == 2]
SEVERAL = [scalar for scalar in SCALARS if scalar.operands > 1]


def check(
    scalar: Scalar,
    attributes: Pointwise,
    *tensors: torch.Tensor,
    device: harness.Interpreter = harness.INTERPRETED,
) -> None:
    op = registry.get(scalar.name)
    specs = tuple(TensorSpec(tuple(tensor.shape), tensor.dtype) for tensor in tensors)
    problem = harness.problem_for(op, attributes, specs)
    (got,) = harness.run_on(device, op, problem, tensors)
    exact = torch.float64 if scalar.name in VECTORISED else torch.float32
    (truth,) = harness.expected(op, problem, tensors, dtype=exact)
    signed = scalar.name not in EITHER_ZERO
    assert not (wrong := differences(got, truth.to(got.dtype), tensors, signed)), wrong[:5]


def differences(
    got: torch.Tensor, truth: torch.Tensor, tensors: tuple[torch.Tensor, ...], signed: bool
) -> list[str]:
    """What comes out as another kind of number, in words; signed: with the sign of zeros."""
    same = got.isnan() == truth.isnan()
    edge = (truth == 0) | truth.isinf()
    same &= ~edge | (got == truth)
    if signed:
        same &= ~edge | (got.signbit() == truth.signbit())
    return [
        f"f({', '.join(str(t.flatten()[at].item()) for t in tensors)}): "
        f"expected {truth.flatten()[at].item()}, got {got.flatten()[at].item()}"
        for at in (~same).flatten().nonzero().flatten().tolist()
    ]


def values(dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor([VALUES]).to(dtype)


both = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)


@pytest.mark.interpreter
@both
@pytest.mark.parametrize("scalar", UNARY, ids=lambda scalar: scalar.name)
def test_of_one_number(scalar: Scalar, dtype: torch.dtype) -> None:
    for parameters in scalar.examples:
        check(scalar, Pointwise(parameters), values(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("scalar", UNARY, ids=lambda scalar: scalar.name)
def test_of_ordinary_numbers(scalar: Scalar) -> None:
    op, (low, high) = registry.get(scalar.name), scalar.range
    x = torch.linspace(max(low, -4.0), min(high, 4.0), 81).reshape(1, 81)
    for parameters in scalar.examples:
        problem = harness.problem_for(op, Pointwise(parameters), (TensorSpec((1, 81), x.dtype),))
        (got,) = harness.run_on(harness.INTERPRETED, op, problem, (x,))
        (truth,) = harness.expected(op, problem, (x,), dtype=torch.float64)
        torch.testing.assert_close(got.double(), truth.double(), rtol=1e-5, atol=1e-6)


def combinations(scalar: Scalar, dtype: torch.dtype) -> list[torch.Tensor]:
    """An operand each, so that every number meets every other."""
    met = torch.meshgrid(*[values(dtype).flatten()] * scalar.operands, indexing="ij")
    return [each.reshape(len(VALUES), -1).contiguous() for each in met]


@pytest.mark.interpreter
@both
@pytest.mark.parametrize("scalar", SEVERAL, ids=lambda scalar: scalar.name)
def test_of_several_numbers(scalar: Scalar, dtype: torch.dtype) -> None:
    for parameters in scalar.examples:
        check(scalar, Pointwise(parameters), *combinations(scalar, dtype))


@pytest.mark.interpreter
@both
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("scalar", BINARY, ids=lambda scalar: scalar.name)
def test_of_a_number_and_a_literal(scalar: Scalar, reverse: bool, dtype: torch.dtype) -> None:
    for literal in LITERALS:
        if scalar.name == "pow" and not reverse and abs(literal) == 0.5:
            continue  # Captured as sqrt and rsqrt, which torch computes too.
        for parameters in scalar.examples:
            check(scalar, Pointwise(parameters, literal, reverse), values(dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("name", [
    "pow", "neg", "elu", "gelu", "gelu_tanh", "log_sigmoid", "threshold", "softshrink", "log1p",
    "nan_to_num", "expm1", "sin", "cos", "atan", "erf", "floor", "ceil", "round", "trunc", "atan2",
    "fmod", "remainder", "lerp", "lerp_by",
])  # fmt: skip
def test_as_compiled_for_a_gpu(name: str) -> None:
    scalar, device = BY_NAME[name], harness.Emulator("sm_90")
    tensors = combinations(scalar, torch.float32)
    check(scalar, Pointwise(scalar.examples[0]), *tensors, device=device)


@pytest.mark.interpreter
def test_the_end_of_a_way_is_exact() -> None:
    """Of numbers far apart, whose difference is rounded."""
    module, _ = nets.make(lambda m, x, y, w: torch.lerp(x, y, w), (1, 1))
    start, end, weight = torch.tensor([[1e8]]), torch.tensor([[1.25]]), torch.ones(1, 1)
    exe = convloom.compile(module, (start, end, weight), target="interpreter")
    assert exe(start, end, weight).item() == 1.25
    assert exe(end, start, 0 * weight).item() == 1.25


@pytest.mark.interpreter
@pytest.mark.parametrize("exponent", [-3, -2, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 1e10, INFINITY])
def test_powers_as_captured(exponent: float) -> None:
    module, _ = nets.make(lambda m, x: (x**exponent, exponent**x), (1, 1))
    x = values(torch.float32)
    for target in ("interpreter", "reference"):
        exe = convloom.compile(module, (x,), target=target, tuning="heuristic")
        for got, truth in zip(exe(x), module(x), strict=True):
            assert not (wrong := differences(got, truth, (x,), signed=True)), wrong
