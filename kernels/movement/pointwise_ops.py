"""How pointwise functions are captured, and their ops: one of each scalar function."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ..contract import epilogue as ep
from ..contract.op import Arguments, Builder, Capture, Op
from ..contract.scalars import SCALARS, Scalar
from .movement import Relayout
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


def _is_boolean(g: Builder, value: Any) -> bool:
    return _is_value(value) and g.spec(value).dtype is torch.bool


OF_BOOLEANS = {
    "add": "logical_or", "maximum": "logical_or", "mul": "logical_and", "minimum": "logical_and",
}  # fmt: skip
"""Sums, products, the larger and the smaller of two booleans, which are booleans too."""


def _combined(g: Builder, name: str, a: Any, b: Any) -> Any:
    """A function of two values, of which one may be a number."""
    computed = any(_is_value(value) and g.is_computed(value) for value in (a, b))
    if computed and (name in COMPARISONS or name in QUOTIENTS):
        a, b = (_whole_as_float(g, value) for value in (a, b))
    if _is_boolean(g, a) and _is_boolean(g, b):
        name = OF_BOOLEANS.get(name, name)
    if not _is_value(b):
        return g.apply(name, (a,), Pointwise(literal=float(b)))
    if not _is_value(a):
        return g.apply(name, (b,), Pointwise(literal=float(a), reverse=True))
    return g.apply(name, (a, b), Pointwise())


def _is_whole(g: Builder, value: Any) -> bool:
    return _is_value(value) and g.spec(value).dtype in (torch.int32, torch.int64)


def _whole_as_float(g: Builder, x: Any) -> Any:
    """Whole numbers, which are compared and divided as floats: those that are computed are below
    2^24."""
    return _as_dtype(g, x, torch.float32) if _is_whole(g, x) else x


def _as_dtype(g: Builder, x: Any, dtype: torch.dtype) -> Any:
    return g.apply("relayout", (x,), Relayout(g.spec(x).layout, dtype))


def _quotient(name: str) -> Capture:
    """A function whose result is whole, and exact, for whole numbers: their dtype stays."""

    def capture(g: Builder, a: Arguments) -> Any:
        x, other = a.self, a.other
        kinds = [g.spec(value).dtype for value in (x, other) if _is_whole(g, value)]
        whole = kinds and all(_is_whole(g, v) or isinstance(v, int) for v in (x, other))
        result = _combined(g, name, x, other)
        return _as_dtype(g, result, max(kinds, key=lambda kind: kind.itemsize)) if whole else result

    return capture


def _scaled(g: Builder, x: Any, factor: float) -> Any:
    if factor == 1:
        return x
    return _combined(g, "mul", x, factor) if _is_value(x) else x * factor


def _binary(name: str) -> Capture:
    return lambda g, a: _combined(g, name, a.self, _scaled(g, a.other, a.get("alpha", 1)))


def _reversed_sub(g: Builder, a: Arguments) -> Any:
    return _combined(g, "sub", a.other, _scaled(g, a.self, a.alpha))


def _div(g: Builder, a: Arguments) -> Any:
    mode = a.get("rounding_mode")
    if mode is not None:
        return _quotient(f"{mode}_divide")(g, a)
    return _combined(g, "div", *(_whole_as_float(g, value) for value in (a.self, a.other)))


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
    if g.is_computed(a.self) and _is_whole(g, a.self):
        # How many, or which: clamped they are whole numbers below 2^24 still.
        clamped = _clamp(g, a.replaced(self=_whole_as_float(g, a.self)))
        return _as_dtype(g, clamped, g.spec(a.self).dtype)
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


def _round(g: Builder, a: Arguments) -> Any:
    """Rounded to so many decimal places, of which there may be less than none."""
    if a.decimals == 0:
        return g.apply("round", (a.self,), Pointwise())
    scale, undo = ("mul", "div") if a.decimals > 0 else ("div", "mul")
    power = 10.0 ** abs(a.decimals)
    stages = (ep.Stage("round"), ep.Stage(undo, literal=power))
    return g.apply(scale, (a.self,), Pointwise(literal=power), stages)


def _compared(name: str) -> Capture:
    """A comparison; the number of one with a tensor of halves is rounded as those are."""

    def capture(g: Builder, a: Arguments) -> Any:
        x, other = a.self, a.other
        if not _is_value(other) and not _is_boolean(g, x):
            other = torch.tensor(other, dtype=g.spec(x).dtype).item()
        return _combined(g, name, x, other)

    return capture


def _infinite(literal: float) -> Capture:
    return lambda g, a: g.apply("eq", (a.self,), Pointwise(literal=literal))


def _number(g: Builder, value: Any) -> Any:
    """The number that a constant without dimensions is; any other value as it is."""
    known = g.constant(value) if _is_value(value) else None
    return value if known is None or known.dim() else known.item()


def _chosen(g: Builder, condition: Any, first: Any, second: Any) -> Any:
    """condition ? first : second."""
    pair = (first, second)
    kinds = [g.spec(value).dtype for value in pair if _is_whole(g, value)]
    if kinds:
        whole = all(_is_whole(g, value) or isinstance(value, int) for value in pair)
        chosen = _chosen(g, condition, *(_whole_as_float(g, value) for value in pair))
        return _as_dtype(g, chosen, max(kinds, key=lambda kind: kind.itemsize)) if whole else chosen
    if any(_is_boolean(g, value) for value in pair):
        if not all(_is_boolean(g, value) for value in pair):
            return g.refuse("a choice between booleans and numbers; convert them with .float()")
        inside = g.apply("logical_and", (condition, first), Pointwise())
        inverse = g.apply("logical_not", (condition,), Pointwise())
        outside = g.apply("logical_and", (inverse, second), Pointwise())
        return g.apply("logical_or", (inside, outside), Pointwise())
    if all(map(_is_value, pair)):
        # With a constant on either side the other one says the dtype.
        first, second = (_number(g, value) if g.spec(other).rank else value
                         for value, other in (pair, pair[::-1]))  # fmt: skip
    if not _is_value(first) and not _is_value(second):
        chosen = g.apply("choose", (condition,), Pointwise((float(first), float(second))))
        whole = isinstance(first, int) and isinstance(second, int)
        return _as_dtype(g, chosen, torch.int64) if whole else chosen
    if not _is_value(second):
        return g.apply("where_else", (first, condition), Pointwise((float(second),)))
    if not _is_value(first):
        return g.apply("masked_fill", (second, condition), Pointwise((float(first),)))
    return g.apply("where", (condition, first, second), Pointwise())


def _index_put(g: Builder, a: Arguments) -> Any:
    """x[mask] = number, with a mask of all dimensions of x or of the first ones."""
    x, value = a.self, _number(g, a["values"])
    mask, *others = a.indices
    numbers = g.spec(value).numel if _is_value(value) else 1
    if others or not _is_boolean(g, mask) or numbers != 1 or a.accumulate:
        return g.refuse("only a number is written, by a mask; write others with torch.where")
    missing = g.spec(x).rank - g.spec(mask).rank
    mask = g.apply("reshape", (mask,), Reshape((*g.spec(mask).shape, *(1 for _ in range(missing)))))
    return _chosen(g, mask, value, x)


HUGE = float(torch.finfo(torch.float32).max)


def _fake_quantise(g: Builder, a: Arguments) -> Any:
    """(clamp(round(x / scale) + zero, min, max) − zero) · scale, by the reciprocal in fp32 as torch
    has it; the smallest whole number for NaN."""
    x, known = a.self, []
    for value in (a.scale, a.zero_point):
        tensor = g.constant(value) if _is_value(value) else torch.tensor(value)
        if tensor is None:
            return g.refuse("a scale or zero point that is computed; make it a buffer")
        known.append(tensor.detach().float().flatten())
    scale, zero = known
    inverse, low, high = 1.0 / scale, a.quant_min - zero, a.quant_max - zero
    stages: ep.Epilogue = (ep.Stage("round"), ep.Stage("nan_to_num", (-HUGE, HUGE, -HUGE)))
    if scale.numel() == zero.numel() == 1:
        bounds = (low.item(), high.item())
        stages = (*stages, ep.Stage("clamp", bounds), ep.Stage("mul", literal=scale.item()))
        return g.apply("mul", (x,), Pointwise(literal=inverse.item()), stages)
    behind = (1,) * (g.spec(x).rank - 1 - a.axis % g.spec(x).rank)
    inverse, low, high, scale = (
        g.add_constant(each.reshape(-1, *behind), torch.float32)
        for each in (inverse, low, high, scale)
    )
    stages = (*stages, ep.Stage("maximum"), ep.Stage("minimum"), ep.Stage("mul"))
    return g.apply("mul", (x, inverse, low, high, scale), Pointwise(), stages)


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)
ALIASES = {
    "special_log1p": "log1p", "special_expm1": "expm1", "special_erf": "erf", "arctan": "atan",
    "fix": "trunc", "bitwise_not": "logical_not",
}  # fmt: skip
BINARY_NAMES = (
    "add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "mul.Tensor", "mul.Scalar",
    "maximum.default", "minimum.default", "atan2.default", "fmod.Tensor", "fmod.Scalar",
    "remainder.Tensor", "remainder.Scalar", "remainder.Scalar_Tensor", "floor_divide.default",
    "floor_divide.Scalar",
)  # fmt: skip

QUOTIENTS = ("floor_divide", "trunc_divide", "fmod", "remainder")
"""Functions of whole numbers too, which are exact in fp32."""
COMPARISONS = {
    "eq": "eq", "ne": "not_equal", "lt": "less", "le": "less_equal", "gt": "greater",
    "ge": "greater_equal",
}  # fmt: skip
"""By scalar, the other name that torch has for it."""


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
    "mul": {
        f"fake_quantize_per_{name}": _fake_quantise
        for name in (
            "tensor_affine.default", "tensor_affine.tensor_qparams", "channel_affine.default"
        )
    },
    "pow": {f"pow.{kind}": _pow for kind in ("Tensor_Scalar", "Tensor_Tensor", "Scalar")},
    "add": {"addcmul.default": _addcmul("mul"), "addcdiv.default": _addcmul("div")},
    "clamp": {
        **dict.fromkeys(
            ("clamp.default", "clamp.Tensor", "clamp_min.default", "clamp_max.default"), _clamp
        ),
        "hardtanh.default": _unary("clamp", "min_val", "max_val"),
        "relu6.default": _unary("clamp", 0.0, 6.0),
    },
    "prelu": {"prelu.default": _prelu},
    "elu": {"selu.default": _unary("elu", *SELU)},
    "gelu": {"gelu.default": _gelu},
    "nan_to_num": {"nan_to_num.default": _nan_to_num},
    **{
        f"logical_{name}": {
            f"{spelt}.{kind}": _binary(f"logical_{name}")
            for spelt in (f"logical_{name}", f"bitwise_{name}", f"__{name}__")
            for kind in (("default",) if spelt.startswith("logical") else ("Tensor", "Scalar"))
        }
        for name in ("and", "or", "xor")
    },
    "eq": {"isposinf.default": _infinite(math.inf), "isneginf.default": _infinite(-math.inf)},
    "where": {
        **{
            f"where.{kind}": lambda g, a: _chosen(g, a.condition, a.self, a.other)
            for kind in ("self", "ScalarOther", "ScalarSelf", "Scalar")
        },
        "index_put.default": _index_put,
    },
    "masked_fill": {
        f"masked_fill.{kind}": lambda g, a: _chosen(g, a.mask, _number(g, a.value), a.self)
        for kind in ("Tensor", "Scalar")
    },
    "round": {"round.decimals": _round, "special_round.default": _round},
    "identity": {
        f"{name}.default": _identity
        for name in ("clone", "detach", "alias", "contiguous", "lift_fresh_copy")
    },
}
"""Overloads that the other tables do not tell of, by the scalar they become."""


def _takes_one_tensor(name: str) -> bool:
    """Whether torch has a call of that name that takes a tensor and nothing else."""
    overload = getattr(getattr(torch.ops.aten, name, None), "default", None)
    return overload is not None and len(overload._schema.arguments) == 1


UNARY_NAMES = frozenset(s.name for s in SCALARS if s.operands == 1 and _takes_one_tensor(s.name))
"""Of our functions; those of extensions say which calls they are."""


def _captures(scalar: str) -> dict[str, Capture]:
    """The aten overloads that become a scalar."""
    table = dict(SPECIAL.get(scalar, {}))
    if scalar in UNARY_NAMES or scalar in PARAMETERS:
        table[f"{scalar}.default"] = _unary(scalar, *PARAMETERS.get(scalar, ()))
    for alias in (alias for alias, name in ALIASES.items() if name == scalar):
        table[f"{alias}.default"] = _unary(scalar)
    for overload in (name for name in BINARY_NAMES if name.partition(".")[0] == scalar):
        table[overload] = (_quotient if scalar in QUOTIENTS else _binary)(scalar)
    for name in {scalar, COMPARISONS[scalar]} if scalar in COMPARISONS else ():
        table |= {f"{name}.{kind}": _compared(scalar) for kind in ("Tensor", "Scalar")}
    return {f"aten.{overload}": capture for overload, capture in table.items()}


def _as_declared(scalar: Scalar) -> Capture:
    """Of calls whose arguments are those of the function, of which one may be a number."""

    def capture(g: Builder, a: Arguments) -> Any:
        names = [argument.name for argument in a.schema.arguments]
        own, rest = names[: scalar.operands], names[scalar.operands :]
        values, parameters = [a[name] for name in own], tuple(float(a[name]) for name in rest)
        tensors = [value for value in values if _is_value(value)]
        if len(tensors) == len(values):
            return g.apply(scalar.name, tensors, Pointwise(parameters))
        if len(values) != 2 or not tensors:
            return g.refuse(f"{scalar.name} of numbers")
        first, second = values
        number, reverse = (second, False) if _is_value(first) else (first, True)
        return g.apply(scalar.name, tensors, Pointwise(parameters, float(number), reverse))

    return capture


def op_of(scalar: Scalar) -> Op:
    """The op that applies a function to whole tensors."""
    return Op(
        scalar.name, Pointwise, partial(infer, scalar.name), partial(reference, scalar.name),
        partial(launches, scalar.name), cost, configs, default,
        input_range=scalar.range,
        aten=_captures(scalar.name) | dict.fromkeys(scalar.aten, _as_declared(scalar)),
        integers=scalar.boolean, follows=True,
    )  # fmt: skip


OPS = tuple(map(op_of, SCALARS))
