"""conv_pool: a convolution and the 2x2 pooling of its result in one kernel.

    y = pool2x2(F(conv2d(B(x), w)))

x: (N, C, H, W) NHWC; w: (K, C, R, S), a constant packed as conv2d packs it; y: (N, K, P', Q') NHWC,
where P' = P/2, rounded as the pooling rounds, Q' likewise. B and F are chains of pointwise stages;
the pooling is the maximum or the average. fp32 from the convolution on, rounded once at the end.

Rows of an implicit matrix product may be output pixels in any order. Here a tile's row is a window
and two bits that say which of its four members it is, and these are the bits that separate the rows
which one thread holds in its registers: bit 3, and the top bit where the tile is tall enough. The
window is reduced without exchanging anything between threads, nothing is computed twice, and only a
quarter of the pixels is written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import (
    Config,
    Cost,
    Launch,
    Op,
    Problem,
    W,
    X,
    Y,
    operand_refs,
    tensor_bytes,
)
from ..contract.spec import TensorSpec
from ..contract.targets import Target
from ..pooling import pool_window
from ..pooling.pool_kernel import combine
from ..pooling.pool_window import AvgPool2d, MaxPool2d
from ..products import gemm
from ..tile import choice
from . import conv_tile
from .conv_tile import StagedConv

PAIR = (2, 2)
# max(f(a), f(b)) = f(max(a, b)), NaN included; adding a number is not among them: inf - inf is NaN.
MONOTONE = ("relu", "clamp", "sigmoid", "tanh", "hardsigmoid")


@dataclass(frozen=True)
class ConvPool(StagedConv):
    """The convolution with its stages, and the pooling of their result."""

    pool: MaxPool2d | AvgPool2d = field(default_factory=lambda: MaxPool2d(PAIR, PAIR))

    @property
    def pool_name(self) -> str:
        return "max_pool2d" if isinstance(self.pool, MaxPool2d) else "avg_pool2d"


def unsupported(attributes: ConvPool, pixels: tuple[int, ...]) -> str | None:
    """Why the kernel cannot pool a convolution's result of that height and width, or None."""
    conv, pool = attributes.conv, attributes.pool
    if conv.groups != 1:
        return f"the convolution has {conv.groups} groups; the kernel takes groups=1"
    for name, value, only in (
        ("window", pool.kernel, PAIR),
        ("stride", pool.stride, PAIR),
        ("dilation", pool.dilation, (1, 1)),
        ("padding", pool.padding, (0, 0)),
    ):
        if value != only:
            return f"the pooling's {name} is {value[0]}x{value[1]}, not {only[0]}x{only[1]}"
    odd = any(size % 2 for size in pixels)
    if isinstance(pool, AvgPool2d) and pool.ceil_mode and odd:
        return f"averages over windows that overhang {pixels[0]}x{pixels[1]} pixels (ceil_mode)"
    return None


