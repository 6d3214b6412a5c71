"""Elements at computed places along one dimension: y[..., j, ...] = x[..., i[..., j, ...], ...].

x and i have one rank, i is int32 or int64, and of the other dimensions each may repeat the other's:
rows of a table are x (T, C), i (M, 1) -> y (M, C). Where i names no element there is zero (torch
raises an error on a CPU and stops on a GPU). Elements are copied, bit by bit; each is read once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.aten import Arguments, Builder
from ..contract.op import Attributes, Config, Cost, Launch, Op, Operand, Problem, Target
from ..contract.spec import TensorSpec
from ..tile.finish import put
from ..tile.geometry import Walked, tile_launch
from ..tile.space import output_tile
from .movement_ops import cut, join
from .rearrangement import Flip, Reshape


@dataclass(frozen=True)
class Gather(Attributes):
    """dim: along which places are counted; from_end: -1 is the last one."""

    dim: int = 0
    from_end: bool = False


def infer(attributes: Gather, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """As torch.take_along_dim."""
    x, index = inputs
    dim = attributes.dim
    sizes = enumerate(zip(x.shape, index.shape, strict=False))
    pairs = [pair for at, pair in sizes if at != dim]
    if x.rank != index.rank or not 0 <= dim < x.rank or not x.shape[dim]:
        raise InvalidInputError(f"gather: no elements of {x} along dimension {dim} for {index}")
    if index.dtype not in (torch.int32, torch.int64):
        raise InvalidInputError(f"gather: expected whole numbers as indices, got {index}")
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        raise InvalidInputError(f"gather: {x} and {index} differ outside dimension {dim}")
    batch = index.batch or x.batch
    samples = (index,) if dim == 0 else inputs
    apart = all(spec.batch == batch or spec.shape[0] == 1 for spec in samples)
    if not apart or (dim == 0 and x.batch is not None):
        raise InvalidInputError(f"gather: {x} and {index} differ in their batch, or it is searched")
    if batch is not None and x.rank == 1:
        raise InvalidInputError(f"gather: {index} is along the batch alone; give it a dimension")
    shape = [max(a, b) for a, b in zip(x.shape, index.shape, strict=True)]
    shape[dim] = index.shape[dim]
    return (TensorSpec(tuple(shape), x.dtype, x.layout, batch),)


def reference(attributes: Gather, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    length, place = x.shape[attributes.dim], index.long()
    if attributes.from_end:
        place = torch.where(place < 0, place + length, place)
    taken = torch.take_along_dim(x, place.clamp(0, length - 1), attributes.dim)
    return taken.masked_fill((place < 0) | (place >= length), 0)


@triton.jit
def gather_kernel(
    x, index, y, extras, m, LENGTH: tl.constexpr, STEP: tl.constexpr, FROM_END: tl.constexpr,
    X: tl.constexpr, INDEX: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    mask = row_mask[:, None] & column_mask[None, :]
    named = index + INDEX.offset + INDEX.row(rows)
    if INDEX.step == 0:
        place = tl.load(named, mask=row_mask, other=0)[:, None]
    else:
        address = named[:, None] + (columns * INDEX.step)[None, :]
        place = tl.load(address, mask=mask, other=0)
    if FROM_END:
        place = tl.where(place < 0, place + LENGTH, place)
    inside = (place >= 0) & (place < LENGTH)
    place = tl.where(inside, place, 0).to(columns.dtype)
    offset = X.row(rows)[:, None] + (columns * X.step)[None, :] + place * STEP
    value = tl.load(x + X.offset + offset, mask=mask & inside, other=0.0)
    put(value.to(tl.float32), y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def _walked(operand: Operand, out: TensorSpec, dim: int | None = None) -> Walked:
    """A tensor, of which the result's elements along `dim` do not tell the place."""
    walked = enumerate(zip(operand.shape, operand.strides, strict=True))
    kept = [0 if at == dim or size == 1 else stride for at, (size, stride) in walked]
    *rows, column = [kept[at] for at in out.layout.order(out.rank)]
    return Walked.of(operand, ep.memory_sizes(out)[:-1], tuple(rows), column)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes, (x, index) = problem.attributes.expect(Gather), problem.inputs
    dim, out = attributes.dim, problem.output.spec
    constexprs = {
        "LENGTH": x.shape[dim], "STEP": x.strides[dim], "FROM_END": attributes.from_end,
        "X": _walked(x, out, dim), "INDEX": _walked(index, out),
    }  # fmt: skip
    return (tile_launch(problem, tile, gather_kernel, constexprs=constexprs),)


