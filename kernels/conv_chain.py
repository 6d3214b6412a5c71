"""conv_chain: convolution -> 1x1 expansion -> 1x1 reduction in one kernel, without halo recompute.

    t = F(conv2d(x, w1))          all channels of t in one tile, kept in registers
    y = E(t · w2ᵀ)                stored; E usually adds the residual and applies the activation
    z = G(y · w3ᵀ)                stored; the next block's 1x1 reduction, summed while y passes by

x: (N, C, H, W) NHWC; w1: (M, C, R, S); w2: (E, M, 1, 1); w3: (O, E, 1, 1); y: (N, E, P, Q);
z: (N, O, P, Q). fp32 accumulation; t and y are rounded to the dtype of the tensors, as they would
be between separate kernels. The first convolution and the last are optional.

This is the "rotated bottleneck" of ResNet (He et al., 2016): cutting the net after the reduction
instead of before it puts the 3x3 first, so no pixel is computed twice, and the wide tensor y is
written once and never read back by the reduction. Back-to-back products whose intermediate stays in
registers: CUTLASS example 13.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ..errors import InvalidInputError
from . import conv2d, gemm
from . import epilogue as ep
from .conv2d import Conv2d
from .op import (
    Attributes,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Problem,
    Ref,
    config,
    power_of_two,
    tensor_bytes,
)
from .spec import Layout, Operand, TensorSpec
from .targets import Target

REGISTERS = 208
"""Registers per thread that both accumulators and t may take before the compiler spills."""


@dataclass(frozen=True)
class ConvChain(Attributes):
    """The links of the chain and the pointwise stages after each of them.

    front: None where x already is t. Inputs: x, [w1, operands of `after_front`], w2, operands of
    `after_expand`, [w3, operands of `after_reduce`].
    """

    front: Conv2d | None = None
    after_front: ep.Epilogue = ()
    after_expand: ep.Epilogue = ()
    has_reduce: bool = False
    after_reduce: ep.Epilogue = ()

    @property
    def slots(self) -> dict[str, int]:
        """Where each weight and each group of operands starts among the inputs."""
        at, slots = 1, {"x": 0}
        if self.front is not None:
            slots |= {"w1": at, "front": at + 1}
            at += 1 + ep.operand_count(self.after_front)
        slots |= {"w2": at, "expand": at + 1}
        at += 1 + ep.operand_count(self.after_expand)
        if self.has_reduce:
            slots |= {"w3": at, "reduce": at + 1}
            at += 1 + ep.operand_count(self.after_reduce)
        return slots | {"end": at}


def _part(attributes: ConvChain, name: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The inputs that the stages of one link read."""
    stages = getattr(attributes, f"after_{name}")
    if name not in attributes.slots:
        return ()
    start = attributes.slots[name]
    return values[start : start + ep.operand_count(stages)]