def infer(attributes: ConvPool, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The pooled spec of the convolution's result."""
    result = conv_tile.result_of("conv_pool", attributes, inputs)
    if (reason := unsupported(attributes, result.shape[2:])) is not None:
        raise InvalidInputError(f"conv_pool: {reason}")
    return pool_window.infer(attributes.pool_name, attributes.pool, (result,))


def reference(attributes: ConvPool, *tensors: torch.Tensor) -> torch.Tensor:
    result = conv_tile.reference(attributes, tensors)
    if isinstance(attributes.pool, MaxPool2d):
        return pool_window.reference_max(attributes.pool, result)
    return pool_window.reference_avg(attributes.pool, result)


@triton.jit
def halves(tile, ROWS: tl.constexpr, STEP: tl.constexpr, COLUMNS: tl.constexpr):
    """The rows whose index has the bit of value STEP clear, and those where it is set."""
    pairs = tl.reshape(tile, (ROWS // (2 * STEP), 2, STEP, COLUMNS))
    clear, set_ = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
    shape: tl.constexpr = (ROWS // 2, COLUMNS)
    return tl.reshape(clear, shape), tl.reshape(set_, shape)


@triton.jit
def pool_tile(
    x,
    w,
    y,
    first,
    stop,
    columns,
    column_mask,
    extras,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    POOLED_P: tl.constexpr,
    POOLED_Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    MAXIMUM: tl.constexpr,
    PROLOGUE: tl.constexpr,
    STAGES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BY_TAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Computes and stores the BLOCK_M / 4 windows from `first` on, those before `stop`."""
    # BLOCK_M counts the members of windows. With the members in bit 3 and the top bit,
    # reduced in that order, sm_90 needs 8 instructions per thread more than for the convolution
    # alone, at 128x64 and also at 64x64, where the top bit lies between warps; with the members in
    # bits 2 and 3 it is 224 and 80, and the top bit first makes it 328 at 64x64.
    WINDOWS: tl.constexpr = BLOCK_M // 4
    HIGH: tl.constexpr = BLOCK_M // 2
    LOW: tl.constexpr = min(8, BLOCK_M // 4)
    index = tl.arange(0, BLOCK_M)
    window = first + index % HIGH // (2 * LOW) * LOW + index % LOW
    live = window < stop
    if WIDE:
        window = window.to(tl.int64)
    image = window // (POOLED_P * POOLED_Q)
    p = (window // POOLED_Q % POOLED_P).to(tl.int32) * 2 + index // HIGH
    q = (window % POOLED_Q).to(tl.int32) * 2 + index // LOW % 2
    # A window that overhangs sees its last pixels twice, which changes no maximum.
    if 2 * POOLED_P > P:
        p = tl.minimum(p, P - 1)
    if 2 * POOLED_Q > Q:
        q = tl.minimum(q, Q - 1)
    acc = conv_tile.convolve(
        x, w, image, p, q, live, columns, column_mask, extras,
        H, WIDTH, C, R, S, STRIDE_H, STRIDE_W, TOP, LEFT, DILATION_H, DILATION_W,
        X_PITCH, X_OFFSET, PROLOGUE, PRECISION, BY_TAP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    acc = STAGES(acc, (image * P + p) * Q + q, columns, live, column_mask, extras)
    # The members a thread holds in any case first: what is left to exchange is then half as much.
    even, odd = halves(acc, BLOCK_M, LOW, BLOCK_N)
    upper, lower = halves(combine(even, odd, MAXIMUM), BLOCK_M // 2, HIGH // 2, BLOCK_N)
    pooled = combine(upper, lower, MAXIMUM)
    rows = first + tl.arange(0, WINDOWS)
    row_mask = rows < stop
    if WIDE:
        rows = rows.to(tl.int64)
    pooled = EPILOGUE(pooled, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, pooled.to(y.dtype.element_ty), mask=mask)


@triton.jit
def conv_pool_kernel(
    x,
    w,
    y,
    extras,
    m,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    POOLED_P: tl.constexpr,
    POOLED_Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    MAXIMUM: tl.constexpr,
    PROLOGUE: tl.constexpr,
    STAGES: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BY_TAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # m counts windows.
    WINDOWS: tl.constexpr = BLOCK_M // 4
    column_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = gemm.tile_index(
        tl.program_id(0), tl.cdiv(m, WINDOWS), column_tiles, GROUP_M
    )
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    pool_tile(
        x, w, y, row_tile * WINDOWS, m, columns, columns < K, extras,
        H, WIDTH, C, P, Q, POOLED_P, POOLED_Q, R, S, STRIDE_H, STRIDE_W, TOP, LEFT,
        DILATION_H, DILATION_W, X_PITCH, X_OFFSET, Y_PITCH, Y_OFFSET, MAXIMUM,
        PROLOGUE, STAGES, EPILOGUE, PRECISION, WIDE, BY_TAP, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


def is_monotone(stage: ep.Stage) -> bool:
    """Whether the maximum may be taken before the stage instead of after it."""
    if stage.name == "leaky_relu":
        return stage.parameters[0] >= 0
    return stage.name in MONOTONE


def split_stages(attributes: ConvPool) -> tuple[ep.Epilogue, ep.Epilogue]:
    """The stages between convolution and pooling that stay there, and those that may follow the
    pooling, where they are a quarter of the work; the divisor of an average is among the latter."""
    stages, pool = attributes.stages, attributes.pool
    if isinstance(pool, AvgPool2d):
        return stages, (ep.Stage("div", literal=float(pool.divisor_override or 4)),)
    keep = len(stages)
    while keep and is_monotone(stages[keep - 1]):
        keep -= 1
    return stages[:keep], stages[keep:]


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the kernel."""
    attributes, out = problem.attributes, problem.output
    assert isinstance(attributes, ConvPool)
    specs = tuple(operand.spec for operand in problem.inputs)
    result = conv_tile.result_of("conv_pool", attributes, specs)
    stay, move = split_stages(attributes)
    chains = conv_tile.chains(problem, stay, result)
    n, k, p, q = out.shape
    launch = Launch(
        kernel=conv_pool_kernel,
        pointers={"x": X, "w": W, "y": Y},
        extras=(*chains.extras, *operand_refs(problem)),
        rows=n * p * q,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_M"] // 4,
        columns=-(-k // tile["BLOCK_N"]),
        constexprs={
            **conv_tile.constants(problem, chains),
            "K": k, "P": result.shape[2], "Q": result.shape[3], "POOLED_P": p, "POOLED_Q": q,
            "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
            "MAXIMUM": isinstance(attributes.pool, MaxPool2d),
            "EPILOGUE": ep.for_output(
                (*move, *problem.epilogue), problem.operands, out.spec, len(chains.extras)
            ),
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=conv_tile.l2_bytes(problem, tile["BLOCK_M"], tile["BLOCK_N"], result),
        instructions=tile["BLOCK_M"] * tile["BLOCK_N"],
        step_instructions=conv_tile.step_instructions(problem, tile),
    )  # fmt: skip
    return (launch,)


def _size(problem: Problem) -> choice.Size:
    n, _, p, q = problem.output.shape
    return conv_tile.size_of(problem, 4 * n * p * q)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Those of the convolution alone: pooling takes no registers."""
    return choice.tile_configs(_size(problem), target)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return choice.legal(_size(problem), tile, target)


def default(problem: Problem, target: Target) -> Config:
    return choice.default_tile(_size(problem), target)


def cost(problem: Problem) -> Cost:
    """The products of the pixels that are pooled."""
    _, c, r, s = problem.inputs[1].shape
    read, written = tensor_bytes(problem)
    return Cost(2 * 4 * problem.output.spec.numel * c * r * s, read, written)


OP = Op(
    name="conv_pool",
    attributes=ConvPool,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    packs=lambda attributes: {1: conv_tile.pack},
)
