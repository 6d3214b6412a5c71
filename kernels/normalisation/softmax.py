"""softmax: y = exp(x − max x) / sum exp(x − max x) along one axis; log_softmax: its logarithm.

x and y: any rank, dense or NHWC; fp32 inside. `statistics.py` has the kernel.

As in torch, NaN or +inf anywhere gives NaN in the whole row, and so does a row of −inf only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...errors import InvalidInputError
from ..contract.op import Attributes, Builder, Config, Domain, Launch, Op, Problem
from ..contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from ..contract.targets import Target
from . import statistics
from .statistics import WHOLE as WHOLE_ROW


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
    """The input's own spec."""
    (x,) = inputs
    if not 0 <= attributes.dim < x.rank:
        raise InvalidInputError(f"{name}: {x} has no dimension {attributes.dim}")
    if x.batch is not None and attributes.dim == 0:
        raise InvalidInputError(f"{name}: cannot normalise over the batch dimension of {x}")
    return (x.with_(dtype=attributes.dtype or x.dtype),)


def reference(attributes: Softmax, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, attributes.dim)


def reference_log(attributes: Softmax, x: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(x, attributes.dim)


def _launches(kind: str, problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    return statistics.launches(problem, tile, kind)


def _build(draw: Mapping[str, Any]) -> tuple[Softmax, tuple[TensorSpec, ...]] | None:
    shape = tuple(draw["shape"])
    layout = Layout.NHWC if len(shape) in MEMORY_FORMATS and draw["nhwc"] else Layout.DENSE
    return Softmax(draw["dim"] % len(shape)), (TensorSpec(shape, torch.float32, layout),)


def _capture(name: str, half_to_float: bool) -> Any:
    """The capture of `aten.<name>.int(x, dim, dtype?)` or of `aten._<name>(x, dim, to_float)`."""

    def capture(g: Builder, x: Any, dim: int, option: Any = None, *, dtype: Any = None) -> Any:
        spec = g.spec(x)
        wanted = option if dtype is None else dtype
        if half_to_float:
            wanted = torch.float32 if option else None
        if wanted not in (None, spec.dtype):
            return g.refuse(f"{name} that changes the dtype from {spec.dtype} to {wanted}")
        if spec.rank == 0:
            return g.refuse(f"{name} of a scalar")
        return g.apply(name, (x,), Softmax(dim % spec.rank))

    return capture


def _op(name: str, log: bool) -> Op:
    return Op(
        name=name,
        attributes=Softmax,
        infer=partial(infer, name),
        reference=reference_log if log else reference,
        launches=partial(_launches, name),
        configs=statistics.configs,
        default=statistics.default,
        legal=statistics.legal,
        cost=statistics.cost,
        domain=Domain(
            ranges={
                "shape": (
                    (1,), (37,), (4, 21), (1, 1000), (3, 5, 8), (2, 7, 4, 3), (1, 33, 5, 5),
                    (2, 1, 6, 1), (2, 3, 4, 2, 5),
                ),
                "dim": (0, 1, 2, 3, 4),
                "nhwc": (True, True, False),
            },
            build=_build,
            # Longer than one tile of the smallest looping configuration.
            interesting=(
                {"shape": (3, 1500), "dim": 1, "nhwc": False},
                # Read in several pieces, the last one not full.
                {"shape": (2, WHOLE_ROW + 809), "dim": 1, "nhwc": False},
            ),
            range=(-8.0, 8.0),
        ),
        aten={
            f"aten.{name}.int": _capture(name, half_to_float=False),
            f"aten._{name}.default": _capture(name, half_to_float=True),
        },
        follows=True,
    )  # fmt: skip


OPS = (_op("softmax", log=False), _op("log_softmax", log=True))
