"""linear: y[..., k] = sum_c x[..., c] w[k, c], a matrix product over the last dimension.

x: (..., C) dense; w: (K, C), a constant; y: (..., K). fp32 accumulation. The bias is an epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract.epilogue import Stage
from ..contract.op import Arguments, Attributes, Builder, Config, Launch, Op, Problem, counted
from ..contract.spec import TensorSpec
from ..contract.targets import Target
from ..movement.movement import Permute
from ..tile import gemm
from . import product
from .bmm import multiplied, scaled


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


def _apply(g: Builder, x: Any, w: Any, b: Any, alpha: float = 1.0) -> Any:
    """alpha · x wᵀ + b; a weight that is computed is a factor of a product of activations."""
    stages = (Stage("mul", literal=float(alpha)),) if alpha != 1 else ()
    stages, operands = (stages, ()) if b is None else ((*stages, Stage("add")), (b,))
    if g.is_computed(w):
        return multiplied(g, x, _transposed(g, w), stages, *operands)
    return g.apply("linear", (x, w, *operands), epilogue=stages)


def _capture_addmm(g: Builder, a: Arguments) -> Any:
    """beta · self + alpha · mat1 mat2."""
    return _apply(g, a.mat1, _transposed(g, a.mat2), scaled(g, a.self, a.beta), a.alpha)


def _transposed(g: Builder, wt: Any) -> Any:
    return g.apply("permute", (wt,), Permute((1, 0)))


OP = Op(
    "linear", Linear, infer, reference, launches,
    counted(lambda problem: gemm.problem_size(problem).flops),
    product.configs, product.default, product.legal, product.crowded,
    aten={
        "aten.linear.default": lambda g, a: _apply(g, a.input, a.weight, a.bias),
        "aten.addmm.default": _capture_addmm,
    },
    packs=lambda attributes: {1: lambda _, w: w.contiguous()}, takes_prologue=True, images=False,
)  # fmt: skip
