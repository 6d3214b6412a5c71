"""Calls between which the batch has left dimension 0: attention as it is usually written.

`qkv.permute(2, 0, 3, 1, 4)` of a vision transformer and `nn.MultiheadAttention`, which computes on
(length, batch, features), bring the batch back before the heads are done. So do Siamese networks,
which join batches and part them again: `torch.cat((a, b))` is two rows in front of the batch in one
dimension, and layers that compute each sample alone do not notice. Such a tensor is kept as
a graph value with the batch in front, and what torch takes its shape to be: permutations then move
the other parts only, reshapes nothing at all. Elements before the batch, in torch's order, are
counted, so that a dimension of length · batch is told from one of batch · length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...kernels import registry
from ...kernels.contract.op import Arguments, Builder, Capture
from ...kernels.movement import pointwise_ops
from ...kernels.movement.movement import Concat, Permute, Slice
from ...kernels.movement.rearrangement import Expand, Reshape
from ..graph.ir import Value
from ..graph.torch_call import BatchNumber

VIEWS = frozenset((
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
    "aten.flatten.using_ints", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default",
))  # fmt: skip
ALONG = frozenset((
    "aten.select.int", "aten.slice.Tensor", "aten.unbind.int", "aten.split.Tensor",
    "aten.split_with_sizes.default", "aten.chunk.default", "aten.softmax.int",
    "aten.log_softmax.int",
))  # fmt: skip
"""Calls along one dimension, `dim`."""
LAST: dict[str, Callable[[Arguments], int]] = {
    "aten.linear.default": lambda a: 1,
    "aten.layer_norm.default": lambda a: len(a.normalized_shape),
}
"""Calls that compute along the last dimensions, and how many."""
REDUCING = ("aten.mean.dim", "aten.sum.dim_IntList", "aten.amax.default", "aten.amin.default")
"""Calls along some dimensions, `dim`."""
BY_SAMPLE = frozenset(
    target
    for target, op in registry.CAPTURES.items()
    if op.batched or op.name == "batch_norm" or target in (
        "aten.group_norm.default", "aten.instance_norm.default"
    )
)  # fmt: skip
"""Calls that compute each sample alone, whatever dimension 0 consists of."""
JOINS = ("aten.cat.default", "aten.stack.default")
FILLS = {"aten.zeros.default": 0.0, "aten.ones.default": 1.0, "aten.full.default": None}
"""Calls that make tensors of one number; None: of `fill_value`."""
SLICE = "aten.slice.Tensor"
CONVOLUTIONS = tuple(
    f"aten.{name}"
    for name in ("conv1d.default", "conv2d.default", "conv_transpose1d.default",
                 "conv_transpose2d.input")
)  # fmt: skip
"""Convolutions, which filters of their own for each sample make of one image with the channels of
all."""
NUMBERS = {SLICE: ("start", "end"), **{target: ("groups",) for target in CONVOLUTIONS}}
"""The arguments that may be multiples of the batch."""
POINTWISE = frozenset(target for op in pointwise_ops.OPS for target in op.aten)


@dataclass(frozen=True)
class Moved:
    """A tensor whose batch is not in front.

    value: the graph's, (batch, parts in front of it, parts behind it) in any split of the parts.
    shape: torch's, at the largest batch; at: the dimension that the batch is in, perhaps with
    others; before: elements in front of the batch, its dimension's own included; batch: the
    largest.
    """

    value: Value
    shape: tuple[int, ...]
    at: int
    before: int
    batch: int

    @property
    def where(self) -> str:
        """Where the batch is, in words."""
        if self.at == 0:
            return f"is there several times, one after the other, in {self.shape}; part it again"
        return f"is in dimension {self.at} of {self.shape}"

    @property
    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """What each dimension consists of, without the batch."""
        front = self.before // math.prod(self.shape[: self.at])
        behind = self.shape[self.at] // (front * self.batch)
        split = [(size,) for size in self.shape]
        return (*split[: self.at], (front, behind), *split[self.at + 1 :])


@dataclass(frozen=True)
class Place:
    """A result's shape at the largest batch, and the dimension that the batch is in."""

    shape: tuple[int, ...]
    at: int


