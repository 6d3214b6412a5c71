"""sum, mean, amax, norm, var, std: y = the sum, average, maximum, Euclidean norm, variance or
standard deviation of x over a set of dimensions.

x: any rank, dense or NHWC; y: the kept dimensions (the reduced ones stay as 1 with `keepdim`).
fp32 accumulation, and of squares too: in half precision they would overflow above 256. Variances
take two passes, because E[x²] − E[x]² cancels where the mean is large.

One kernel. Its tile is (rows, reduced elements, columns), where rows and columns are those of the
output in memory; the offsets of all three are generated from the input's strides. Which of them is
contiguous decides the shape of the tile: global average pooling of NHWC images reads along the
columns (channels), a reduction of the last dimension along the reduced elements. Partial results
are kept per lane and folded once at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract import op
from ..contract.cost_model import MULTIPROCESSORS
from ..contract.elementary import NAN
from ..contract.op import Arguments, Attributes, Builder, Capture, Config, Launch, Op, Problem
from ..contract.spec import Layout, TensorSpec
from ..contract.targets import Target
from ..movement.movement import Slice
from ..movement.pointwise import Pointwise
from ..movement.rearrangement import Reshape
from ..tile.geometry import Output, tile_launch
from ..tile.space import output_tile
from . import topk
from .scan import Scan


@dataclass(frozen=True)
class Reduce(Attributes):
    """The (non-negative, ascending) dimensions that are reduced, and whether they stay as 1."""

    dims: tuple[int, ...] = ()
    keepdim: bool = False


@dataclass(frozen=True)
class Variance(Reduce):
    """correction: what is subtracted from the count before the squared differences are divided."""

    correction: float = 1.0


def infer(name: str, attributes: Reduce, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The kept dimensions. Images stay as they are; a rank 4 made of another rank is NHWC."""
    (x,) = inputs
    dims = attributes.dims
    if not dims or list(dims) != sorted(set(dims)) or not 0 <= dims[0] <= dims[-1] < x.rank:
        raise InvalidInputError(f"{name}: {dims} are not ascending dimensions of {x}")
    if x.batch is not None and dims[0] == 0:
        raise InvalidInputError(
            f"{name}: dimension 0 of {x} is the batch; its samples must stay apart"
        )
    if isinstance(attributes, Variance):
        count, less = math.prod(x.shape[dim] for dim in dims), attributes.correction
        if count <= less:
            raise InvalidInputError(
                f"{name}: the variance of {count} numbers with correction {less:g} does not exist"
            )
    if attributes.keepdim:
        shape = tuple(1 if dim in dims else size for dim, size in enumerate(x.shape))
    else:
        shape = tuple(size for dim, size in enumerate(x.shape) if dim not in dims)
    layout = x.layout if x.rank == len(shape) else Layout.DENSE
    if len(shape) == 4 != x.rank:
        layout = Layout.NHWC
    return (TensorSpec(shape, x.dtype, layout, x.batch),)


def reference(name: str, attributes: Reduce, x: torch.Tensor) -> torch.Tensor:
    dims, keepdim = attributes.dims, attributes.keepdim
    if isinstance(attributes, Variance):
        made: torch.Tensor = getattr(x, name)(
            dims, correction=attributes.correction, keepdim=keepdim
        )
    elif name == "norm":
        made = torch.linalg.vector_norm(x, 2, dims, keepdim)
    else:
        made = getattr(x, name)(dims, keepdim)
    return made


