"""softmax: y = exp(x − max x) / sum exp(x − max x) along one axis; log_softmax: its logarithm.

x and y: any rank, dense or NHWC; fp32 inside. `statistics.py` has the kernel.

As in torch, NaN or +inf anywhere gives NaN in the whole row, and so does a row of −inf only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...errors import InvalidInputError
from ..contract.op import Arguments, Attributes, Builder, Capture, Op, TensorSpec
from . import statistics


@dataclass(frozen=True)
class Softmax(Attributes):
    """dim: the (non-negative) dimension that is normalised. dtype: the result's, where it is not
    the input's."""

    dim: int = 0
    dtype: torch.dtype | None = None

    groups = 1

    @property
    def dims(self) -> tuple[int, ...]:
        return (self.dim,)


def infer(name: str, attributes: Softmax, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    if not 0 <= attributes.dim < x.rank:
        raise InvalidInputError(f"{name}: {x} has no dimension {attributes.dim}")
    if x.batch is not None and attributes.dim == 0:
        raise InvalidInputError(f"{name}: cannot normalise over the batch dimension of {x}")
    return (x.with_(dtype=attributes.dtype or x.dtype),)


def reference(name: str, attributes: Softmax, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = getattr(torch, name)(x, attributes.dim)
    return result


def _capture(name: str) -> Capture:
    """The capture of `aten.<name>.int` and of `aten._<name>`, whose option is fp32 or nothing."""

    def capture(g: Builder, a: Arguments) -> Any:
        spec = g.spec(a.self)
        dtype = torch.float32 if a.get("half_to_float") else a.get("dtype")
        if dtype not in (None, spec.dtype):
            return g.refuse(f"{name} that changes the dtype from {spec.dtype} to {dtype}")
        if spec.rank == 0:
            return g.refuse(f"{name} of a scalar")
        return g.apply(name, (a.self,), Softmax(a.dim % spec.rank))

    return capture


OPS = tuple(
    Op(
        name, Softmax, partial(infer, name), partial(reference, name),
        partial(statistics.launches, name), statistics.cost, statistics.configs,
        statistics.default, statistics.legal,
        input_range=(-8.0, 8.0),
        aten={f"aten.{name}.int": _capture(name), f"aten._{name}.default": _capture(name)},
        follows=True,
    )
    for name in ("softmax", "log_softmax")
)  # fmt: skip
