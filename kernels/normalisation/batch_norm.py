"""batch_norm with running statistics: y = (x − mean) / sqrt(var + eps) · weight + bias per channel.

x and y: any rank of at least 2, dense or NHWC, channels in dimension 1; mean, var, and weight and
bias where present: (C,). fp32 inside.

A batch normalisation that follows a convolution is folded into it and never gets here; this kernel
serves the ones that cannot be (after a concatenation or a pooling, as in DenseNet).
"""

from __future__ import annotations

import math
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
    Ref,
    X,
    Y,
    config,
    operand_refs,
    tensor_bytes,
    tile_config,
)
from ..contract.spec import TensorSpec
from ..contract.targets import Target


@dataclass(frozen=True)
class BatchNorm(Attributes):
    """eps, and which of the optional inputs are there: x, [weight], [bias], mean, var."""

    eps: float = 1e-5
    has_weight: bool = True
    has_bias: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs in order."""
        weight = ("weight",) if self.has_weight else ()
        bias = ("bias",) if self.has_bias else ()
        return ("x", *weight, *bias, "mean", "var")


def infer(attributes: BatchNorm, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The spec of x."""
    names = attributes.inputs
    if len(inputs) != len(names):
        wanted = ", ".join(names)
        raise InvalidInputError(f"batch_norm: expected {wanted}, got {len(inputs)} inputs")
    x = inputs[0]
    if x.rank < 2:
        raise InvalidInputError(f"batch_norm: expected x of rank 2 or more, got {x}")
    for name, spec in zip(names[1:], inputs[1:], strict=True):
        if spec.shape != (x.shape[1],):
            raise InvalidInputError(
                f"batch_norm: expected {name} of shape ({x.shape[1]},), one per channel of {x}, "
                f"got {spec}"
            )
    return (x,)


def reference(attributes: BatchNorm, *tensors: torch.Tensor) -> torch.Tensor:
    given = dict(zip(attributes.inputs, tensors, strict=True))
    return F.batch_norm(
        given["x"],
        given["mean"],
        given["var"],
        given.get("weight"),
        given.get("bias"),
        eps=attributes.eps,
    )


def pack(attributes: BatchNorm, vector: torch.Tensor) -> torch.Tensor:
    """(C,), dense."""
    return vector.contiguous()