def concerns(g: Builder, target: str, a: Arguments, places: Sequence[Place | None]) -> bool:
    """Whether a call reads or makes a tensor whose batch is not in front."""
    made = any(place is not None and place.at != 0 for place in places)
    joins = places[0] is not None and _joins_samples(g, target, a, len(places[0].shape))
    return made or joins or any(isinstance(leaf, Moved) for leaf in pytree.tree_leaves(a.given))


def _joins_samples(g: Builder, target: str, a: Arguments, rank: int) -> bool:
    """Whether dimension 0 of the result is several batches, one after the other; not where a
    constant is repeated for each sample."""
    if target == "aten.repeat.default":
        times, *others = a.repeats
        several = len(a.repeats) == rank and times != 1 and set(others) <= {1}
        return several and _moved(g, a.self) is not None
    return target == "aten.cat.default" and a.dim % rank == 0 and len(a.tensors) > 1


def call(
    g: Builder,
    target: str,
    function: Capture | None,
    a: Arguments,
    places: Sequence[Place | None],
    batch: int,
) -> Any:
    """What an ATen call makes of tensors some of which are `Moved`: one value or several.

    function: the call's capture function; places: of its results. Refuses what it does not know.
    """
    place = places[0]
    if place is not None and target in FILLS:
        return _filled(g, target, a, place, batch)
    if place is not None and target in JOINS:
        return _joined(g, target, a, place)
    if place is not None and _joins_samples(g, target, a, len(place.shape)):
        return _chained(g, [_moved(g, a.self)] * a.repeats[0], 0, place)
    moved = (leaf for leaf in pytree.tree_leaves(a.given) if isinstance(leaf, Moved))
    x = next(moved, None) if target in POINTWISE else _moved(g, a.first)
    if x is None or place is None or function is None:
        return g.refuse("it joins samples of the batch, or its batch is not in dimension 0")
    if target in VIEWS:
        front, rest = divmod(x.before, math.prod(place.shape[: place.at]))
        if rest or place.shape[place.at] % (front * x.batch):
            return g.refuse(f"{x.shape} -> {place.shape} splits the batch")
        return _settled(g, x.value, place.shape, place.at, front)
    if target in ("aten.permute.default", "aten.transpose.int"):
        return _permuted(g, x, _dims(a, len(x.shape)))
    if target == SLICE and a.dim % len(x.shape) == x.at:
        return _sliced(g, x, a, place)
    result = _computed(g, target, function, x, a)
    if isinstance(result, (list, tuple)):
        return [
            one if one is None else _like(g, x, one, at)
            for one, at in zip(result, places, strict=True)
        ]
    return _like(g, x, result, place)


def _computed(g: Builder, target: str, function: Capture, x: Moved, a: Arguments) -> Any:
    """What a call makes of the graph's value of its first argument, or of any, if pointwise."""
    if x.at == 0 and target in BY_SAMPLE:
        rows = _reshaped(g, x.value, x.shape)
        return function(g, a.mapped(lambda _, value: rows if value is a.first else value))
    if target in ALONG:
        value = _apart(g, x)
        dim = _place_along(g, x, a.dim % len(x.shape), g.spec(value).rank)
        return function(g, a.replaced(self=value, dim=dim))
    if target in OTHERS:
        return OTHERS[target](g, function, x, a)
    if target in LAST:
        count = LAST[target](a)
        if x.at >= len(x.shape) - count:
            return g.refuse(f"the batch is among the last {count} dimensions of {x.shape}")
        return function(g, a.replaced(input=_apart(g, x)))
    if target in POINTWISE:
        return function(g, a.mapped(lambda _, value: _alike(g, x, value)))
    return g.refuse("its batch is not in dimension 0")


def _filled(g: Builder, target: str, a: Arguments, place: Place, batch: int) -> Value | Moved:
    """One number everywhere: the state that a recurrent layer begins with."""
    number: Any = a.fill_value if FILLS[target] is None else FILLS[target]
    dtype = a.get("dtype") or torch.get_default_dtype()
    if not dtype.is_floating_point:
        g.refuse(f"dtype {dtype} is not supported here; expected floats")
    beside = place.shape[place.at] // batch
    shape = (batch, *place.shape[: place.at], beside, *place.shape[place.at + 1 :])
    one = g.add_constant(torch.tensor(float(number)), dtype)
    value = g.apply("expand", (one,), Expand(shape, batch))
    return _settled(g, value, place.shape, place.at, 1)


