"""Operators that move elements, and the arithmetic of sizes that tells them where."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from .file import DTYPES
from .operator import Call, Value, as_tensor, of_arrays, operator

IF = "If"
MOST_ELEMENTS = 1 << 28
"""Of a constant that a file asks to be filled."""


def objects(values: Any) -> Any:
    """An array of Python numbers and symbols."""
    values = list(values)
    made = np.empty(len(values), object)
    made[:] = values
    return made


# Sizes.


@operator("Shape", sizes=True)
def shape(call: Call, x: torch.Tensor) -> Any:
    return objects(x.shape[slice(call.get("start", 0), call.get("end"))])


@operator("Size", sizes=True)
def size(call: Call, x: torch.Tensor) -> Any:
    return np.asarray(math.prod(x.shape), object)


@operator("ConstantOfShape", known=(0,), sizes=True)
def constant_of_shape(call: Call, sizes: Value) -> Any:
    wanted = call.numbers(sizes, "shape")
    if math.prod(wanted) > MOST_ELEMENTS or any(each < 0 for each in wanted):
        raise call.fail(f"a constant of the shape {wanted}; expected at most 2^28 elements")
    value = call.get("value", torch.zeros(1))
    if value.is_floating_point():
        return torch.full(wanted, value.item(), dtype=value.dtype)
    return np.full(wanted, value.item(), object)


@operator("Constant")
def constant(call: Call) -> Any:
    for name in ("value_int", "value_ints"):
        if (found := call.get(name)) is not None:
            return np.asarray(found, object)
    for name in ("value_float", "value_floats"):
        if (found := call.get(name)) is not None:
            return torch.tensor(found, dtype=torch.float32)
    if (found := call.get("value")) is None:
        raise call.fail("its value is a string or a sparse tensor")
    return found


@operator("Range", known=(0, 1, 2), sizes=True)
def number_range(call: Call, start: Value, limit: Value, step: Value) -> Any:
    bounds = [call.numbers(value, "range")[0] for value in (start, limit, step)]
    return objects(range(*bounds))


@operator("Cast", "CastLike")
def cast(call: Call, x: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    dtype = DTYPES.get(call.get("to")) if like is None else like.dtype
    if dtype is None:
        raise call.fail(f"a data type of number {call.get('to')}, which is not supported")
    return x.to(dtype)


@of_arrays("Cast")
def _cast_array(call: Call, x: Any) -> Any:
    dtype = DTYPES.get(call.get("to"), torch.int64)
    kind = float if dtype.is_floating_point else bool if dtype is torch.bool else int

    def convert(number: Any) -> Any:
        # A symbol of a batch that varies stays one.
        return number if isinstance(number, torch.SymInt) else kind(number)

    return np.asarray(np.frompyfunc(convert, 1, 1)(x), object)


@operator(IF, sizes=True)
def choice(call: Call, condition: Any) -> Any:
    """Only checks a condition: what it chooses stands in the place of the If already."""
    if bool(condition.all()) != call.attributes["taken"]:
        raise call.fail(
            "its condition is another one for these inputs than for the shapes that the file says, "
            "which it was read for; pass inputs of those shapes"
        )
    return ()


# Dimensions.


@operator("Identity", sizes=True)
def identity(call: Call, x: Any) -> Any:
    return x


@operator("Reshape", known=(1,), sizes=True)
def reshape(call: Call, x: Any, sizes: Value = None) -> Any:
    wanted = call.get("shape") if sizes is None else call.numbers(sizes, "shape")
    if not call.get("allowzero", 0):
        wanted = [x.shape[at] if isinstance(size, int) and size == 0 else size
                  for at, size in enumerate(wanted)]  # fmt: skip
    return x.reshape([size if isinstance(size, torch.SymInt) else int(size) for size in wanted])


@operator("Flatten")
def flatten(call: Call, x: torch.Tensor) -> torch.Tensor:
    axis = call.get("axis", 1)
    axis = axis if axis == x.dim() else axis % x.dim()
    if axis == 1:
        return x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def transpose(call: Call, x: torch.Tensor) -> torch.Tensor:
    return x.permute(call.get("perm", list(range(x.dim()))[::-1]))


@of_arrays("Transpose")
def _transpose_array(call: Call, x: Any) -> Any:
    return x.transpose(call.get("perm"))


def _axes(call: Call, axes: Value) -> list[int] | None:
    return call.get("axes") if axes is None else [int(a) for a in call.numbers(axes, "axes")]


@operator("Squeeze", known=(1,), sizes=True)
def squeeze(call: Call, x: Any, axes: Value = None) -> Any:
    found = _axes(call, axes)
    if found is None:
        found = [axis for axis, size in enumerate(x.shape) if size == 1]
    dropped = {axis % len(x.shape) for axis in found}
    return x.reshape([size for axis, size in enumerate(x.shape) if axis not in dropped])


@operator("Unsqueeze", known=(1,), sizes=True)
def unsqueeze(call: Call, x: Any, axes: Value = None) -> Any:
    found = _axes(call, axes) or []
    rank = len(x.shape) + len(found)
    new, sizes = {axis % rank for axis in found}, iter(x.shape)
    return x.reshape([1 if axis in new else next(sizes) for axis in range(rank)])


@operator("Expand", known=(1,))
def expand(call: Call, x: torch.Tensor, sizes: Value) -> torch.Tensor:
    wanted = call.numbers(sizes, "shape")
    own = [1] * (len(wanted) - x.dim()) + list(x.shape)
    wanted = [1] * (len(own) - len(wanted)) + wanted
    # A size of 1 keeps what is there.
    return x.expand([have if want == 1 else want for have, want in zip(own, wanted, strict=True)])


@of_arrays("Expand")
def _expand_array(call: Call, x: Any, sizes: Any) -> Any:
    return x * np.ones([int(each) for each in sizes], object)


@operator("Tile", known=(1,))
def tile(call: Call, x: torch.Tensor, repeats: Value) -> torch.Tensor:
    return x.repeat([int(each) for each in call.numbers(repeats, "repeats")])


# Parts.


@operator("Concat")
def concat(call: Call, *parts: Value) -> torch.Tensor:
    like = next(part for part in parts if isinstance(part, torch.Tensor))
    found = [as_tensor(part, like) for part in parts]
    if not all(isinstance(part, torch.Tensor) for part in found):
        raise call.fail("sizes beside pixels in one concatenation")
    return torch.cat(found, call.get("axis"))


@of_arrays("Concat")
def _concat_arrays(call: Call, *parts: Any) -> Any:
    return np.concatenate([np.asarray(part, object) for part in parts], call.get("axis"))


@operator("Split", known=(1,))
def split(call: Call, x: Any, sizes: Value = None) -> Any:
    axis = call.get("axis", 0)
    found = call.get("split") if sizes is None else call.numbers(sizes, "split")
    if found is None:
        count = call.get("num_outputs")
        return x.split(-(-x.shape[axis] // count), axis)
    return x.split([int(each) for each in found], axis)


@operator("Slice", known=(1, 2, 3, 4))
def slices(call: Call, x: torch.Tensor, *known: Value) -> torch.Tensor:
    for axis, start, stop, step in _ranges(call, x.dim(), known):
        before = (slice(None),) * axis
        if step > 0:
            x = x[(*before, slice(start, stop, step))]
            continue
        taken = range(int(x.shape[axis]))[start:stop:step]
        ends = (taken[-1], taken[0] + 1) if taken else (0, 0)
        x = x[(*before, slice(*ends, -step))].flip(axis)
    return x


def _ranges(call: Call, rank: int, known: tuple[Value, ...]) -> list[tuple[Any, ...]]:
    """(axis, start, stop, step) for each dimension that is cut."""
    if call.opset < 10:
        starts: Any = call.get("starts")
        ends, axes, steps = call.get("ends"), call.get("axes"), None
    else:
        starts, ends, axes, steps = (
            None if value is None else call.numbers(value, "place")
            for value in (*known, None, None)[:4]
        )
    axes, steps = axes or list(range(len(starts))), steps or [1] * len(starts)
    return [
        (int(axis) % rank, start, stop, int(step))
        for axis, start, stop, step in zip(axes, starts, ends, steps, strict=True)
    ]


@of_arrays("Slice")
def _slice_array(call: Call, x: Any, *known: Value) -> Any:
    for axis, start, stop, step in _ranges(call, x.ndim, known):
        x = x[(slice(None),) * axis + (slice(int(start), int(stop), step),)]
    return x


@operator("Gather", known=(1,))
def gather(call: Call, x: torch.Tensor, places: Value) -> torch.Tensor:
    axis = call.get("axis", 0) % x.dim()
    assert isinstance(places, np.ndarray)
    found = [int(place) for place in places.reshape(-1)]
    if places.ndim == 0:
        return x.select(axis, found[0])
    found = [place % x.shape[axis] for place in found]
    if places.ndim == 1 and found == list(range(found[0], found[0] + len(found))):
        return x.narrow(axis, found[0], len(found))
    if places.ndim == 1:
        return torch.cat([x.narrow(axis, place, 1) for place in found], axis)
    raise call.fail(f"indices of rank {places.ndim}; expected 0 or 1")


@of_arrays("Gather")
def _gather_array(call: Call, x: Any, places: Any) -> Any:
    return np.asarray(np.take(x, np.asarray(places).astype(np.int64), call.get("axis", 0)), object)


@operator("Pad", known=(1, 2, 3))
def pad(call: Call, x: torch.Tensor, *known: Value) -> torch.Tensor:
    sizes, value, axes = (*known, None, None, None)[:3]
    found = call.get("pads") if sizes is None else call.numbers(sizes, "pads")
    rank, at = x.dim(), range(x.dim())
    where = at if axes is None else [int(axis) % rank for axis in call.numbers(axes, "axes")]
    pairs = {axis: (int(found[i]), int(found[i + len(where)])) for i, axis in enumerate(where)}
    fill = call.get("value", 0.0) if value is None or not value.size else value.reshape(-1)[0]
    first = min((axis for axis, pair in pairs.items() if any(pair)), default=rank)
    if first == rank:
        return x
    flat = [size for axis in reversed(at[first:]) for size in pairs.get(axis, (0, 0))]
    modes = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}
    mode = modes[call.get("mode", "constant")]
    if mode == "constant":
        return F.pad(x, flat, value=float(fill))
    flat += [0] * (2 * (rank - 2) - len(flat))  # torch wants a pair for each spatial dimension.
    if len(flat) > 2 * (rank - 2):
        raise call.fail(f"mode {call.get('mode')} for the batch or the channels")
    return F.pad(x, flat, mode=mode)


@operator("Where")
def where(call: Call, condition: Value, a: Value, b: Value) -> Any:
    like = next(each for each in (a, b, condition) if isinstance(each, torch.Tensor))
    return torch.where(*(as_tensor(each, like) for each in (condition, a, b)))


@of_arrays("Where")
def _where_array(call: Call, condition: Any, a: Any, b: Any) -> Any:
    return np.asarray(np.where(condition.astype(bool), a, b), object)
