"""The movement ops as the registry knows them; how ATen's views, slices and joins become them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..contract.op import Attributes, BatchExtent, Builder, Capture, Domain, Op
from ..contract.spec import FLOAT_DTYPES, Layout, TensorSpec
from . import movement, pointwise
from .movement import Concat, FlattenPixels, Permute, Relayout, Slice
from .rearrangement import Expand, Flip, Reshape


def _capture_view(g: Builder, x: Any, shape: Any) -> Any:
    known = math.prod(size for size in shape if size != -1)
    full = (g.spec(x).numel // max(known, 1) if size == -1 else int(size) for size in shape)
    return g.apply("reshape", (x,), Reshape(tuple(full)))


def _capture_flatten(g: Builder, x: Any, start: int = 0, end: int = -1) -> Any:
    shape = g.spec(x).shape
    end %= len(shape)
    merged = 1
    for size in shape[start : end + 1]:
        merged *= size
    return _capture_view(g, x, (*shape[:start], merged, *shape[end + 1 :]))


def _capture_squeeze(g: Builder, x: Any, dims: Any = None) -> Any:
    shape = g.spec(x).shape
    chosen = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    drop = {dim % len(shape) for dim in chosen if shape[dim] == 1}
    if g.spec(x).batch is not None:
        drop.discard(0)
    return _capture_view(g, x, [size for dim, size in enumerate(shape) if dim not in drop])


def _capture_unsqueeze(g: Builder, x: Any, dim: int) -> Any:
    shape = list(g.spec(x).shape)
    shape.insert(dim % (len(shape) + 1), 1)
    return _capture_view(g, x, shape)


def _capture_permute(g: Builder, x: Any, dims: Any) -> Any:
    rank = g.spec(x).rank
    return g.apply("permute", (x,), Permute(tuple(dim % rank for dim in dims)))


def _capture_transpose(g: Builder, x: Any, a: int, b: int) -> Any:
    dims = list(range(g.spec(x).rank))
    dims[a], dims[b] = dims[b], dims[a]
    return _capture_permute(g, x, dims)


def _capture_expand(g: Builder, x: Any, size: Any, implicit: bool = False) -> Any:
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


def _capture_full(g: Builder, x: Any, size: Any, value: Any, dtype: Any = None, **_: Any) -> Any:
    """A tensor of one number."""
    dtype = dtype or g.spec(x).dtype
    if dtype not in FLOAT_DTYPES:
        return g.refuse(f"dtype {dtype} is not supported")
    return _capture_expand(g, g.add_constant(torch.tensor(float(value)), dtype), tuple(size))


def _capture_full_like(g: Builder, x: Any, value: Any, **options: Any) -> Any:
    spec = g.spec(x)
    rows = spec.shape[:1] if spec.batch is None else (BatchExtent(spec.shape[0], spec.batch),)
    return _capture_full(g, x, (*rows, *spec.shape[1:]), value, **options)


def _cut(g: Builder, x: Any, dim: int, start: int, stop: int, step: int = 1) -> Any:
    size = g.spec(x).shape[dim]
    dim %= g.spec(x).rank
    start, stop, step = slice(start, stop, step).indices(size)
    if (start, stop, step) == (0, size, 1):
        return x
    return g.apply("slice", (x,), Slice(dim, start, stop, step))


def _capture_slice(
    g: Builder, x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    if isinstance(end, BatchExtent):
        if not _rows_of_batch(g, x, end):
            return x
        piece = _cut(g, x, 0, 0, end)
        return _capture_expand(g, piece, (end, *g.spec(piece).shape[1:]))
    return _cut(g, x, dim, start, end, step)


def _capture_select(g: Builder, x: Any, dim: int, index: int) -> Any:
    size = g.spec(x).shape[dim]
    index %= size
    piece = _cut(g, x, dim, index, index + 1)
    shape = list(g.spec(x).shape)
    del shape[dim]
    return _capture_view(g, piece, shape)


def _capture_split(g: Builder, x: Any, sizes: Any, dim: int = 0) -> Any:
    extent = g.spec(x).shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, extent - at) for at in range(0, extent, sizes)]
    pieces, start = [], 0
    for size in sizes:
        pieces.append(_cut(g, x, dim, start, start + size))
        start += size
    return pieces


def _capture_chunk(g: Builder, x: Any, chunks: int, dim: int = 0) -> Any:
    extent = g.spec(x).shape[dim]
    return _capture_split(g, x, -(-extent // chunks), dim)


def _capture_cat(g: Builder, tensors: Any, dim: int = 0) -> Any:
    if len(tensors) == 1:
        return tensors[0]
    return g.apply("concat", tuple(tensors), Concat(dim % g.spec(tensors[0]).rank))


def _capture_stack(g: Builder, tensors: Any, dim: int = 0) -> Any:
    rank = g.spec(tensors[0]).rank + 1
    return _capture_cat(g, [_capture_unsqueeze(g, x, dim) for x in tensors], dim % rank)


def _capture_unbind(g: Builder, x: Any, dim: int = 0) -> Any:
    return [_capture_select(g, x, dim, index) for index in range(g.spec(x).shape[dim])]


def _capture_glu(g: Builder, x: Any, dim: int = -1) -> Any:
    """a · sigmoid(b), the halves of one dimension."""
    half = g.spec(x).shape[dim] // 2
    a, b = _cut(g, x, dim, 0, half), _cut(g, x, dim, half, 2 * half)
    gate = g.apply("sigmoid", (b,), pointwise.Pointwise())
    return g.apply("mul", (a, gate), pointwise.Pointwise())


def _capture_roll(g: Builder, x: Any, shifts: Any, dims: Any = ()) -> Any:
    """The end of each dimension in front of its beginning."""
    if not dims:
        return g.refuse("roll of the flattened tensor; pass dims")
    for shift, dim in zip(shifts, dims, strict=True):
        size = g.spec(x).shape[dim]
        if start := -shift % size:
            x = _capture_cat(g, [_cut(g, x, dim, start, size), _cut(g, x, dim, 0, start)], dim)
    return x


def _capture_repeat(g: Builder, x: Any, repeats: Any) -> Any:
    if repeats and _rows_of_batch(g, x, repeats[0]):
        x = _capture_repeat(g, x, (1, *repeats[1:]))
        rows, *rest = g.spec(x).shape
        many = _capture_expand(g, _capture_unsqueeze(g, x, 0), (repeats[0], rows, *rest))
        return _capture_view(g, many, (repeats[0] * rows, *rest))
    for _ in range(len(repeats) - g.spec(x).rank):
        if g.spec(x).batch is not None:
            return g.refuse("repeat that moves the batch from dimension 0")
        x = _capture_unsqueeze(g, x, 0)
    if 0 in repeats:
        return g.refuse("repeat zero times")
    for dim, count in enumerate(repeats):
        x = _capture_cat(g, [x] * count, dim)
    return x


def _capture_tile(g: Builder, x: Any, repeats: Any) -> Any:
    missing = g.spec(x).rank - len(repeats)
    return _capture_repeat(g, x, [*(1 for _ in range(missing)), *repeats])


def _capture_repeat_interleave(
    g: Builder, x: Any, count: int, dim: int | None = None, **_: Any
) -> Any:
    """Every element `count` times in a row."""
    if dim is None or count < 1:
        return g.refuse("repeat_interleave without a dimension, or zero times")
    shape = g.spec(x).shape
    dim %= len(shape)
    wide = _capture_unsqueeze(g, x, dim + 1)
    kept = (*(-1 for _ in range(dim + 1)), count, *(-1 for _ in shape[dim + 1 :]))
    wide = g.apply("expand", (wide,), Expand(kept))
    return _capture_view(g, wide, (*shape[:dim], shape[dim] * count, *shape[dim + 1 :]))


MOST_RUNS = 16
"""Pieces that an indexed tensor is put together from at most."""


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


def _capture_index_select(g: Builder, x: Any, dim: int, index: Any) -> Any:
    """Indices known at compile time, as slices and flipped slices joined together."""
    known = g.constant(index)
    if known is None or known.dim() != 1 or known.dtype not in (torch.int32, torch.int64):
        return g.refuse("indices that are not a constant vector of whole numbers")
    size = g.spec(x).shape[dim]
    runs = _runs([int(value) % size for value in known])
    if not 0 < len(runs) <= MOST_RUNS:
        return g.refuse(f"{len(runs)} runs of indices; expected 1 to {MOST_RUNS}")
    pieces = []
    for first, step, count in runs:
        last = first + (count - 1) * step
        piece = _cut(g, x, dim, min(first, last), max(first, last) + 1, abs(step))
        if step < 0:
            piece = g.apply("flip", (piece,), Flip((dim % g.spec(x).rank,)))
        pieces.append(piece)
    return _capture_cat(g, pieces, dim)


def _capture_index(g: Builder, x: Any, indices: Any) -> Any:
    given = [dim for dim, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        return g.refuse(f"indexing of {len(given)} dimensions at once; expected one")
    return _capture_index_select(g, x, given[0], indices[given[0]])


def _capture_cast(g: Builder, x: Any, **options: Any) -> Any:
    dtype = options.get("dtype") or g.spec(x).dtype
    if dtype is g.spec(x).dtype:
        return x
    return g.apply("relayout", (x,), Relayout(g.spec(x).layout, dtype))


def _op(
    name: str,
    attributes: type[Attributes],
    infer: Callable[[Any, tuple[TensorSpec, ...]], tuple[TensorSpec, ...]],
    reference: Callable[..., torch.Tensor],
    build: Callable[[Mapping[str, Any]], Any],
    aten: Mapping[str, Capture],
    **changes: Any,
) -> Op:
    """One movement op; they share kernel, tuning space and cost."""
    domain = Domain(
        ranges={
            "shape": movement.SHAPES,
            "seed": tuple(range(1, 7)),
            "cut": (0, 1),
            "step": (1, 2),
            "count": (1, 2, 3),
            "flat": (False, True),
            "layout": tuple(Layout),
        },
        build=build,
    )
    return Op(
        name=name,
        attributes=attributes,
        infer=infer,
        reference=reference,
        configs=pointwise.configs,
        default=pointwise.default,
        domain=domain,
        aten=aten,
        **{"integers": True, "launches": movement.launches, **changes},
    )


OPS = (
    _op(
        "reshape", Reshape, movement.infer_reshape, movement.reshape, movement.build_reshape,
        {
            "aten.view.default": _capture_view,
            "aten.reshape.default": _capture_view,
            "aten._unsafe_view.default": _capture_view,
            "aten.flatten.using_ints": _capture_flatten,
            "aten.squeeze.default": _capture_squeeze,
            "aten.squeeze.dim": _capture_squeeze,
            "aten.squeeze.dims": _capture_squeeze,
            "aten.unsqueeze.default": _capture_unsqueeze,
        },
        images=False, launches=movement.launches_linear, legal=movement.legal_linear,
        takes_epilogue=False,
    ),
    _op(
        "flatten_pixels", FlattenPixels, movement.infer_flatten, movement.flatten,
        movement.build_flatten, {},
        launches=movement.launches_linear, legal=movement.legal_linear, takes_epilogue=False,
    ),
    _op(
        "permute", Permute, movement.infer_permute, movement.permute, movement.build_permute,
        {
            "aten.permute.default": _capture_permute,
            "aten.transpose.int": _capture_transpose,
            "aten.t.default": lambda g, x: _capture_permute(g, x, (1, 0)),
        },
        follows=True,
    ),
    _op(
        "expand", Expand, movement.infer_expand, movement.expand, movement.build_expand,
        {
            "aten.expand.default": _capture_expand,
            "aten.repeat_interleave.self_int": _capture_repeat_interleave,
            "aten.new_zeros.default": lambda g, x, size, **options: _capture_full(
                g, x, size, 0, **options
            ),
            "aten.new_ones.default": lambda g, x, size, **options: _capture_full(
                g, x, size, 1, **options
            ),
            "aten.new_full.default": _capture_full,
            "aten.zeros_like.default": lambda g, x, **options: _capture_full_like(
                g, x, 0, **options
            ),
            "aten.ones_like.default": lambda g, x, **options: _capture_full_like(
                g, x, 1, **options
            ),
            "aten.full_like.default": _capture_full_like,
        },
        takes_epilogue=False,
    ),
    _op(
        "slice", Slice, movement.infer_slice, movement.slice_, movement.build_slice,
        {
            "aten.slice.Tensor": _capture_slice,
            "aten.select.int": _capture_select,
            "aten.narrow.default": lambda g, x, dim, start, length: _cut(
                g, x, dim, start, start + length
            ),
            "aten.split.Tensor": _capture_split,
            "aten.split_with_sizes.default": _capture_split,
            "aten.chunk.default": _capture_chunk,
            "aten.unbind.int": _capture_unbind,
            "aten.glu.default": _capture_glu,
            "aten.index_select.default": _capture_index_select,
            "aten.index.Tensor": _capture_index,
        },
        takes_epilogue=False,
    ),
    _op(
        "concat", Concat, movement.infer_concat, movement.concat, movement.build_concat,
        {
            "aten.cat.default": _capture_cat,
            "aten.stack.default": _capture_stack,
            "aten.roll.default": _capture_roll,
            "aten.repeat.default": _capture_repeat,
            "aten.tile.default": _capture_tile,
        },
        launches=movement.launches_concat, takes_epilogue=False,
    ),
    _op(
        "relayout", Relayout, movement.infer_relayout, movement.relayout, movement.build_relayout,
        {"aten._to_copy.default": _capture_cast, "aten.to.dtype": lambda g, x, dtype, *_: (
            _capture_cast(g, x, dtype=dtype)
        )},
    ),
)  # fmt: skip