def _joined(g: Builder, target: str, a: Arguments, place: Place) -> Value | Moved:
    """Tensors one after the other, or side by side in a new dimension."""
    dim, parts = a.dim, [_moved(g, x) for x in a.tensors]
    if target == "aten.stack.default":
        dim %= len(place.shape)
        parts = [
            x and replace(x, shape=(*x.shape[:dim], 1, *x.shape[dim:]), at=x.at + (dim <= x.at))
            for x in parts
        ]  # fmt: skip
    x = parts[0]
    # Of those along the batch the numbers in front may differ.
    along = x is not None and dim % len(x.shape) == x.at
    if x is None or any(
        y is None or y.at != x.at or y.sizes[y.at][along:] != x.sizes[x.at][along:]
        for y in parts
    ):
        g.refuse("it joins tensors whose batch is in different places")
    if dim % len(x.shape) == x.at:
        return _chained(g, parts, x.at, place)
    values = [_apart(g, y) for y in parts if y is not None]
    at = _place_along(g, x, dim % len(x.shape), g.spec(values[0]).rank)
    return _like(g, x, g.apply("concat", values, Concat(at)), place)


def _in_front(x: Moved) -> tuple[int, ...]:
    """The shape of the graph's value with a dimension for what is in front of the batch in its own
    dimension, and one for what is behind it."""
    return (x.batch, *x.shape[: x.at], *x.sizes[x.at], *x.shape[x.at + 1 :])


def _chained(g: Builder, parts: Sequence[Moved | None], at: int, place: Place) -> Value | Moved:
    """Tensors one after the other in the dimension of the batch."""
    values = [_reshaped(g, y.value, _in_front(y)) for y in parts if y is not None]
    value = g.apply("concat", values, Concat(1 + at))
    return _settled(g, value, place.shape, at, g.spec(value).shape[1 + at])


def _sliced(g: Builder, x: Moved, a: Arguments, place: Place) -> Value | Moved:
    """Whole batches of those that are one after the other: x[:n], x[n:]."""
    front, behind = x.sizes[x.at]

    def position(number: Any, default: int) -> int:
        if isinstance(number, BatchNumber):
            count = number.expression / (number.symbol * behind)
            if count.is_Integer and a.step == 1:
                return int(count)
        elif number is None or number == 0 or number >= x.shape[x.at]:
            return 0 if number == 0 else default
        return g.refuse(f"it takes some samples of {front} batches that are joined")

    first, last, _ = slice(position(a.start, 0), position(a.end, front)).indices(front)
    apart = _reshaped(g, x.value, _in_front(x))
    value = g.apply("slice", (apart,), Slice(1 + x.at, first, last, 1))
    return _settled(g, value, place.shape, x.at, last - first)


