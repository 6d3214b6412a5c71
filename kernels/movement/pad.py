"""pad: a border around a tensor, or a crop where a side's width is negative.

With i = o − before for every dimension at once, y[o] = x[i] where i lies inside x, and elsewhere

    constant   value                          0 0 | a b c d | 0 0
    reflect    x[−i], x[2(L − 1) − i]         c b | a b c d | c b    widths below L
    replicate  x[0], x[L − 1]                 a a | a b c d | d d
    circular   x[i + L], x[i − L]             c d | a b c d | a b    widths up to L

A crop on one side and a border on the other are a border, then a crop, but for circular ones, where
torch crops first and repeats what is left.

x: rank 1 to 5 in any layout -> y: the same layout, each dimension `before + size + after` long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import (
    Arguments,
    Attributes,
    Builder,
    Config,
    Cost,
    Launch,
    Op,
    Problem,
    Target,
    X,
    Y,
    config,
    operand_refs,
    tensor_bytes,
    tile_config,
)
from ..contract.spec import Layout, TensorSpec, rows_and_columns

MOST_DIMENSIONS = 5
MODES = ("constant", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Pad(Attributes):
    """Elements added before and after each logical dimension (negative: removed), how they are
    found, and their value where that is constant."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    value: float = 0.0
    mode: str = "constant"

    @property
    def sides(self) -> list[int]:
        """As torch wants them: before and after of the last dimension, then of the one before."""
        pairs = zip(reversed(self.before), reversed(self.after), strict=True)
        return [width for pair in pairs for width in pair]


def check_border(name: str, mode: str, x: TensorSpec, dim: int, before: int, after: int) -> None:
    """Raises InvalidInputError where a border needs elements that dimension `dim` of x lacks."""
    cropped = x.shape[dim] + min(before, 0) + min(after, 0)
    most = {"reflect": x.shape[dim] - 1, "circular": cropped}.get(mode)
    if most is not None and max(before, after) > most:
        raise InvalidInputError(
            f"{name}: mode {mode!r} can add at most {most} to dimension {dim} of {x}, got "
            f"({before}, {after})"
        )


