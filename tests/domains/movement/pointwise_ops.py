"""Problems of `kernels/movement/pointwise_ops.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.scalars import SCALARS, Scalar
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.movement.pointwise import Pointwise

from ..domain import Domain


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


def _domain(scalar: Scalar) -> Domain:
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


DOMAINS = {scalar.name: _domain(scalar) for scalar in SCALARS}
