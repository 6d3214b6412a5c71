"""The pointwise family: each member is one scalar `@triton.jit` function on fp32 values.

The same function is used alone (the pointwise kernel) and as a stage of any kernel's epilogue or
prologue. Next to it stands its torch reference, the only definition of correct. NaN propagates as
in torch: written explicitly, because `tl.maximum(nan, 0)` drops NaN on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

NAN: tl.constexpr = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def identity(v):
    return v


@triton.jit
def replace(v, other):
    return other


@triton.jit
def relu(v):
    return tl.maximum(v, 0.0, propagate_nan=NAN)


@triton.jit
def clamp(v, low, high):
    return tl.minimum(tl.maximum(v, low, propagate_nan=NAN), high, propagate_nan=NAN)


@triton.jit
def leaky_relu(v, slope):
    return tl.where(v > 0, v, v * slope)


@triton.jit
def prelu(v, slope):
    return tl.where(v > 0, v, v * slope)


@triton.jit
def expm1(v):
    # Near zero exp(v) - 1 cancels; the cubic Taylor polynomial is exact to fp32 below 2^-7.
    series = v * (1.0 + v * (0.5 + v * (1.0 / 6.0)))
    return tl.where(tl.abs(v) < 0.0078125, series, tl.exp(v) - 1.0)


@triton.jit
def elu(v, alpha, scale, input_scale):
    # A positive v never reaches exp: overflow there would be inf * 0 in the other branch.
    negative = tl.where(v > 0, 0.0, v) * input_scale
    return scale * tl.where(v > 0, v, alpha * expm1(negative))


@triton.jit
def celu(v, alpha):
    negative = tl.where(v > 0, 0.0, v)
    return tl.where(v > 0, v, alpha * expm1(negative / alpha))


@triton.jit
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@triton.jit
def tanh(v):
    # libdevice.tanh branches per lane and cannot be interpreted.
    e = tl.exp(-2.0 * tl.abs(v))
    far = (1.0 - e) / (1.0 + e)
    square = v * v
    near = v * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(v) < 0.125, near, tl.where(v < 0, -far, far))


@triton.jit
def silu(v):
    return v / (1.0 + tl.exp(-v))


@triton.jit
def gelu(v):
    # Infinity stays infinite, as in torch on a GPU or in fp64; torch's vectorised code for CPUs
    # gives NaN.
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


@triton.jit
def gelu_tanh(v):
    # 0.5 v (1 + tanh u) = v sigmoid(2u)
    u = 0.7978845608028654 * (v + 0.044715 * v * v * v)
    return v / (1.0 + tl.exp(-2.0 * u))


@triton.jit
def hardsigmoid(v):
    return clamp(v + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def hardswish(v):
    return v * clamp(v + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@triton.jit
def log1p_exp(v):
    # log(1 + e^v) = max(v, 0) + log(1 + u), u = e^-|v| in (0, 1], without overflow. A logarithm of
    # 1 + u would lose the digits of a small u: log(1 + u) = 2 atanh(s), s = u / (2 + u) <= 1/3,
    # whose series is exact to fp32 after eight terms.
    u = tl.exp(-tl.abs(v))
    s = u / (2.0 + u)
    square = s * s
    series = 1.0 / 13.0 + square * (1.0 / 15.0)
    series = 1.0 / 9.0 + square * (1.0 / 11.0 + square * series)
    series = 1.0 / 5.0 + square * (1.0 / 7.0 + square * series)
    series = 1.0 + square * (1.0 / 3.0 + square * series)
    return tl.maximum(v, 0.0, propagate_nan=NAN) + 2.0 * s * series


@triton.jit
def softplus(v, beta, threshold):
    return tl.where(v * beta > threshold, v, log1p_exp(v * beta) / beta)


@triton.jit
def mish(v):
    return v * tanh(log1p_exp(v))


@triton.jit
def sqrt(v):
    return tl.sqrt(v)


@triton.jit
def rsqrt(v):
    return 1.0 / tl.sqrt(v)


@triton.jit
def exp(v):
    # A GPU computes 2^(v log2 e), where the rounding of a large product is a relative error of the
    # result. Here 2^n 2^r: with |r| <= 1/2 it is none, and v - n ln 2 is exact in two parts (Cody
    # and Waite), the first of which has few enough bits for every n.
    v = clamp(v, -104.0, 89.0)
    n = tl.floor(v * 1.4426950408889634 + 0.5)
    rest = v - n * 0.693145751953125 - n * 1.4286068203094172e-6
    # In two factors: 2^128 is no number, though results that it is a factor of are.
    return tl.exp2(rest * 1.4426950408889634) * tl.exp2(n - 1.0) * 2.0


@triton.jit
def log(v):
    return tl.log(v)


@triton.jit
def absolute(v):
    return tl.abs(v)


@triton.jit
def negate(v):
    # Triton's -v is 0 - v, which is +0 for +0.
    return v * -1.0


@triton.jit
def sign(v):
    # 0 for NaN, as torch has it.
    return tl.where(v > 0, 1.0, tl.where(v < 0, -1.0, 0.0))


@triton.jit
def add(a, b):
    return a + b


@triton.jit
def subtract(a, b):
    return a - b


@triton.jit
def multiply(a, b):
    return a * b


@triton.jit
def divide(a, b):
    return a / b


@triton.jit
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=NAN)


@triton.jit
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=NAN)


@triton.jit
def square(v):
    return v * v


@triton.jit
def power(a, b):
    # |a|^b through fp64 exp2(b log2|a|): the fp32 logarithm would lose b * log2|a| ulps.
    # The special values are those of IEEE 754 pow.
    base, exponent = tl.broadcast(a, b)
    magnitude = tl.exp2(exponent.to(tl.float64) * tl.log2(tl.abs(base).to(tl.float64)))
    magnitude = tl.where(tl.abs(base) == 1.0, 1.0, magnitude.to(tl.float32))
    whole = tl.floor(exponent) == exponent
    odd = whole & (tl.floor(exponent * 0.5) != exponent * 0.5)
    # By its sign bit: -0 is not less than 0. And -x is 0 - x in Triton, +0 for +0.
    is_negative = base.to(tl.int32, bitcast=True) < 0
    result = tl.where(is_negative & odd, magnitude * -1.0, magnitude)
    complex_root = (base < 0) & (tl.abs(base) != float("inf")) & (whole == 0)
    result = tl.where(complex_root, float("nan"), result)
    return tl.where((exponent == 0.0) | (base == 1.0), 1.0, result)


@dataclass(frozen=True)
class Scalar:
    """One member of the family.

    operands: 1 or 2 tensors (the second may be a literal); parameters: names of the fp32 literals
    that follow them; range: where the tests draw inputs from.
    """

    name: str
    function: Any
    reference: Callable[..., torch.Tensor]
    operands: int = 1
    parameters: tuple[str, ...] = ()
    examples: tuple[tuple[float, ...], ...] = ((),)
    range: tuple[float, float] = (-8.0, 8.0)


def _elu(x: torch.Tensor, alpha: float, scale: float, input_scale: float) -> torch.Tensor:
    result: torch.Tensor = torch.ops.aten.elu.default(x, alpha, scale, input_scale)
    return result


def _prelu(x: torch.Tensor | float, slope: torch.Tensor | float) -> torch.Tensor:
    value = _as_tensor(x, slope)
    return torch.where(value > 0, value, value * slope)


def _clamp(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.clamp(x, low, high)


def _as_tensor(value: torch.Tensor | float, like: torch.Tensor | float) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    assert isinstance(like, torch.Tensor)
    return torch.full((), value, dtype=like.dtype, device=like.device)


def _maximum(a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    return torch.maximum(_as_tensor(a, b), _as_tensor(b, a))


def _minimum(a: torch.Tensor | float, b: torch.Tensor | float) -> torch.Tensor:
    return torch.minimum(_as_tensor(a, b), _as_tensor(b, a))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


SCALARS: tuple[Scalar, ...] = (
    Scalar("identity", identity, _identity),
    Scalar("relu", relu, torch.relu),
    Scalar("clamp", clamp, _clamp, 1, ("low", "high"), ((0.0, 6.0), (-1.0, 2.5))),
    Scalar("leaky_relu", leaky_relu, F.leaky_relu, 1, ("slope",), ((0.01,), (0.2,))),
    Scalar("prelu", prelu, _prelu, 2),
    Scalar(
        "elu",
        elu,
        _elu,
        1,
        ("alpha", "scale", "input_scale"),
        ((1.0, 1.0, 1.0), (1.6732632423543772, 1.0507009873554805, 1.0)),
    ),
    Scalar("celu", celu, F.celu, 1, ("alpha",), ((1.0,), (0.5,))),
    Scalar("sigmoid", sigmoid, torch.sigmoid),
    Scalar("tanh", tanh, torch.tanh),
    Scalar("silu", silu, F.silu),
    Scalar("gelu", gelu, F.gelu),
    # Below -5 the reference's own 1 + tanh cancels, in fp64 too.
    Scalar("gelu_tanh", gelu_tanh, _gelu_tanh, range=(-5.0, 8.0)),
    Scalar("hardsigmoid", hardsigmoid, F.hardsigmoid),
    Scalar("hardswish", hardswish, F.hardswish),
    Scalar("softplus", softplus, F.softplus, 1, ("beta", "threshold"), ((1.0, 20.0), (2.0, 5.0))),
    Scalar("mish", mish, F.mish),
    Scalar("square", square, torch.square),
    Scalar("sqrt", sqrt, torch.sqrt, range=(0.0, 50.0)),
    Scalar("rsqrt", rsqrt, torch.rsqrt, range=(0.01, 50.0)),
    Scalar("exp", exp, torch.exp),
    Scalar("log", log, torch.log, range=(0.01, 50.0)),
    Scalar("abs", absolute, torch.abs),
    Scalar("neg", negate, torch.neg),
    Scalar("sign", sign, torch.sign),
    Scalar("add", add, torch.add, 2),
    Scalar("sub", subtract, torch.sub, 2),
    Scalar("mul", multiply, torch.mul, 2),
    Scalar("div", divide, torch.div, 2, range=(0.5, 8.0)),
    Scalar("maximum", maximum, _maximum, 2),
    Scalar("minimum", minimum, _minimum, 2),
    Scalar("pow", power, torch.pow, 2, range=(0.1, 4.0)),
)

LOAD = Scalar("load", replace, lambda value, other: other, 2)
"""The first stage of a chain that starts from a tensor in memory; not an op of its own."""

BY_NAME = {scalar.name: scalar for scalar in (*SCALARS, LOAD)}
