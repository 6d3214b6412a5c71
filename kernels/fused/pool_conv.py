"""pool_conv: maximum or average pooling -> 1x1 convolution in one kernel.

    t = F(pool2d(x))          stored only with `keep`, for its other readers
    y = E(G(t) · wᵀ)

x: (N, C, H, W) NHWC in memory; w: (K, C, 1, 1); t: (N, C, P, Q); y: (N, K, P, Q) NHWC. The window
is reduced in fp32 and t and G(t) are rounded to the dtype of the tensors, as they would be between
separate kernels; fp32 accumulation. NaN wins a maximum, as in torch.

A program pools its pixels a block of channels at a time, straight into the operand of the matrix
product: the branch of an Inception block (Szegedy et al., 2015) that pools and projects, or a
stage's pooling with the first reduction behind it. Every tile of output channels pools again, so a
tile is as wide as all of them where registers allow.

The taps are read through L1, which serves eight of nine; asynchronous copies bypass it, and a
pipelined loop needs a buffer per tap (84 KB at three stages) and unpacks the half-precision
maximum: 976 instead of 464 instructions at 64x32x32 on sm_90.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import cost_model
from ..contract import epilogue as ep
from ..contract.op import (
    Attributes,
    Config,
    Cost,
    Launch,
    Op,
    Problem,
    Ref,
    W,
    X,
    Y,
    config,
    operand_refs,
    power_of_two,
    tensor_bytes,
)
from ..contract.spec import Operand, TensorSpec
from ..contract.targets import Target
from ..convolution import conv2d
from ..pooling import pool_kernel, pool_window
from ..pooling.pool_window import AvgPool2d, MaxPool2d
from ..tile import choice, conv_geometry
from ..tile.conv_geometry import Conv2d
from ..tile.torch_convolution import convolve

MOST_LOADS = 144
"""Elements that a thread reads for one block of pooled channels: 16 results of a 3x3 window take 98
to 153 registers on sm_90; beside 16 outputs they spill 16 bytes (32x16x64 with 4 warps)."""
MOST_WEIGHTS = 128
"""Bytes of a weight tile that a thread holds on its way to shared memory."""
EVERY_TAP, EVERY_PACKED_TAP, EVERY_RESULT = 3, 2, 4
"""Thread instructions for one element of a window and for one pooled element, counted in sm_90 code
at 64x64x64; the maximum of halves is packed."""


@dataclass(frozen=True)
class PoolConv(Attributes):
    """The pooling, the pointwise stages after it (seen by all readers of t) and before the
    convolution (seen by it alone), and whether t is a second output.

    Inputs: x, w, operands of `after_pool`, operands of `before_conv`.
    """

    pool: MaxPool2d | AvgPool2d = field(default_factory=MaxPool2d)
    after_pool: ep.Epilogue = ()
    before_conv: ep.Epilogue = ()
    keep: bool = False

    @property
    def pool_op(self) -> str:
        """The name of the pooling's own op."""
        return "max_pool2d" if isinstance(self.pool, MaxPool2d) else "avg_pool2d"

    def parts(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The inputs that the stages after the pooling and before the convolution read."""
        split = 2 + ep.operand_count(self.after_pool)
        return values[2:split], values[split:]


def pooled_spec(attributes: PoolConv, x: TensorSpec) -> TensorSpec:
    """The spec of t."""
    return pool_window.infer(attributes.pool_op, attributes.pool, (x,))[0]


def infer(attributes: PoolConv, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """y, and t where it is kept."""
    stages = (*attributes.after_pool, *attributes.before_conv)
    expected = 2 + ep.operand_count(stages)
    if len(inputs) != expected:
        raise InvalidInputError(f"pool_conv: expected {expected} inputs, got {len(inputs)}")
    x, w, *operands = inputs
    if w.rank != 4 or w.shape[2:] != (1, 1):
        raise InvalidInputError(f"pool_conv: expected w (K,C,1,1), got {w}")
    t = pooled_spec(attributes, x)
    for operand in operands:
        if not ep.broadcasts(operand, t):
            raise InvalidInputError(
                f"pool_conv: {operand}, read after the pooling, does not broadcast to {t}"
            )
    (y,) = conv_geometry.infer(Conv2d(), (t, w))
    return (y, t) if attributes.keep else (y,)


def reference(
    attributes: PoolConv, x: torch.Tensor, w: torch.Tensor, *operands: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    after, before = attributes.parts((x, w, *operands))
    if isinstance(attributes.pool, MaxPool2d):
        t = pool_window.reference_max(attributes.pool, x)
    else:
        t = pool_window.reference_avg(attributes.pool, x)
    t = ep.apply_reference(attributes.after_pool, t, after)
    y = convolve(ep.apply_reference(attributes.before_conv, t, before), w)
    return (y, t) if attributes.keep else y


@triton.jit
def pool_conv_kernel(
    x,
    w,
    y,
    t,
    extras,
    m,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    T_PITCH: tl.constexpr,
    T_OFFSET: tl.constexpr,
    MAXIMUM: tl.constexpr,
    COUNT: tl.constexpr,
    KEEP: tl.constexpr,
    AFTER_POOL: tl.constexpr,
    BEFORE_CONV: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    EMPTY: tl.constexpr = float("-inf") if MAXIMUM else 0.0
    column_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    column_tile = tl.program_id(0) % column_tiles
    rows = tl.program_id(0) // column_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_mask = rows < m
    column_mask = columns < K
    if WIDE:
        rows = rows.to(tl.int64)
    image = rows // (P * Q)
    top = (rows // Q % P).to(tl.int32) * STRIDE_H - PADDING_H
    left = (rows % Q).to(tl.int32) * STRIDE_W - PADDING_W
    if COUNT is not None:
        height = pool_kernel.extent(top, R, H, PADDING_H, COUNT)
        width = pool_kernel.extent(left, S, WIDTH, PADDING_W, COUNT)
        count = (height * width).to(tl.float32)[:, None]
    corner = (image * H + top) * WIDTH + left
    # Rows past the end get a position that no tap brings inside the image: one mask serves both.
    top = tl.where(row_mask, top, -1048576)
    x_tile = x + X_OFFSET + (corner * X_PITCH)[:, None] + depth[None, :]
    w_tile = w + (columns * C)[:, None] + depth[None, :]
    t_tile = t + T_OFFSET + (rows * T_PITCH)[:, None] + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_K):
        channels = start + depth
        exists = channels < C
        pooled = tl.full((BLOCK_M, BLOCK_K), EMPTY, tl.float32)
        for r in tl.static_range(R):
            row_inside = (top + r * DILATION_H).to(tl.uint32, bitcast=True) < H
            for s in tl.static_range(S):
                inside = row_inside & ((left + s * DILATION_W).to(tl.uint32, bitcast=True) < WIDTH)
                mask = inside[:, None]
                if C % BLOCK_K != 0:
                    mask = mask & exists[None, :]
                offset = (r * DILATION_H * WIDTH + s * DILATION_W) * X_PITCH
                value = tl.load(x_tile + (offset + start), mask=mask, other=EMPTY).to(tl.float32)
                pooled = pool_kernel.combine(pooled, value, MAXIMUM)
        # A sum over an axis of length 2 costs one addition and is what keeps the compiler from
        # converting every tap, instead of the result, to the layout of the product's operand: 4
        # barriers and 117 registers per block of channels at 64x64x32, 22 and 146 without it.
        pooled = tl.sum(tl.join(pooled, tl.zeros((BLOCK_M, BLOCK_K), tl.float32)), axis=2)
        if COUNT is not None:
            pooled = pooled / count
        pooled = AFTER_POOL(pooled, rows, channels, row_mask, exists, extras)
        a = pooled.to(x.dtype.element_ty)
        if KEEP:
            stored = row_mask & (column_tile == 0)
            tl.store(t_tile + start, a, mask=stored[:, None] & exists[None, :])
        if BEFORE_CONV is not None:
            value = BEFORE_CONV(a.to(tl.float32), rows, channels, row_mask, exists, extras)
            a = value.to(x.dtype.element_ty)
        b_mask = column_mask[:, None]
        if C % BLOCK_K != 0:
            # Channels outside the tensor must be zero whatever the stages made of -inf or zero.
            a = tl.where(exists[None, :], a, 0.0).to(x.dtype.element_ty)
            b_mask = b_mask & exists[None, :]
        b = tl.load(w_tile + start, mask=b_mask, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


def _attributes(problem: Problem) -> PoolConv:
    assert isinstance(problem.attributes, PoolConv)
    return problem.attributes


def pooling(problem: Problem) -> Problem:
    """The problem of the pooling alone."""
    attributes, x = _attributes(problem), problem.inputs[0]
    t = Operand.dense(pooled_spec(attributes, x.spec))
    return Problem(attributes.pool_op, attributes.pool, (x,), (t,))


def _chains(
    problem: Problem, divisor: int | None
) -> tuple[dict[str, ep.GeneratedFunction | None], tuple[Ref, ...]]:
    """The three chains of stages, and the tensors they read in the order of `extras`."""
    attributes, refs = _attributes(problem), operand_refs(problem)
    t = pooled_spec(attributes, problem.inputs[0].spec)
    divide = () if divisor is None else (ep.Stage("div", literal=float(divisor)),)
    after, before = attributes.parts(problem.inputs)
    reads = [tuple(ep.access(operand, t) for operand in part) for part in (after, before)]
    sizes, first = ep.memory_sizes(t), len(refs)
    stages = (*divide, *attributes.after_pool)
    functions = {
        "EPILOGUE": ep.for_output(problem.epilogue, problem.operands, problem.output.spec),
        "AFTER_POOL": ep.generate(stages, reads[0], sizes, first, "after_pool"),
        "BEFORE_CONV": None,
    }
    if attributes.before_conv:
        functions["BEFORE_CONV"] = ep.generate(
            attributes.before_conv, reads[1], sizes, first + len(after), "before_conv"
        )
    own = tuple(Ref("input", index) for index in range(2, len(problem.inputs)))
    return functions, (*refs, *own)


def _outline(problem: Problem, tile: Config) -> Launch:
    """The launch as the cost model sees it: without arguments."""
    y, k = problem.output, problem.output.shape[1]
    return Launch(
        kernel=pool_conv_kernel,
        pointers={},
        rows=y.spec.numel // k,
        batch=y.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=-(-k // tile["BLOCK_N"]),
        constexprs={},
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=_l2_bytes(problem, tile),
        instructions=_instructions(problem, tile),
        steps=-(-problem.inputs[0].shape[1] // tile["BLOCK_K"]),
    )


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; neighbouring programs share their pixels, which stay in L2."""
    attributes, inner = _attributes(problem), pooling(problem)
    window, chosen = attributes.pool, pool_window.reduction(inner)
    x, y, t = problem.inputs[0], problem.output, problem.outputs[-1]
    functions, extras = _chains(problem, chosen.divisor)
    constants = {
        **pool_window.window_sizes(window, x, y),
        "K": y.shape[1],
        "X_PITCH": x.pitch, "X_OFFSET": x.offset,
        "Y_PITCH": y.pitch, "Y_OFFSET": y.offset,
        "T_PITCH": t.pitch, "T_OFFSET": t.offset,
        "MAXIMUM": chosen.maximum, "COUNT": chosen.counts, "KEEP": attributes.keep,
        **functions,
        "PRECISION": choice.dot_precision(problem, x.shape[1]),
        "WIDE": problem.is_wide,
        **dict(tile.blocks),
    }  # fmt: skip
    launch = replace(
        _outline(problem, tile),
        # Where t is not kept its pointer is never used.
        pointers={"x": X, "w": W, "y": Y, "t": Ref("output", len(problem.outputs) - 1)},
        extras=extras,
        constexprs=constants,
    )
    return (launch,)


def _l2_bytes(problem: Problem, tile: Config) -> int:
    """What one program reads: its windows' pixels, each once thanks to L1, and its weights."""
    window = _attributes(problem).pool
    _, c, h, width = problem.inputs[0].shape
    _, _, p, q = problem.output.shape
    pixels = min(tile["BLOCK_M"], p * q)
    rows = min(h, (-(-pixels // q) - 1) * window.stride[0] + window.kernel[0])
    columns = min(width, (min(pixels, q) - 1) * window.stride[1] + window.kernel[1])
    values = min(rows * columns, pixels * math.prod(window.kernel)) + tile["BLOCK_N"]
    return values * c * problem.inputs[0].spec.dtype.itemsize


def _instructions(problem: Problem, tile: Config) -> int:
    """What pooling one program's pixels takes."""
    spec, window = problem.inputs[0].spec, _attributes(problem).pool
    packed = isinstance(window, MaxPool2d) and spec.dtype is not torch.float32
    every_tap = EVERY_PACKED_TAP if packed else EVERY_TAP
    return tile["BLOCK_M"] * spec.shape[1] * (every_tap * math.prod(window.kernel) + EVERY_RESULT)


def _size(problem: Problem) -> tuple[int, int, int]:
    """Pixels, input channels and output channels of the product."""
    k = problem.output.shape[1]
    return problem.output.spec.numel // k, problem.inputs[0].shape[1], k


def _tile(pixels: int, outputs: int, channels: int, warps: int) -> Config:
    return config(warps, 1, BLOCK_M=pixels, BLOCK_N=outputs, BLOCK_K=channels)


def _shapes(problem: Problem) -> Iterator[tuple[int, int, int]]:
    """(BLOCK_M, BLOCK_K, warps) with 16 to 2 pooled elements per thread, the most first.

    Fewer than 64 bytes of a pixel at a time would waste L1, which serves a line per cycle.
    """
    x = problem.inputs[0]
    widest = max(16, power_of_two(x.shape[1]))
    least = min(widest, 64 // x.spec.dtype.itemsize)
    for per_thread in (16, 8, 4, 2):
        for pixels, warps in ((64, 8), (64, 4), (32, 4), (32, 8), (128, 8), (16, 4)):
            channels = per_thread * 32 * warps // pixels
            if least <= channels <= widest:
                yield pixels, channels, warps


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Every shape of the pooled tile with 32 to 256 output channels."""
    widest = max(16, power_of_two(_size(problem)[2]))
    for pixels, channels, warps in _shapes(problem):
        for outputs in (16, 32, 64, 128, 256):
            tile = _tile(pixels, outputs, channels, warps)
            if widest // 4 <= outputs <= widest and legal(problem, tile, target) is None:
                yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Registers for the taps, the weights and the accumulators, and shared memory."""
    if target.name == "interpreter":
        return None
    x, threads = problem.inputs[0], 32 * tile.num_warps
    if target.capability < 90 and tile.num_warps > 4 and x.shape[1] <= tile["BLOCK_K"]:
        return f"{tile.num_warps} warps and all channels in one block spill before sm_90"
    # Channels that do not line up are loaded one by one; tf32x3 keeps its operands twice.
    single = x.spec.dtype is torch.float32
    aligned = not any(value % 8 for value in (x.shape[1], x.pitch, x.offset))
    most = MOST_LOADS if aligned and not single and tile["BLOCK_N"] > 16 else MOST_LOADS // 2
    pooled = tile["BLOCK_M"] * tile["BLOCK_K"] // threads
    loads = pooled * math.prod(_attributes(problem).pool.kernel)
    if loads > most:
        return f"{loads} loads per thread and block of channels; more than {most} spill"
    held = tile["BLOCK_N"] * tile["BLOCK_K"] * x.spec.dtype.itemsize // threads
    if held > MOST_WEIGHTS:
        return f"{held} bytes of weights per thread; more than {MOST_WEIGHTS} spill"
    accumulators = tile["BLOCK_M"] * tile["BLOCK_N"] // threads
    if single and accumulators > 32:
        return f"{accumulators} fp32 accumulators per thread; more than 32 spill"
    return choice.legal_tile(x.spec.dtype, tile, target)


def default(problem: Problem, target: Target) -> Config:
    """The shape that should take the least time: few tiles of output channels, because each pools
    again, but enough tiles to keep the multiprocessors busy."""
    if target.name == "interpreter":
        rows, c, k = _size(problem)
        tile = choice.interpreter_tile(choice.Size(rows, k, c, problem.inputs[0].spec.dtype))
        names = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
        return config(1, 1, **{name: tile[name] for name in names})
    gpu, work = cost_model.machine_for(target), cost(problem).flops
    dtype = problem.inputs[0].spec.dtype

    def time_us(tile: Config) -> float:
        # 16 pooled elements beside 64 accumulators leave room for one program: 64x256x64 takes 158
        # to 186 registers (sm_80 to sm_100), 64x256x32 112 to 158.
        threads = 32 * tile.num_warps
        crowded = tile["BLOCK_M"] * (tile["BLOCK_K"] + tile["BLOCK_N"]) > 72 * threads
        ends = cost_model.end_bytes(problem)
        time = cost_model.launch_us(gpu, _outline(problem, tile), work, dtype, ends)
        return time * 2 if crowded else time

    return min(configs(problem, target), key=time_us, default=_tile(16, 16, 16, 4))


def cost(problem: Problem) -> Cost:
    """The product, and one operation per tap."""
    rows, c, k = _size(problem)
    taps = math.prod(_attributes(problem).pool.kernel)
    read, written = tensor_bytes(problem)
    return Cost(2 * rows * c * k + taps * rows * c, read, written)


OP = Op(
    name="pool_conv",
    attributes=PoolConv,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    packs=lambda attributes: {1: lambda _, w: conv2d.pack(Conv2d(), w)},
)
