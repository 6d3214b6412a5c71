"""How pointwise functions are captured, and their ops: one of each scalar function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..contract import epilogue as ep
from ..contract.op import Arguments, Builder, Capture, Op
from ..contract.scalars import SCALARS
from .pointwise import Pointwise, configs, cost, default, infer, launches, reference
from .rearrangement import Expand, Reshape


def _unary(name: str, *parameters: float | str) -> Capture:
    """The capture of a function of one tensor; parameters: numbers, or arguments that are."""

    def capture(g: Builder, a: Arguments) -> Any:
        given = (a[one] if isinstance(one, str) else one for one in parameters)
        return g.apply(name, (a.self,), Pointwise(tuple(map(float, given))))

    return capture


def _identity(g: Builder, a: Arguments) -> Any:
    """Of indices, which no kernel reads, the indices themselves."""
    x = a.self
    return g.apply("identity", (x,), Pointwise()) if g.spec(x).dtype.is_floating_point else x


def _is_value(value: Any) -> bool:
    return not isinstance(value, (int, float, bool)) and value is not None


def _combined(g: Builder, name: str, a: Any, b: Any) -> Any:
    """A function of two values, of which one may be a number."""
    if not _is_value(b):
        return g.apply(name, (a,), Pointwise(literal=float(b)))
    if not _is_value(a):
        return g.apply(name, (b,), Pointwise(literal=float(a), reverse=True))
    return g.apply(name, (a, b), Pointwise())


def _scaled(g: Builder, x: Any, factor: float) -> Any:
    if factor == 1:
        return x
    return _combined(g, "mul", x, factor) if _is_value(x) else x * factor


def _binary(name: str) -> Capture:
    return lambda g, a: _combined(g, name, a.self, _scaled(g, a.other, a.get("alpha", 1)))


def _reversed_sub(g: Builder, a: Arguments) -> Any:
    return _combined(g, "sub", a.other, _scaled(g, a.self, a.alpha))


def _div(g: Builder, a: Arguments) -> Any:
    if (mode := a.get("rounding_mode")) is not None:
        return g.refuse(f"division with rounding_mode={mode!r}; only true division is")
    return _combined(g, "div", a.self, a.other)


def _addcmul(op: str) -> Capture:
    """x + value * (a op b), rounded once: the product of halves may overflow where the sum does
    not."""

    def capture(g: Builder, a: Arguments) -> Any:
        x, value, factors = a.self, a.value, [a.tensor1, a.tensor2]
        batch = g.spec(x).batch
        shapes = [g.spec(factor).shape for factor in factors]
        shape = tuple(torch.broadcast_shapes(*shapes, g.spec(x).shape))
        if torch.broadcast_shapes(*shapes) != shape:
            # Stages do not enlarge a tensor, and a batch cannot be expanded to.
            wide = [at for at, factor in enumerate(factors) if g.spec(factor).batch == batch]
            if not wide:
                product = g.apply(op, factors, Pointwise())
                return _combined(g, "add", x, _scaled(g, product, value))
            factors[wide[0]] = _expand(g, factors[wide[0]], shape)
        scale = (ep.Stage("mul", literal=float(value)),) if value != 1 else ()
        return g.apply(op, (*factors, x), Pointwise(), (*scale, ep.Stage("add")))

    return capture


def _pow(g: Builder, a: Arguments) -> Any:
    shortcuts = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", 1.0: "identity"}
    if not _is_value(a.exponent) and float(a.exponent) in shortcuts:
        return g.apply(shortcuts[float(a.exponent)], (a.self,), Pointwise())
    return _combined(g, "pow", a.self, a.exponent)


def _clamp(g: Builder, a: Arguments) -> Any:
    x, low, high = a.self, a.get("min"), a.get("max")
    if _is_value(low):
        x, low = g.apply("maximum", (x, low), Pointwise()), None
    if _is_value(high):
        x, high = g.apply("minimum", (x, high), Pointwise()), None
    if low is None and high is None:
        return x
    infinity = float("inf")
    bounds = (-infinity if low is None else float(low), infinity if high is None else float(high))
    return g.apply("clamp", (x,), Pointwise(bounds))


def _prelu(g: Builder, a: Arguments) -> Any:
    spec, slope = g.spec(a.self), a.weight
    if g.spec(slope).numel > 1 and spec.rank > 2:
        shape = (g.spec(slope).numel, *(1 for _ in range(spec.rank - 2)))
        slope = g.apply("reshape", (slope,), Reshape(shape))
    return g.apply("prelu", (a.self, slope), Pointwise())


def _expand(g: Builder, x: Any, shape: tuple[int, ...]) -> Any:
    old = g.spec(x).shape
    missing = len(shape) - len(old)
    new = (-1 if at >= missing and old[at - missing] == size else size
           for at, size in enumerate(shape))  # fmt: skip
    return g.apply("expand", (x,), Expand(tuple(new)))


def _gelu(g: Builder, a: Arguments) -> Any:
    name = "gelu" if a.approximate == "none" else "gelu_tanh"
    return g.apply(name, (a.self,), Pointwise())


def _nan_to_num(g: Builder, a: Arguments) -> Any:
    """Infinities become the largest numbers of the dtype, where no others are given."""
    largest = torch.finfo(g.spec(a.self).dtype).max
    parameters = (
        0.0 if a.nan is None else float(a.nan),
        largest if a.posinf is None else float(a.posinf),
        -largest if a.neginf is None else float(a.neginf),
    )
    return g.apply("nan_to_num", (a.self,), Pointwise(parameters))


def _lerp(g: Builder, a: Arguments) -> Any:
    """start + weight * (end - start), rounded once."""
    start, end, weight = a.self, a.end, a.weight
    if not _is_value(weight):
        return g.apply("lerp", (start, end), Pointwise((float(weight),)))
    stages = (ep.Stage("mul"), ep.Stage("add"))
    return g.apply("sub", (end, start, weight, start), Pointwise(), stages)


def _round(g: Builder, a: Arguments) -> Any:
    """Rounded to so many decimal places, of which there may be less than none."""
    if a.decimals == 0:
        return g.apply("round", (a.self,), Pointwise())
    scale, undo = ("mul", "div") if a.decimals > 0 else ("div", "mul")
    power = 10.0 ** abs(a.decimals)
    stages = (ep.Stage("round"), ep.Stage(undo, literal=power))
    return g.apply(scale, (a.self,), Pointwise(literal=power), stages)


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)
UNARY_NAMES = (
    "relu", "sigmoid", "tanh", "silu", "hardsigmoid", "hardswish", "mish", "sqrt", "rsqrt", "exp",
    "log", "abs", "neg", "sign", "log_sigmoid", "log1p", "expm1", "sin", "cos", "atan", "erf",
    "floor", "ceil", "round", "trunc",
)  # fmt: skip
ALIASES = {
    "special_log1p": "log1p", "special_expm1": "expm1", "special_erf": "erf", "arctan": "atan",
    "fix": "trunc",
}  # fmt: skip
BINARY_NAMES = (
    "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "mul.Tensor", "mul.Scalar",
    "maximum.default", "minimum.default", "atan2.default", "fmod.Tensor", "fmod.Scalar",
    "remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor",
)  # fmt: skip


PARAMETERS = {
    "leaky_relu": ("negative_slope",), "elu": ("alpha", "scale", "input_scale"),
    "celu": ("alpha",), "softplus": ("beta", "threshold"), "threshold": ("threshold", "value"),
}  # fmt: skip
"""Functions whose parameters are arguments, and which."""
SPECIAL: dict[str, dict[str, Capture]] = {
    "atan2": {"arctan2.default": _binary("atan2")},
    "maximum": {"max.other": _binary("maximum")},
    "minimum": {"min.other": _binary("minimum")},
    "sub": {"rsub.Scalar": _reversed_sub, "rsub.Tensor": _reversed_sub},
    "div": {
        **{f"div.{kind}": _div for kind in ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode")},
        "reciprocal.default": lambda g, a: _combined(g, "div", 1.0, a.self),
    },
    "pow": {f"pow.{kind}": _pow for kind in ("Tensor_Scalar", "Tensor_Tensor", "Scalar")},
    "add": {"addcmul.default": _addcmul("mul"), "addcdiv.default": _addcmul("div")},
    "square": {"square.default": _unary("square")},
    "clamp": {
        **{
            name: _clamp
            for name in ("clamp.default", "clamp.Tensor", "clamp_min.default", "clamp_max.default")
        },
        "hardtanh.default": _unary("clamp", "min_val", "max_val"),
        "relu6.default": _unary("clamp", 0.0, 6.0),
    },
    "prelu": {"prelu.default": _prelu},
    "elu": {"selu.default": _unary("elu", *SELU)},
    "gelu": {"gelu.default": _gelu},
    "nan_to_num": {"nan_to_num.default": _nan_to_num},
    "lerp": {"lerp.Scalar": _lerp, "lerp.Tensor": _lerp},
    "round": {"round.decimals": _round, "special_round.default": _round},
    "identity": {
        f"{name}.default": _identity
        for name in ("clone", "detach", "alias", "contiguous", "lift_fresh_copy")
    },
}
"""Overloads that the other tables do not tell of, by the scalar they become."""


def _captures(scalar: str) -> dict[str, Capture]:
    """The aten overloads that become a scalar."""
    table = dict(SPECIAL.get(scalar, {}))
    if scalar in UNARY_NAMES or scalar in PARAMETERS:
        table[f"{scalar}.default"] = _unary(scalar, *PARAMETERS.get(scalar, ()))
    for alias in (alias for alias, name in ALIASES.items() if name == scalar):
        table[f"{alias}.default"] = _unary(scalar)
    for overload in (name for name in BINARY_NAMES if name.partition(".")[0] == scalar):
        table[overload] = _binary(scalar)
    return {f"aten.{overload}": capture for overload, capture in table.items()}


def _make_ops() -> tuple[Op, ...]:
    return tuple(
        Op(
            name=scalar.name,
            attributes=Pointwise,
            infer=partial(infer, scalar.name),
            reference=partial(reference, scalar.name),
            launches=partial(launches, scalar.name),
            configs=configs,
            default=default,
            cost=cost,
            input_range=scalar.range,
            aten=_captures(scalar.name),
            follows=True,
        )
        for scalar in SCALARS
    )


OPS = _make_ops()
