"""cumsum and cumprod: every element and all before it along a dimension, added up or multiplied.

    y[..., j, ...] = x[..., 0, ...] + ... + x[..., j, ...]

x: any rank and layout -> y likewise. Sums are kept in fp32. A program scans some rows, long ones
block by block (Blelloch, 1990, "Prefix sums and their applications"); each element is read and
written once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.aten import Arguments, Builder, Capture
from ..contract.op import Attributes, Config, Launch, Op, Problem, Target, TensorSpec, X, Y, counted
from .along import launch_along, rows_of_program, tile_along, tiles_along

BLOCK = 1024


@dataclass(frozen=True)
class Scan(Attributes):
    """Along which dimension."""

    dim: int = 0


def infer(name: str, attributes: Scan, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    if not 0 <= attributes.dim < x.rank:
        raise InvalidInputError(f"{name}: {x} has no dimension {attributes.dim}")
    if x.batch is not None and attributes.dim == 0:
        raise InvalidInputError(f"{name}: the batch dimension of {x} cannot be scanned")
    return (x,)


def reference(name: str, attributes: Scan, x: torch.Tensor) -> torch.Tensor:
    wide = x if x.dtype is torch.float64 else x.float()
    scanned: torch.Tensor = getattr(wide, name)(attributes.dim)
    return scanned.to(x.dtype)


@triton.jit
def _sum(a, b):
    return a + b


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def scan_kernel(
    x, y, extras, m, L: tl.constexpr, MULTIPLY: tl.constexpr, X: tl.constexpr, Y: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    rows, row_mask = rows_of_program(m, TILE)
    source = (x + X.offset + X.row(rows))[:, None]
    target = (y + Y.offset + Y.row(rows))[:, None]
    NEUTRAL: tl.constexpr = 1.0 if MULTIPLY else 0.0
    before = tl.full((M,), NEUTRAL, tl.float32)
    for start in range(0, L, TILE.N):
        places = start + tl.arange(0, TILE.N)
        mask = row_mask[:, None] & (places < L)[None, :]
        value = tl.load(source + (places * X.step)[None, :], mask=mask, other=NEUTRAL)
        value = value.to(tl.float32)
        if MULTIPLY:
            result = tl.associative_scan(value, 1, _product) * before[:, None]
            before = before * tl.reduce(value, 1, _product)
        else:
            result = tl.associative_scan(value, 1, _sum) + before[:, None]
            before = before + tl.sum(value, axis=1)
        tl.store(target + (places * Y.step)[None, :], result.to(y.dtype.element_ty), mask=mask)


def launches(multiply: bool, problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    tensors = {"x": (X, problem.inputs[0]), "y": (Y, problem.output)}
    return launch_along(problem, tile, scan_kernel, tensors, {"MULTIPLY": multiply})


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Long rows in blocks of up to 64, 256 or 1024."""
    return tiles_along(problem, (64, 256, BLOCK))


def default(problem: Problem, target: Target) -> Config:
    return tile_along(problem, BLOCK, target)


@counted
def cost(problem: Problem) -> int:
    """Two operations per element: those of a scan that goes up and down a tree."""
    return 2 * problem.output.spec.numel


def _capture(name: str) -> Capture:
    def capture(g: Builder, a: Arguments) -> Any:
        spec = g.spec(a.self)
        if a.dtype not in (None, spec.dtype):
            return g.refuse(f"{name} that changes the dtype from {spec.dtype} to {a.dtype}")
        if spec.rank == 0:
            _ = a.dim
            return a.self
        return g.apply(name, (a.self,), Scan(a.dim % spec.rank))

    return capture


OPS = tuple(
    Op(
        name, Scan, partial(infer, name), partial(reference, name),
        partial(launches, name == "cumprod"), cost, configs, default,
        aten={f"aten.{name}.default": _capture(name)}, takes_epilogue=False, follows=True,
    )
    for name in ("cumsum", "cumprod")
)  # fmt: skip
