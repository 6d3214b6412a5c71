"""Ops that move elements and compute nothing: reshape, permute, expand, slice, concat, relayout,
cast.

Where the memory layout allows it the plan turns them into views and no kernel runs (`view_of`);
otherwise they are the pointwise kernel loading with other strides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import InvalidInputError, KernelError
from ..contract import epilogue as ep
from ..contract.op import Attributes, Config, Launch, Problem, Ref, Target
from ..contract.spec import MEMORY_FORMATS, Layout, Operand, TensorSpec, as_layout
from . import pointwise, rearrangement
from .rearrangement import Expand, Flip, Reshape, refine


@dataclass(frozen=True)
class FlattenPixels(Attributes):
    """(N, C, H, W) -> (N, H·W·C), or (N, C, D, H, W) -> (N, D·H·W·C): flattened in the order images
    lie in memory, always a view."""


@dataclass(frozen=True)
class Permute(Attributes):
    """Output dimension i is input dimension dims[i]."""

    dims: tuple[int, ...] = ()


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


def layout_for(shape: tuple[int, ...], source: TensorSpec) -> Layout:
    """Images and volumes lie as what they are made of."""
    has_images = len(shape) in MEMORY_FORMATS and source.layout is Layout.NHWC
    return Layout.NHWC if has_images else Layout.DENSE


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
    is_volume = x.rank == 5 and x.layout is Layout.NHWC
    if x.rank != 4 and not is_volume:
        raise InvalidInputError(f"flatten_pixels: expected an image (N, C, H, W), got {x}")
    n = x.shape[0]
    return (TensorSpec((n, x.numel // n), x.dtype, batch=x.batch),)


def infer_permute(attributes: Permute, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    if sorted(attributes.dims) != list(range(x.rank)):
        raise InvalidInputError(f"permute: {attributes.dims} does not permute the dims of {x}")
    if x.batch is not None and attributes.dims[0] != 0:
        raise InvalidInputError(f"permute: the batch of {x} must stay in dimension 0")
    shape = tuple(x.shape[dim] for dim in attributes.dims)
    return (TensorSpec(shape, x.dtype, x.layout, x.batch),)


def infer_expand(attributes: Expand, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
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
    if x.batch is not None and (missing or attributes.shape[0] != -1 or attributes.batch):
        raise InvalidInputError(f"expand: the batch of {x} must stay as it is in dimension 0")
    batch = attributes.batch or x.batch
    if batch is not None and shape[0] % batch:
        raise InvalidInputError(f"expand: {shape} has no batch of {batch} in dimension 0")
    return (TensorSpec(shape, x.dtype, layout_for(shape, x), batch),)


def infer_slice(attributes: Slice, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
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
    if not 0 <= dim < first.rank:
        raise InvalidInputError(f"concat: {first} has no dimension {dim}")
    kept = (*first.shape[:dim], *first.shape[dim + 1 :])
    for spec in inputs[1:]:
        if spec.rank != first.rank or (*spec.shape[:dim], *spec.shape[dim + 1 :]) != kept:
            raise InvalidInputError(f"concat: {first} and {spec} differ outside dimension {dim}")
    if any(spec.batch is not None for spec in inputs) and dim == 0:
        raise InvalidInputError("concat: tensors cannot be joined along the batch dimension")
    total = sum(spec.shape[dim] for spec in inputs)
    shape = (*first.shape[:dim], total, *first.shape[dim + 1 :])
    batch = next((spec.batch for spec in inputs if spec.batch is not None), None)
    return (TensorSpec(shape, first.dtype, first.layout, batch),)


def infer_relayout(attributes: Relayout, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    if attributes.layout is Layout.NHWC and inputs[0].rank not in MEMORY_FORMATS:
        raise InvalidInputError(f"relayout: only ranks 4 and 5 can be NHWC, got {inputs[0]}")
    return (inputs[0].with_(layout=attributes.layout, dtype=attributes.dtype),)


def reshape(attributes: Reshape, x: torch.Tensor) -> torch.Tensor:
    # At another batch than the largest, only dimension 0 differs.
    if x.numel() == 0 or not attributes.shape:
        return x.reshape(attributes.shape)
    return x.reshape(-1, *attributes.shape[1:])


def flatten(attributes: FlattenPixels, x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).reshape(x.shape[0], -1)


def permute(attributes: Permute, x: torch.Tensor) -> torch.Tensor:
    return x.permute(attributes.dims)


def expand(attributes: Expand, x: torch.Tensor) -> torch.Tensor:
    return x.expand(attributes.shape)


def slice_(attributes: Slice, x: torch.Tensor) -> torch.Tensor:
    cut = slice(attributes.start, attributes.stop, attributes.step)
    return x[(slice(None),) * attributes.dim + (cut,)]


def concat(attributes: Concat, *tensors: torch.Tensor) -> torch.Tensor:
    return torch.cat(tensors, attributes.dim)


def relayout(attributes: Relayout, x: torch.Tensor) -> torch.Tensor:
    return as_layout(x.to(attributes.dtype), attributes.layout)


def read_strides(problem: Problem) -> ep.Access:
    """How the single input is read in the memory order of the output."""
    x, out, attributes = problem.inputs[0], problem.output.spec, problem.attributes
    strides, offset = list(x.strides), x.offset
    if isinstance(attributes, Permute):
        strides = [strides[dim] for dim in attributes.dims]
    elif isinstance(attributes, Slice):
        offset += attributes.start * strides[attributes.dim]
        strides[attributes.dim] *= attributes.step
    elif isinstance(attributes, Flip):
        for dim in attributes.dims:
            offset += (x.shape[dim] - 1) * strides[dim]
            strides[dim] = -strides[dim]
    else:
        return ep.access(x, out)
    order = out.layout.order(out.rank)
    return ep.Access(tuple(strides[dim] for dim in order) or (0,), offset, str(x.spec))


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    reads = (read_strides(problem),)
    return (pointwise.launch_reads(problem, tile, reads, (pointwise.LOAD,)),)


def linear_sizes(x: Operand, out: Operand) -> tuple[int, ...] | None:
    """Extents of one walk through two tensors that hold the same elements in the same order.

    A boundary is needed wherever either side jumps (its pitch is wider than its row) and where the
    batch dimension ends. None where the boundaries do not nest.
    """
    return refine(_boundaries(x), _boundaries(out))


def _boundaries(operand: Operand) -> tuple[int, int, int]:
    """A tensor's samples, the rows of each, and their elements; 1 where no walk needs to know."""
    row = ep.memory_sizes(operand.spec)[-1]
    row = row if operand.pitch != row and operand.spec.rank > 1 else 1
    samples = operand.shape[0] if operand.spec.batch is not None else 1
    return samples, operand.spec.numel // samples // row, row


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
    written, reads = _linear_access(out, sizes), (_linear_access(x, sizes),)
    stages, refs = (pointwise.LOAD,), (Ref("input", 0),)
    return (pointwise.launch_chain(problem, tile, sizes, written, reads, stages, refs),)


