"""conv3d, and conv2d whose border is not zero:

    y[n,k,o,p,q] = sum_{t,r,s,c} x[n, c, o·sd − front + t·dd, p·sh − top + r·dh, q·sw − left + s·dw]
                                 w[k,c,t,r,s]

x: (N, C, D, H, W) channels innermost in memory; w: (K, C/G, T, R, S), a constant packed as
(K, T·R·S·C/G); y: (N, K, O, P, Q) channels innermost; fp32 accumulation. The bias is an epilogue.
`border_conv2d` is the same without D, O and T, and x outside its image is what `pad` would have put
there (reflect, replicate, circular): nothing is padded, the loads find their pixels themselves.

Implicit GEMM as in `conv2d.py`: one loop flattened over (t, r, s) and channel blocks, or with few
channels per group over (tap, channel) pairs. A step of that loop at 128x64 and 4 warps on sm_90:
3x3x3 218 instructions, 152 without padding, against 171 of conv2d's 3x3; a 3x3 filter with borders
232 (replicate) to 256 (circular). A 1x1x1 filter with stride 1 is a matrix product (`gemm.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.op import (
    Builder,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Problem,
    W,
    X,
    Y,
    operand_refs,
    tensor_bytes,
)
from ..contract.spec import Layout, TensorSpec
from ..contract.targets import Target
from ..movement.arguments import as_image, as_sequence, both_sides, numbers, with_bias
from ..movement.pad import correction
from ..products import gemm
from ..tile import choice, space
from ..tile.conv_geometry import Conv2d
from ..tile.source import runs_by_tap
from .conv_window import BORDERS, BorderConv2d, Conv3d, ConvNd, infer, pack, reference


@triton.jit
def locate(
    row_mask,
    front,
    top,
    left,
    D: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    OPEN_D: tl.constexpr,
    OPEN_H: tl.constexpr,
    OPEN_W: tl.constexpr,
    BORDER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Whether there is something to load at a position, and how many pixels further it lies.

    OPEN: whether a position can be outside the input in that dimension.
    """
    inside = row_mask
    move = left * 0
    if WIDE:
        move = move.to(tl.int64)
    if BORDER == "constant":
        if OPEN_H:
            # Rows past the end are where no tap comes inside: they need no mask of their own.
            inside = top.to(tl.uint32, bitcast=True) < H
        if OPEN_W:
            inside = inside & (left.to(tl.uint32, bitcast=True) < WIDTH)
        if OPEN_D:
            inside = inside & (front.to(tl.uint32, bitcast=True) < D)
    else:
        if OPEN_D:
            move += correction(front, D, BORDER)
        move = move * H
        if OPEN_H:
            move += correction(top, H, BORDER)
        move = move * WIDTH
        if OPEN_W:
            move += correction(left, WIDTH, BORDER)
    return inside, move


