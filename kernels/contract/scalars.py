"""The pointwise family: each member is one scalar `@triton.jit` function on fp32 values.

The same function is used alone (the pointwise kernel) and as a stage of any kernel's epilogue or
prologue. Next to it stands its torch reference, the only definition of correct. NaN propagates as
in torch: written explicitly, because `tl.maximum(nan, 0)` drops NaN on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from .conditions import (
    choose,
    choose_first,
    choose_second,
    equal,
    greater,
    greater_equal,
    is_finite,
    is_infinite,
    is_nan,
    less,
    less_equal,
    logical_and,
    logical_not,
    logical_or,
    logical_xor,
    not_equal,
)
from .elementary import (
    NAN,
    atan,
    atan2,
    clamp,
    cos,
    exp,
    expm1,
    fmod,
    log1p,
    log1p_exp,
    log1p_exp_of_negative,
    power,
    remainder,
    round_half_even,
    sin,
    trunc,
)


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
def leaky_relu(v, slope):
    return tl.where(v > 0, v, v * slope)


@triton.jit
def prelu(v, slope):
    return tl.where(v > 0, v, v * slope)


@triton.jit
def expm1_of_negative(v):
    # Near zero exp(v) - 1 cancels; the cubic Taylor polynomial is exact to fp32 below 2^-7. A third
    # of `expm1`'s instructions; exact to a last bit of 1, not of the result.
    series = v * (1.0 + v * (0.5 + v * (1.0 / 6.0)))
    return tl.where(tl.abs(v) < 0.0078125, series, tl.exp(v) - 1.0)


@triton.jit
def elu(v, alpha, scale, input_scale):
    # A positive v never reaches exp: overflow there would be inf * 0 in the other branch.
    negative = tl.where(v > 0, 0.0, v) * input_scale
    return scale * tl.where(v > 0, v, alpha * expm1_of_negative(negative))


@triton.jit
def celu(v, alpha):
    negative = tl.where(v > 0, 0.0, v)
    return tl.where(v > 0, v, alpha * expm1_of_negative(negative / alpha))


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
def softplus(v, beta, threshold):
    return tl.where(v * beta > threshold, v, log1p_exp(v * beta) / beta)


@triton.jit
def log_sigmoid(v):
    return tl.minimum(v, 0.0, propagate_nan=NAN) - log1p_exp_of_negative(v)


@triton.jit
def threshold(v, limit, value):
    return tl.where(v <= limit, value, v)


@triton.jit
def hardshrink(v, width):
    return tl.where((v >= -width) & (v <= width), 0.0, v)


@triton.jit
def softshrink(v, width):
    # 0 of the number's own sign, and NaN of NaN.
    return tl.where(v > width, v - width, tl.where(v < -width, v + width, v * 0.0))


@triton.jit
def nan_to_num(v, nan, above, below):
    finite = tl.where(v == float("inf"), above, tl.where(v == float("-inf"), below, v))
    return tl.where(v == v, finite, nan)


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
def log(v):
    return tl.log(v)


@triton.jit
def erf(v):
    return tl.erf(v)


@triton.jit
def floor(v):
    return tl.floor(v)


@triton.jit
def ceil(v):
    return tl.ceil(v)


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
def inverse_deviation(variance, eps):
    # Corrected by a step of Newton's method: it is per channel, and its error in every element.
    v = variance + eps
    root = tl.rsqrt(v)
    better = root * (1.5 - 0.5 * v * root * root)
    return tl.where(better == better, better, root)


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
def lerp(a, b, weight):
    # From the nearer end: with a weight of 1 the second number comes out as it is.
    way = b - a
    is_near: tl.constexpr = (weight > -0.5) and (weight < 0.5)
    return a + weight * way if is_near else b - way * (1.0 - weight)


@triton.jit
def square(v):
    return v * v


@dataclass(frozen=True)
class Scalar:
    """One member of the family.

    operands: 1 to 3 tensors (the second of two may be a literal); parameters: names of the fp32
    literals that follow them; range: where the tests draw inputs from. boolean: the result is true
    or false. conditions: the operands of which only that is asked. aten: calls, by overload, whose
    arguments are these operands and parameters in order ("library.name.default"); those of torch
    that ask for more are in `movement/pointwise_ops.py`.
    """

    name: str
    function: Any
    reference: Callable[..., torch.Tensor]
    operands: int = 1
    parameters: tuple[str, ...] = ()
    examples: tuple[tuple[float, ...], ...] = ((),)
    range: tuple[float, float] = (-8.0, 8.0)
    boolean: bool = False
    conditions: tuple[int, ...] = ()
    aten: tuple[str, ...] = ()

    @property
    def symbol(self) -> str:
        """The function by its name in this module, or with its own module if that is another."""
        own = self.function.fn
        here = globals().get(own.__name__) is self.function
        return str(own.__name__ if here else f"{own.__module__}:{own.__name__}")


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
    dtype = torch.float32 if like.dtype is torch.bool else like.dtype
    return torch.full((), value, dtype=dtype, device=like.device)


def _pair(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function of two tensors, of which one may be given as a number."""

    def reference(a: torch.Tensor | float, b: torch.Tensor | float, *rest: float) -> torch.Tensor:
        return function(_as_tensor(a, b), _as_tensor(b, a), *rest)

    return reference


def _where(
    condition: torch.Tensor, first: torch.Tensor | float, second: torch.Tensor | float
) -> torch.Tensor:
    return torch.where(condition != 0, first, second)


def _where_first(first: torch.Tensor, condition: torch.Tensor, second: Any) -> torch.Tensor:
    return _where(condition, first, second)


def _where_second(second: torch.Tensor, condition: torch.Tensor, first: Any) -> torch.Tensor:
    return _where(condition, first, second)