def _by_sample(g: Builder, function: Capture, x: Moved, a: Arguments) -> Any:
    """A convolution whose groups are samples, as one of samples."""
    groups = a.groups.at(x.batch) if isinstance(a.groups, BatchNumber) else a.groups
    if (x.at, x.before) != (1, 1) or groups % x.batch:
        g.refuse("its batch is not in dimension 0")
    images = _reshaped(g, x.value, (x.batch, x.shape[1] // x.batch, *x.shape[2:]))
    return function(g, a.replaced(input=images, groups=groups // x.batch))


def _reduced(g: Builder, function: Capture, x: Moved, a: Arguments) -> Any:
    value, rank = _apart(g, x), len(x.shape)
    named = [a.dim] if isinstance(a.dim, int) else a.dim or range(rank)
    dims = [_place_along(g, x, dim % rank, g.spec(value).rank) for dim in named]
    return function(g, a.replaced(self=value, dim=dims))


def _flipped(g: Builder, function: Capture, x: Moved, a: Arguments) -> Any:
    value = _apart(g, x)
    rank = g.spec(value).rank
    dims = [_place_along(g, x, dim % len(x.shape), rank) for dim in a.dims]
    return function(g, a.replaced(self=value, dims=dims))


def _moved(g: Builder, x: Any) -> Moved | None:
    """An argument, whose batch may also be in front."""
    batch = g.spec(x).batch if isinstance(x, Value) else None
    if batch is None:
        return x if isinstance(x, Moved) else None
    return Moved(x, g.spec(x).shape, 0, 1, batch)


def _reshaped(g: Builder, value: Value, shape: tuple[int, ...]) -> Value:
    if g.spec(value).shape == shape:
        return value
    made: Value = g.apply("reshape", (value,), Reshape(shape))
    return made


def _apart(g: Builder, x: Moved) -> Value:
    """The graph's value with one dimension for each of torch's; those beside the batch in its own
    dimension only where there are such."""
    beside = [part for part in x.sizes[x.at] if part != 1]
    return _reshaped(g, x.value, (x.batch, *x.shape[: x.at], *beside, *x.shape[x.at + 1 :]))


def _settled(
    g: Builder, value: Value, shape: tuple[int, ...], at: int, front: int
) -> Value | Moved:  # fmt: skip
    """The tensor, as a plain value where its batch is in front again. front: elements in front of
    the batch in its own dimension."""
    before, batch = math.prod(shape[:at]) * front, g.spec(value).batch
    if (at, before) == (0, 1):
        return _reshaped(g, value, shape)
    assert batch is not None
    return Moved(value, shape, at, before, batch)


def _dims(a: Arguments, rank: int) -> list[int]:
    """The order that a permutation brings dimensions into."""
    if "dims" in a:
        return [dim % rank for dim in a.dims]
    dims = list(range(rank))
    dims[a.dim0], dims[a.dim1] = dims[a.dim1], dims[a.dim0]
    return dims


def _permuted(g: Builder, x: Moved, dims: list[int]) -> Value | Moved:
    sizes = x.sizes
    starts = [1 + sum(map(len, sizes[:dim])) for dim in range(len(sizes))]
    order = [starts[dim] + part for dim in dims for part in range(len(sizes[dim]))]
    parts = tuple(part for dim in sizes for part in dim)
    value = x.value
    # Where only the batch has moved, and parts of one element, nothing has to.
    real = [part for part in order if parts[part - 1] != 1]
    if real != sorted(real):
        kept = sorted(real)
        apart = _reshaped(g, value, (x.batch, *(parts[part - 1] for part in kept)))
        places = tuple(1 + kept.index(part) for part in real)
        value = g.apply("permute", (apart,), Permute((0, *places)))
    shape = tuple(x.shape[dim] for dim in dims)
    return _settled(g, value, shape, dims.index(x.at), sizes[x.at][0])


def _place_along(g: Builder, x: Moved, dim: int, rank: int) -> int:
    """The dimension of the graph's value, of that rank, which a dimension of torch's is."""
    if dim == x.at:
        g.refuse(f"it goes along dimension {dim} of {x.shape}, where the batch is")
    return 1 + dim if dim < x.at else rank - (len(x.shape) - dim)


def _alike(g: Builder, x: Moved, argument: Any) -> Any:
    """An operand of a pointwise call, as it stands beside the graph's value."""
    if isinstance(argument, Moved):
        places = ((len(y.shape), y.at, y.sizes[y.at]) for y in (x, argument))
        if len(set(places)) > 1:
            g.refuse(f"{x.shape} meets {argument.shape}, whose batch is elsewhere")
        return _apart(g, argument)
    if isinstance(argument, Value):
        spec = g.spec(argument)
        front, behind = x.sizes[x.at]
        if spec.batch and spec.rank == len(x.shape) - x.at and (front, behind) == (1, 1):
            return _reshaped(g, argument, (x.batch, *(1 for _ in range(x.at)), *spec.shape[1:]))
        behind_batch = len(x.shape) - 1 - x.at
        if spec.batch is None and set(spec.shape[: -behind_batch or None]) == {1}:
            return _reshaped(g, argument, spec.shape[spec.rank - behind_batch :])
        if spec.batch is not None or spec.rank > behind_batch:
            g.refuse(f"{x.shape}, whose batch is in dimension {x.at}, meets {spec}")
    return argument


def _like(g: Builder, x: Moved, value: Value, place: Place | None) -> Value | Moved:
    """A result that is split as `x` is, but for what has changed in one dimension."""
    if place is None:
        g.refuse("its result has no batch")
    assert g.spec(value).numel == math.prod(place.shape), "a call that changes more than one dim"
    return _settled(g, value, place.shape, place.at, x.sizes[x.at][0])


OTHERS = {
    "aten.flip.default": _flipped,
    **dict.fromkeys(CONVOLUTIONS, _by_sample),
    **dict.fromkeys(REDUCING, _reduced),
}
"""Calls with a way of their own."""
