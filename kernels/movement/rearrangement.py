"""Rearrangements by parts: dimensions are split, the parts permuted, and merged again.

Reshapes around a permutation are such a rearrangement where the dimensions on both sides of each
have a common refinement. Every part then has one stride on either side, so that the whole is one
copy in any layout, or none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..contract.op import Attributes, Operand, TensorSpec


@dataclass(frozen=True)
class Rearrange(Attributes):
    """split: the parts of x's dimensions; dims: their new order; shape: of the result.

    With a batch, part 0 is dimension 0 and stays first."""

    split: tuple[int, ...] = ()
    dims: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()

    @property
    def parts(self) -> tuple[int, ...]:
        """The sizes of the parts in their new order."""
        return tuple(self.split[dim] for dim in self.dims)


def factors(shape: Sequence[int], parts: Sequence[int]) -> list[list[int]] | None:
    """For each dimension of a shape the indices of the parts it consists of, in order, or None
    where the parts do not split (or merge into) the dimensions of the shape."""
    result: list[list[int]] = []
    at = 0
    for size in shape:
        taken: list[int] = []
        product = 1
        # A dimension of size one takes a part of size one where there is one.
        while product != size or (not taken and at < len(parts) and parts[at] == 1):
            if at == len(parts) or size % (product * max(parts[at], 1)):
                return None
            product *= parts[at]
            taken.append(at)
            at += 1
        result.append(taken)
    if any(size != 1 for size in parts[at:]) or (at < len(parts) and not result):
        return None
    if result:
        result[-1].extend(range(at, len(parts)))
    return result


def refine(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...] | None:
    """The coarsest parts that make up the dimensions of both shapes, or None where there are none.
    Dimensions of size one have no part."""
    if math.prod(a) != math.prod(b) or min((*a, *b), default=1) < 1:
        return None
    steps = {1}
    for shape in (a, b):
        steps |= set(itertools.accumulate(reversed(shape), int.__mul__))
    ordered = sorted(steps)
    if any(large % small for small, large in itertools.pairwise(ordered)):
        return None
    parts = [large // small for small, large in itertools.pairwise(ordered)]
    return tuple(reversed(parts)) if parts else (1,)


def rearrangement(
    shape: tuple[int, ...], middle: tuple[int, ...], dims: tuple[int, ...], result: tuple[int, ...]
) -> Rearrange | None:
    """reshape(permute(reshape(x, middle), dims), result) for x of a shape, or None."""
    first = refine(shape, middle)
    groups = None if first is None else factors(middle, first)
    if first is None or groups is None:
        return None
    order = [part for dim in dims for part in groups[dim]]
    permuted = [first[part] for part in order]
    last = refine(permuted, result)
    pieces = None if last is None else factors(permuted, last)
    if last is None or pieces is None:
        return None
    # Each first part becomes the run of its pieces; pieces are numbered in their new order.
    runs = dict(zip(order, pieces, strict=True))
    numbers = [piece for part in range(len(first)) for piece in runs[part]]
    split = tuple(last[piece] for piece in numbers)
    places = {piece: place for place, piece in enumerate(numbers)}
    return Rearrange(split, tuple(places[piece] for piece in range(len(last))), result)


def permutation(shape: tuple[int, ...], dims: tuple[int, ...]) -> Rearrange:
    """A permutation of the dimensions of a shape, as a rearrangement."""
    return Rearrange(shape, dims, tuple(shape[dim] for dim in dims))


def composed(first: Rearrange, second: Rearrange) -> Rearrange | None:
    """The second rearrangement of the first one's result as one, or None where their parts cut
    across each other."""
    pieces = refine(first.parts, second.split)
    if pieces is None:
        return None
    before, after = factors(first.parts, pieces), factors(second.split, pieces)
    if before is None or after is None:
        return None
    # The first one's part `part` is at `place` of its result.
    places = sorted(range(len(first.dims)), key=first.dims.__getitem__)
    order = [piece for place in places for piece in before[place]]
    dims = [order.index(piece) for part in second.dims for piece in after[part]]
    return Rearrange(tuple(pieces[piece] for piece in order), tuple(dims), second.shape)


def spread(
    strides: Sequence[int], groups: list[list[int]], sizes: Sequence[int]
) -> tuple[int, ...]:
    """The stride of every part, from those of the dimensions they make up."""
    result = [0] * len(sizes)
    for step, taken in zip(strides, groups, strict=True):
        for part in reversed(taken):
            result[part] = step
            step *= sizes[part]
    return tuple(result)


@dataclass(frozen=True)
class Parts:
    """The parts in the output's memory order: their sizes and strides in the input.

    groups, order: for `of_output`, which gives the strides of what is indexed like the output.
    """

    attributes: Rearrange
    sizes: tuple[int, ...]
    read: tuple[int, ...]
    groups: list[list[int]]
    order: tuple[int, ...]

    def of_output(self, strides: Sequence[int]) -> tuple[int, ...]:
        """Strides by dimension of the output as strides by part."""
        spread_out = spread(strides, self.groups, self.attributes.parts)
        return tuple(spread_out[part] for part in self.order)


def parts_of(attributes: Rearrange, x: Operand, out: TensorSpec) -> Parts:
    """How a rearrangement walks; its attributes and specs agree (`infer`)."""
    before, after = factors(x.shape, attributes.split), factors(out.shape, attributes.parts)
    assert before is not None and after is not None
    order = tuple(part for dim in out.layout.order(out.rank) for part in after[dim])
    source = spread(x.strides, before, attributes.split)
    return Parts(
        attributes,
        tuple(attributes.parts[part] for part in order),
        tuple(source[attributes.dims[part]] for part in order),
        after,
        order,
    )


def view_of(attributes: Rearrange, x: Operand, out: TensorSpec) -> Operand | None:
    """The result inside the input's buffer, or None where a copy is needed."""
    parts = parts_of(attributes, x, out)
    for pitch in (Operand.dense(out).pitch, x.pitch):
        place = Operand(out, pitch, x.offset)
        steps = zip(parts.read, parts.of_output(place.strides), parts.sizes, strict=True)
        if all(read == written or size == 1 for read, written, size in steps):
            return place
    return None


@dataclass(frozen=True)
class Reshape(Attributes):
    """The new shape; with a batch, dimension 0 is that of the largest batch."""

    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Flip(Attributes):
    """The dimensions whose order is reversed."""

    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Expand(Attributes):
    """The shape to broadcast to; -1 keeps the input's extent, which may be the batch of a call.

    batch: of a constant, whose rows become those of the batch: dimension 0 is that of the largest,
    a smaller one has the first rows.
    """

    shape: tuple[int, ...] = ()
    batch: int | None = None
