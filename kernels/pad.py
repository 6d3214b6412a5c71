"""pad: a constant around a tensor, or a crop where a side's width is negative.

y[i] = x[i − before] where that lies inside x, else `value`, for every dimension at once.

x: rank 1 to 4 in any layout -> y: the same layout, each dimension `before + size + after` long.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..errors import InvalidInputError
from . import epilogue as ep
from .op import (
    Attributes,
    Builder,
    Config,
    Cost,
    Domain,
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
from .spec import Layout, TensorSpec, rows_and_columns

MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class Pad(Attributes):
    """Elements added before and after each logical dimension (negative: removed); their value."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    value: float = 0.0


def infer(attributes: Pad, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """Every dimension longer by its two sides."""
    (x,) = inputs
    if not 1 <= x.rank <= MOST_DIMENSIONS:
        raise InvalidInputError(f"pad: expected 1 to {MOST_DIMENSIONS} dimensions, got {x}")
    if not len(attributes.before) == len(attributes.after) == x.rank:
        raise InvalidInputError(f"pad: {attributes} does not give both sides of each dim of {x}")
    if x.batch is not None and (x.rank == 1 or attributes.before[0] or attributes.after[0]):
        raise InvalidInputError(f"pad: the batch dimension of {x} cannot be padded")
    shape = tuple(
        low + size + high
        for low, size, high in zip(attributes.before, x.shape, attributes.after, strict=True)
    )
    if min(shape) < 1:
        raise InvalidInputError(f"pad: {attributes} leaves nothing of {x}")
    return (x.with_(shape=shape),)


def reference(attributes: Pad, x: torch.Tensor) -> torch.Tensor:
    sides = zip(reversed(attributes.before), reversed(attributes.after), strict=True)
    return F.pad(x, [width for pair in sides for width in pair], value=attributes.value)


@triton.jit
def pad_kernel(
    x,
    y,
    extras,
    m,
    OUTER: tl.constexpr,
    UPPER: tl.constexpr,
    LOWER: tl.constexpr,
    INNER: tl.constexpr,
    OUTER_BEFORE: tl.constexpr,
    UPPER_BEFORE: tl.constexpr,
    LOWER_BEFORE: tl.constexpr,
    INNER_BEFORE: tl.constexpr,
    OUTER_STRIDE: tl.constexpr,
    UPPER_STRIDE: tl.constexpr,
    LOWER_STRIDE: tl.constexpr,
    X_OFFSET: tl.constexpr,
    UPPER_OUT: tl.constexpr,
    LOWER_OUT: tl.constexpr,
    INNER_OUT: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    VALUE: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # Four dimensions in memory order: three make up the rows, the innermost the columns.
    column_tiles: tl.constexpr = (INNER_OUT + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    column_mask = columns < INNER_OUT
    if WIDE:
        rows = rows.to(tl.int64)
    outer = rows // (UPPER_OUT * LOWER_OUT) - OUTER_BEFORE
    upper = rows // LOWER_OUT % UPPER_OUT - UPPER_BEFORE
    lower = rows % LOWER_OUT - LOWER_BEFORE
    inner = columns - INNER_BEFORE
    rows_inside = (upper >= 0) & (upper < UPPER) & (lower >= 0) & (lower < LOWER) & row_mask
    if OUTER is not None:
        rows_inside = rows_inside & (outer >= 0) & (outer < OUTER)
    inside = rows_inside[:, None] & ((inner >= 0) & (inner < INNER))[None, :]
    source = outer * OUTER_STRIDE + upper * UPPER_STRIDE + lower * LOWER_STRIDE
    value = tl.load(x + X_OFFSET + source[:, None] + inner[None, :], mask=inside, other=0.0)
    acc = tl.where(inside, value.to(tl.float32), VALUE)
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
    missing = MOST_DIMENSIONS - out.spec.rank

    def four(values: tuple[int, ...], fill: int) -> list[int]:
        return [*(fill for _ in range(missing)), *(values[dim] for dim in order)]

    sizes, before = four(x.shape, 1), four(attributes.before, 0)
    strides, outputs = four(x.strides, 0), four(out.shape, 1)
    # The outermost dimension may be the batch of this call: it is bounded by m alone.
    outer = sizes[0] if sizes[0] != outputs[0] or before[0] else None
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
            "OUTER": outer, "UPPER": sizes[1], "LOWER": sizes[2], "INNER": sizes[3],
            "OUTER_BEFORE": before[0], "UPPER_BEFORE": before[1],
            "LOWER_BEFORE": before[2], "INNER_BEFORE": before[3],
            "OUTER_STRIDE": strides[0], "UPPER_STRIDE": strides[1], "LOWER_STRIDE": strides[2],
            "X_OFFSET": x.offset,
            "UPPER_OUT": outputs[1], "LOWER_OUT": outputs[2], "INNER_OUT": outputs[3],
            "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
            "VALUE": float(attributes.value),
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, out.spec),
            "WIDE": problem.is_wide,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
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


def _capture(
    g: Builder, x: Any, sides: Any, mode: str = "constant", value: float | None = None
) -> Any:
    """Sides are torch's: before and after of the last dimension, then of the one before it, ..."""
    spec = g.spec(x)
    if mode != "constant":
        return g.refuse(f"padding with mode={mode!r}; only mode='constant' is supported")
    if not 1 <= spec.rank <= MOST_DIMENSIONS:
        return g.refuse(f"padding of a rank-{spec.rank} tensor; ranks 1 to {MOST_DIMENSIONS} are")
    if not any(sides):
        return x
    missing = [0] * (spec.rank - len(sides) // 2)
    before = (*missing, *reversed([int(width) for width in sides[0::2]]))
    after = (*missing, *reversed([int(width) for width in sides[1::2]]))
    return g.apply("pad", (x,), Pad(before, after, float(value or 0.0)))


def _capture_constant(g: Builder, x: Any, sides: Any, value: float = 0.0) -> Any:
    return _capture(g, x, sides, value=value)


def _build(draw: Mapping[str, Any]) -> tuple[Pad, tuple[TensorSpec, ...]] | None:
    shape, rank = draw["shape"], len(draw["shape"])
    layout = draw["layout"] if rank == MOST_DIMENSIONS else Layout.DENSE
    attributes = Pad(draw["before"][-rank:], draw["after"][-rank:], draw["value"])
    x = TensorSpec(shape, torch.float32, layout)
    try:
        infer(attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


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
    domain=Domain(
        ranges={
            "shape": ((1,), (7,), (4, 6), (2, 3, 5), (2, 4, 3, 5), (1, 33, 7, 9), (3, 8, 1, 1)),
            "before": ((0, 0, 1, 1), (0, 0, 3, 0), (1, 2, 0, 1), (0, 3, -1, 2), (-1, -2, 2, -1)),
            "after": ((0, 0, 1, 1), (0, 0, 2, 4), (2, 1, 0, 0), (0, -1, 5, -3), (0, 0, -1, 0)),
            "value": (0.0, 1.5, -2.0, float("-inf")),
            "layout": (NHWC, NHWC, DENSE),
        },
        build=_build,
        interesting=(
            # Nothing of the image is left, only its border.
            {"shape": (1, 3, 2, 2), "before": (0, 0, -2, 0), "after": (0, 0, 3, 0), "value": 1.0,
             "layout": NHWC},
            {"shape": (2, 8, 5, 5), "before": (0, 0, -1, -1), "after": (0, 0, -1, -1),
             "value": 0.0, "layout": NHWC},
            {"shape": (2, 3, 4, 5), "before": (1, 1, 1, 1), "after": (1, 1, 1, 1),
             "value": float("inf"), "layout": DENSE},
            {"shape": (1,), "before": (0, 0, 0, 3), "after": (0, 0, 0, 2), "value": -1.0,
             "layout": DENSE},
        ),
    ),
    aten={
        "aten.pad.default": _capture,
        "aten.constant_pad_nd.default": _capture_constant,
    },
)  # fmt: skip
