"""topk: the k largest (or smallest) elements along a dimension in order, and where they stand.

    y[..., j, ...] = x[..., i_j, ...],   x[i_0] >= x[i_1] >= ...

of equal elements the first comes first, NaN counts as larger than every number, as in torch. With
k = 1 it is max, argmax and their counterparts, with k the whole length a stable sort.

x: any rank and layout, length L along the dimension -> y: as x, with length k, and i likewise in
int64. A program holds some rows. Element and place become one 64-bit number, of which the largest
is found and struck out k times; for k = 1 long rows are read in blocks. k steps over L elements
each: k is at most MOST_SELECTED, and L for k > 1 at most LONGEST.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.aten import Arguments, Builder
from ..contract.op import (
    Attributes,
    Config,
    Launch,
    Op,
    Problem,
    Ref,
    Target,
    X,
    Y,
    counted,
    power_of_two,
)
from ..contract.spec import TensorSpec
from ..movement.pointwise import Pointwise
from ..movement.rearrangement import Reshape
from .along import launch_along, length_of, rows_of_program, tile_along, tiles_along

MOST_SELECTED = 64
LONGEST = 4096
MOST_PLACES = 2**24
"""Whole numbers up to which fp32, through which elements are moved, is exact."""
BLOCK = 1024


@dataclass(frozen=True)
class TopK(Attributes):
    """Along which dimension, how many, and whether the largest ones."""

    dim: int = 0
    k: int = 1
    largest: bool = True


def infer(attributes: TopK, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """x's spec with k elements along the dimension; the same in int64."""
    (x,) = inputs
    dim, k = attributes.dim, attributes.k
    if not 0 <= dim < x.rank or not 1 <= k <= x.shape[dim]:
        raise InvalidInputError(f"topk: {x} has no {k} elements along dimension {dim}")
    if x.batch is not None and dim == 0:
        raise InvalidInputError(f"topk: the batch dimension of {x} cannot be searched")
    if k > MOST_SELECTED:
        raise InvalidInputError(
            f"topk: {k} elements of {x} along dimension {dim}; at most {MOST_SELECTED} are found, "
            "one after the other"
        )
    longest = LONGEST if k > 1 else MOST_PLACES
    if x.shape[dim] > longest:
        raise InvalidInputError(
            f"topk: {x} has {x.shape[dim]} elements along dimension {dim}; for k = {k} at most "
            f"{longest}"
        )
    values = x.with_(shape=(*x.shape[:dim], k, *x.shape[dim + 1 :]))
    return values, values.with_(dtype=torch.int64)