@triton.jit
def conv_nd_kernel(
    x,
    w,
    y,
    extras,
    m,
    D: tl.constexpr,
    H: tl.constexpr,
    WIDTH: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    OUT_D: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    T: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_D: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    FRONT: tl.constexpr,
    TOP: tl.constexpr,
    LEFT: tl.constexpr,
    DILATION_D: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    OPEN_D: tl.constexpr,
    OPEN_H: tl.constexpr,
    OPEN_W: tl.constexpr,
    GROUPS: tl.constexpr,
    BORDER: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BY_TAP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    # C and K count the channels of one group. OPEN: whether some tap can leave the input in that
    # dimension; where none can, nothing is checked.
    group_tiles: tl.constexpr = (K + BLOCK_N - 1) // BLOCK_N
    row_tile, column_tile = space.tile_index(
        tl.program_id(0), tl.cdiv(m, BLOCK_M), GROUPS * group_tiles, GROUP_M
    )
    group = column_tile // group_tiles
    within = column_tile % group_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = group * K + within
    column_mask = within < K
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask = rows < m
    if WIDE:
        rows = rows.to(tl.int64)
    image = rows // (OUT_D * P * Q)
    front = (rows // (P * Q) % OUT_D).to(tl.int32) * STRIDE_D - FRONT
    top = (rows // Q % P).to(tl.int32) * STRIDE_H - TOP
    left = (rows % Q).to(tl.int32) * STRIDE_W - LEFT
    corner = ((image * D + front) * H + top) * WIDTH + left
    if BORDER == "constant":
        # One mask for both: 218 instead of 230 instructions per step (3x3x3, 128x64, sm_90).
        top = tl.where(row_mask, top, -1048576)
    depth = tl.arange(0, BLOCK_K)
    x_group = x + X_OFFSET + group * C
    x_corner = (corner * X_PITCH)[:, None]
    w_tile = w + (columns * (T * R * S * C))[:, None] + depth[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if BY_TAP:
        blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
        x_tile = x_corner + depth[None, :]
        for step in range(T * R * S * blocks):
            tap = step // blocks
            start = step % blocks * BLOCK_K
            t = tap // (R * S) * DILATION_D
            r = tap // S % R * DILATION_H
            s = tap % S * DILATION_W
            inside, move = locate(
                row_mask, front + t, top + r, left + s,
                D, H, WIDTH, OPEN_D, OPEN_H, OPEN_W, BORDER, WIDE,
            )  # fmt: skip
            if WIDE:
                t = t.to(tl.int64)
            x_step = x_group + (((t * H + r) * WIDTH + s) * X_PITCH + start)
            w_step = w_tile + (tap * C + start)
            channels = start + depth
            a_mask = inside[:, None]
            b_mask = column_mask[:, None]
            if C % BLOCK_K != 0:
                a_mask = a_mask & (channels < C)[None, :]
                b_mask = b_mask & (channels < C)[None, :]
            a = tl.load(x_step + (x_tile + (move * X_PITCH)[:, None]), mask=a_mask, other=0.0)
            b = tl.load(w_step, mask=b_mask, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    else:
        for start in range(0, T * R * S * C, BLOCK_K):
            index = start + depth[None, :]
            live = index < T * R * S * C
            tap = index // C
            t = tap // (R * S) * DILATION_D
            r = tap // S % R * DILATION_H
            s = tap % S * DILATION_W
            inside, move = locate(
                row_mask[:, None], front[:, None] + t, top[:, None] + r, left[:, None] + s,
                D, H, WIDTH, OPEN_D, OPEN_H, OPEN_W, BORDER, WIDE,
            )  # fmt: skip
            if WIDE:
                t = t.to(tl.int64)
            offset = x_corner + ((t * H + r) * WIDTH + s) * X_PITCH + index % C
            offset = offset + move * X_PITCH
            a = tl.load(x_group + offset, mask=inside & live, other=0.0)
            b_mask = column_mask[:, None] & live
            b = tl.load(w_tile + start, mask=b_mask, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
    address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


def _attributes(problem: Problem) -> ConvNd:
    assert isinstance(problem.attributes, (Conv3d, BorderConv2d))
    return problem.attributes


def is_matrix_product(problem: Problem) -> bool:
    """Whether input and output are one matrix each, and the filter multiplies their rows."""
    attributes = _attributes(problem)
    plain = set(attributes.stride) == {1} and not any(attributes.padding)
    return plain and attributes.groups == 1 and set(problem.inputs[1].shape[2:]) == {1}


def _size(problem: Problem) -> choice.Size:
    groups = _attributes(problem).groups
    x, w, y = problem.inputs[0].spec, problem.inputs[1].spec, problem.output.spec
    taps = math.prod(w.shape[2:])
    by_tap = runs_by_tap(w.shape[1], taps)
    depth = w.shape[1] if by_tap else w.shape[1] * taps
    rows, columns = y.numel // y.shape[1], y.shape[1] // groups
    return choice.Size(rows, columns, depth, x.dtype, groups, not by_tap, taps)


def _three(values: tuple[int, ...], missing: int) -> tuple[int, ...]:
    return (*(missing for _ in range(3 - len(values))), *values)


def _open_dimensions(problem: Problem) -> tuple[bool, ...]:
    """Where some tap leaves the input."""
    attributes = _attributes(problem)
    x, w, y = problem.inputs[0].shape, problem.inputs[1].shape, problem.output.shape
    result = []
    for at, (stride, dilation) in enumerate(
        zip(attributes.stride, attributes.dilation, strict=True)
    ):
        before = attributes.padding[2 * at]
        last = (y[at + 2] - 1) * stride + (w[at + 2] - 1) * dilation - before
        result.append(before > 0 or last >= x[at + 2])
    return tuple(result)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch: of the matrix product where the convolution is one."""
    attributes = _attributes(problem)
    x, out, w = problem.inputs[0], problem.output, problem.inputs[1].spec
    if is_matrix_product(problem):
        return (gemm.launch(problem, tile, x, out.shape[1]),)
    size = _size(problem)
    per_group, taps = w.shape[1], math.prod(w.shape[2:])
    names = (
        ("D", "H", "WIDTH"), ("OUT_D", "P", "Q"), ("T", "R", "S"),
        ("STRIDE_D", "STRIDE_H", "STRIDE_W"), ("FRONT", "TOP", "LEFT"),
        ("DILATION_D", "DILATION_H", "DILATION_W"), ("OPEN_D", "OPEN_H", "OPEN_W"),
    )  # fmt: skip
    values = (
        (x.shape[2:], 1), (out.shape[2:], 1), (w.shape[2:], 1),
        (attributes.stride, 1), (attributes.padding[::2], 0), (attributes.dilation, 1),
        (_open_dimensions(problem), False),
    )  # fmt: skip
    geometry = {
        name: number
        for three, (given, missing) in zip(names, values, strict=True)
        for name, number in zip(three, _three(given, missing), strict=True)
    }
    steps = -(-size.depth // tile["BLOCK_K"]) * (1 if size.gathers else taps)
    area = tile["BLOCK_K"] * (tile["BLOCK_M"] + tile["BLOCK_N"])
    launch = Launch(
        kernel=conv_nd_kernel,
        pointers={"x": X, "w": W, "y": Y},
        extras=operand_refs(problem),
        rows=size.rows,
        batch=out.spec.batch,
        block_rows=tile["BLOCK_M"],
        columns=size.groups * -(-size.columns // tile["BLOCK_N"]),
        constexprs={
            **geometry,
            "C": per_group, "K": size.columns, "GROUPS": size.groups,
            "BORDER": attributes.border,
            "X_PITCH": x.pitch, "X_OFFSET": x.offset,
            "Y_PITCH": out.pitch, "Y_OFFSET": out.offset,
            "EPILOGUE": gemm.chains(problem)[0],
            "PRECISION": choice.dot_precision(problem, per_group * taps),
            "WIDE": problem.is_wide,
            "BY_TAP": not size.gathers,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        l2_bytes=steps * area * x.spec.dtype.itemsize,
        steps=steps,
        step_instructions=choice.step_instructions(tile, size.dtype, taps),
    )  # fmt: skip
    return (launch,)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    return choice.tile_configs(_size(problem), target)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    return choice.legal(_size(problem), tile, target)


def default(problem: Problem, target: Target) -> Config:
    return choice.default_tile(_size(problem), target)


def cost(problem: Problem) -> Cost:
    read, written = tensor_bytes(problem)
    per_output = math.prod(problem.inputs[1].shape[1:])
    return Cost(2 * problem.output.spec.numel * per_output, read, written)


def _capture_3d(
    g: Builder,
    x: Any,
    w: Any,
    b: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    if g.spec(x).rank != 5:
        return g.refuse("unbatched convolution; pass a batch dimension")
    dilations = numbers(dilation, 3)
    around = both_sides(padding, g.spec(w).shape[2:], dilations)
    attributes = Conv3d(numbers(stride, 3), around, dilations, int(groups))
    return with_bias(g, "conv3d", x, w, b, attributes)


def _capture_1d(
    g: Builder,
    x: Any,
    w: Any,
    b: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    """conv1d as the conv2d of an image of one row."""
    if g.spec(x).rank != 3:
        return g.refuse("unbatched convolution; pass a batch dimension")
    (step,), (apart,) = numbers(stride, 1), numbers(dilation, 1)
    left, right = both_sides(padding, g.spec(w).shape[2:], (apart,))
    attributes = Conv2d((1, step), (0, 0, left, right), (1, apart), int(groups))
    row = with_bias(g, "conv2d", as_image(g, x), as_image(g, w), b, attributes)
    return as_sequence(g, row)


def _build(
    make: type[ConvNd], draw: Mapping[str, Any]
) -> tuple[ConvNd, tuple[TensorSpec, ...]] | None:
    dims = 3 if make is Conv3d else 2
    groups, per_group, per_group_out = draw["groups"], draw["C"], draw["K"]
    if draw["depthwise"]:
        groups, per_group, per_group_out = groups * per_group, 1, min(per_group_out, 2)
    attributes = make(
        draw["stride"][-dims:],
        draw["padding"][-2 * dims :],
        draw["dilation"][-dims:],
        groups,
        draw["border"],
    )
    shape = (draw["N"], groups * per_group, *draw["image"][-dims:])
    x = TensorSpec(shape, torch.float32, Layout.NHWC)
    filters = draw["filter"][-dims:]
    w = TensorSpec((groups * per_group_out, per_group, *filters), torch.float32)
    try:
        infer(NAMES[make], attributes, (x, w))
    except InvalidInputError:
        return None
    return attributes, (x, w)


NAMES: dict[type[ConvNd], str] = {Conv3d: "conv3d", BorderConv2d: "border_conv2d"}


def _draw(**changes: Any) -> Mapping[str, Any]:
    plain = {
        "N": 1, "image": (3, 5, 4), "C": 16, "K": 8, "filter": (3, 3, 3), "stride": (1, 1, 1),
        "padding": (1, 1, 1, 1, 1, 1), "dilation": (1, 1, 1), "groups": 1, "depthwise": False,
        "border": "reflect",
    }  # fmt: skip
    return {**plain, **changes}


def _op(make: type[ConvNd], borders: tuple[str, ...], **more: Any) -> Op:
    name = NAMES[make]
    return Op(
        name=name,
        attributes=make,
        infer=partial(infer, name),
        reference=reference,
        launches=launches,
        configs=configs,
        default=default,
        legal=legal,
        cost=cost,
        domain=Domain(
            ranges={
                "N": (1, 2, 3),
                "image": ((1, 1, 1), (3, 5, 5), (5, 6, 4), (4, 9, 7)),
                "C": (1, 3, 8, 16, 20),
                "K": (1, 8, 10, 33),
                "filter": ((1, 1, 1), (3, 3, 3), (1, 3, 3), (3, 1, 1), (2, 1, 5), (3, 5, 2)),
                "stride": ((1, 1, 1), (2, 2, 2), (1, 2, 1), (3, 1, 2)),
                "padding": (
                    (0, 0, 0, 0, 0, 0), (1, 1, 1, 1, 1, 1), (0, 0, 2, 2, 2, 2), (0, 1, 2, 0, 1, 3),
                    (1, 0, -1, 0, 2, -1),
                ),
                "dilation": ((1, 1, 1), (1, 1, 1), (2, 2, 2), (1, 3, 2)),
                "groups": (1, 2, 3),
                "depthwise": (False, False, True),
                "border": borders,
            },
            build=partial(_build, make),
            interesting=(
                # The widest borders: all of the input is repeated on both sides.
                _draw(image=(3, 4, 3), padding=(2, 2, 3, 3, 2, 2)),
                _draw(image=(2, 4, 3), padding=(2, 2, 4, 4, 3, 3), border="circular", C=3),
                _draw(image=(1, 1, 1), padding=(1, 1, 5, 0, 3, 3), border="replicate", C=20),
                _draw(stride=(2, 2, 2), dilation=(1, 2, 1), groups=2, C=8, border="circular"),
            ),
        ),
        packs=lambda attributes: {1: pack},
        **more,
    )  # fmt: skip


OPS = (
    _op(
        Conv3d,
        ("constant", "constant", *BORDERS),
        aten={
            "aten.conv3d.default": _capture_3d,
            "aten.conv3d.padding": _capture_3d,
            "aten.conv1d.default": _capture_1d,
            "aten.conv1d.padding": _capture_1d,
        },
    ),
    _op(BorderConv2d, BORDERS),
)
