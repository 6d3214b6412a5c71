"""normalize: y = (x − mean) / sqrt(var + eps), mean and biased variance over a set of dimensions.

Layer, group and instance normalisation, and batch normalisation by the batch's own statistics,
differ only in the set: the last dimensions; the pixels and a group's channels; the pixels; samples
and pixels. RMS normalisation leaves the mean out. Weight and bias are stages of the epilogue.

x and y: any rank, dense or NHWC; fp32 inside. In memory the tensor is a matrix of rows and columns
(the innermost dimension). Its columns are `groups` runs of `width` neighbours that are normalised
together; its rows are (outer, length): `length` of them share their statistics. A program owns
BLOCK_OUTER outer indices by BLOCK_GROUPS groups and
- holds all they normalise in registers, where that fits: one read, mean and variance in two passes
  over registers, one write;
- otherwise walks it twice: every lane keeps mean and squared deviations of what it has seen
  (Welford 1962), as differences to the first element; the lanes are combined (Chan, Golub and
  LeVeque 1979), and a second read, mostly from the L2 cache, writes the result.
E[x²] − E[x]² is never formed: it cancels where the mean is large.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.cost_model import MULTIPROCESSORS
from ..contract.op import (
    Arguments,
    Attributes,
    Builder,
    Config,
    Cost,
    Launch,
    Op,
    Problem,
    X,
    Y,
    config,
    operand_refs,
    power_of_two,
    tensor_bytes,
)
from ..contract.spec import TensorSpec
from ..contract.targets import Target
from ..movement.rearrangement import Reshape
from . import batch_norm
from .normalize_kernel import normalize_kernel

WHOLE = 16384
"""Most elements that a program keeps in registers: 32 per thread at 16 warps."""
RUN, SHORTEST_RUN = 32, 16
"""Neighbouring elements that a program reads of a row, and at least: a 32-byte sector of halves."""


@dataclass(frozen=True)
class Normalize(Attributes):
    """dims: the (non-negative, ascending) dimensions normalised together; groups: into how many
    parts dimension 1, then one of them, is split first; centred: whether the mean is subtracted."""

    dims: tuple[int, ...] = ()
    groups: int = 1
    eps: float = 1e-5
    centred: bool = True


def infer(attributes: Normalize, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The input's own spec."""
    (x,) = inputs
    dims, groups = attributes.dims, attributes.groups
    if not dims or list(dims) != sorted(set(dims)) or not 0 <= dims[0] <= dims[-1] < x.rank:
        raise InvalidInputError(f"normalize: {dims} are not ascending dimensions of {x}")
    if x.batch is not None and dims[0] == 0:
        raise InvalidInputError(
            f"normalize: dimension 0 of {x} is the batch: statistics over all samples of a call "
            "need a batch of fixed size (dynamic_batch=None)"
        )
    if groups != 1 and (1 not in dims or groups < 1 or x.shape[1] % groups):
        raise InvalidInputError(
            f"normalize: dimension 1 of {x} cannot be split into {groups} groups over {dims}"
        )
    return (x,)


def reference(attributes: Normalize, x: torch.Tensor) -> torch.Tensor:
    y = x if x.dtype is torch.float64 else x.float()
    dims = attributes.dims
    if attributes.groups > 1:
        y = y.unflatten(1, (attributes.groups, -1))
        dims = tuple(dim + (dim >= 1) for dim in dims)
    if attributes.centred:
        y = y - y.mean(dims, keepdim=True)
    variance = y.square().mean(dims, keepdim=True)
    return (y / torch.sqrt(variance + attributes.eps)).reshape(x.shape).to(x.dtype)


@dataclass(frozen=True)
class Walk:
    """The tensor as the kernel goes over it: rows (outer, length), columns (groups, width).

    outer_rows, length_rows: row strides of the dimensions that make up the two, with their sizes.
    """

    outer_sizes: tuple[int, ...]
    outer_rows: tuple[int, ...]
    length_sizes: tuple[int, ...]
    length_rows: tuple[int, ...]
    groups: int
    width: int

    @property
    def outer(self) -> int:
        return math.prod(self.outer_sizes)

    @property
    def length(self) -> int:
        return math.prod(self.length_sizes)

    def is_whole(self, tile: Config) -> bool:
        """Whether a program reads all it normalises at once."""
        return self.length <= tile["BLOCK_LENGTH"] and self.width <= tile["BLOCK_WIDTH"]