def infer(attributes: Pad, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Every dimension longer by its two sides."""
    (x,) = inputs
    before, after, mode = attributes.before, attributes.after, attributes.mode
    if mode not in MODES:
        raise InvalidInputError(f"pad: unknown mode {mode!r}; there are {', '.join(MODES)}")
    if not 1 <= x.rank <= MOST_DIMENSIONS:
        raise InvalidInputError(f"pad: expected 1 to {MOST_DIMENSIONS} dimensions, got {x}")
    if not len(before) == len(after) == x.rank:
        raise InvalidInputError(f"pad: {attributes} does not give both sides of each dim of {x}")
    if x.batch is not None and (x.rank == 1 or before[0] or after[0]):
        raise InvalidInputError(f"pad: the batch dimension of {x} cannot be padded")
    if mode != "constant":
        if x.rank == 1:
            raise InvalidInputError(f"pad: mode {mode!r} needs two dimensions or more, got {x}")
        fixed = _unpadded(x.rank)
        if any((*before[:fixed], *after[:fixed])):
            raise InvalidInputError(
                f"pad: mode {mode!r} leaves the first {fixed} of {x.rank} dimensions alone, as in "
                f"torch; got {attributes}"
            )
        for dim in range(x.rank):
            check_border("pad", mode, x, dim, before[dim], after[dim])
    sizes = tuple(zip(before, x.shape, after, strict=True))
    shape = tuple(low + size + high for low, size, high in sizes)
    # Torch crops before it pads with a constant.
    crops = (min(low, 0) + size + min(high, 0) for low, size, high in sizes)
    if min(shape) < 1 or (mode == "constant" and min(crops) < 0):
        raise InvalidInputError(f"pad: {attributes} leaves nothing of {x}")
    return (x.with_(shape=shape),)


def _unpadded(rank: int) -> int:
    """Leading dimensions that torch does not pad but with a constant: it pads at most three."""
    return max(1, rank - 3)


def reference(attributes: Pad, x: torch.Tensor) -> torch.Tensor:
    if attributes.mode == "constant":
        return F.pad(x, attributes.sides, value=attributes.value)
    return F.pad(x, attributes.sides[: 2 * (x.dim() - _unpadded(x.dim()))], attributes.mode)


@triton.jit
def correction(index, SIZE: tl.constexpr, MODE: tl.constexpr):
    """What leads from an index outside 0 ... SIZE − 1 to the one whose element stands there; zero
    inside."""
    if MODE == "reflect":
        result = tl.maximum(-2 * index, 0) + tl.minimum(2 * (SIZE - 1) - 2 * index, 0)
    elif MODE == "replicate":
        result = tl.maximum(-index, 0) + tl.minimum(SIZE - 1 - index, 0)
    else:
        result = tl.where(index < 0, SIZE, 0) - tl.where(index >= SIZE, SIZE, 0)
    return result


@triton.jit
def pad_kernel(
    x,
    y,
    extras,
    m,
    DIMS: tl.constexpr,
    SIZES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BEFORE: tl.constexpr,
    OPEN: tl.constexpr,
    STRIDES: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    MODE: tl.constexpr,
    VALUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # Tuples hold the dimensions in memory order: all but the last make up the rows. OPEN tells
    # where an index may leave the input.
    INNER: tl.constexpr = SIZES[DIMS - 1]
    INNER_OUT: tl.constexpr = OUTPUTS[DIMS - 1]
    column_tiles: tl.constexpr = (INNER_OUT + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    column_mask = columns < INNER_OUT
    if WIDE:
        rows = rows.to(tl.int64)
    rows_inside = row_mask
    columns_inside = column_mask
    inner = columns - BEFORE[DIMS - 1]
    if OPEN[DIMS - 1]:
        if MODE == "constant":
            columns_inside = (inner >= 0) & (inner < INNER)
        else:
            inner = inner + correction(inner, INNER, MODE)
    rest = rows
    source = tl.zeros_like(rows)
    for step in tl.static_range(DIMS - 1):
        # The outermost dimension may be the batch of this call: it is bounded by m alone.
        index = rest if step == DIMS - 2 else rest % OUTPUTS[DIMS - 2 - step]
        rest = rest // OUTPUTS[DIMS - 2 - step]
        index = index - BEFORE[DIMS - 2 - step]
        if OPEN[DIMS - 2 - step]:
            if MODE == "constant":
                rows_inside = rows_inside & (index >= 0) & (index < SIZES[DIMS - 2 - step])
            else:
                index = index + correction(index, SIZES[DIMS - 2 - step], MODE)
        source += index * STRIDES[DIMS - 2 - step]
    inside = rows_inside[:, None] & columns_inside[None, :]
    value = tl.load(x + X_OFFSET + source[:, None] + inner[None, :], mask=inside, other=0.0)
    acc = value.to(tl.float32)
    if MODE == "constant":
        acc = tl.where(inside, acc, VALUE)
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """The one launch of the kernel."""
    attributes = problem.attributes
    assert isinstance(attributes, Pad)
    x, out = problem.inputs[0], problem.output
    order = out.spec.layout.order(out.spec.rank)

    def in_memory(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[dim] for dim in order)

    before, after = in_memory(attributes.before), in_memory(attributes.after)
    sizes, strides, offset = in_memory(x.shape), in_memory(x.strides), x.offset
    if attributes.mode == "circular":
        low, high = (tuple(max(-width, 0) for width in side) for side in (before, after))
        sizes = tuple(size - a - b for size, a, b in zip(sizes, low, high, strict=True))
        offset += sum(a * stride for a, stride in zip(low, strides, strict=True))
        before = tuple(max(width, 0) for width in before)
    rows, columns = rows_and_columns(out.spec)
    launch = Launch(
        kernel=pad_kernel,
        pointers={"x": X, "y": Y},
        extras=operand_refs(problem),
        rows=rows,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_ROWS"],
        columns=-(-columns // tile["BLOCK_COLUMNS"]),
        constexprs={
            "DIMS": len(order),
            "SIZES": sizes,
            "OUTPUTS": in_memory(out.shape),
            "BEFORE": before,
            "OPEN": tuple(low > 0 or high > 0 for low, high in zip(before, after, strict=True)),
            "STRIDES": strides,
            "X_OFFSET": offset,
            "Y_PITCH": out.pitch,
            "Y_OFFSET": out.offset,
            "MODE": attributes.mode,
            "VALUE": float(attributes.value),
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, out.spec),
            "WIDE": problem.is_wide,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return (launch,)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """512 to 4096 elements per program, in wide or in square tiles."""
    for elements in (512, 1024, 2048, 4096):
        for columns in (32, 64, 128, 512):
            yield config(4, 1, BLOCK_ROWS=elements // columns, BLOCK_COLUMNS=columns)


def default(problem: Problem, target: Target) -> Config:
    rows, columns = rows_and_columns(problem.output.spec)
    return tile_config(rows, columns, target)


def cost(problem: Problem) -> Cost:
    read, written = tensor_bytes(problem)
    return Cost(0, read, written)


def _capture(g: Builder, a: Arguments) -> Any:
    """Sides are torch's: before and after of the last dimension, then of the one before it, ..."""
    spec, mode, value = g.spec(a.self), a.get("mode", "constant"), float(a.value or 0.0)
    if not 1 <= spec.rank <= MOST_DIMENSIONS:
        return g.refuse(f"padding of a rank-{spec.rank} tensor; ranks 1 to {MOST_DIMENSIONS} are")
    if not any(a.pad):
        return a.self
    missing = [0] * (spec.rank - len(a.pad) // 2)
    before = (*missing, *reversed([int(width) for width in a.pad[0::2]]))
    after = (*missing, *reversed([int(width) for width in a.pad[1::2]]))
    return g.apply("pad", (a.self,), Pad(before, after, value, mode))


NHWC, DENSE = Layout.NHWC, Layout.DENSE


OP = Op(
    name="pad",
    attributes=Pad,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    cost=cost,
    aten={"aten.pad.default": _capture, "aten.constant_pad_nd.default": _capture},
)  # fmt: skip
