"""Operators element by element, products, and sums over dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .operator import (
    OPERATORS,
    Call,
    Operator,
    Value,
    as_tensor,
    enter_all,
    of_arrays,
    operator,
)  # fmt: skip

UNARY: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "Abs": torch.abs, "Ceil": torch.ceil, "Cos": torch.cos, "Erf": torch.erf, "Exp": torch.exp,
    "Floor": torch.floor, "HardSwish": F.hardswish, "Log": torch.log, "Mish": F.mish,
    "Neg": torch.neg, "Reciprocal": torch.reciprocal, "Relu": F.relu, "Round": torch.round,
    "Sigmoid": torch.sigmoid, "Sign": torch.sign, "Sin": torch.sin, "Softplus": F.softplus,
    "Softsign": F.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "Atan": torch.atan, "Not": torch.logical_not,
}  # fmt: skip
UNARY_OF_ARRAYS: dict[str, Callable[[Any], Any]] = {
    "Abs": abs, "Ceil": math.ceil, "Floor": math.floor, "Neg": lambda a: -a, "Round": round,
    "Sqrt": lambda a: a**0.5, "Not": lambda a: not a,
}  # fmt: skip
BINARY: dict[str, Callable[[Any, Any], Any]] = {
    "Add": lambda a, b: a + b, "Sub": lambda a, b: a - b, "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a / b, "Pow": lambda a, b: a**b, "Equal": lambda a, b: a == b,
    "Less": lambda a, b: a < b, "Greater": lambda a, b: a > b,
    "LessOrEqual": lambda a, b: a <= b, "GreaterOrEqual": lambda a, b: a >= b,
    "And": lambda a, b: a & b, "Or": lambda a, b: a | b, "Xor": lambda a, b: a ^ b,
}  # fmt: skip


def _quotient(a: Any, b: Any) -> Any:
    """Division as C rounds it: of whole numbers towards zero."""
    if isinstance(a, float) or isinstance(b, float):
        return a / b
    return a // b if isinstance(a, torch.SymInt) or a * b >= 0 else -(-a // b)


BINARY_OF_ARRAYS: dict[str, Callable[..., Any]] = {
    **BINARY, "Div": _quotient, "Mod": lambda a, b: a % b, "Min": min, "Max": max,
}  # fmt: skip


def each(function: Callable[..., Any], *arrays: Any) -> Any:
    """The function of the elements of arrays that are broadcast, as Python numbers."""
    objects = (np.asarray(array).astype(object) for array in arrays)
    return np.asarray(np.frompyfunc(function, len(arrays), 1)(*objects), object)


def _enter(name: str, function: Any, of_arrays: Any) -> None:
    OPERATORS[name] = Operator(function, of_arrays, takes_numbers=True)


def _unary(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return lambda call, x: function(x)


def _binary(function: Callable[[Any, Any], Any]) -> Any:
    def apply(call: Call, a: Value, b: Value) -> Any:
        like = a if isinstance(a, torch.Tensor) else b
        assert isinstance(like, torch.Tensor)
        return function(as_tensor(a, like), as_tensor(b, like))

    return apply


def _of_arrays(function: Callable[..., Any]) -> Any:
    return lambda call, *arrays: reduce(lambda a, b: each(function, a, b), arrays)


def _of_array(function: Callable[[Any], Any] | None) -> Any:
    return None if function is None else lambda call, x: each(function, x)


for _name in UNARY:
    _enter(_name, _unary(UNARY[_name]), _of_array(UNARY_OF_ARRAYS.get(_name)))
for _name in BINARY:
    _enter(_name, _binary(BINARY[_name]), _of_arrays(BINARY_OF_ARRAYS[_name]))


def _many(function: Callable[[Any, Any], Any]) -> Any:
    """Of any number of operands, one after the other."""

    def apply(call: Call, *operands: Value) -> Any:
        like = next(x for x in operands if isinstance(x, torch.Tensor))
        return reduce(function, (as_tensor(x, like) for x in operands))

    return apply


def _limit(bound: str) -> Callable[[Any, Any], Any]:
    """The larger ("min") or smaller ("max") of two operands, one of which may be a number."""
    of_two = torch.maximum if bound == "min" else torch.minimum

    def apply(a: Any, b: Any) -> torch.Tensor:
        if not isinstance(a, torch.Tensor):
            a, b = b, a
        return of_two(a, b) if isinstance(b, torch.Tensor) else a.clamp(**{bound: b})

    return apply


_enter("Sum", _many(BINARY["Add"]), _of_arrays(BINARY["Add"]))
_enter("Max", _many(_limit("min")), _of_arrays(max))
_enter("Min", _many(_limit("max")), _of_arrays(min))


@operator("Mean")
def mean(call: Call, *operands: torch.Tensor) -> Any:
    return _many(BINARY["Add"])(call, *operands) / len(operands)


def mod(call: Call, a: torch.Tensor, b: Value) -> torch.Tensor:
    """With the sign of a (fmod) or of b."""
    return (torch.fmod if call.get("fmod", 0) else torch.remainder)(a, as_tensor(b, a))


_enter("Mod", mod, _of_arrays(BINARY_OF_ARRAYS["Mod"]))


enter_all({
    "LeakyRelu": lambda call, x: F.leaky_relu(x, call.get("alpha", 0.01)),
    "Elu": lambda call, x: F.elu(x, call.get("alpha", 1.0)),
    "Celu": lambda call, x: F.celu(x, call.get("alpha", 1.0)),
    "Gelu": lambda call, x: F.gelu(x, approximate=call.get("approximate", "none")),
    "ThresholdedRelu": lambda call, x: F.threshold(x, call.get("alpha", 1.0), 0.0),
    "Dropout": lambda call, x, *_: x,
    "MatMul": lambda call, a, b: torch.matmul(a, b),
    "Einsum": lambda call, *operands: torch.einsum(call.get("equation"), *operands),
    "LpNormalization": lambda call, x: (
        x / torch.linalg.vector_norm(x, call.get("p", 2), call.get("axis", -1), keepdim=True)
    ),
})  # fmt: skip

# Activations with parameters.


@operator("Clip", known=(1, 2))
def clip(call: Call, x: torch.Tensor, low: Value = None, high: Value = None) -> torch.Tensor:
    bounds = [
        call.get(name) if value is None else call.numbers(value, name)[0]
        for name, value in (("min", low), ("max", high))
    ]
    return x if bounds == [None, None] else x.clamp(*bounds)


@operator("PRelu")
def prelu(call: Call, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    channels = x.shape[1] if x.dim() > 1 else 1
    along = [1] * (x.dim() - 2)
    if slope.numel() == 1 or list(slope.shape[-len(along) - 1 :]) == [channels, *along]:
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x >= 0, x, slope * x)


SELU = (1.67326319217681884765625, 1.05070102214813232421875)


@operator("Selu")
def selu(call: Call, x: torch.Tensor) -> Any:
    alpha, gamma = call.get("alpha", SELU[0]), call.get("gamma", SELU[1])
    if (alpha, gamma) == SELU:
        return F.selu(x)
    return gamma * F.elu(x, alpha)


@operator("HardSigmoid")
def hard_sigmoid(call: Call, x: torch.Tensor) -> Any:
    alpha, beta = call.get("alpha", 0.2), call.get("beta", 0.5)
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return (x * alpha + beta).clamp(0, 1)


@operator("Softmax", "LogSoftmax")
def softmax(call: Call, x: torch.Tensor) -> torch.Tensor:
    function = F.softmax if call.op == "Softmax" else F.log_softmax
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    axis = call.get("axis", 1) % x.dim()
    if all(size == 1 for size in x.shape[axis + 1 :]):
        return function(x, axis)
    return function(x.flatten(axis), axis).reshape(x.shape)  # Over all dimensions from the axis on.


# Products.


@operator("Gemm")
def gemm(
    call: Call, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None
) -> torch.Tensor:
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    a = a.t() if call.get("transA", 0) else a
    b = b if call.get("transB", 0) else b.t()
    b = b if alpha == 1 else b * alpha
    if c is not None and beta != 1:
        c = c * beta
    if c is None or c.numel() != b.shape[0] or c.shape[-1] != b.shape[0]:
        y = F.linear(a, b)
        return y if c is None else y + c
    return F.linear(a, b, c.reshape(-1))


# Over dimensions.

REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "ReduceMean": torch.mean, "ReduceSum": torch.sum, "ReduceMax": torch.amax,
    "ReduceMin": torch.amin, "ReduceLogSumExp": torch.logsumexp,
    "ReduceL1": lambda x, axes, keep: torch.linalg.vector_norm(x, 1, axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: (x * x).sum(axes, keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
}  # fmt: skip


def _axes(call: Call, axes: Value, rank: int, empty: tuple[int, ...]) -> tuple[int, ...]:
    found = call.get("axes") if axes is None else call.numbers(axes, "axes")
    return tuple(int(axis) % rank for axis in found) if found else empty


@operator(*REDUCTIONS, known=(1,))
def reduction(call: Call, x: torch.Tensor, axes: Value = None) -> torch.Tensor:
    every = () if call.get("noop_with_empty_axes", 0) else tuple(range(x.dim()))
    found = _axes(call, axes, x.dim(), every)
    return REDUCTIONS[call.op](x, found, bool(call.get("keepdims", 1))) if found else x


@operator("ReduceProd", known=(1,))
def product(call: Call, x: torch.Tensor, axes: Value = None) -> torch.Tensor:
    raise call.fail("products of pixels are not supported")


@of_arrays("ReduceProd")
def _product_of_array(call: Call, x: Any, axes: Value = None) -> Any:
    found = _axes(call, axes, x.ndim, tuple(range(x.ndim)))
    return np.asarray(np.prod(x, found, keepdims=bool(call.get("keepdims", 1))), object)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(call: Call, x: torch.Tensor) -> torch.Tensor:
    axes = tuple(call.get("axes", [0, 2, 3]))
    centred = x - x.mean(axes, keepdim=True)
    return centred / ((centred * centred).mean(axes, keepdim=True).sqrt() + 1e-9)


@operator("ArgMax", "ArgMin")
def arg_extreme(call: Call, x: torch.Tensor) -> torch.Tensor:
    if call.get("select_last_index", 0):
        raise call.fail("select_last_index, where torch takes the first")
    function = torch.argmax if call.op == "ArgMax" else torch.argmin
    return function(x, call.get("axis", 0), bool(call.get("keepdims", 1)))


@operator("CumSum", known=(1,))
def cumulative_sum(call: Call, x: torch.Tensor, axis: Value) -> torch.Tensor:
    if call.get("exclusive", 0) or call.get("reverse", 0):
        raise call.fail("exclusive or reversed sums")
    return x.cumsum(call.numbers(axis, "axis")[0])


@operator("TopK", known=(1,))
def top_k(call: Call, x: torch.Tensor, k: Value = None) -> Any:
    count = call.get("k") if k is None else call.numbers(k, "k")[0]
    return tuple(x.topk(int(count), call.get("axis", -1), bool(call.get("largest", 1))))
