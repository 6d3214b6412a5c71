"""The pointwise family: each member is one scalar `@triton.jit` function on fp32 values.

The same function is used alone (the pointwise kernel) and as a stage of any kernel's epilogue or
prologue. Next to it stands its torch reference, the only definition of correct. NaN propagates as
in torch: written explicitly, because `tl.maximum(nan, 0)` drops NaN on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.runtime.jit import JITFunction

from .elementary import (
    NAN,
    atan,
    atan2,
    clamp,
    cos,
    divide,
    exp,
    expm1,
    floor_divide,
    fmod,
    log1p,
    log1p_exp,
    log1p_exp_of_negative,
    power,
    remainder,
    round_half_even,
    sin,
    trunc,
    trunc_divide,
)


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


_SCALARS: list[Scalar] = []


def scalar_jit(reference: Any, operands: int = 1, *rest: Any, name: str = "", **more: Any) -> Any:
    """Makes the function below a member of the family, with what `Scalar` asks for; by its own name
    where none is given."""

    def add(function: Any) -> Any:
        jitted = function if isinstance(function, JITFunction) else triton.jit(function)
        known = name or jitted.fn.__name__
        _SCALARS.append(Scalar(known, jitted, reference, operands, *rest, **more))
        return jitted

    return add


def _prelu(x: torch.Tensor | float, slope: torch.Tensor | float) -> torch.Tensor:
    value = _as_tensor(x, slope)
    return torch.where(value > 0, value, value * slope)


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


def _identity(x: torch.Tensor) -> torch.Tensor:
    return x


scalar_jit(torch.clamp, 1, ("low", "high"), ((0.0, 6.0), (-1.0, 2.5)))(clamp)
scalar_jit(torch.exp)(exp)
scalar_jit(torch.log1p, range=(-0.99, 8.0))(log1p)
scalar_jit(torch.expm1)(expm1)
scalar_jit(torch.sin)(sin)
scalar_jit(torch.cos)(cos)
scalar_jit(torch.atan)(atan)
scalar_jit(torch.round, name="round")(round_half_even)
scalar_jit(torch.trunc)(trunc)
scalar_jit(_pair(torch.atan2), 2)(atan2)
scalar_jit(_pair(torch.fmod), 2)(fmod)
scalar_jit(_pair(torch.remainder), 2)(remainder)
scalar_jit(torch.div, 2, name="div", range=(0.5, 8.0))(divide)
scalar_jit(_pair(torch.floor_divide), 2)(floor_divide)
scalar_jit(_pair(partial(torch.div, rounding_mode="trunc")), 2)(trunc_divide)
scalar_jit(torch.pow, 2, name="pow", range=(0.1, 4.0))(power)


@scalar_jit(_identity)
def identity(v):
    return v


@triton.jit
def replace(v, other):
    return other


@scalar_jit(torch.relu)
def relu(v):
    return tl.maximum(v, 0.0, propagate_nan=NAN)


@scalar_jit(F.leaky_relu, 1, ("slope",), ((0.01,), (0.2,)))
def leaky_relu(v, slope):
    return tl.where(v > 0, v, v * slope)


@scalar_jit(_prelu, 2)
def prelu(v, slope):
    return tl.where(v > 0, v, v * slope)


@triton.jit
def expm1_of_negative(v):
    # Near zero exp(v) - 1 cancels; the cubic Taylor polynomial is exact to fp32 below 2^-7. A third
    # of `expm1`'s instructions; exact to a last bit of 1, not of the result.
    series = v * (1.0 + v * (0.5 + v * (1.0 / 6.0)))
    return tl.where(tl.abs(v) < 0.0078125, series, tl.exp(v) - 1.0)


@scalar_jit(
    torch.ops.aten.elu.default, 1, ("alpha", "scale", "input_scale"),
    ((1.0, 1.0, 1.0), (1.6732632423543772, 1.0507009873554805, 1.0)),
)
def elu(v, alpha, scale, input_scale):
    # A positive v never reaches exp: overflow there would be inf * 0 in the other branch.
    negative = tl.where(v > 0, 0.0, v) * input_scale
    return scale * tl.where(v > 0, v, alpha * expm1_of_negative(negative))


@scalar_jit(F.celu, 1, ("alpha",), ((1.0,), (0.5,)))
def celu(v, alpha):
    negative = tl.where(v > 0, 0.0, v)
    return tl.where(v > 0, v, alpha * expm1_of_negative(negative / alpha))


@scalar_jit(torch.sigmoid)
def sigmoid(v):
    return 1.0 / (1.0 + tl.exp(-v))


@scalar_jit(torch.tanh)
def tanh(v):
    # libdevice.tanh branches per lane and cannot be interpreted.
    e = tl.exp(-2.0 * tl.abs(v))
    far = (1.0 - e) / (1.0 + e)
    square = v * v
    near = v * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(tl.abs(v) < 0.125, near, tl.where(v < 0, -far, far))


@scalar_jit(F.silu)
def silu(v):
    return v / (1.0 + tl.exp(-v))


@scalar_jit(F.gelu)
def gelu(v):
    # Infinity stays infinite, as in torch on a GPU or in fp64; torch's vectorised code for CPUs
    # gives NaN.
    return 0.5 * v * (1.0 + tl.erf(v * 0.7071067811865476))


# Below -5 the reference's own 1 + tanh cancels, in fp64 too.
@scalar_jit(partial(F.gelu, approximate="tanh"), range=(-5.0, 8.0))
def gelu_tanh(v):
    # 0.5 v (1 + tanh u) = v sigmoid(2u)
    u = 0.7978845608028654 * (v + 0.044715 * v * v * v)
    return v / (1.0 + tl.exp(-2.0 * u))


@scalar_jit(F.hardsigmoid)
def hardsigmoid(v):
    return clamp(v + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@scalar_jit(F.hardswish)
def hardswish(v):
    return v * clamp(v + 3.0, 0.0, 6.0) * (1.0 / 6.0)


@scalar_jit(F.softplus, 1, ("beta", "threshold"), ((1.0, 20.0), (2.0, 5.0)))
def softplus(v, beta, threshold):
    return tl.where(v * beta > threshold, v, log1p_exp(v * beta) / beta)


@scalar_jit(F.logsigmoid)
def log_sigmoid(v):
    return tl.minimum(v, 0.0, propagate_nan=NAN) - log1p_exp_of_negative(v)


@scalar_jit(F.threshold, 1, ("limit", "value"), ((0.25, 20.0), (-1.0, -3.0)))
def threshold(v, limit, value):
    return tl.where(v <= limit, value, v)


@scalar_jit(F.hardshrink, 1, ("width",), ((0.5,), (1.25,)))
def hardshrink(v, width):
    return tl.where((v >= -width) & (v <= width), 0.0, v)


@scalar_jit(F.softshrink, 1, ("width",), ((0.5,), (1.25,)))
def softshrink(v, width):
    # 0 of the number's own sign, and NaN of NaN.
    return tl.where(v > width, v - width, tl.where(v < -width, v + width, v * 0.0))


@scalar_jit(
    torch.nan_to_num, 1, ("nan", "above", "below"), ((0.0, 1e4, -1e4), (1.5, math.inf, -0.0))
)
def nan_to_num(v, nan, above, below):
    finite = tl.where(v == float("inf"), above, tl.where(v == float("-inf"), below, v))
    return tl.where(v == v, finite, nan)


@scalar_jit(F.mish)
def mish(v):
    return v * tanh(log1p_exp(v))


@scalar_jit(torch.sqrt, range=(0.0, 50.0))
def sqrt(v):
    return tl.sqrt(v)


@scalar_jit(torch.rsqrt, range=(0.01, 50.0))
def rsqrt(v):
    return 1.0 / tl.sqrt(v)


@scalar_jit(torch.log, range=(0.01, 50.0))
def log(v):
    return tl.log(v)


@scalar_jit(torch.erf, range=(-4.0, 4.0))
def erf(v):
    return tl.erf(v)


@scalar_jit(torch.floor)
def floor(v):
    return tl.floor(v)


@scalar_jit(torch.ceil)
def ceil(v):
    return tl.ceil(v)


@scalar_jit(torch.abs, name="abs")
def absolute(v):
    return tl.abs(v)


@scalar_jit(torch.neg, name="neg")
def negate(v):
    # Triton's -v is 0 - v, which is +0 for +0.
    return v * -1.0


@scalar_jit(torch.sign)
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


@scalar_jit(torch.add, 2)
def add(a, b):
    return a + b


@scalar_jit(torch.sub, 2, name="sub")
def subtract(a, b):
    return a - b


@scalar_jit(torch.mul, 2, name="mul")
def multiply(a, b):
    return a * b


@scalar_jit(_pair(torch.maximum), 2)
def maximum(a, b):
    return tl.maximum(a, b, propagate_nan=NAN)


@scalar_jit(_pair(torch.minimum), 2)
def minimum(a, b):
    return tl.minimum(a, b, propagate_nan=NAN)


# Lerp starts from the nearer end: with a weight of 1 the second number comes out as it is.


@scalar_jit(_pair(torch.lerp), 2, ("weight",), ((0.25,), (0.75,)), aten=("aten.lerp.Scalar",))
def lerp(a, b, weight):
    way = b - a
    is_near: tl.constexpr = (weight > -0.5) and (weight < 0.5)
    return a + weight * way if is_near else b - way * (1.0 - weight)


@scalar_jit(torch.lerp, 3, aten=("aten.lerp.Tensor",))
def lerp_by(a, b, weight):
    is_near = tl.abs(weight) < 0.5
    return tl.where(is_near, a, b) + tl.where(is_near, weight, weight - 1.0) * (b - a)


@scalar_jit(torch.square)
def square(v):
    return v * v


# Comparisons, logic and choices. A boolean is 1 or 0 in a chain and one byte in memory. Whatever
# else stands where a condition is asked for is true where it is not zero, as torch has it; NaN is.


@scalar_jit(_pair(torch.eq), 2, name="eq", boolean=True)
def equal(a, b):
    return tl.where(a == b, 1.0, 0.0)


@scalar_jit(_pair(torch.ne), 2, name="ne", boolean=True)
def not_equal(a, b):
    return tl.where(a != b, 1.0, 0.0)


@scalar_jit(_pair(torch.lt), 2, name="lt", boolean=True)
def less(a, b):
    return tl.where(a < b, 1.0, 0.0)


@scalar_jit(_pair(torch.le), 2, name="le", boolean=True)
def less_equal(a, b):
    return tl.where(a <= b, 1.0, 0.0)


@scalar_jit(_pair(torch.gt), 2, name="gt", boolean=True)
def greater(a, b):
    return tl.where(a > b, 1.0, 0.0)


@scalar_jit(_pair(torch.ge), 2, name="ge", boolean=True)
def greater_equal(a, b):
    return tl.where(a >= b, 1.0, 0.0)


@scalar_jit(_pair(torch.logical_and), 2, boolean=True, conditions=(0, 1))
def logical_and(a, b):
    return tl.where(a == 0.0, 0.0, tl.where(b == 0.0, 0.0, 1.0))


@scalar_jit(_pair(torch.logical_or), 2, boolean=True, conditions=(0, 1))
def logical_or(a, b):
    return tl.where(a == 0.0, tl.where(b == 0.0, 0.0, 1.0), 1.0)


@scalar_jit(_pair(torch.logical_xor), 2, boolean=True, conditions=(0, 1))
def logical_xor(a, b):
    other = tl.where(b == 0.0, 0.0, 1.0)
    return tl.where(a == 0.0, other, 1.0 - other)


@scalar_jit(torch.logical_not, boolean=True, conditions=(0,))
def logical_not(v):
    return tl.where(v == 0.0, 1.0, 0.0)


@scalar_jit(torch.isnan, name="isnan", boolean=True)
def is_nan(v):
    return tl.where(v != v, 1.0, 0.0)


@scalar_jit(torch.isinf, name="isinf", boolean=True)
def is_infinite(v):
    return tl.where(tl.abs(v) == float("inf"), 1.0, 0.0)


@scalar_jit(torch.isfinite, name="isfinite", boolean=True)
def is_finite(v):
    return tl.where(tl.abs(v) < float("inf"), 1.0, 0.0)


@scalar_jit(_choose, 1, ("first", "second"), ((1.0, 0.0), (-0.5, math.inf)), conditions=(0,))
def choose(condition, first, second):
    return tl.where(condition != 0.0, first, second)


@scalar_jit(
    _pair(_where_first), 2, ("second",), ((0.0,), (-math.inf,)), name="where_else", conditions=(1,)
)
def choose_first(first, condition, second):
    return tl.where(condition != 0.0, first, second)


@scalar_jit(
    _pair(_where_second), 2, ("first",), ((0.0,), (-math.inf,)), name="masked_fill", conditions=(1,)
)
def choose_second(second, condition, first):
    return tl.where(condition != 0.0, first, second)


scalar_jit(_where, 3, name="where", conditions=(0,))(choose)
SCALARS = tuple(_SCALARS)

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