def middle(attributes: ConvChain, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
    """The spec of t."""
    if attributes.front is None:
        return inputs[0].with_(layout=Layout.NHWC)
    return conv2d.infer(attributes.front, (inputs[0], inputs[1]))[0]


def infer(attributes: ConvChain, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """y, and z where there is a reduction."""
    slots = attributes.slots
    if len(inputs) != slots["end"]:
        raise InvalidInputError(f"conv_chain: expected {slots['end']} inputs, got {len(inputs)}")
    t = middle(attributes, inputs)
    outputs = conv2d.infer(Conv2d(), (t, inputs[slots["w2"]]))
    links = {"front": t, "expand": outputs[0]}
    if attributes.has_reduce:
        outputs += conv2d.infer(Conv2d(), (outputs[0], inputs[slots["w3"]]))
        links["reduce"] = outputs[1]
    for name, result in links.items():
        for operand in _part(attributes, name, inputs):
            if not ep.broadcasts(operand, result):
                raise InvalidInputError(
                    f"conv_chain: {operand}, read after {name}, does not broadcast to {result}"
                )
    return outputs


def reference(
    attributes: ConvChain, *tensors: torch.Tensor
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    slots = attributes.slots
    t = tensors[0]
    if attributes.front is not None:
        t = conv2d.reference(attributes.front, t, tensors[slots["w1"]])
        t = ep.apply_reference(attributes.after_front, t, _part(attributes, "front", tensors))
    y = F.conv2d(t, tensors[slots["w2"]])
    y = ep.apply_reference(attributes.after_expand, y, _part(attributes, "expand", tensors))
    if not attributes.has_reduce:
        return y
    z = F.conv2d(y, tensors[slots["w3"]])
    z = ep.apply_reference(attributes.after_reduce, z, _part(attributes, "reduce", tensors))
    return y, z


@triton.jit
def conv_chain_kernel(
    x,
    w1,
    w2,
    w3,
    y,
    z,
    extras,
    m,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    MIDDLE: tl.constexpr,
    WIDE_CHANNELS: tl.constexpr,
    NARROW: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
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
    Z_PITCH: tl.constexpr,
    Z_OFFSET: tl.constexpr,
    FRONT: tl.constexpr,
    EXPAND: tl.constexpr,
    REDUCE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_MIDDLE: tl.constexpr,
    BLOCK_NARROW: tl.constexpr,
    INNER_STAGES: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    inner = tl.arange(0, BLOCK_MIDDLE)
    inner_mask = inner < MIDDLE
    if FRONT is None:
        tile = x + X_OFFSET + (rows * X_PITCH)[:, None] + inner[None, :]
        t = tl.load(tile, mask=row_mask[:, None] & inner_mask[None, :], other=0.0)
    else:
        image = rows // (P * Q)
        top = (rows // Q % P).to(tl.int32) * STRIDE_H - TOP
        left = (rows % Q).to(tl.int32) * STRIDE_W - LEFT
        corner = (image * H + top) * WIDTH + left
        top = tl.where(row_mask, top, -1048576)
        depth = tl.arange(0, BLOCK_K)
        x_tile = (corner * X_PITCH)[:, None] + depth[None, :]
        w1_tile = w1 + (inner * (R * S * C))[:, None] + depth[None, :]
        blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
        acc = tl.zeros((BLOCK_M, BLOCK_MIDDLE), tl.float32)
        for step in range(R * S * blocks):
            tap = step // blocks
            start = step % blocks * BLOCK_K
            r = tap // S * DILATION_H
            s = tap % S * DILATION_W
            inside = ((top + r).to(tl.uint32, bitcast=True) < H) & (
                (left + s).to(tl.uint32, bitcast=True) < WIDTH
            )
            a_mask = inside[:, None]
            b_mask = inner_mask[:, None]
            if C % BLOCK_K != 0:
                a_mask = a_mask & (start + depth < C)[None, :]
                b_mask = b_mask & (start + depth < C)[None, :]
            x_step = x + X_OFFSET + ((r * WIDTH + s) * X_PITCH + start)
            a = tl.load(x_step + x_tile, mask=a_mask, other=0.0)
            b = tl.load(w1_tile + (tap * C + start), mask=b_mask, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
        acc = FRONT(acc, rows, inner, row_mask, inner_mask, extras)
        # Channels past MIDDLE must stay zero whatever the stages made of them.
        t = tl.where(inner_mask[None, :], acc, 0.0).to(x.dtype.element_ty)
    narrow = tl.arange(0, BLOCK_NARROW)
    narrow_mask = narrow < NARROW
    total = tl.zeros((BLOCK_M, BLOCK_NARROW), tl.float32)
    for begin in tl.range(0, WIDE_CHANNELS, BLOCK_N, num_stages=INNER_STAGES):
        columns = begin + tl.arange(0, BLOCK_N)
        column_mask = columns < WIDE_CHANNELS
        w2_tile = w2 + (columns * MIDDLE)[:, None] + inner[None, :]
        w2_mask = column_mask[:, None] & inner_mask[None, :]
        product = tl.dot(
            t, tl.load(w2_tile, mask=w2_mask, other=0.0).T, input_precision=PRECISION
        )
        product = EXPAND(product, rows, columns, row_mask, column_mask, extras)
        wide = product.to(y.dtype.element_ty)
        address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
        tl.store(address, wide, mask=row_mask[:, None] & column_mask[None, :])
        if REDUCE is not None:
            if WIDE_CHANNELS % BLOCK_N != 0:
                wide = tl.where(column_mask[None, :], wide, 0.0).to(y.dtype.element_ty)
            w3_tile = w3 + (narrow * WIDE_CHANNELS)[:, None] + columns[None, :]
            w3_mask = narrow_mask[:, None] & column_mask[None, :]
            b = tl.load(w3_tile, mask=w3_mask, other=0.0)
            total = tl.dot(wide, b.T, total, input_precision=PRECISION)
    if REDUCE is not None:
        total = REDUCE(total, rows, narrow, row_mask, narrow_mask, extras)
        address = z + Z_OFFSET + (rows * Z_PITCH)[:, None] + narrow[None, :]
        mask = row_mask[:, None] & narrow_mask[None, :]
        tl.store(address, total.to(z.dtype.element_ty), mask=mask)


def _function(
    stages: ep.Epilogue, operands: tuple[Operand, ...], spec: TensorSpec, first: int, name: str
) -> ep.GeneratedFunction:
    reads = tuple(ep.access(operand, spec) for operand in operands)
    return ep.generate(stages, reads, ep.memory_sizes(spec), first, name)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch; every program owns BLOCK_M pixels and all their channels."""
    attributes = problem.attributes
    assert isinstance(attributes, ConvChain)
    slots, inputs = attributes.slots, problem.inputs
    t = middle(attributes, tuple(operand.spec for operand in inputs))
    x, y = inputs[0], problem.outputs[0]
    z = problem.outputs[-1]
    front = attributes.front or Conv2d()
    _, _, r, s = inputs[slots["w1"]].shape if attributes.front else (0, 0, 1, 1)
    refs: list[Ref] = []
    functions: dict[str, ep.GeneratedFunction | None] = {}
    for name, spec in (("front", t), ("expand", y.spec), ("reduce", z.spec)):
        if name not in slots:
            functions[name] = None
            continue
        stages = getattr(attributes, f"after_{name}")
        operands = _part(attributes, name, inputs)
        functions[name] = _function(stages, operands, spec, len(refs), name)
        refs += [Ref("input", slots[name] + index) for index in range(len(operands))]
    last = attributes.has_reduce
    launch = Launch(
        kernel=conv_chain_kernel,
        pointers={
            "x": Ref("input", 0),
            # Absent links are compiled out; their pointers are never read.
            "w1": Ref("input", slots.get("w1", slots["w2"])),
            "w2": Ref("input", slots["w2"]),
            "w3": Ref("input", slots.get("w3", slots["w2"])),
            "y": Ref("output", 0),
            "z": Ref("output", 1 if last else 0),
        },
        extras=tuple(refs),
        rows=y.spec.numel // y.shape[1],
        batch=y.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=1,
        constexprs={
            "H": x.shape[2], "WIDTH": x.shape[3], "C": x.shape[1], "MIDDLE": t.shape[1],
            "WIDE_CHANNELS": y.shape[1], "NARROW": z.shape[1] if last else 1,
            "P": y.shape[2], "Q": y.shape[3], "R": r, "S": s,
            "STRIDE_H": front.stride[0], "STRIDE_W": front.stride[1],
            "TOP": front.padding[0], "LEFT": front.padding[2],
            "DILATION_H": front.dilation[0], "DILATION_W": front.dilation[1],
            "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": y.pitch, "Y_OFFSET": y.offset,
            "Z_PITCH": z.pitch, "Z_OFFSET": z.offset,
            "FRONT": functions["front"], "EXPAND": functions["expand"],
            "REDUCE": functions["reduce"],
            "PRECISION": gemm.dot_precision(problem, 16),
            "WIDE": problem.is_wide,
            "BLOCK_MIDDLE": max(16, power_of_two(t.shape[1])),
            "BLOCK_NARROW": max(16, power_of_two(z.shape[1])) if last else 16,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return (launch,)


def _widths(problem: Problem) -> tuple[int, int, int]:
    """Channels of x, of t, and of z (0 without a reduction)."""
    attributes = problem.attributes
    assert isinstance(attributes, ConvChain)
    t = middle(attributes, tuple(operand.spec for operand in problem.inputs))
    narrow = problem.outputs[1].shape[1] if attributes.has_reduce else 0
    return problem.inputs[0].shape[1], t.shape[1], narrow


def _taps(problem: Problem) -> int:
    """Taps of the first convolution's filter; 1 without one."""
    attributes = problem.attributes
    assert isinstance(attributes, ConvChain)
    if attributes.front is None:
        return 1
    r, s = problem.inputs[attributes.slots["w1"]].shape[2:]
    return r * s


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """All warps lie along the rows (BLOCK_M = 16 per warp), so that t stays in registers."""
    for warps in (4, 8):
        for block_n in (32, 64):
            for stages in (2, 3, 4):
                for inner in (1, 2):
                    tile = _tile(16 * warps, block_n, 64, warps, stages, inner)
                    if legal(problem, tile, target) is None:
                        yield tile


def _tile(m: int, n: int, k: int, warps: int, stages: int, inner: int) -> Config:
    return config(warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, INNER_STAGES=inner)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Shared memory for the pipelined operands and registers for both accumulators."""
    if target.name == "interpreter":
        return None
    if (reason := gemm.legal_for_taps(tile, _taps(problem))) is not None:
        return reason
    _, middle_channels, narrow = _widths(problem)
    block_middle, block_narrow = power_of_two(middle_channels), power_of_two(max(narrow, 16))
    size = problem.inputs[0].spec.dtype.itemsize
    attributes, block_m, block_n = problem.attributes, tile["BLOCK_M"], tile["BLOCK_N"]
    assert isinstance(attributes, ConvChain)
    inner = tile["INNER_STAGES"] * (block_middle + block_narrow) * block_n + block_m * block_n
    if attributes.front is None:
        needed = size * (block_m * block_middle + inner)
    else:
        needed = size * max(tile.num_stages * (block_m + block_middle) * tile["BLOCK_K"], inner)
    if needed > target.shared_bytes:
        return f"needs {needed} bytes of shared memory; {target.name} has {target.shared_bytes}"
    threads = 32 * tile.num_warps
    values = block_m * (block_narrow + block_n + block_middle // 2) // threads
    if values > REGISTERS:
        return f"{values} registers per thread for tiles alone; more than {REGISTERS} spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """16 pixels per warp; the expansion in steps of 64 channels, or of 32 where registers are
    short; the first legal configuration where that needs more shared memory than there is.

    sm_90, 3x3 64 -> 1x1 256 -> 1x1 64: 140 registers; without the 3x3 256 -> 1024 -> 256: 254, no
    spills.
    """
    rows = problem.outputs[0].spec.numel // problem.outputs[0].shape[1]
    channels, middle_channels, narrow = _widths(problem)
    if target.name == "interpreter":
        block_m = max(16, min(4096, power_of_two(rows)))
        block_k = max(16, min(128, power_of_two(channels)))
        return _tile(block_m, 256, block_k, 1, 1, 1)
    block_k = max(16, min(64, power_of_two(channels)))
    block_n = 64 if max(middle_channels, narrow) <= 64 else 32
    warps = gemm.MOST_WARPS_OVER_TAPS if _taps(problem) > 1 else 8
    tile = _tile(16 * warps, block_n, block_k, warps, 3, 1)
    if legal(problem, tile, target) is None:
        return tile
    return next(configs(problem, target), tile)


def cost(problem: Problem) -> Cost:
    """The products of all links; t is neither written nor read, y is not read."""
    attributes = problem.attributes
    assert isinstance(attributes, ConvChain)
    slots = attributes.slots
    y = problem.outputs[0]
    pixels = y.spec.numel // y.shape[1]
    products = y.shape[1] * problem.inputs[slots["w2"]].shape[1]
    if attributes.front is not None:
        k, per_group, r, s = problem.inputs[slots["w1"]].shape
        products += k * per_group * r * s
    if attributes.has_reduce:
        products += y.shape[1] * problem.outputs[1].shape[1]
    read, written = tensor_bytes(problem)
    return Cost(2 * pixels * products, read, written)


def packs(attributes: ConvChain) -> Mapping[int, Callable[[Any, torch.Tensor], torch.Tensor]]:
    """Every weight K-major, as conv2d packs it."""
    slots = attributes.slots
    return {slots[name]: _pack for name in ("w1", "w2", "w3") if name in slots}


def _pack(attributes: ConvChain, w: torch.Tensor) -> torch.Tensor:
    return w.permute(0, 2, 3, 1).reshape(w.shape[0], -1).contiguous()


def _build(draw: Mapping[str, Any]) -> tuple[ConvChain, tuple[TensorSpec, ...]] | None:
    n, (h, width) = draw["N"], draw["image"]
    c, mid, wide, narrow = draw["C"], draw["M"], draw["E"], draw["O"]
    bias = (ep.Stage("add"), ep.Stage("relu"))
    residual = (ep.Stage("add"), ep.Stage("add"), ep.Stage("relu"))
    r, pad = draw["filter"]
    stride = draw["stride"]
    front = Conv2d((stride, stride), (pad,) * 4) if draw["front"] else None
    attributes = ConvChain(front, bias, residual, draw["reduce"], bias)
    x = TensorSpec((n, c, h, width), torch.float32, Layout.NHWC)
    specs = [x]
    if front is not None:
        specs += [TensorSpec((mid, c, r, r), torch.float32), TensorSpec((mid, 1, 1), torch.float32)]
    else:
        attributes = ConvChain(None, (), residual, draw["reduce"], bias)
        mid = c
    try:
        t = middle(attributes, tuple(specs))
    except InvalidInputError:
        return None
    y = TensorSpec((n, wide, *t.shape[2:]), torch.float32, Layout.NHWC)
    specs += [TensorSpec((wide, mid, 1, 1), torch.float32), TensorSpec((wide, 1, 1), torch.float32)]
    specs.append(y)
    if draw["reduce"]:
        specs.append(TensorSpec((narrow, wide, 1, 1), torch.float32))
        specs.append(TensorSpec((narrow, 1, 1), torch.float32))
    return attributes, tuple(specs)


OP = Op(
    name="conv_chain",
    attributes=ConvChain,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    domain=Domain(
        ranges={
            "N": (1, 2),
            "image": ((1, 1), (5, 7), (8, 8)),
            "C": (8, 20, 33),
            "M": (8, 16, 20),
            "E": (8, 40, 72),
            "O": (8, 16, 33),
            "filter": ((3, 1), (1, 0), (5, 1)),
            "stride": (1, 2),
            "front": (True, True, False),
            "reduce": (True, True, False),
        },
        build=_build,
    ),
    packs=packs,
    takes_epilogue=False,
)