def reference(attributes: TopK, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, places = x.sort(dim=attributes.dim, descending=attributes.largest, stable=True)
    first = attributes.dim, 0, attributes.k
    return values.narrow(*first), places.narrow(*first)


@triton.jit
def ranked(value, place, exists, LARGEST: tl.constexpr):
    """A number that is larger the earlier an element comes: its order in the upper half, its place
    counted from the end in the lower."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # -0 and 0 are equal.
    order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    order = tl.where(value != value, 0x7FFFFFFF, order)
    if not LARGEST:
        order = ~order
    both = (order.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64)
    return tl.where(exists, both, -(2**63))


@triton.jit
def ranked_block(source, places, row_mask, L: tl.constexpr, LARGEST: tl.constexpr, X: tl.constexpr):
    """Elements at some places of every row, ranked."""
    mask = row_mask[:, None] & (places < L)[None, :]
    value = tl.load(source[:, None] + (places * X.step)[None, :], mask=mask, other=0.0)
    return ranked(value.to(tl.float32), places[None, :], mask, LARGEST)


@triton.jit
def store_selected(
    best, j, source, values, places, row_mask,
    X: tl.constexpr, Y: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """The element of that rank as it lies in x, and its place, as the results' element j."""
    place = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    value = tl.load(source + place * X.step, mask=row_mask, other=0.0)
    tl.store(values + j * Y.step, value, mask=row_mask)
    tl.store(places + j * PLACES.step, place, mask=row_mask)


@triton.jit
def topk_kernel(
    x, y, places, extras, m, L: tl.constexpr, K: tl.constexpr, LARGEST: tl.constexpr,
    X: tl.constexpr, Y: tl.constexpr, PLACES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    rows, row_mask = rows_of_program(m, TILE)
    source = x + X.offset + X.row(rows)
    values = y + Y.offset + Y.row(rows)
    places += PLACES.offset + PLACES.row(rows)
    lanes = tl.arange(0, TILE.N)
    if K == 1:
        best = tl.full((M,), -(2**63), tl.int64)
        for start in range(0, L, TILE.N):
            block = ranked_block(source, start + lanes, row_mask, L, LARGEST, X)
            best = tl.maximum(best, tl.max(block, axis=1))
        store_selected(best, 0, source, values, places, row_mask, X, Y, PLACES)
    else:
        left = ranked_block(source, lanes, row_mask, L, LARGEST, X)
        for j in range(K):
            best = tl.max(left, axis=1)
            left = tl.where(left == best[:, None], -(2**63), left)
            store_selected(best, j, source, values, places, row_mask, X, Y, PLACES)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes, (values, places) = problem.attributes.expect(TopK), problem.outputs
    tensors = {"x": (X, problem.inputs[0]), "y": (Y, values), "places": (Ref("output", 1), places)}
    constants = {"K": attributes.k, "LARGEST": attributes.largest}
    return launch_along(problem, tile, topk_kernel, tensors, constants)


def _blocks(problem: Problem) -> tuple[int, ...]:
    """At least a row of elements, but blocks where one of them is taken."""
    if problem.attributes.expect(TopK).k == 1:
        return 256, BLOCK
    return (power_of_two(length_of(problem)),)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    return tiles_along(problem, _blocks(problem))


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    length = length_of(problem)
    if problem.attributes.expect(TopK).k > 1 and tile["BLOCK_COLUMNS"] < length:
        return f"a tile of {tile['BLOCK_COLUMNS']} must hold all {length} elements where k > 1"
    return None


def default(problem: Problem, target: Target) -> Config:
    return tile_along(problem, _blocks(problem)[-1], target)


@counted
def cost(problem: Problem) -> int:
    """A comparison per element and selected one."""
    return problem.inputs[0].spec.numel * problem.attributes.expect(TopK).k


def _selected(g: Builder, x: Any, dim: int, k: int, largest: bool) -> tuple[Any, Any]:
    attributes = TopK(dim % max(1, g.spec(x).rank), int(k), bool(largest))
    values = g.apply("topk", (x,), attributes)
    return values, g.output(values, 1)


def _topk(g: Builder, a: Arguments) -> Any:
    _ = a.sorted  # They come in order, whether asked for or not.
    return _selected(g, a.self, a.dim, a.k, a.largest)


def _sort(g: Builder, a: Arguments) -> tuple[Any, Any]:
    _ = a.get("stable")
    length = g.spec(a.self).shape[a.dim]
    return _selected(g, a.self, a.dim, length, a.descending)


def _argsort(g: Builder, a: Arguments) -> Any:
    return _sort(g, a)[1]


def place_of(g: Builder, x: Any, dim: int | None, keepdim: bool) -> Any:
    """argmax; of all elements where no dimension is given."""
    spec = g.spec(x)
    if dim is None:
        if spec.batch is not None:
            return g.refuse("the place of the largest of all samples; give a dimension")
        x, dim = g.apply("reshape", (x,), Reshape((spec.numel,))), 0
        shape: tuple[int, ...] = (1,) * spec.rank if keepdim else ()
    else:
        dim %= max(1, spec.rank)
        kept = (1,) if keepdim else ()
        shape = (*spec.shape[:dim], *kept, *spec.shape[dim + 1 :])
    _, places = _selected(g, x, dim, 1, largest=True)
    return g.apply("reshape", (places,), Reshape(shape))


def _argmin(g: Builder, a: Arguments) -> Any:
    """Of -x: NaN, the largest in a sort, comes first in a minimum."""
    negated = g.apply("neg", (a.self,), Pointwise())
    return place_of(g, negated, a.dim, a.keepdim)


OP = Op(
    "topk", TopK, infer, reference, launches, cost, configs, default, legal,
    aten={
        "aten.topk.default": _topk,
        "aten.sort.default": _sort,
        "aten.sort.stable": _sort,
        "aten.argsort.default": _argsort,
        "aten.argsort.stable": _argsort,
        "aten.argmax.default": lambda g, a: place_of(g, a.self, a.dim, a.keepdim),
        "aten.argmin.default": _argmin,
    },
    takes_epilogue=False, follows=True, integers=True,
)  # fmt: skip
