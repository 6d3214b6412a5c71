"""softmax: y = exp(x − max x) / sum exp(x − max x) along one axis; log_softmax: its logarithm.

x and y: any rank, dense or NHWC. In memory the tensor is (outer, L, inner), L being the axis.
fp32 inside. Two kernels:
- `rows`, when the axis is innermost (classifier heads; channels of NHWC images): a program holds
  whole rows in registers, or, where they are too long, walks them twice;
- `across`, for any other axis: every lane owns one (outer, inner) position and walks its L elements
  twice; neighbouring lanes read neighbouring addresses.

A walk keeps a running maximum and rescales the running sum when it grows (Milakov and Gimelshein,
"Online normalizer calculation for softmax", 2018).

As in torch, NaN or +inf anywhere gives NaN in the whole row, and so does a row of −inf only.
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
from ..contract.op import (
    Arguments,
    Attributes,
    Builder,
    Capture,
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
    tile_config,
)
from ..contract.spec import TensorSpec
from ..contract.targets import Target

WHOLE_ROW = 8192
"""The longest row kept in registers: 32 elements per thread at 8 warps."""


@dataclass(frozen=True)
class Softmax(Attributes):
    """dim: the (non-negative) dimension that is normalised. dtype: the result's, where it is not
    the input's."""

    dim: int = 0
    dtype: torch.dtype | None = None