@triton.jit
def reduce_kernel(
    x, y, extras, m, LENGTH: tl.constexpr, BLOCK_LENGTH: tl.constexpr, X_OFFSET: tl.constexpr,
    X_ROW: tl.constexpr, X_REDUCED: tl.constexpr, X_COLUMN_STRIDE: tl.constexpr,
    Y_ROW: tl.constexpr, Y_COLUMN_STRIDE: tl.constexpr,
    IS_MAXIMUM: tl.constexpr, IS_CENTRED: tl.constexpr, IS_SQUARED: tl.constexpr,
    IS_ROOT: tl.constexpr, DIVISOR: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    lanes = tl.arange(0, BLOCK_LENGTH)
    mask = row_mask[:, None] & column_mask[None, :]
    if TILE.wide:
        lanes = lanes.to(tl.int64)
    base = x + X_OFFSET + X_ROW(rows)[:, None] + (columns * X_COLUMN_STRIDE)[None, :]
    base = base[:, None, :]
    neutral: tl.constexpr = float("-inf") if IS_MAXIMUM else 0.0
    if IS_CENTRED:
        total = tl.full((M, BLOCK_LENGTH, N), 0.0, tl.float32)
        for start in range(0, LENGTH, BLOCK_LENGTH):
            reduced = start + lanes
            live = mask[:, None, :] & (reduced < LENGTH)[None, :, None]
            value = tl.load(base + X_REDUCED(reduced)[None, :, None], mask=live, other=0.0)
            total += value.to(tl.float32)
        mean = tl.sum(total, axis=1)
        mean = tl.div_rn(mean, tl.full(mean.shape, LENGTH, tl.float32))[:, None, :]
    partial = tl.full((M, BLOCK_LENGTH, N), neutral, tl.float32)
    for start in range(0, LENGTH, BLOCK_LENGTH):
        reduced = start + lanes
        live = mask[:, None, :] & (reduced < LENGTH)[None, :, None]
        value = tl.load(base + X_REDUCED(reduced)[None, :, None], mask=live, other=neutral)
        value = value.to(tl.float32)
        if IS_CENTRED:
            value = tl.where(live, value - mean, 0.0)
        if IS_MAXIMUM:
            partial = tl.maximum(partial, value, propagate_nan=NAN)
        elif IS_SQUARED:
            # Fused by hand: a product would fuse with the first sum of two lanes, which then differ
            # in the last bit, and from Triton 3.8 on both are stored.
            partial = tl.fma(value, value, partial)
        else:
            partial += value
    if IS_MAXIMUM:
        # tl.max drops NaN on a GPU.
        is_nan = partial != partial
        largest = tl.max(tl.where(is_nan, neutral, partial), axis=1)
        acc = tl.where(tl.sum(is_nan.to(tl.int32), axis=1) > 0, float("nan"), largest)
    else:
        acc = tl.sum(partial, axis=1)
    if DIVISOR != 1:
        acc = tl.div_rn(acc, tl.full(acc.shape, DIVISOR, tl.float32))
    if IS_ROOT:
        acc = tl.sqrt_rn(acc)
    acc = OUTPUT.epilogue(acc, rows, columns, row_mask, column_mask, extras)
    address = y + OUTPUT.offset + Y_ROW(rows)[:, None] + (columns * Y_COLUMN_STRIDE)[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Walk:
    """What the kernel goes over.

    sizes: the output's extents in memory order, neighbours merged where every tensor allows it;
    the last are the columns. Strides follow them: `written`, `read` (the input at the first
    reduced element), `operands`. `reduced_sizes`, `reduced_strides`: the reduced dimensions of the
    input from the outermost to the innermost in memory.
    """

    sizes: tuple[int, ...]
    written: tuple[int, ...]
    read: tuple[int, ...]
    operands: tuple[tuple[int, ...], ...]
    reduced_sizes: tuple[int, ...]
    reduced_strides: tuple[int, ...]

    @property
    def rows(self) -> int:
        return math.prod(self.sizes[:-1])

    @property
    def columns(self) -> int:
        return self.sizes[-1]

    @property
    def length(self) -> int:
        return math.prod(self.reduced_sizes)

    @property
    def is_along_columns(self) -> bool:
        """Whether neighbouring columns, not neighbouring reduced elements, are contiguous."""
        return self.read[-1] == 1 and self.columns > 1


def walk_of(problem: Problem) -> Walk:
    """How the kernel goes over the problem's tensors."""
    attributes, x, out = problem.attributes.expect(Reduce), problem.inputs[0], problem.output.spec
    kept = [
        0 if dim in attributes.dims else stride
        for dim, stride in enumerate(x.strides)
        if attributes.keepdim or dim not in attributes.dims
    ]
    read = tuple(kept[dim] for dim in out.layout.order(out.rank)) or (0,)
    written = ep.access(problem.output, out).strides
    walks = (written, read, *(ep.access(operand, out).strides for operand in problem.operands))
    sizes = ep.memory_sizes(out)
    if len(sizes) == 1 and out.batch is not None:
        # Only rows vary with the batch.
        sizes, walks = (*sizes, 1), tuple((*strides, 0) for strides in walks)
    sizes, walks = ep.collapse(sizes, walks, keep_first=out.batch is not None)
    order = [dim for dim in x.spec.layout.order(x.spec.rank) if dim in attributes.dims]
    return Walk(
        sizes,
        walks[0],
        walks[1],
        walks[2:],
        tuple(x.shape[dim] for dim in order),
        tuple(x.strides[dim] for dim in order),
    )


def _divisor(name: str, attributes: Reduce, length: int) -> float:
    if isinstance(attributes, Variance):
        return length - attributes.correction
    return length if name == "mean" else 1


def _launches(name: str, problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    walk, attributes = walk_of(problem), problem.attributes.expect(Reduce)
    reads = tuple(
        ep.Access(strides, operand.offset, str(operand.spec))
        for strides, operand in zip(walk.operands, problem.operands, strict=True)
    )
    # Where rows lie only Y_ROW tells.
    epilogue = ep.generate(problem.epilogue, reads, walk.sizes)
    launch = tile_launch(
        problem, tile, reduce_kernel,
        constexprs={
            "LENGTH": walk.length, "BLOCK_LENGTH": tile["BLOCK_LENGTH"],
            "X_OFFSET": problem.inputs[0].offset,
            "X_ROW": ep.row_offset_function(walk.sizes[:-1], walk.read[:-1]),
            "X_REDUCED": ep.row_offset_function(walk.reduced_sizes, walk.reduced_strides),
            "X_COLUMN_STRIDE": walk.read[-1],
            "Y_ROW": ep.row_offset_function(walk.sizes[:-1], walk.written[:-1]),
            "Y_COLUMN_STRIDE": walk.written[-1],
            "IS_MAXIMUM": name == "amax", "IS_CENTRED": name in ("var", "std"),
            "IS_SQUARED": name in ("var", "std", "norm"), "IS_ROOT": name in ("std", "norm"),
            "DIVISOR": _divisor(name, attributes, walk.length),
        },
        output=Output(1, 1, walk.columns, 0, problem.output.offset, epilogue),
        rows=walk.rows,
    )  # fmt: skip
    return (launch,)


def _tile(walk: Walk, elements: int, contiguous: int, num_warps: int) -> Config:
    """A tile of `elements`, `contiguous` of them along the dimension that is contiguous."""
    columns, length = op.power_of_two(walk.columns), op.power_of_two(walk.length)
    if walk.is_along_columns:
        columns = min(contiguous, columns)
        length = min(elements // columns, length)
    else:
        length = min(contiguous, length)
        columns = min(elements // length, columns)
    rows = min(max(1, elements // (columns * length)), op.power_of_two(walk.rows))
    return op.config(num_warps, 1, BLOCK_ROWS=rows, BLOCK_LENGTH=length, BLOCK_COLUMNS=columns)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """1024 to 4096 elements in flight, in runs of 16 to 1024 contiguous ones."""
    walk = walk_of(problem)
    tiles = {
        _tile(walk, elements, contiguous, num_warps): None
        for elements in (1024, 2048, 4096)
        for contiguous in (16, 32, 64, 128, 1024)
        for num_warps in (4, 8)
    }
    yield from tiles


def default(problem: Problem, target: Target) -> Config:
    """2048 elements, 16 per thread: at global average pooling 64 channels by 32 pixels, or fewer
    channels (down to 16, a 32-byte sector of halves) where that leaves multiprocessors idle; a run
    of up to 1024 where the reduced elements are contiguous."""
    walk = walk_of(problem)
    if target.name == "interpreter":
        return _tile(walk, 1 << 20, 4096, num_warps=1)
    if not walk.is_along_columns:
        return _tile(walk, 2048, 1024, num_warps=4)
    contiguous = 64
    while contiguous > 16 and walk.rows * -(-walk.columns // contiguous) < MULTIPROCESSORS:
        contiguous //= 2
    return _tile(walk, 2048, contiguous, num_warps=4)


@op.counted
def cost(problem: Problem) -> int:
    """One operation per input element, four where its squared difference to the mean is summed."""
    operations = 4 if isinstance(problem.attributes, Variance) else 1
    return operations * problem.inputs[0].spec.numel


def _dims(g: Builder, a: Arguments) -> tuple[int, ...]:
    """The dimensions of a reduction: all where none are named."""
    dims, rank = a.get("dim"), g.spec(a.self).rank
    chosen = [dims] if isinstance(dims, int) else dims or range(rank)
    return tuple(sorted({dim % rank for dim in chosen}))


def _reduced(g: Builder, name: str, x: Any, a: Arguments) -> Any:
    """The reduction of x as a call of it asks for."""
    dims, keepdim, dtype = _dims(g, a), a.get("keepdim", False), a.get("dtype")
    if dtype not in (None, g.spec(x).dtype):
        what = "a norm" if "ord" in a else name
        return g.refuse(f"{what} that changes the dtype from {g.spec(x).dtype} to {dtype}")
    return g.apply(name, (x,), Reduce(dims, keepdim)) if g.spec(x).rank else x


def _plain(g: Builder, name: str, x: Any) -> Any:
    return g.apply(name, (x,), Pointwise())


def _capture(name: str) -> Capture:
    return lambda g, a: _reduced(g, name, a.self, a)


def _capture_variance(name: str, with_mean: bool = False) -> Capture:
    def capture(g: Builder, a: Arguments) -> Any:
        dims, correction = _dims(g, a), a.get("correction")
        less = float(a.get("unbiased", True) if correction is None else correction)
        y = g.apply(name, (a.self,), Variance(dims, a.keepdim, less))
        return (y, g.apply("mean", (a.self,), Reduce(dims, a.keepdim))) if with_mean else y

    return capture


def _capture_norm(g: Builder, a: Arguments) -> Any:
    """The 1-, 2- and maximum norm of vectors; the first and the last are exact in any dtype until
    they are summed."""
    names = {1: "sum", 2: "norm", math.inf: "amax"}
    if a.ord not in names:
        return g.refuse(f"the {a.ord}-norm; only the 1-, 2- and maximum norm are")
    x = a.self
    if a.ord != 2 or g.spec(x).rank == 0:
        x = _plain(g, "abs", x)
    return _reduced(g, names[a.ord], x, a)


def _capture_amin(g: Builder, a: Arguments) -> Any:
    return _plain(g, "neg", _reduced(g, "amax", _plain(g, "neg", a.self), a))


def _decided(g: Builder, a: Arguments, everywhere: bool) -> Any:
    """Whether all elements, or any, are other than zero: the largest of numbers that say which are
    (or, for all, are not), as 1."""
    x, dims = a.self, _dims(g, a)
    if g.spec(x).dtype is not torch.bool:
        x = g.apply("ne", (x,), Pointwise(literal=0.0))
    if not g.spec(x).rank:
        return x
    numbers = g.apply("choose", (x,), Pointwise((0.0, 1.0) if everywhere else (1.0, 0.0)))
    largest = g.apply("amax", (numbers,), Reduce(dims, a.get("keepdim", False)))
    return g.apply("eq" if everywhere else "ne", (largest,), Pointwise(literal=0.0))


def _capture_product(g: Builder, a: Arguments) -> Any:
    """The last of the products of all elements before, and that: `cumprod` writes them all."""
    x, spec, keepdim = a.self, g.spec(a.self), a.get("keepdim", False)
    if a.dtype not in (None, spec.dtype):
        return g.refuse(f"prod that changes the dtype from {spec.dtype} to {a.dtype}")
    if "dim" not in a:
        x = g.apply("reshape", (x,), Reshape((spec.numel,)))
    dim = a.get("dim", 0) % max(1, g.spec(x).rank)
    size = g.spec(x).shape[dim]
    products = g.apply("cumprod", (x,), Scan(dim))
    last = g.apply("slice", (products,), Slice(dim, size - 1, size))
    if keepdim:
        return last
    shape = g.spec(last).shape
    return g.apply("reshape", (last,), Reshape((*shape[:dim], *shape[dim + 1 :])))


def _with_places(g: Builder, a: Arguments, values: Any, x: Any) -> Any:
    """The extremes along a dimension and where they stand: kernels of their own, of which those
    that nobody reads are left out."""
    if a.dim % max(1, g.spec(x).rank) == 0 and g.spec(x).batch is not None:
        return values, None
    return values, topk.place_of(g, x, a.dim, a.keepdim)


CAPTURES: dict[str, dict[str, Capture]] = {
    "sum": dict.fromkeys(("sum.dim_IntList", "sum.default"), _capture("sum")),
    "mean": {
        **dict.fromkeys(("mean.dim", "mean.default"), _capture("mean")),
        **dict.fromkeys(
            ("var_mean.correction", "var_mean.dim"), _capture_variance("var", with_mean=True)
        ),
    },
    "amax": {
        **dict.fromkeys(("amax.default", "max.default"), _capture("amax")),
        **dict.fromkeys(("amin.default", "min.default"), _capture_amin),
        **dict.fromkeys(("prod.default", "prod.dim_int"), _capture_product),
        **{
            f"{name}.{kind}": partial(_decided, everywhere=name == "all")
            for name in ("any", "all")
            for kind in ("default", "dim", "dims")
        },
        "max.dim": lambda g, a: _with_places(g, a, _reduced(g, "amax", a.self, a), a.self),
        "min.dim": lambda g, a: _with_places(g, a, _capture_amin(g, a), _plain(g, "neg", a.self)),
    },
    "norm": {"linalg_vector_norm.default": _capture_norm},
    **{
        name: dict.fromkeys((f"{name}.correction", f"{name}.dim"), _capture_variance(name))
        for name in ("var", "std")
    },
}
"""The calls that become each reduction."""
OPS = tuple(
    Op(
        name, Variance if name in ("var", "std") else Reduce, partial(infer, name),
        partial(reference, name), partial(_launches, name), cost, configs, default,
        # Not centred on zero: an error relative to a sum that cancels means nothing.
        input_range=(-1.0, 3.0),
        aten={f"aten.{overload}": capture for overload, capture in captures.items()},
    )
    for name, captures in CAPTURES.items()
)  # fmt: skip