def walk_of(problem: Problem) -> Walk:
    """How the kernel goes over the problem's tensor."""
    attributes, spec = problem.attributes, problem.inputs[0].spec
    assert isinstance(attributes, Normalize)

    def parts(dim: int) -> tuple[tuple[int, bool], ...]:
        """A dimension's sizes, outermost first, and whether each is normalised over."""
        size = spec.shape[dim]
        if dim == 1 and attributes.groups > 1:
            return (attributes.groups, False), (size // attributes.groups, True)
        return ((size, dim in attributes.dims),)

    *row_dims, last = spec.layout.order(spec.rank)
    kept: list[tuple[int, int]] = []
    reduced: list[tuple[int, int]] = []
    stride = 1
    for size, is_reduced in reversed([part for dim in row_dims for part in parts(dim)]):
        (reduced if is_reduced else kept).insert(0, (size, stride))
        stride *= size
    columns = parts(last)
    return Walk(
        tuple(size for size, _ in kept),
        tuple(step for _, step in kept),
        tuple(size for size, _ in reduced),
        tuple(step for _, step in reduced),
        math.prod(size for size, is_reduced in columns if not is_reduced),
        math.prod(size for size, is_reduced in columns if is_reduced),
    )


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; its cost model counts the second read where there is one."""
    attributes, walk = problem.attributes, walk_of(problem)
    assert isinstance(attributes, Normalize)
    x, out = problem.inputs[0], problem.output
    reads = 1 if walk.is_whole(tile) else 2
    owned = walk.length * walk.width * tile["BLOCK_OUTER"] * tile["BLOCK_GROUPS"]
    launch = Launch(
        kernel=normalize_kernel,
        pointers={"x": X, "y": Y},
        extras=operand_refs(problem),
        rows=walk.outer,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_OUTER"],
        columns=-(-walk.groups // tile["BLOCK_GROUPS"]),
        constexprs={
            "LENGTH": walk.length, "GROUPS": walk.groups, "WIDTH": walk.width,
            "OUTER_ROW": ep.row_offset_function(walk.outer_sizes, walk.outer_rows),
            "LENGTH_ROW": ep.row_offset_function(walk.length_sizes, walk.length_rows),
            "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
            "EPS": attributes.eps,
            "CENTRED": attributes.centred,
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, out.spec),
            "WIDE": problem.is_wide,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=reads * owned * x.spec.dtype.itemsize,
    )  # fmt: skip
    return (launch,)


def _tile(walk: Walk, least: int, whole: int, run: int = RUN, warps: int | None = None) -> Config:
    """A tile that holds `least` elements or more, everything it normalises if that is at most
    `whole`, and reads runs of `run` neighbours."""
    width = min(power_of_two(walk.width), whole)
    groups = 1
    if width >= walk.width:
        groups = min(max(1, run // width), power_of_two(walk.groups))
    length = power_of_two(walk.length)
    if length * groups * width > whole:
        length = max(1, min(length, whole // 4 // (groups * width)))
    elif width >= walk.width:
        groups = max(groups, min(power_of_two(walk.groups), least // (length * width)))
    outer = max(1, min(power_of_two(walk.outer), least // (length * groups * width)))
    elements = outer * length * groups * width
    return config(
        warps or min(16, max(4, power_of_two(elements) // 512)),
        1,
        BLOCK_OUTER=outer,
        BLOCK_LENGTH=length,
        BLOCK_GROUPS=groups,
        BLOCK_WIDTH=width,
    )


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """512 to 2048 elements or one whole group per program; loops over groups of 2048 to 16384
    elements."""
    walk = walk_of(problem)
    yield from {
        _tile(walk, least, whole, run): None
        for least in (512, 1024, 2048)
        for whole in (2048, 4096, WHOLE)
        for run in (16, RUN, 64)
    }


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Groups whose columns take several tiles are done one at a time."""
    walk = walk_of(problem)
    if walk.width > tile["BLOCK_WIDTH"] and tile["BLOCK_GROUPS"] > 1:
        return f"{tile['BLOCK_GROUPS']} groups of {walk.width} columns in tiles of fewer"
    return None


def default(problem: Problem, target: Target) -> Config:
    """1024 elements, 8 per thread, or whatever is normalised together up to `WHOLE`; fewer groups
    side by side where that saves the second read or keeps more multiprocessors busy."""
    walk = walk_of(problem)
    if target.name == "interpreter":
        return _tile(walk, 1 << 18, 1 << 20, run=256, warps=1)
    tile, narrow = (_tile(walk, 1024, WHOLE, run) for run in (RUN, SHORTEST_RUN))
    programs = -(-walk.outer // tile["BLOCK_OUTER"]) * -(-walk.groups // tile["BLOCK_GROUPS"])
    if programs < MULTIPROCESSORS or (walk.is_whole(narrow) and not walk.is_whole(tile)):
        return narrow
    return tile


def cost(problem: Problem) -> Cost:
    """Sum, difference, square, its sum and the scaling."""
    read, written = tensor_bytes(problem)
    return Cost(5 * problem.output.spec.numel, read, written)


def _affine(g: Builder, x: Any, w: Any, b: Any, shape: Any, attributes: Normalize) -> Any:
    """With weight and bias, seen as tensors of `shape`, as an epilogue."""
    stages, operands = [], []
    for name, value in (("mul", w), ("add", b)):
        if value is None:
            continue
        if g.spec(value).shape != tuple(shape):
            value = g.apply("reshape", (value,), Reshape(tuple(shape)))
        stages.append(ep.Stage(name))
        operands.append(value)
    return g.apply("normalize", (x, *operands), attributes, tuple(stages))


def _per_channel(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of one number per channel."""
    return (spec.shape[1], *(1 for _ in spec.shape[2:]))


def _last(spec: TensorSpec, a: Arguments) -> tuple[int, ...]:
    """The last dimensions, as many as `normalized_shape` has."""
    return tuple(range(spec.rank - len(a.normalized_shape), spec.rank))


def _capture_layer_norm(g: Builder, a: Arguments) -> Any:
    attributes = Normalize(_last(g.spec(a.input), a), eps=float(a.eps))
    return _affine(g, a.input, a.weight, a.bias, a.normalized_shape, attributes)


def _capture_rms_norm(g: Builder, a: Arguments) -> Any:
    # What torch takes where none is given.
    eps = torch.finfo(torch.float32).eps if a.eps is None else float(a.eps)
    attributes = Normalize(_last(g.spec(a.input), a), eps=eps, centred=False)
    return _affine(g, a.input, a.weight, None, a.normalized_shape, attributes)


def _capture_group_norm(g: Builder, a: Arguments) -> Any:
    spec, groups = g.spec(a.input), a.num_groups
    dims = tuple(range(1, spec.rank))
    if groups == spec.shape[1] and spec.rank > 2:
        dims, groups = dims[1:], 1
    attributes = Normalize(dims, groups, float(a.eps))
    return _affine(g, a.input, a.weight, a.bias, _per_channel(spec), attributes)


def _capture_instance_norm(g: Builder, a: Arguments) -> Any:
    spec = g.spec(a.input)
    if not a.use_input_stats:
        return batch_norm.capture(g, a)
    attributes = Normalize(tuple(range(2, spec.rank)), eps=float(a.eps))
    return _affine(g, a.input, a.weight, a.bias, _per_channel(spec), attributes)


def _capture_batch_statistics(g: Builder, a: Arguments) -> Any:
    """Batch normalisation made with track_running_stats=False: y; no mean, no deviation."""
    spec = g.spec(a.input)
    attributes = Normalize((0, *range(2, spec.rank)), eps=float(a.eps))
    return _affine(g, a.input, a.weight, a.bias, _per_channel(spec), attributes), None, None


OP = Op(
    name="normalize",
    attributes=Normalize,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    # Far from zero: squares would cancel.
    input_range=(4.0, 8.0),
    aten={
        "aten.layer_norm.default": _capture_layer_norm,
        "aten.rms_norm.default": _capture_rms_norm,
        "aten.group_norm.default": _capture_group_norm,
        "aten.instance_norm.default": _capture_instance_norm,
        "aten._native_batch_norm_legit.no_stats": _capture_batch_statistics,
    },
    follows=True,
)  # fmt: skip
