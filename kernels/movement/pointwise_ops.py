"""How pointwise functions are captured, and their ops: one of each scalar function."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from ..contract import epilogue as ep
from ..contract.op import Builder, Capture, Op
from ..contract.scalars import SCALARS
from .pointwise import Pointwise, configs, cost, default, infer, launches, reference
from .rearrangement import Expand, Reshape


def _unary(name: str, parameters: tuple[float, ...] = ()) -> Capture:
    def capture(g: Builder, x: Any) -> Any:
        return g.apply(name, (x,), Pointwise(parameters))

    return capture


def _identity(g: Builder, x: Any, **_: Any) -> Any:
    """Of indices, which no kernel reads, the indices themselves."""
    return g.apply("identity", (x,), Pointwise()) if g.spec(x).dtype.is_floating_point else x


def _is_value(value: Any) -> bool:
    return not isinstance(value, (int, float, bool)) and value is not None


def _binary(name: str) -> Capture:
    def capture(g: Builder, a: Any, b: Any, alpha: float = 1.0) -> Any:
        if alpha != 1 and _is_value(b):
            b = g.apply("mul", (b,), Pointwise(literal=float(alpha)))
        elif alpha != 1:
            b = b * alpha
        if not _is_value(b):
            return g.apply(name, (a,), Pointwise(literal=float(b)))
        if not _is_value(a):
            return g.apply(name, (b,), Pointwise(literal=float(a), reverse=True))
        return g.apply(name, (a, b), Pointwise())

    return capture


def _reversed_sub(g: Builder, a: Any, b: Any, alpha: float = 1.0) -> Any:
    if alpha != 1:
        a = g.apply("mul", (a,), Pointwise(literal=float(alpha)))
    if _is_value(b):
        return g.apply("sub", (b, a), Pointwise())
    return g.apply("sub", (a,), Pointwise(literal=float(b), reverse=True))


def _div(g: Builder, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return g.refuse(f"division with rounding_mode={rounding_mode!r}; only true division is")
    return _binary("div")(g, a, b)


def _addcmul(op: str) -> Capture:
    """x + value * (a op b), rounded once: the product of halves may overflow where the sum does
    not."""

    def capture(g: Builder, x: Any, a: Any, b: Any, *, value: float = 1.0) -> Any:
        factors, batch = [a, b], g.spec(x).batch
        shapes = [g.spec(factor).shape for factor in factors]
        shape = tuple(torch.broadcast_shapes(*shapes, g.spec(x).shape))
        if torch.broadcast_shapes(*shapes) != shape:
            # Stages do not enlarge a tensor, and a batch cannot be expanded to.
            wide = [at for at, factor in enumerate(factors) if g.spec(factor).batch == batch]
            if not wide:
                product = g.apply(op, factors, Pointwise())
                return _binary("add")(g, x, product, alpha=value)
            factors[wide[0]] = _expand(g, factors[wide[0]], shape)
        scale = (ep.Stage("mul", literal=float(value)),) if value != 1 else ()
        return g.apply(op, (*factors, x), Pointwise(), (*scale, ep.Stage("add")))

    return capture


def _pow(g: Builder, a: Any, b: Any) -> Any:
    shortcuts = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", 1.0: "identity"}
    if not _is_value(b) and float(b) in shortcuts:
        return g.apply(shortcuts[float(b)], (a,), Pointwise())
    return _binary("pow")(g, a, b)


def _clamp(g: Builder, x: Any, low: Any = None, high: Any = None) -> Any:
    if _is_value(low):
        x, low = g.apply("maximum", (x, low), Pointwise()), None
    if _is_value(high):
        x, high = g.apply("minimum", (x, high), Pointwise()), None
    if low is None and high is None:
        return x
    infinity = float("inf")
    bounds = (-infinity if low is None else float(low), infinity if high is None else float(high))
    return g.apply("clamp", (x,), Pointwise(bounds))


def _hardtanh(g: Builder, x: Any, low: float = -1.0, high: float = 1.0) -> Any:
    return g.apply("clamp", (x,), Pointwise((float(low), float(high))))


def _leaky_relu(g: Builder, x: Any, slope: float = 0.01) -> Any:
    return g.apply("leaky_relu", (x,), Pointwise((float(slope),)))


def _prelu(g: Builder, x: Any, slope: Any) -> Any:
    spec = g.spec(x)
    if g.spec(slope).numel > 1 and spec.rank > 2:
        shape = (g.spec(slope).numel, *(1 for _ in range(spec.rank - 2)))
        slope = g.apply("reshape", (slope,), Reshape(shape))
    return g.apply("prelu", (x, slope), Pointwise())


def _expand(g: Builder, x: Any, shape: tuple[int, ...]) -> Any:
    old = g.spec(x).shape
    missing = len(shape) - len(old)
    new = (-1 if at >= missing and old[at - missing] == size else size
           for at, size in enumerate(shape))  # fmt: skip
    return g.apply("expand", (x,), Expand(tuple(new)))


def _elu(
    g: Builder, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Any:
    return g.apply("elu", (x,), Pointwise((float(alpha), float(scale), float(input_scale))))


def _celu(g: Builder, x: Any, alpha: float = 1.0) -> Any:
    return g.apply("celu", (x,), Pointwise((float(alpha),)))


def _gelu(g: Builder, x: Any, approximate: str = "none") -> Any:
    return g.apply("gelu" if approximate == "none" else "gelu_tanh", (x,), Pointwise())


def _softplus(g: Builder, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return g.apply("softplus", (x,), Pointwise((float(beta), float(threshold))))


def _threshold(g: Builder, x: Any, limit: float, value: float) -> Any:
    return g.apply("threshold", (x,), Pointwise((float(limit), float(value))))


def _nan_to_num(
    g: Builder, x: Any, nan: float | None = None, above: float | None = None,
    below: float | None = None,
) -> Any:  # fmt: skip
    """Infinities become the largest numbers of the dtype, where no others are given."""
    largest = torch.finfo(g.spec(x).dtype).max
    parameters = (
        0.0 if nan is None else float(nan),
        largest if above is None else float(above),
        -largest if below is None else float(below),
    )
    return g.apply("nan_to_num", (x,), Pointwise(parameters))


def _lerp(g: Builder, start: Any, end: Any, weight: Any) -> Any:
    """start + weight * (end - start), rounded once."""
    if not _is_value(weight):
        return g.apply("lerp", (start, end), Pointwise((float(weight),)))
    stages = (ep.Stage("mul"), ep.Stage("add"))
    return g.apply("sub", (end, start, weight, start), Pointwise(), stages)


def _round(g: Builder, x: Any, *, decimals: int) -> Any:
    """Rounded to so many decimal places, of which there may be less than none."""
    if decimals == 0:
        return g.apply("round", (x,), Pointwise())
    scale, undo = ("mul", "div") if decimals > 0 else ("div", "mul")
    power = 10.0 ** abs(decimals)
    stages = (ep.Stage("round"), ep.Stage(undo, literal=power))
    return g.apply(scale, (x,), Pointwise(literal=power), stages)


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)
UNARY_NAMES = (
    "relu", "sigmoid", "tanh", "silu", "hardsigmoid", "hardswish", "mish", "sqrt", "rsqrt", "exp",
    "log", "abs", "neg", "sign", "log_sigmoid", "log1p", "expm1", "sin", "cos", "atan", "erf",
    "floor", "ceil", "round", "trunc",
)  # fmt: skip
ALIASES = {
    "special_log1p": "log1p", "special_expm1": "expm1", "special_erf": "erf", "arctan": "atan",
    "fix": "trunc", "special_round": "round",
}  # fmt: skip
BINARY_NAMES = (
    "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "mul.Tensor", "mul.Scalar",
    "maximum.default", "minimum.default", "atan2.default", "fmod.Tensor", "fmod.Scalar",
    "remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor",
)  # fmt: skip


def _captures() -> dict[str, dict[str, Capture]]:
    """aten overloads by the scalar they become."""
    table: dict[str, dict[str, Capture]] = {scalar.name: {} for scalar in SCALARS}
    for name in UNARY_NAMES:
        table[name][f"aten.{name}.default"] = _unary(name)
    for alias, name in ALIASES.items():
        table[name][f"aten.{alias}.default"] = _unary(name)
    for overload in BINARY_NAMES:
        name = overload.partition(".")[0]
        table[name][f"aten.{overload}"] = _binary(name)
    table["atan2"]["aten.arctan2.default"] = _binary("atan2")
    table["maximum"]["aten.max.other"] = _binary("maximum")
    table["minimum"]["aten.min.other"] = _binary("minimum")
    table["sub"]["aten.rsub.Scalar"] = _reversed_sub
    table["sub"]["aten.rsub.Tensor"] = _reversed_sub
    for overload in ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode"):
        table["div"][f"aten.div.{overload}"] = _div
    table["div"]["aten.reciprocal.default"] = lambda g, x: _binary("div")(g, 1.0, x)
    for overload in ("Tensor_Scalar", "Tensor_Tensor", "Scalar"):
        table["pow"][f"aten.pow.{overload}"] = _pow
    table["add"]["aten.addcmul.default"] = _addcmul("mul")
    table["add"]["aten.addcdiv.default"] = _addcmul("div")
    table["square"]["aten.square.default"] = _unary("square")
    for name in ("clamp.default", "clamp.Tensor"):
        table["clamp"][f"aten.{name}"] = _clamp
    table["clamp"]["aten.clamp_min.default"] = _clamp
    table["clamp"]["aten.clamp_max.default"] = lambda g, x, high: _clamp(g, x, None, high)
    table["clamp"]["aten.hardtanh.default"] = _hardtanh
    table["clamp"]["aten.relu6.default"] = _unary("clamp", (0.0, 6.0))
    table["leaky_relu"]["aten.leaky_relu.default"] = _leaky_relu
    table["prelu"]["aten.prelu.default"] = _prelu
    table["elu"]["aten.elu.default"] = _elu
    table["elu"]["aten.selu.default"] = _unary("elu", SELU)
    table["celu"]["aten.celu.default"] = _celu
    table["gelu"]["aten.gelu.default"] = _gelu
    table["softplus"]["aten.softplus.default"] = _softplus
    table["threshold"]["aten.threshold.default"] = _threshold
    table["nan_to_num"]["aten.nan_to_num.default"] = _nan_to_num
    table["lerp"]["aten.lerp.Scalar"] = _lerp
    table["lerp"]["aten.lerp.Tensor"] = _lerp
    table["round"]["aten.round.decimals"] = _round
    for name in ("clone", "detach", "alias", "contiguous", "lift_fresh_copy"):
        table["identity"][f"aten.{name}.default"] = _identity
    return table


def _make_ops() -> tuple[Op, ...]:
    captures = _captures()
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
            aten=captures[scalar.name],
            follows=True,
        )
        for scalar in SCALARS
    )


OPS = _make_ops()