def infer(name: str, attributes: Softmax, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The input's own spec."""
    (x,) = inputs
    if not 0 <= attributes.dim < x.rank:
        raise InvalidInputError(f"{name}: {x} has no dimension {attributes.dim}")
    if x.batch is not None and attributes.dim == 0:
        raise InvalidInputError(f"{name}: cannot normalise over the batch dimension of {x}")
    return (x.with_(dtype=attributes.dtype or x.dtype),)


def reference(attributes: Softmax, x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, attributes.dim)


def reference_log(attributes: Softmax, x: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(x, attributes.dim)


@triton.jit
def rescaled(peak, total, tile_peak):
    """The maximum after one more tile, what to subtract from it, and the sum so far rescaled."""
    new_peak = tl.maximum(peak, tile_peak)
    # A row of -inf so far must not give exp(-inf + inf) = NaN: later elements may be finite.
    # NaN needs no care: whether the maximum keeps it or not, the sum does.
    shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    return new_peak, shift, total * tl.exp(peak - shift)


@triton.jit
def normalized(value, peak, total, LOG: tl.constexpr):
    """The result for a tile whose rows' maximum and sum are known and broadcast against it."""
    if LOG:
        return (value - peak) - tl.log(total)
    # One reciprocal per row instead of one division per element.
    return tl.exp(value - peak) * (1.0 / total)


@triton.jit
def rows_kernel(
    x,
    y,
    extras,
    m,
    L: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    LOG: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lanes = tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    source = x + X_OFFSET + (rows * X_PITCH)[:, None]
    target = y + Y_OFFSET + (rows * Y_PITCH)[:, None]
    if L <= BLOCK_COLUMNS:
        mask = row_mask[:, None] & (lanes < L)[None, :]
        value = tl.load(source + lanes[None, :], mask=mask, other=float("-inf")).to(tl.float32)
        peak = tl.max(value, axis=1)[:, None]
        total = tl.sum(tl.exp(value - peak), axis=1)[:, None]
        acc = normalized(value, peak, total, LOG)
        acc = EPILOGUE(acc, rows, lanes, row_mask, lanes < L, extras)
        tl.store(target + lanes[None, :], acc.to(y.dtype.element_ty), mask=mask)
    else:
        peak = tl.full((BLOCK_ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_ROWS,), tl.float32)
        for start in range(0, L, BLOCK_COLUMNS):
            columns = start + lanes
            mask = row_mask[:, None] & (columns < L)[None, :]
            value = tl.load(source + columns[None, :], mask=mask, other=float("-inf"))
            value = value.to(tl.float32)
            peak, shift, total = rescaled(peak, total, tl.max(value, axis=1))
            total += tl.sum(tl.exp(value - shift[:, None]), axis=1)
        for start in range(0, L, BLOCK_COLUMNS):
            columns = start + lanes
            column_mask = columns < L
            mask = row_mask[:, None] & column_mask[None, :]
            value = tl.load(source + columns[None, :], mask=mask, other=float("-inf"))
            acc = normalized(value.to(tl.float32), peak[:, None], total[:, None], LOG)
            acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
            tl.store(target + columns[None, :], acc.to(y.dtype.element_ty), mask=mask)


@triton.jit
def across_kernel(
    x,
    y,
    extras,
    m,
    L: tl.constexpr,
    MIDDLE: tl.constexpr,
    COLUMNS: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    LOG: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # m counts outer * MIDDLE; row (outer, l, middle) of the tensor holds COLUMNS elements.
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    index = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = index < m
    column_mask = columns < COLUMNS
    mask = row_mask[:, None] & column_mask[None, :]
    if WIDE:
        index = index.to(tl.int64)
    first = index // MIDDLE * (L * MIDDLE) + index % MIDDLE
    source = x + X_OFFSET + columns[None, :]
    peak = tl.full((BLOCK_ROWS, BLOCK_COLUMNS), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(L):
        rows = first + step * MIDDLE
        value = tl.load(source + (rows * X_PITCH)[:, None], mask=mask, other=0.0).to(tl.float32)
        peak, shift, total = rescaled(peak, total, value)
        total += tl.exp(value - shift)
    for step in range(L):
        rows = first + step * MIDDLE
        value = tl.load(source + (rows * X_PITCH)[:, None], mask=mask, other=0.0).to(tl.float32)
        acc = normalized(value, peak, total, LOG)
        acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
        address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
        tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Walk:
    """The tensor as (outer, length, middle, columns) in memory, `length` being the axis.

    With the axis innermost, `middle` and `columns` are 1.
    """

    outer: int
    length: int
    middle: int
    columns: int
    is_innermost: bool

    @property
    def rows(self) -> int:
        return self.outer * self.middle


def walk_of(problem: Problem) -> Walk:
    """How the kernels go over the problem's tensor."""
    assert isinstance(problem.attributes, Softmax)
    spec = problem.inputs[0].spec
    at = spec.layout.order(spec.rank).index(problem.attributes.dim)
    sizes = ep.memory_sizes(spec)
    before, after = sizes[:at], sizes[at + 1 :]
    return Walk(
        math.prod(before), sizes[at], math.prod(after[:-1]), math.prod(after[-1:]), not after
    )


def _launches(log: bool, problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    walk = walk_of(problem)
    x, out = problem.inputs[0], problem.output
    if walk.is_innermost:
        kernel, sizes = rows_kernel, {"L": walk.length}
    else:
        kernel = across_kernel
        sizes = {"L": walk.length, "MIDDLE": walk.middle, "COLUMNS": walk.columns}
    launch = Launch(
        kernel=kernel,
        pointers={"x": X, "y": Y},
        extras=operand_refs(problem),
        rows=walk.rows,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_ROWS"],
        columns=1 if walk.is_innermost else -(-walk.columns // tile["BLOCK_COLUMNS"]),
        constexprs={
            **sizes,
            "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
            "LOG": log,
            "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, out.spec),
            "WIDE": problem.is_wide,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return (launch,)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Innermost axis: whole rows at 4 to 32 elements per thread, and tiles that walk long rows;
    otherwise tiles of 256 to 2048 lanes."""
    walk = walk_of(problem)
    if not walk.is_innermost:
        for elements in (256, 512, 1024, 2048):
            for columns in (16, 64, 256):
                yield config(4, 1, BLOCK_ROWS=elements // columns, BLOCK_COLUMNS=columns)
        return
    width = power_of_two(walk.length)
    for warps in (1, 4, 8):
        for per_thread in (4, 8, 16, 32):
            rows = warps * 32 * per_thread // width
            if rows and width <= WHOLE_ROW:
                yield config(warps, 1, BLOCK_ROWS=rows, BLOCK_COLUMNS=width)
    for columns in (1024, 2048, 4096):
        if columns < walk.length:
            yield config(columns // 512, 1, BLOCK_ROWS=1, BLOCK_COLUMNS=columns)


def default(problem: Problem, target: Target) -> Config:
    """Eight elements per thread for rows up to 1024, up to 32 for longer ones; one lane for each
    position where the axis is not innermost."""
    walk = walk_of(problem)
    if not walk.is_innermost:
        return tile_config(walk.rows, walk.columns, target, elements=512)
    width = power_of_two(walk.length)
    if target.name == "interpreter":
        width = min(width, 1 << 16)
        rows = min(power_of_two(walk.rows), (1 << 20) // width)
        return config(1, 1, BLOCK_ROWS=rows, BLOCK_COLUMNS=width)
    if width > WHOLE_ROW:
        return config(8, 1, BLOCK_ROWS=1, BLOCK_COLUMNS=4096)
    return config(
        4 if width <= 2048 else 8, 1, BLOCK_ROWS=max(1, 1024 // width), BLOCK_COLUMNS=width
    )


def cost(problem: Problem) -> Cost:
    """Maximum, subtraction, exponential, sum and scaling per element."""
    read, written = tensor_bytes(problem)
    return Cost(5 * problem.output.spec.numel, read, written)


def _capture(name: str) -> Capture:
    """The capture of `aten.<name>.int` and of `aten._<name>`, whose option is fp32 or nothing."""

    def capture(g: Builder, a: Arguments) -> Any:
        spec = g.spec(a.self)
        dtype = torch.float32 if a.get("half_to_float") else a.get("dtype")
        if dtype not in (None, spec.dtype):
            return g.refuse(f"{name} that changes the dtype from {spec.dtype} to {dtype}")
        if spec.rank == 0:
            return g.refuse(f"{name} of a scalar")
        return g.apply(name, (a.self,), Softmax(a.dim % spec.rank))

    return capture


def _op(name: str, log: bool) -> Op:
    return Op(
        name=name,
        attributes=Softmax,
        infer=partial(infer, name),
        reference=reference_log if log else reference,
        launches=partial(_launches, log),
        configs=configs,
        default=default,
        cost=cost,
        input_range=(-8.0, 8.0),
        aten={f"aten.{name}.int": _capture(name), f"aten._{name}.default": _capture(name)},
        follows=True,
    )  # fmt: skip


OPS = (_op("softmax", log=False), _op("log_softmax", log=True))