@triton.jit
def batch_norm_kernel(
    x,
    weight,
    bias,
    mean,
    var,
    y,
    extras,
    m,
    COLUMNS: tl.constexpr,
    X_OFFSET: tl.constexpr,
    X_ROW: tl.constexpr,
    X_COLUMN_STRIDE: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    Y_ROW: tl.constexpr,
    Y_COLUMN_STRIDE: tl.constexpr,
    CHANNEL_OF_ROW: tl.constexpr,
    CHANNELS_ARE_COLUMNS: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    column_mask = columns < COLUMNS
    mask = row_mask[:, None] & column_mask[None, :]
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    channels = columns if CHANNELS_ARE_COLUMNS else CHANNEL_OF_ROW(rows)
    live = column_mask if CHANNELS_ARE_COLUMNS else row_mask
    variance = tl.load(var + channels, mask=live, other=1.0).to(tl.float32)
    # Exactly rounded root and quotient: they are per channel, and their error is in every element.
    scale = tl.div_rn(tl.full(variance.shape, 1.0, tl.float32), tl.sqrt_rn(variance + EPS))
    if HAS_WEIGHT:
        scale *= tl.load(weight + channels, mask=live, other=0.0).to(tl.float32)
    centre = tl.load(mean + channels, mask=live, other=0.0).to(tl.float32)
    axis: tl.constexpr = 0 if CHANNELS_ARE_COLUMNS else 1
    source = x + X_OFFSET + X_ROW(rows)[:, None] + (columns * X_COLUMN_STRIDE)[None, :]
    value = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    acc = (value - tl.expand_dims(centre, axis)) * tl.expand_dims(scale, axis)
    if HAS_BIAS:
        shift = tl.load(bias + channels, mask=live, other=0.0).to(tl.float32)
        acc += tl.expand_dims(shift, axis)
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + Y_ROW(rows)[:, None] + (columns * Y_COLUMN_STRIDE)[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Walk:
    """The output in memory order, neighbouring dimensions merged where every tensor allows it.

    sizes: the last are the columns; strides of the output, the input, the channel's number and the
    epilogue's operands follow them.
    """

    sizes: tuple[int, ...]
    written: tuple[int, ...]
    read: tuple[int, ...]
    channel: tuple[int, ...]
    operands: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        return math.prod(self.sizes[:-1])

    @property
    def columns(self) -> int:
        return self.sizes[-1]


def walk_of(problem: Problem) -> Walk:
    """How the kernel goes over the problem's tensors."""
    out = problem.output.spec
    channel = tuple(int(dim == 1) for dim in out.layout.order(out.rank))
    tensors = (problem.output, problem.inputs[0], *problem.operands)
    written, read, *operands = (ep.access(tensor, out).strides for tensor in tensors)
    sizes, walks = ep.collapse(
        ep.memory_sizes(out), (written, read, channel, *operands), out.batch is not None
    )
    return Walk(sizes, walks[0], walks[1], walks[2], walks[3:])


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch over the whole output."""
    attributes, walk = problem.attributes, walk_of(problem)
    assert isinstance(attributes, BatchNorm)
    refs = {name: Ref("input", index) for index, name in enumerate(attributes.inputs)}
    reads = tuple(
        ep.Access(strides, operand.offset, str(operand.spec))
        for strides, operand in zip(walk.operands, problem.operands, strict=True)
    )
    x, out = problem.inputs[0], problem.output
    launch = Launch(
        kernel=batch_norm_kernel,
        # An absent weight or bias is never read: any pointer will do.
        pointers={"weight": X, "bias": X, **refs, "y": Y},
        extras=operand_refs(problem),
        rows=walk.rows,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_ROWS"],
        columns=-(-walk.columns // tile["BLOCK_COLUMNS"]),
        constexprs={
            "COLUMNS": walk.columns,
            "X_OFFSET": x.offset,
            "X_ROW": ep.row_offset_function(walk.sizes[:-1], walk.read[:-1]),
            "X_COLUMN_STRIDE": walk.read[-1],
            "Y_OFFSET": out.offset,
            "Y_ROW": ep.row_offset_function(walk.sizes[:-1], walk.written[:-1]),
            "Y_COLUMN_STRIDE": walk.written[-1],
            "CHANNEL_OF_ROW": ep.row_offset_function(walk.sizes[:-1], walk.channel[:-1]),
            "CHANNELS_ARE_COLUMNS": walk.channel[-1] == 1,
            "HAS_WEIGHT": attributes.has_weight,
            "HAS_BIAS": attributes.has_bias,
            "EPS": attributes.eps,
            "EPILOGUE": ep.generate(problem.epilogue, reads, walk.sizes),
            "WIDE": problem.is_wide,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return (launch,)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Tiles of 1024 to 4096 elements."""
    for elements in (1024, 2048, 4096):
        for columns in (32, 64, 128, 256, 1024):
            yield config(4, 1, BLOCK_ROWS=elements // columns, BLOCK_COLUMNS=columns)


def default(problem: Problem, target: Target) -> Config:
    """2048 elements, 16 per thread, at most 128 of them along the columns."""
    walk = walk_of(problem)
    return tile_config(walk.rows, walk.columns, target)


def cost(problem: Problem) -> Cost:
    """Three operations per element."""
    read, written = tensor_bytes(problem)
    return Cost(3 * problem.output.spec.numel, read, written)


def capture(g: Builder, a: Arguments) -> Any:
    """Of calls with the statistics that the module has gathered."""
    if a.get("training"):
        return g.refuse(
            "batch normalisation that would update its running statistics: the module is in "
            "training mode; call .eval()"
        )
    if a.running_mean is None or a.running_var is None:
        return g.refuse("batch normalisation without running statistics")
    inputs = (a.input, a.weight, a.bias, a.running_mean, a.running_var)
    attributes = BatchNorm(float(a.eps), a.weight is not None, a.bias is not None)
    return g.apply("batch_norm", [value for value in inputs if value is not None], attributes)


def _capture_native(g: Builder, a: Arguments) -> Any:
    """The results are y, and what training would go on with."""
    return capture(g, a), None, None


OP = Op(
    name="batch_norm",
    attributes=BatchNorm,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    cost=cost,
    # Variances are drawn from the same range as everything else.
    input_range=(0.1, 3.0),
    aten={
        "aten.batch_norm.default": capture,
        "aten._native_batch_norm_legit.default": _capture_native,
        "aten._native_batch_norm_legit_no_training.default": _capture_native,
    },
    packs=lambda attributes: {index: pack for index in range(1, len(attributes.inputs))},
)  # fmt: skip
