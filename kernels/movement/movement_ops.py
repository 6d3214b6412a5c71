"""The movement ops as the registry knows them; how ATen's views, slices and joins become them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch

from ..contract.op import Arguments, BatchExtent, Builder, Capture
from ..contract.spec import FLOAT_DTYPES
from . import movement, pointwise
from .movement import Concat, FlattenPixels, Permute, Relayout, Slice
from .rearrangement import Expand, Reshape


def _view(g: Builder, x: Any, shape: Any) -> Any:
    known = math.prod(size for size in shape if size != -1)
    full = (g.spec(x).numel // max(known, 1) if size == -1 else int(size) for size in shape)
    return g.apply("reshape", (x,), Reshape(tuple(full)))


def _squeeze(g: Builder, a: Arguments) -> Any:
    shape, dims = g.spec(a.self).shape, a.get("dim")
    chosen = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    drop = {dim % len(shape) for dim in chosen if shape[dim] == 1}
    if g.spec(a.self).batch is not None:
        drop.discard(0)
    return _view(g, a.self, [size for dim, size in enumerate(shape) if dim not in drop])


def _unsqueeze(g: Builder, x: Any, dim: int) -> Any:
    shape = list(g.spec(x).shape)
    shape.insert(dim % (len(shape) + 1), 1)
    return _view(g, x, shape)


def _permute(g: Builder, x: Any, dims: Any) -> Any:
    rank = g.spec(x).rank
    return g.apply("permute", (x,), Permute(tuple(dim % rank for dim in dims)))


def _transpose(g: Builder, a: Arguments) -> Any:
    dims = list(range(g.spec(a.self).rank))
    dims[a.dim0], dims[a.dim1] = dims[a.dim1], dims[a.dim0]
    return _permute(g, a.self, dims)


def _expand(g: Builder, x: Any, size: Any) -> Any:
    shape = g.spec(x).shape
    if _rows_of_batch(g, x, size[0] if size else 0):
        full = tuple(
            int(new) if new != -1 else shape[at - len(size)] for at, new in enumerate(size)
        )
        return g.apply("expand", (x,), Expand(full, size[0].batch))
    aligned = (*(None for _ in range(len(size) - len(shape))), *shape)
    kept = (-1 if new == old else int(new) for old, new in zip(aligned, size, strict=True))
    return g.apply("expand", (x,), Expand(tuple(kept)))


def _rows_of_batch(g: Builder, x: Any, size: Any) -> bool:
    """Whether a size makes what follows from constants a tensor of samples."""
    return isinstance(size, BatchExtent) and g.spec(x).batch is None


def _full(number: float | None = None) -> Capture:
    """The capture of a tensor of one number, `fill_value` where none is given, as large as `size`
    says or as another tensor."""

    def capture(g: Builder, a: Arguments) -> Any:
        spec, dtype = g.spec(a.self), a.dtype or g.spec(a.self).dtype
        if dtype not in (*FLOAT_DTYPES, torch.bool):
            return g.refuse(f"dtype {dtype} is not supported")
        rows = spec.shape[:1] if spec.batch is None else (BatchExtent(spec.shape[0], spec.batch),)
        size = a.get("size", (*rows, *spec.shape[1:]))
        value = torch.tensor(float(a.fill_value if number is None else number))
        value = value.to(torch.bool) if dtype is torch.bool else value
        return _expand(g, g.add_constant(value, dtype), tuple(size))

    return capture


def cut(g: Builder, x: Any, dim: int, start: int, stop: int, step: int = 1) -> Any:
    size = g.spec(x).shape[dim]
    dim %= g.spec(x).rank
    start, stop, step = slice(start, stop, step).indices(size)
    if (start, stop, step) == (0, size, 1):
        return x
    return g.apply("slice", (x,), Slice(dim, start, stop, step))


def _refuse_write(g: Builder, a: Arguments) -> Any:
    """Other writes have been made concatenations (`capture/decompositions.py`)."""
    return g.refuse("a write into some samples of a batch that varies; join the parts (torch.cat)")


def _slice(g: Builder, a: Arguments) -> Any:
    dim, start, end, step = a.dim, a.start, a.end, a.step
    if isinstance(end, BatchExtent):
        if not _rows_of_batch(g, a.self, end):
            return a.self
        piece = cut(g, a.self, 0, 0, end)
        return _expand(g, piece, (end, *g.spec(piece).shape[1:]))
    return cut(g, a.self, dim, start, end, step)


def _select(g: Builder, x: Any, dim: int, index: int) -> Any:
    size = g.spec(x).shape[dim]
    index %= size
    piece = cut(g, x, dim, index, index + 1)
    shape = list(g.spec(x).shape)
    del shape[dim]
    return _view(g, piece, shape)


def _split(g: Builder, x: Any, sizes: Any, dim: int) -> Any:
    extent = g.spec(x).shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, extent - at) for at in range(0, extent, sizes)]
    pieces, start = [], 0
    for size in sizes:
        pieces.append(cut(g, x, dim, start, start + size))
        start += size
    return pieces


def _chunk(g: Builder, a: Arguments) -> Any:
    extent = g.spec(a.self).shape[a.dim]
    return _split(g, a.self, -(-extent // a.chunks), a.dim)


def _unbind(g: Builder, a: Arguments) -> Any:
    return [_select(g, a.self, a.dim, at) for at in range(g.spec(a.self).shape[a.dim])]


def join(g: Builder, tensors: Any, dim: int) -> Any:
    if len(tensors) == 1:
        return tensors[0]
    return g.apply("concat", tuple(tensors), Concat(dim % g.spec(tensors[0]).rank))


def _stack(g: Builder, a: Arguments) -> Any:
    dim, rank = a.dim, g.spec(a.tensors[0]).rank + 1
    return join(g, [_unsqueeze(g, x, dim) for x in a.tensors], dim % rank)


def _glu(g: Builder, a: Arguments) -> Any:
    """x · sigmoid(y), the halves of one dimension."""
    half = g.spec(a.self).shape[a.dim] // 2
    x, y = cut(g, a.self, a.dim, 0, half), cut(g, a.self, a.dim, half, 2 * half)
    gate = g.apply("sigmoid", (y,), pointwise.Pointwise())
    return g.apply("mul", (x, gate), pointwise.Pointwise())


def _roll(g: Builder, a: Arguments) -> Any:
    """The end of each dimension in front of its beginning."""
    if not a.dims:
        return g.refuse("roll of the flattened tensor; pass dims")
    x = a.self
    for shift, dim in zip(a.shifts, a.dims, strict=True):
        size = g.spec(x).shape[dim]
        if start := -shift % size:
            x = join(g, [cut(g, x, dim, start, size), cut(g, x, dim, 0, start)], dim)
    return x


def _repeat(g: Builder, x: Any, repeats: Any) -> Any:
    if repeats and _rows_of_batch(g, x, repeats[0]):
        x = _repeat(g, x, (1, *repeats[1:]))
        rows, *rest = g.spec(x).shape
        many = _expand(g, _unsqueeze(g, x, 0), (repeats[0], rows, *rest))
        return _view(g, many, (repeats[0] * rows, *rest))
    for _ in range(len(repeats) - g.spec(x).rank):
        if g.spec(x).batch is not None:
            return g.refuse("repeat that moves the batch from dimension 0")
        x = _unsqueeze(g, x, 0)
    if 0 in repeats:
        return g.refuse("repeat zero times")
    for dim, count in enumerate(repeats):
        x = join(g, [x] * count, dim)
    return x


def _tile(g: Builder, a: Arguments) -> Any:
    missing = g.spec(a.self).rank - len(a.dims)
    return _repeat(g, a.self, [*(1 for _ in range(missing)), *a.dims])


def _repeat_interleave(g: Builder, a: Arguments) -> Any:
    """Every element `repeats` times in a row."""
    dim, count = a.dim, a.repeats
    if dim is None or count < 1:
        return g.refuse("repeat_interleave without a dimension, or zero times")
    shape = g.spec(a.self).shape
    dim %= len(shape)
    kept = (*(-1 for _ in range(dim + 1)), count, *(-1 for _ in shape[dim + 1 :]))
    wide = g.apply("expand", (_unsqueeze(g, a.self, dim + 1),), Expand(kept))
    return _view(g, wide, (*shape[:dim], shape[dim] * count, *shape[dim + 1 :]))


def _cast(g: Builder, a: Arguments) -> Any:
    dtype = a.get("dtype") or g.spec(a.other if "other" in a else a.self).dtype
    if dtype is g.spec(a.self).dtype:
        return a.self
    if dtype is torch.bool:
        return g.apply("ne", (a.self,), pointwise.Pointwise(literal=0.0))
    return g.apply("relayout", (a.self,), Relayout(g.spec(a.self).layout, dtype))


_op = partial(pointwise.copying, integers=True)
OPS = (
    _op(
        "reshape", Reshape, movement.infer_reshape, movement.reshape, movement.launches_linear,
        aten={
            "aten.view.default": lambda g, a: _view(g, a.self, a.size),
            "aten.reshape.default": lambda g, a: _view(g, a.self, a.shape),
            "aten._unsafe_view.default": lambda g, a: _view(g, a.self, a.size),
            "aten.squeeze.default": _squeeze,
            "aten.squeeze.dim": _squeeze,
            "aten.squeeze.dims": _squeeze,
            "aten.unsqueeze.default": lambda g, a: _unsqueeze(g, a.self, a.dim),
        },
        images=False, legal=movement.legal_linear, takes_epilogue=False,
    ),
    _op(
        "flatten_pixels", FlattenPixels, movement.infer_flatten, movement.flatten,
        movement.launches_linear, legal=movement.legal_linear, takes_epilogue=False,
    ),
    _op(
        "permute", Permute, movement.infer_permute, movement.permute, movement.launches,
        aten={
            "aten.permute.default": lambda g, a: _permute(g, a.self, a.dims),
            "aten.transpose.int": _transpose,
            "aten.t.default": lambda g, a: _permute(g, a.self, (1, 0)),
        },
        follows=True, writes_any=True,
    ),
    _op(
        "expand", Expand, movement.infer_expand, movement.expand, movement.launches,
        aten={
            "aten.expand.default": lambda g, a: _expand(g, a.self, a.size),
            "aten.repeat_interleave.self_int": _repeat_interleave,
            "aten.new_zeros.default": _full(0),
            "aten.new_ones.default": _full(1),
            "aten.new_full.default": _full(),
            "aten.zeros_like.default": _full(0),
            "aten.ones_like.default": _full(1),
            "aten.full_like.default": _full(),
        },
        takes_epilogue=False,
    ),
    _op(
        "slice", Slice, movement.infer_slice, movement.slice_, movement.launches,
        aten={
            "aten.slice.Tensor": _slice,
            "aten.slice_scatter.default": _refuse_write,
            "aten.select_scatter.default": _refuse_write,
            "aten.select.int": lambda g, a: _select(g, a.self, a.dim, a.index),
            "aten.narrow.default": lambda g, a: cut(g, a.self, a.dim, a.start, a.start + a.length),
            "aten.split.Tensor": lambda g, a: _split(g, a.self, a.split_size, a.dim),
            "aten.split_with_sizes.default": lambda g, a: _split(g, a.self, a.split_sizes, a.dim),
            "aten.chunk.default": _chunk,
            "aten.unbind.int": _unbind,
            "aten.glu.default": _glu,
        },
        takes_epilogue=False,
    ),
    _op(
        "concat", Concat, movement.infer_concat, movement.concat, movement.launches_concat,
        aten={
            "aten.cat.default": lambda g, a: join(g, a.tensors, a.dim),
            "aten.stack.default": _stack,
            "aten.roll.default": _roll,
            "aten.repeat.default": lambda g, a: _repeat(g, a.self, a.repeats),
            "aten.tile.default": _tile,
        },
        takes_epilogue=False,
    ),
    _op(
        "relayout", Relayout, movement.infer_relayout, movement.relayout, movement.launches,
        aten={
            "aten._to_copy.default": _cast, "aten.to.dtype": _cast, "aten.type_as.default": _cast,
        },
    ),
)  # fmt: skip