def cost(problem: Problem) -> Cost:
    """The indices, and the elements that they name, once each."""
    (x, index), out = problem.inputs, problem.output.spec
    read = out.numel * x.spec.dtype.itemsize + index.spec.size_bytes
    return Cost(0, read + sum(each.spec.size_bytes for each in problem.operands), out.size_bytes)


def prepare(attributes: Gather, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Places that there are, all over the dimension."""
    x, index = tensors
    count = torch.arange(index.numel(), device=index.device).view(index.shape)
    return x, ((index + 7 * count) % x.shape[attributes.dim]).to(index.dtype)


MOST_RUNS = 16
"""Pieces that a tensor indexed by constants is put together from at most."""


def _runs(indices: list[int]) -> list[tuple[int, int, int]]:
    """Indices as (first, step, count) of arithmetic progressions."""
    runs: list[tuple[int, int, int]] = []
    for index in indices:
        if runs:
            first, step, count = runs[-1]
            gap = index - (first + (count - 1) * step)
            if gap and (count == 1 or gap == step):
                runs[-1] = (first, gap, count + 1)
                continue
        runs.append((index, 1, 1))
    return runs


def _pieces(g: Builder, x: Any, dim: int, runs: list[tuple[int, int, int]]) -> Any:
    """Indices known at compile time, as slices and flipped slices joined together."""
    pieces = []
    for first, step, count in runs:
        last = first + (count - 1) * step
        piece = cut(g, x, dim, min(first, last), max(first, last) + 1, abs(step))
        if step < 0:
            piece = g.apply("flip", (piece,), Flip((dim % g.spec(x).rank,)))
        pieces.append(piece)
    return join(g, pieces, dim)


def _select(g: Builder, x: Any, dim: int, index: Any, from_end: bool = False) -> Any:
    """All elements that indices of any shape name along a dimension, in the place of it."""
    shape, named, known = g.spec(x).shape, g.spec(index), g.constant(index)
    dim %= max(1, len(shape))
    if known is not None:
        size = shape[dim]
        if not known.numel() or not -size <= int(known.min()) <= int(known.max()) < size:
            return g.refuse(f"no indices, or indices outside dimension {dim} of {g.spec(x)}")
        runs = _runs([int(value) % size for value in known.flatten()])
        if known.dim() == 1 and len(runs) <= MOST_RUNS:
            return _pieces(g, x, dim, runs)
    if len(shape) == 1:
        x = g.apply("reshape", (x,), Reshape((*shape, 1)))
    flat = [named.numel if at == dim else 1 for at in range(max(2, len(shape)))]
    index = g.apply("reshape", (index,), Reshape(tuple(flat)))
    y = g.apply("gather", (x, index), Gather(dim, from_end))
    return g.apply("reshape", (y,), Reshape((*shape[:dim], *named.shape, *shape[dim + 1 :])))


def _index(g: Builder, a: Arguments) -> Any:
    given = [dim for dim, index in enumerate(a.indices) if index is not None]
    if len(given) != 1:
        return g.refuse(f"indexing of {len(given)} dimensions at once; expected one")
    return _select(g, a.self, given[0], a.indices[given[0]], from_end=True)


def _embedding(g: Builder, a: Arguments) -> Any:
    _ = a.padding_idx, a.scale_grad_by_freq, a.sparse  # They say what gradients are.
    return _select(g, a.weight, 0, a.indices)


def _gather(g: Builder, a: Arguments) -> Any:
    """torch.gather; an index that is the same along a dimension is read once there."""
    x, index, _ = a.self, a.index, a.sparse_grad
    sizes = g.spec(index).shape
    if len(sizes) < 2:
        return _select(g, x, 0, index)
    dim = a.dim % len(sizes)
    for at, size in enumerate(sizes):
        if at != dim and size != g.spec(x).shape[at]:
            x = cut(g, x, at, 0, size)
    made = g.maker(index)
    if made is not None and made[0] == "expand" and g.spec(made[2][0]).rank == len(sizes):
        source = g.spec(made[2][0])
        if source.batch == g.spec(index).batch and source.shape[dim] == sizes[dim]:
            (index,) = made[2]
    return g.apply("gather", (x, index), Gather(dim))


OP = Op(
    "gather", Gather, infer, reference, launches, cost, prepare=prepare,
    aten={
        "aten.gather.default": _gather,
        "aten.index_select.default": lambda g, a: _select(g, a.self, a.dim, a.index),
        "aten.index.Tensor": _index,
        "aten.embedding.default": _embedding,
    },
    factors=(0, 1), integers=True, follows=True, writes_any=True,
)  # fmt: skip
