"""Ops that move elements and compute nothing: reshape, permute, expand, slice, concat, relayout,
cast.

Where the memory layout allows it the plan turns them into views and no kernel runs (`view_of`);
otherwise they are the pointwise kernel loading with other strides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InvalidInputError, KernelError
from . import epilogue as ep
from . import pointwise
from .op import (
    Attributes,
    Builder,
    Capture,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Problem,
    Ref,
    tensor_bytes,
)
from .spec import Layout, Operand, TensorSpec
from .targets import Target


@dataclass(frozen=True)
class Reshape(Attributes):
    """The new shape; with a batch, dimension 0 is that of the largest batch."""

    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class FlattenPixels(Attributes):
    """(N, C, H, W) -> (N, H·W·C): flattened in the order images lie in memory, always a view."""


@dataclass(frozen=True)
class Permute(Attributes):
    """Output dimension i is input dimension dims[i]."""

    dims: tuple[int, ...] = ()


@dataclass(frozen=True)
class Expand(Attributes):
    """The shape to broadcast to; -1 keeps the input's extent, which may be the batch of a call."""

    shape: tuple[int, ...] = ()


@dataclass(frozen=True)
class Slice(Attributes):
    """Elements start, start + step, ... below stop of one dimension."""

    dim: int = 0
    start: int = 0
    stop: int = 0
    step: int = 1


@dataclass(frozen=True)
class Concat(Attributes):
    """Joins its inputs along one dimension."""

    dim: int = 0


@dataclass(frozen=True)
class Relayout(Attributes):
    """The same logical tensor in another memory layout and dtype."""

    layout: Layout = Layout.DENSE
    dtype: torch.dtype = torch.float32


def _layout_for(shape: tuple[int, ...], source: TensorSpec) -> Layout:
    return Layout.NHWC if len(shape) == 4 and source.layout is Layout.NHWC else Layout.DENSE


