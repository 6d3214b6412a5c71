"""What a domain of an op is, and that of every pointwise function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from convloom.kernels.contract.op import Attributes
from convloom.kernels.contract.scalars import Scalar
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.movement.pointwise import Pointwise


@dataclass(frozen=True)
class Domain:
    """Where an op's problems are drawn from, as plain data.

    ranges: a name and the values it may take; `build` turns one draw into attributes and input
    specs, or returns None where the draw is impossible. `interesting` lists draws that are always
    tried: past failures and the shapes guards are checked on.
    """

    ranges: Mapping[str, Sequence[Any]]
    build: Callable[[Mapping[str, Any]], tuple[Attributes, tuple[TensorSpec, ...]] | None]
    interesting: tuple[Mapping[str, Any], ...] = ()


def _with_booleans(
    scalar: Scalar, draw: Mapping[str, Any], attributes: Pointwise, specs: tuple[TensorSpec, ...]
) -> tuple[Pointwise, tuple[TensorSpec, ...]]:
    """What conditions are is mostly booleans; of logic it may be numbers."""
    if scalar.boolean and not draw["booleans"]:
        return attributes, specs
    last = scalar.operands - 1
    conditions = {last - at if attributes.reverse else at for at in scalar.conditions}
    kinds = (torch.bool if at in conditions else spec.dtype for at, spec in enumerate(specs))
    return attributes, tuple(s.with_(dtype=kind) for s, kind in zip(specs, kinds, strict=True))


def domain_of(scalar: Scalar) -> Domain:
    """Shapes of one to four dimensions, every kind of second operand, the examples' parameters."""

    def build(draw: Mapping[str, Any]) -> tuple[Pointwise, tuple[TensorSpec, ...]] | None:
        shape = tuple(draw["shape"])
        layout = Layout.NHWC if len(shape) == 4 else Layout.DENSE
        spec = TensorSpec(shape, torch.float32, layout)
        parameters = draw["parameters"]
        if scalar.operands == 1:
            return _with_booleans(scalar, draw, Pointwise(parameters), (spec,))
        kind = draw["operand"]
        if kind == "literal" and scalar.operands == 2:
            return _with_booleans(
                scalar, draw, Pointwise(parameters, 1.5, draw["reverse"]), (spec,)
            )
        if kind == "channel":
            other = TensorSpec((shape[1], *(1 for _ in shape[2:])), torch.float32)
        elif kind == "sample":
            smaller = (*shape[:2], *(1 for _ in shape[2:]))
            other = TensorSpec(smaller, torch.float32, layout)
        else:
            other = spec
        if scalar.operands == 3:
            return _with_booleans(scalar, draw, Pointwise(parameters), (other, spec, other))
        attributes = Pointwise(parameters, None, draw["reverse"])
        return _with_booleans(scalar, draw, attributes, (spec, other))

    return Domain(
        ranges={
            "shape": ((1, 1), (3, 10), (2, 5, 7), (1, 3, 9, 8), (2, 16, 5, 1), (2, 33, 3, 4)),
            "operand": ("full", "channel", "sample", "literal"),
            "reverse": (False, True),
            "parameters": scalar.examples,
            "booleans": (True, False),
        },
        build=build,
    )
