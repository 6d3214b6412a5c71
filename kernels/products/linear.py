"""linear: y[..., k] = sum_c x[..., c] w[k, c], a matrix product over the last dimension.

x: (..., C) dense; w: (K, C), a constant; y: (..., K). fp32 accumulation. The bias is an epilogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract.epilogue import Stage
from ..contract.op import Attributes, Builder, Config, Domain, Launch, Op, Problem, counted
from ..contract.spec import TensorSpec
from ..contract.targets import Target
from . import gemm, product


@dataclass(frozen=True)
class Linear(Attributes):
    """linear has no attributes."""


def infer(attributes: Linear, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(..., C) and (K, C) give (..., K)."""
    x, w = inputs
    if w.rank != 2 or x.rank < 1 or x.shape[-1] != w.shape[1]:
        raise InvalidInputError(f"linear: expected x (..., C) and weight (K, C), got {x} and {w}")
    return (TensorSpec((*x.shape[:-1], w.shape[0]), x.dtype, batch=x.batch),)


def reference(attributes: Linear, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.linear(x, w)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    return (product.launch(problem, tile, target),)


@counted
def cost(problem: Problem) -> int:
    size = gemm.problem_size(problem)
    return 2 * size.rows * size.columns * size.depth


def _build(draw: Mapping[str, Any]) -> tuple[Linear, tuple[TensorSpec, ...]] | None:
    x = TensorSpec((*draw["leading"], draw["C"]), torch.float32)
    return Linear(), (x, TensorSpec((draw["K"], draw["C"]), torch.float32))


def _capture(g: Builder, x: Any, w: Any, b: Any = None) -> Any:
    if b is None:
        return g.apply("linear", (x, w))
    return g.apply("linear", (x, w, b), epilogue=(Stage("add"),))


def _capture_addmm(g: Builder, b: Any, x: Any, wt: Any, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        return g.refuse(f"addmm with beta={beta}, alpha={alpha}; only 1 and 1 are")
    return _capture(g, x, _transposed(g, wt), b)


def _transposed(g: Builder, wt: Any) -> Any:
    from ..movement.movement import Permute

    return g.apply("permute", (wt,), Permute((1, 0)))


OP = Op(
    name="linear",
    attributes=Linear,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=product.configs,
    default=product.default,
    legal=product.legal,
    cost=cost,
    domain=Domain(
        ranges={
            "leading": ((1,), (5,), (2, 3), (33,)),
            "C": (1, 8, 20, 64, 130),
            "K": (1, 10, 16, 72),
        },
        build=_build,
    ),
    aten={"aten.linear.default": _capture, "aten.addmm.default": _capture_addmm},
    packs=lambda attributes: {1: lambda _, w: w.contiguous()},
    takes_prologue=True,
    images=False,
)