def infer_reshape(attributes: Reshape, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The new shape in dense memory; the batch stays in dimension 0."""
    (x,) = inputs
    out = TensorSpec(attributes.shape, x.dtype)
    if out.numel != x.numel:
        raise InvalidInputError(f"reshape: {x} has {x.numel} elements, {out} has {out.numel}")
    batch = x.batch
    if batch is not None and (not out.rank or out.shape[0] % batch):
        raise InvalidInputError(f"reshape: the batch of {x} must stay in dimension 0, got {out}")
    return (out.with_(batch=batch),)


def infer_flatten(
    attributes: FlattenPixels, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """(N, C, H, W) gives (N, H·W·C)."""
    (x,) = inputs
    if x.rank != 4:
        raise InvalidInputError(f"flatten_pixels: expected an image (N, C, H, W), got {x}")
    n, c, h, w = x.shape
    return (TensorSpec((n, h * w * c), x.dtype, batch=x.batch),)


def infer_permute(attributes: Permute, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The permuted shape; rank 4 keeps the input's layout."""
    (x,) = inputs
    if sorted(attributes.dims) != list(range(x.rank)):
        raise InvalidInputError(f"permute: {attributes.dims} does not permute the dims of {x}")
    if x.batch is not None and attributes.dims[0] != 0:
        raise InvalidInputError(f"permute: the batch of {x} must stay in dimension 0")
    shape = tuple(x.shape[dim] for dim in attributes.dims)
    return (TensorSpec(shape, x.dtype, x.layout, x.batch),)


def infer_expand(attributes: Expand, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The larger shape."""
    (x,) = inputs
    missing = len(attributes.shape) - x.rank
    if missing < 0 or -1 in attributes.shape[:missing]:
        raise InvalidInputError(f"expand: {x} does not broadcast to {attributes.shape}")
    aligned = (*attributes.shape[:missing], *x.shape)
    shape = tuple(
        old if new == -1 else new for old, new in zip(aligned, attributes.shape, strict=True)
    )
    if any(old not in (1, new) for old, new in zip(aligned, shape, strict=True)):
        raise InvalidInputError(f"expand: {x} does not broadcast to {attributes.shape}")
    if x.batch is not None and (missing or attributes.shape[0] != -1):
        raise InvalidInputError(f"expand: the batch of {x} must stay as it is in dimension 0")
    batch = x.batch if len(shape) == x.rank else None
    return (TensorSpec(shape, x.dtype, _layout_for(shape, x), batch),)


def infer_slice(attributes: Slice, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The shape with one dimension cut."""
    (x,) = inputs
    if not 0 <= attributes.dim < x.rank:
        raise InvalidInputError(f"slice: {x} has no dimension {attributes.dim}")
    if x.batch is not None and attributes.dim == 0:
        raise InvalidInputError(f"slice: the batch dimension of {x} cannot be cut")
    if not 0 <= attributes.start <= attributes.stop <= x.shape[attributes.dim]:
        span = f"{attributes.start}:{attributes.stop}"
        raise InvalidInputError(f"slice: {span} is outside dimension {attributes.dim} of {x}")
    count = len(range(attributes.start, attributes.stop, attributes.step))
    shape = (*x.shape[: attributes.dim], count, *x.shape[attributes.dim + 1 :])
    return (TensorSpec(shape, x.dtype, x.layout, x.batch),)


def infer_concat(attributes: Concat, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The inputs' shape with the joined dimension summed."""
    first, dim = inputs[0], attributes.dim
    for spec in inputs[1:]:
        same = spec.rank == first.rank and all(
            a == b
            for at, (a, b) in enumerate(zip(spec.shape, first.shape, strict=True))
            if at != dim
        )
        if not same:
            raise InvalidInputError(f"concat: {first} and {spec} differ outside dimension {dim}")
    if any(spec.batch is not None for spec in inputs) and dim == 0:
        raise InvalidInputError("concat: tensors cannot be joined along the batch dimension")
    total = sum(spec.shape[dim] for spec in inputs)
    shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
    batch = next((spec.batch for spec in inputs if spec.batch is not None), None)
    return (TensorSpec(shape, first.dtype, first.layout, batch),)


def infer_relayout(attributes: Relayout, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The same shape with the new layout and dtype."""
    if attributes.layout is Layout.NHWC and inputs[0].rank != 4:
        raise InvalidInputError(f"relayout: only rank 4 can be NHWC, got {inputs[0]}")
    return (inputs[0].with_(layout=attributes.layout, dtype=attributes.dtype),)


def _reshape(attributes: Reshape, x: torch.Tensor) -> torch.Tensor:
    # At another batch than the largest, only dimension 0 differs.
    if x.numel() == 0 or not attributes.shape:
        return x.reshape(attributes.shape)
    return x.reshape(-1, *attributes.shape[1:])


def _flatten(attributes: FlattenPixels, x: torch.Tensor) -> torch.Tensor:
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1)


def _permute(attributes: Permute, x: torch.Tensor) -> torch.Tensor:
    return x.permute(attributes.dims)


def _expand(attributes: Expand, x: torch.Tensor) -> torch.Tensor:
    return x.expand(attributes.shape)


def _slice(attributes: Slice, x: torch.Tensor) -> torch.Tensor:
    cut = slice(attributes.start, attributes.stop, attributes.step)
    return x[(slice(None),) * attributes.dim + (cut,)]


def _concat(attributes: Concat, *tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors, attributes.dim)


def _relayout(attributes: Relayout, x: torch.Tensor) -> torch.Tensor:
    memory = {Layout.NHWC: torch.channels_last, Layout.DENSE: torch.contiguous_format}
    return x.to(attributes.dtype).contiguous(memory_format=memory[attributes.layout])


def read_strides(problem: Problem) -> ep.Access:
    """How the single input is read in the memory order of the output."""
    x, out, attributes = problem.inputs[0], problem.output.spec, problem.attributes
    strides, offset = x.strides, x.offset
    if isinstance(attributes, Permute):
        strides = tuple(strides[dim] for dim in attributes.dims)
    elif isinstance(attributes, Slice):
        offset += attributes.start * strides[attributes.dim]
        strides = tuple(
            step * attributes.step if dim == attributes.dim else step
            for dim, step in enumerate(strides)
        )
    else:
        return ep.access(x, out)
    order = out.layout.order(out.rank)
    return ep.Access(tuple(strides[dim] for dim in order) or (0,), offset, str(x.spec))


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One copy with the op's strides."""
    reads = (read_strides(problem),)
    return (pointwise.launch_reads(problem, tile, reads, (pointwise.LOAD,)),)


def linear_sizes(x: Operand, out: Operand) -> tuple[int, ...] | None:
    """Extents of one walk through two tensors that hold the same elements in the same order.

    A boundary is needed wherever either side jumps (its pitch is wider than its row) and where the
    batch dimension ends. None where the boundaries do not nest.
    """
    boundaries = {1, x.spec.numel}
    for operand in (x, out):
        row = ep.memory_sizes(operand.spec)[-1]
        if operand.pitch != row:
            boundaries.add(row)
        if operand.spec.batch is not None:
            boundaries.add(operand.spec.numel // operand.shape[0])
    ordered = sorted(boundaries)
    if any(large % small for small, large in zip(ordered, ordered[1:], strict=False)):
        return None
    pairs = list(zip(ordered, ordered[1:], strict=False))
    return tuple(large // small for small, large in reversed(pairs)) or (1,)


def _linear_access(operand: Operand, sizes: tuple[int, ...]) -> ep.Access:
    row = max(ep.memory_sizes(operand.spec)[-1], 1)
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step // row * operand.pitch + step % row)
        step *= size
    return ep.Access(tuple(reversed(strides)), operand.offset, str(operand.spec))


def legal_linear(problem: Problem, tile: Config, target: Target) -> str | None:
    """Why a reshape cannot be one walk through memory, or None."""
    if linear_sizes(problem.inputs[0], problem.output) is None:
        return "rows of the input and of the output are both padded and do not nest"
    return None


def launches_linear(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One copy in memory order, for ops that keep it."""
    (x,), out = problem.inputs, problem.output
    sizes = linear_sizes(x, out)
    if sizes is None:
        raise KernelError(f"{problem.op}: {legal_linear(problem, tile, target)}")
    walk = pointwise.Walk(sizes, _linear_access(out, sizes), out.spec.batch)
    reads = (_linear_access(x, sizes),)
    refs = (Ref("input", 0),)
    return (pointwise.launch_chain(problem, tile, walk, reads, (pointwise.LOAD,), refs),)


def launches_concat(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One copy per input into its slice of the output."""
    assert isinstance(problem.attributes, Concat)
    out, dim = problem.output, problem.attributes.dim
    order = out.spec.layout.order(out.spec.rank)
    start, result = 0, []
    for index, x in enumerate(problem.inputs):
        offset = out.offset + start * out.strides[dim]
        written = ep.Access(tuple(out.strides[at] for at in order), offset)
        sizes = tuple(x.shape[at] for at in order)
        read = ep.Access(tuple(x.strides[at] for at in order), x.offset, str(x.spec))
        walk = pointwise.Walk(sizes, written, out.spec.batch)
        refs = (Ref("input", index),)
        launch = pointwise.launch_chain(problem, tile, walk, (read,), (pointwise.LOAD,), refs)
        result.append(launch)
        start += x.shape[dim]
    return tuple(result)


def slice_operand(whole: Operand, dim: int, start: int, size: int) -> Operand | None:
    """The part of an operand along one dimension as an operand, or None where pitch and offset
    cannot express it (only the innermost and the outermost dimension in memory can be cut)."""
    spec = whole.spec
    shape = (*spec.shape[:dim], size, *spec.shape[dim + 1 :])
    order = spec.layout.order(spec.rank)
    offset = whole.offset + start * whole.strides[dim]
    outer_is_one = all(spec.shape[other] == 1 for other in order[: order.index(dim)])
    if dim == order[-1] or outer_is_one or size == spec.shape[dim]:
        return Operand(spec.with_(shape=shape), whole.pitch, offset)
    return None


def view_of(
    attributes: Attributes, x: Operand, out: TensorSpec
) -> Operand | None:
    """The op's result as an operand inside its input's buffer, or None where a copy is needed."""
    if x.spec.dtype is not out.dtype:
        return None
    if isinstance(attributes, Slice):
        if attributes.step != 1:
            return None
        size = out.shape[attributes.dim]
        return slice_operand(x, attributes.dim, attributes.start, size)
    candidate = Operand.dense(out)
    candidate = Operand(out, candidate.pitch, x.offset)
    is_whole = x.pitch == Operand.dense(x.spec).pitch
    if isinstance(attributes, (Reshape, FlattenPixels)):
        return candidate if is_whole else None
    if isinstance(attributes, Relayout):
        same = Operand(out, x.pitch, x.offset)
        for place in (same, candidate):
            if _same_walk(x.strides, place.strides, out.shape):
                return place
        return None
    if isinstance(attributes, Permute):
        strides = tuple(x.strides[dim] for dim in attributes.dims)
        return candidate if is_whole and _same_walk(strides, candidate.strides, out.shape) else None
    return None


def _same_walk(a: tuple[int, ...], b: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return all(left == right or size == 1 for left, right, size in zip(a, b, shape, strict=True))


def cost(problem: Problem) -> Cost:
    read, written = tensor_bytes(problem)
    return Cost(0, read, written)


def _spec(shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(shape, torch.float32, Layout.NHWC if len(shape) == 4 else Layout.DENSE)


SHAPES = ((1,), (4, 6), (2, 3, 5), (2, 4, 3, 5), (1, 1, 8, 4), (3, 16, 1, 1), (2, 3, 2, 2, 3))


def _build_reshape(draw: Mapping[str, Any]) -> tuple[Reshape, tuple[TensorSpec, ...]] | None:
    x = TensorSpec(draw["shape"], torch.float32)
    if draw["flat"]:
        return Reshape((x.shape[0], x.numel // x.shape[0])), (x,)
    return Reshape((x.numel,)), (x,)


def _build_flatten(
    draw: Mapping[str, Any],
) -> tuple[FlattenPixels, tuple[TensorSpec, ...]] | None:
    return (FlattenPixels(), (_spec(draw["shape"]),)) if len(draw["shape"]) == 4 else None


def _build_permute(draw: Mapping[str, Any]) -> tuple[Permute, tuple[TensorSpec, ...]] | None:
    rank = len(draw["shape"])
    dims = sorted(range(rank), key=lambda dim: (draw["seed"] * (dim + 3)) % 7)
    return Permute(tuple(dims)), (_spec(draw["shape"]),)


def _build_expand(draw: Mapping[str, Any]) -> tuple[Expand, tuple[TensorSpec, ...]] | None:
    shape = draw["shape"]
    dim = draw["seed"] % len(shape)
    small = tuple(1 if at == dim else size for at, size in enumerate(shape))
    kept = tuple(-1 if draw["flat"] and at != dim else size for at, size in enumerate(shape))
    return Expand(kept), (_spec(small),)


def _build_slice(draw: Mapping[str, Any]) -> tuple[Slice, tuple[TensorSpec, ...]] | None:
    shape = draw["shape"]
    dim = draw["seed"] % len(shape)
    stop = shape[dim] - draw["cut"]
    if stop - draw["cut"] < 1:
        return None
    return Slice(dim, draw["cut"], stop, draw["step"]), (_spec(shape),)


def _build_concat(draw: Mapping[str, Any]) -> tuple[Concat, tuple[TensorSpec, ...]] | None:
    shape = draw["shape"]
    if len(shape) == 1:
        return None
    dim = draw["seed"] % len(shape)
    specs = [_spec((*shape[:dim], size, *shape[dim + 1 :])) for size in (3, shape[dim], 8)]
    return Concat(dim), tuple(specs[: draw["count"]])


def _build_relayout(draw: Mapping[str, Any]) -> tuple[Relayout, tuple[TensorSpec, ...]] | None:
    spec = _spec(draw["shape"])
    layout = draw["layout"] if spec.rank == 4 else Layout.DENSE
    return Relayout(layout, torch.float32), (spec,)


def _capture_view(g: Builder, x: Any, shape: Any) -> Any:
    known = math.prod(size for size in shape if size != -1)
    full = (g.spec(x).numel // max(known, 1) if size == -1 else size for size in shape)
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
    aligned = (*(None for _ in range(len(size) - len(shape))), *shape)
    kept = (-1 if new == old else new for old, new in zip(aligned, size, strict=True))
    return g.apply("expand", (x,), Expand(tuple(kept)))


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
    fields: dict[str, Any] = {
        "launches": launches,
        "takes_epilogue": True,
        "domain": Domain(
            ranges={
                "shape": SHAPES,
                "seed": tuple(range(1, 7)),
                "cut": (0, 1),
                "step": (1, 2),
                "count": (1, 2, 3),
                "flat": (False, True),
                "layout": tuple(Layout),
            },
            build=build,
        ),
    }
    fields.update(changes)
    return Op(
        name=name,
        attributes=attributes,
        infer=infer,
        reference=reference,
        configs=pointwise.configs,
        default=pointwise.default,
        cost=cost,
        aten=aten,
        **fields,
    )


OPS = (
    _op(
        "reshape", Reshape, infer_reshape, _reshape, _build_reshape,
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
        images=False, launches=launches_linear, legal=legal_linear, takes_epilogue=False,
    ),
    _op(
        "flatten_pixels", FlattenPixels, infer_flatten, _flatten, _build_flatten, {},
        launches=launches_linear, legal=legal_linear, takes_epilogue=False,
    ),
    _op(
        "permute", Permute, infer_permute, _permute, _build_permute,
        {
            "aten.permute.default": _capture_permute,
            "aten.transpose.int": _capture_transpose,
            "aten.t.default": lambda g, x: _capture_permute(g, x, (1, 0)),
        },
    ),
    _op(
        "expand", Expand, infer_expand, _expand, _build_expand,
        {"aten.expand.default": _capture_expand},
        takes_epilogue=False,
    ),
    _op(
        "slice", Slice, infer_slice, _slice, _build_slice,
        {
            "aten.slice.Tensor": _capture_slice,
            "aten.select.int": _capture_select,
            "aten.narrow.default": lambda g, x, dim, start, length: _cut(
                g, x, dim, start, start + length
            ),
            "aten.split.Tensor": _capture_split,
            "aten.split_with_sizes.default": _capture_split,
            "aten.chunk.default": _capture_chunk,
        },
        takes_epilogue=False,
    ),
    _op(
        "concat", Concat, infer_concat, _concat, _build_concat,
        {"aten.cat.default": _capture_cat, "aten.stack.default": _capture_stack},
        launches=launches_concat, takes_epilogue=False,
    ),
    _op(
        "relayout", Relayout, infer_relayout, _relayout, _build_relayout,
        {"aten._to_copy.default": _capture_cast, "aten.to.dtype": lambda g, x, dtype, *_: (
            _capture_cast(g, x, dtype=dtype)
        )},
    ),
)  # fmt: skip