def _choose(condition: torch.Tensor, first: float, second: float) -> torch.Tensor:
    """In fp64 of what is in fp64, which is computed in to know the exact result."""
    is_exact = condition.dtype is torch.float64
    like = torch.zeros((), dtype=torch.float64 if is_exact else torch.float32)
    return _where(condition, like + first, like + second)


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
    Scalar("log_sigmoid", log_sigmoid, F.logsigmoid),
    Scalar(
        "threshold", threshold, F.threshold, 1, ("limit", "value"), ((0.25, 20.0), (-1.0, -3.0))
    ),
    Scalar("hardshrink", hardshrink, F.hardshrink, 1, ("width",), ((0.5,), (1.25,))),
    Scalar("softshrink", softshrink, F.softshrink, 1, ("width",), ((0.5,), (1.25,))),
    Scalar(
        "nan_to_num",
        nan_to_num,
        torch.nan_to_num,
        1,
        ("nan", "above", "below"),
        ((0.0, 1e4, -1e4), (1.5, math.inf, -0.0)),
    ),
    Scalar("mish", mish, F.mish),
    Scalar("square", square, torch.square),
    Scalar("sqrt", sqrt, torch.sqrt, range=(0.0, 50.0)),
    Scalar("rsqrt", rsqrt, torch.rsqrt, range=(0.01, 50.0)),
    Scalar("exp", exp, torch.exp),
    Scalar("log", log, torch.log, range=(0.01, 50.0)),
    Scalar("log1p", log1p, torch.log1p, range=(-0.99, 8.0)),
    Scalar("expm1", expm1, torch.expm1),
    Scalar("sin", sin, torch.sin),
    Scalar("cos", cos, torch.cos),
    Scalar("atan", atan, torch.atan),
    Scalar("erf", erf, torch.erf, range=(-4.0, 4.0)),
    Scalar("floor", floor, torch.floor),
    Scalar("ceil", ceil, torch.ceil),
    Scalar("round", round_half_even, torch.round),
    Scalar("trunc", trunc, torch.trunc),
    Scalar("abs", absolute, torch.abs),
    Scalar("neg", negate, torch.neg),
    Scalar("sign", sign, torch.sign),
    Scalar("add", add, torch.add, 2),
    Scalar("sub", subtract, torch.sub, 2),
    Scalar("mul", multiply, torch.mul, 2),
    Scalar("div", divide, torch.div, 2, range=(0.5, 8.0)),
    Scalar("maximum", maximum, _pair(torch.maximum), 2),
    Scalar("minimum", minimum, _pair(torch.minimum), 2),
    Scalar("atan2", atan2, _pair(torch.atan2), 2),
    Scalar("fmod", fmod, _pair(torch.fmod), 2),
    Scalar("remainder", remainder, _pair(torch.remainder), 2),
    Scalar("lerp", lerp, _pair(torch.lerp), 2, ("weight",), ((0.25,), (0.75,))),
    Scalar("pow", power, torch.pow, 2, range=(0.1, 4.0)),
    Scalar("eq", equal, _pair(torch.eq), 2, boolean=True),
    Scalar("ne", not_equal, _pair(torch.ne), 2, boolean=True),
    Scalar("lt", less, _pair(torch.lt), 2, boolean=True),
    Scalar("le", less_equal, _pair(torch.le), 2, boolean=True),
    Scalar("gt", greater, _pair(torch.gt), 2, boolean=True),
    Scalar("ge", greater_equal, _pair(torch.ge), 2, boolean=True),
    Scalar(
        "logical_and", logical_and, _pair(torch.logical_and), 2, boolean=True, conditions=(0, 1)
    ),
    Scalar("logical_or", logical_or, _pair(torch.logical_or), 2, boolean=True, conditions=(0, 1)),
    Scalar(
        "logical_xor", logical_xor, _pair(torch.logical_xor), 2, boolean=True, conditions=(0, 1)
    ),
    Scalar("logical_not", logical_not, torch.logical_not, boolean=True, conditions=(0,)),
    Scalar("isnan", is_nan, torch.isnan, boolean=True),
    Scalar("isinf", is_infinite, torch.isinf, boolean=True),
    Scalar("isfinite", is_finite, torch.isfinite, boolean=True),
    Scalar(
        "choose", choose, _choose, 1, ("first", "second"), ((1.0, 0.0), (-0.5, math.inf)),
        conditions=(0,),
    ),
    Scalar("where", choose, _where, 3, conditions=(0,)),
    Scalar(
        "where_else", choose_first, _pair(_where_first), 2, ("second",), ((0.0,), (-math.inf,)),
        conditions=(1,),
    ),
    Scalar(
        "masked_fill", choose_second, _pair(_where_second), 2, ("first",), ((0.0,), (-math.inf,)),
        conditions=(1,),
    ),
)  # fmt: skip

LOAD = Scalar("load", replace, lambda value, other: other, 2)
"""The first stage of a chain that starts from a tensor in memory; not an op of its own."""
WHERE_FIRST = Scalar("where_first", choose_first, _where_first, 3, conditions=(1,))
WHERE_SECOND = Scalar("where_second", choose_second, _where_second, 3, conditions=(1,))
"""`where` as a stage of its first or of its second choice."""

_BY_NAME = {scalar.name: scalar for scalar in (*SCALARS, LOAD, WHERE_FIRST, WHERE_SECOND)}
BY_NAME = MappingProxyType(_BY_NAME)


def extend(scalars: Iterable[Scalar]) -> None:
    """Adds the functions of extensions, which the registry has checked, to `BY_NAME`."""
    _BY_NAME.update((scalar.name, scalar) for scalar in scalars)