def launches_concat(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One copy per input into its slice of the output."""
    out, dim = problem.output, problem.attributes.expect(Concat).dim
    order = out.spec.layout.order(out.spec.rank)
    start, result = 0, []
    for index, x in enumerate(problem.inputs):
        offset = out.offset + start * out.strides[dim]
        written = ep.Access(tuple(out.strides[at] for at in order), offset)
        sizes = tuple(x.shape[at] for at in order)
        reads = (ep.Access(tuple(x.strides[at] for at in order), x.offset, str(x.spec)),)
        stages, refs = (pointwise.LOAD,), (Ref("input", index),)
        result.append(pointwise.launch_chain(problem, tile, sizes, written, reads, stages, refs))
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


def view_of(attributes: Attributes, x: Operand, out: TensorSpec) -> Operand | None:
    """The op's result as an operand inside its input's buffer, or None where a copy is needed."""
    if x.spec.dtype is not out.dtype:
        return None
    if isinstance(attributes, Slice):
        if attributes.step != 1:
            return None
        size = out.shape[attributes.dim]
        return slice_operand(x, attributes.dim, attributes.start, size)
    if isinstance(attributes, rearrangement.Rearrange):
        return rearrangement.view_of(attributes, x, out)
    candidate = Operand.dense(out)
    candidate = Operand(out, candidate.pitch, x.offset)
    is_whole = x.pitch == Operand.dense(x.spec).pitch
    if isinstance(attributes, (Reshape, FlattenPixels)):
        return candidate if is_whole else None
    strides = x.strides
    if isinstance(attributes, Permute) and is_whole:
        strides = tuple(strides[dim] for dim in attributes.dims)
    elif not isinstance(attributes, Relayout):
        return None
    for place in (Operand(out, x.pitch, x.offset), candidate):
        walks = zip(strides, place.strides, out.shape, strict=True)
        if all(read == written or size == 1 for read, written, size in walks):
            return place
    return None
