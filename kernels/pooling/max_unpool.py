"""max_unpool2d: pooled values back where they stood, zero everywhere else.

y[n,c,o] = x[n,c,p,q] for the window (p, q) with i[n,c,p,q] = o, 0 where there is none; o counts the
pixels of the result row by row, and so do the indices. Where overlapping windows name one pixel the
last of them counts, as in torch on one CPU thread (on a GPU torch leaves it open): results are the
same in every run.

x, i: (N, C, P, Q) NHWC in memory, i of int64 -> y: (N, C, H, W) NHWC.

Torch scatters. Here the op also knows the pooling that made the indices, so that it can gather: an
element of the pooled image is named only by windows that cover it. The image is cut into cells of
one stride in each direction; all pixels of a cell have the same few candidates (one, where windows
do not overlap), which a program reads once and compares with each pixel's own position. No atomics,
and nothing is zeroed beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.launch_tiles import tiled_launch, tiles_of
from ..contract.op import (
    Attributes,
    Builder,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Problem,
    Ref,
    Target,
    X,
    Y,
    config,
    tensor_bytes,
    tile_config,
)
from ..contract.spec import Layout, TensorSpec, as_layout
from . import max_pool_indices
from .pool_window import MaxPool2d, output_size
from .tiles import channel_block

MOST_HELD = 9
"""Candidates kept in registers: those of a 3x3 window with stride 1."""


@dataclass(frozen=True)
class MaxUnpool2d(Attributes):
    """The result's height and width; those of the image that was pooled, and how it was."""

    size: tuple[int, int] = (1, 1)
    image: tuple[int, int] = (1, 1)
    pool: MaxPool2d = field(default_factory=MaxPool2d)

    @property
    def candidates(self) -> tuple[int, int]:
        """How many windows may cover one pixel, by direction."""
        pool = self.pool
        return tuple(  # type: ignore[return-value]
            pool.dilation[axis] * (pool.kernel[axis] - 1) // pool.stride[axis] + 1
            for axis in (0, 1)
        )

    @property
    def cells(self) -> tuple[int, int]:
        """Cells of one stride that hold all pixels of the result, by direction of the image."""
        # A larger result goes on below the image, with rows as wide as the image's.
        height = -(-math.prod(self.size) // self.image[1])
        extents = (height, self.image[1])
        return tuple(  # type: ignore[return-value]
            (extents[axis] - 1 + self.pool.padding[axis]) // self.pool.stride[axis] + 1
            for axis in (0, 1)
        )


def infer(attributes: MaxUnpool2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, C, P, Q) twice gives (N, C, *size)."""
    if len(inputs) != 2 or inputs[0].rank != 4 or inputs[0].shape != inputs[1].shape:
        raise InvalidInputError(
            "max_unpool2d: expected values and indices of one shape (N,C,P,Q), got "
            + " and ".join(map(str, inputs))
        )
    x, where = inputs
    if where.dtype is not torch.int64:
        raise InvalidInputError(f"max_unpool2d: expected int64 indices, got {where}")
    pool, windows = attributes.pool, x.shape[2:]
    made = tuple(
        output_size(
            attributes.image[axis], pool.kernel[axis], pool.stride[axis], pool.padding[axis],
            pool.dilation[axis], pool.ceil_mode,
        )
        for axis in (0, 1)
    )  # fmt: skip
    if made != windows:
        raise InvalidInputError(
            f"max_unpool2d: pooling {attributes.image} gives {made} windows, x has {windows}"
        )
    if math.prod(attributes.size) < math.prod(attributes.image):
        raise InvalidInputError(
            f"max_unpool2d: the result {attributes.size} has fewer pixels than the image "
            f"{attributes.image} that the indices count; pass output_size={attributes.image}"
        )
    return (TensorSpec((*x.shape[:2], *attributes.size), x.dtype, Layout.NHWC, x.batch),)


def reference(
    attributes: MaxUnpool2d, x: torch.Tensor, indices: torch.Tensor
) -> torch.Tensor:
    """By the last window that names each pixel: torch's own scatter leaves that to chance."""
    n, c, p, q = x.shape
    named = indices.flatten(2)
    windows = torch.arange(p * q, device=x.device).expand_as(named)
    last = named.new_full((n, c, math.prod(attributes.size)), -1)
    last = last.scatter_reduce(2, named, windows, "amax")
    values = x.flatten(2).gather(2, last.clamp_min(0))
    return torch.where(last >= 0, values, 0.0).view(n, c, *attributes.size)


@triton.jit
def candidate(
    x,
    i,
    image,
    p,
    q,
    columns,
    row_mask,
    column_mask,
    P: tl.constexpr,
    Q: tl.constexpr,
    X_PITCH: tl.constexpr,
    I_PITCH: tl.constexpr,
):
    """A window's value and the pixel it names; -1 where there is no such window."""
    inside = (p.to(tl.uint32, bitcast=True) < P) & (q.to(tl.uint32, bitcast=True) < Q) & row_mask
    mask = inside[:, None] & column_mask[None, :]
    row = (image * P + p) * Q + q
    named = tl.load(i + (row * I_PITCH)[:, None] + columns[None, :], mask=mask, other=-1)
    value = tl.load(x + (row * X_PITCH)[:, None] + columns[None, :], mask=mask, other=0.0)
    return named.to(tl.int32), value.to(tl.float32)


@triton.jit
def max_unpool_kernel(
    x,
    i,
    y,
    extras,
    m,
    WIDTH: tl.constexpr,
    PIXELS: tl.constexpr,
    C: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    CELLS_H: tl.constexpr,
    CELLS_W: tl.constexpr,
    COUNT_H: tl.constexpr,
    COUNT_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    X_PITCH: tl.constexpr,
    X_OFFSET: tl.constexpr,
    I_PITCH: tl.constexpr,
    I_OFFSET: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WIDE: tl.constexpr,
    HELD: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    # m counts cells: N * CELLS_H * CELLS_W.
    column_tiles: tl.constexpr = (C + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    index = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    live = index < m
    column_mask = columns < C
    if WIDE:
        index = index.to(tl.int64)
    image = index // (CELLS_H * CELLS_W)
    cell_h = (index // CELLS_W % CELLS_H).to(tl.int32)
    cell_w = (index % CELLS_W).to(tl.int32)
    x += X_OFFSET
    i += I_OFFSET
    # Row-major order: where two windows name one pixel the later one overwrites the earlier.
    named = ()
    values = ()
    if HELD:
        for k in tl.static_range(COUNT_H * COUNT_W):
            p = cell_h - (COUNT_H - 1) + k // COUNT_W
            q = cell_w - (COUNT_W - 1) + k % COUNT_W
            place, value = candidate(
                x, i, image, p, q, columns, live, column_mask, P, Q, X_PITCH, I_PITCH
            )
            named = named + (place,)  # type: ignore[assignment]
            values = values + (value,)  # type: ignore[assignment]
    for pixel in range(STRIDE_H * STRIDE_W):
        h = cell_h * STRIDE_H - PADDING_H + pixel // STRIDE_W
        w = cell_w * STRIDE_W - PADDING_W + pixel % STRIDE_W
        here = h * WIDTH + w
        acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        if HELD:
            for k in tl.static_range(COUNT_H * COUNT_W):
                acc = tl.where(named[k] == here[:, None], values[k], acc)
        else:
            for k in range(COUNT_H * COUNT_W):
                p = cell_h - (COUNT_H - 1) + k // COUNT_W
                q = cell_w - (COUNT_W - 1) + k % COUNT_W
                place, value = candidate(
                    x, i, image, p, q, columns, live, column_mask, P, Q, X_PITCH, I_PITCH
                )
                acc = tl.where(place == here[:, None], value, acc)
        row_mask = live & (h >= 0) & (w >= 0) & (w < WIDTH) & (here < PIXELS)
        rows = image * PIXELS + here
        acc = EPILOGUE(acc, rows, columns, row_mask, column_mask, extras)
        address = y + Y_OFFSET + (rows * Y_PITCH)[:, None] + columns[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


def _attributes(problem: Problem) -> MaxUnpool2d:
    assert isinstance(problem.attributes, MaxUnpool2d)
    return problem.attributes


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """The one launch of the kernel."""
    attributes = _attributes(problem)
    pool, (cells_h, cells_w) = attributes.pool, attributes.cells
    (x, where), out = problem.inputs, problem.output
    n, c, h, w = out.shape
    return tiled_launch(
        problem,
        tile,
        max_unpool_kernel,
        {
            "WIDTH": attributes.image[1], "PIXELS": h * w, "C": c,
            "P": x.shape[2], "Q": x.shape[3], "CELLS_H": cells_h, "CELLS_W": cells_w,
            "COUNT_H": attributes.candidates[0], "COUNT_W": attributes.candidates[1],
            "STRIDE_H": pool.stride[0], "STRIDE_W": pool.stride[1],
            "PADDING_H": pool.padding[0], "PADDING_W": pool.padding[1],
            "I_PITCH": where.pitch, "I_OFFSET": where.offset,
            "HELD": math.prod(attributes.candidates) <= MOST_HELD,
        },
        rows=n * cells_h * cells_w,
        pointers={"x": X, "i": Ref("input", 1), "y": Y},
    )  # fmt: skip


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """128 to 1024 elements per program: each costs a value and an index per candidate."""
    for tile in tiles_of((128, 256, 512, 1024), (16, 32, 64)):
        if legal(problem, tile, target) is None:
            yield tile


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    held = math.prod(_attributes(problem).candidates)
    elements = tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"] // (32 * tile.num_warps)
    if target.is_gpu and held <= MOST_HELD and held * elements > 36:
        return "more than 36 candidates per thread spill"
    return None


def default(problem: Problem, target: Target) -> Config:
    """Eight elements per thread where windows do not overlap, else two."""
    attributes = _attributes(problem)
    n, c = problem.output.shape[:2]
    if target.name == "interpreter":
        rows = n * math.prod(attributes.cells)
        return config(1, 1, **dict(tile_config(rows, c, target).blocks))
    single = math.prod(attributes.candidates) == 1
    columns = channel_block(c)
    return config(4, 1, BLOCK_ROWS=(1024 if single else 256) // columns, BLOCK_COLUMNS=columns)


def cost(problem: Problem) -> Cost:
    """One comparison per pixel and candidate."""
    read, written = tensor_bytes(problem)
    per_pixel = math.prod(_attributes(problem).candidates)
    return Cost(per_pixel * problem.output.spec.numel, read, written)


def _pooled(g: Builder, value: Any) -> tuple[MaxPool2d, TensorSpec, TensorSpec] | None:
    """The pooling whose indices a value is, what it read and what it made; views between count."""
    while (made := g.maker(value)) is not None:
        name, attributes, inputs = made
        if name == max_pool_indices.NAME:
            assert isinstance(attributes, MaxPool2d)
            return attributes, g.spec(inputs[0]), g.spec(value)
        if name != "reshape":
            return None
        value = inputs[0]
    return None


def _turned(pair: tuple[int, int]) -> tuple[int, int]:
    return pair[1], pair[0]


def _capture(g: Builder, x: Any, indices: Any, size: Any) -> Any:
    found = _pooled(g, indices)
    if found is None:
        return g.refuse("its indices must come straight from a max pooling of this module")
    pool, image, windows = found
    height, width = image.shape[2:]
    if g.spec(x).rank != 4:
        return g.refuse("unbatched unpooling; pass a batch dimension")
    if windows.shape[2:] != g.spec(x).shape[2:]:
        if 1 not in windows.shape[2:] or windows.shape[2:] != g.spec(x).shape[:1:-1]:
            return g.refuse(f"its indices were reshaped from {windows}")
        # A sequence: pooled as an image of one row, unpooled as one of one column.
        height, width = width, height
        pool = MaxPool2d(
            _turned(pool.kernel), _turned(pool.stride), _turned(pool.padding),
            _turned(pool.dilation), pool.ceil_mode,
        )  # fmt: skip
    wanted = (int(size[0]), int(size[1]))
    return g.apply("max_unpool2d", (x, indices), MaxUnpool2d(wanted, (height, width), pool))


def _build(draw: Mapping[str, Any]) -> tuple[MaxUnpool2d, tuple[TensorSpec, ...]] | None:
    pool = MaxPool2d(draw["kernel"], draw["stride"], draw["padding"], ceil_mode=draw["ceil_mode"])
    image = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    try:
        x, where = max_pool_indices.infer(pool, (image,))
    except InvalidInputError:
        return None
    height, width = draw["image"]
    size = (height + draw["more"], width + draw["more"])
    return MaxUnpool2d(size, (height, width), pool), (x, where)


def prepare(
    attributes: MaxUnpool2d, tensors: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Indices as the pooling of some image makes them."""
    x, drawn = tensors
    generator = torch.Generator().manual_seed(int(drawn.abs().sum()))
    pool = attributes.pool
    image = torch.rand((*x.shape[:2], *attributes.image), generator=generator)
    window = (pool.kernel, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
    _, indices = F.max_pool2d_with_indices(image, *window)
    return x, as_layout(indices.to(drawn.device), Layout.NHWC)


OP = Op(
    name="max_unpool2d",
    attributes=MaxUnpool2d,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=configs,
    default=default,
    legal=legal,
    cost=cost,
    domain=Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (4, 4), (5, 7), (9, 6)),
            "C": (1, 3, 8, 33),
            "kernel": ((1, 1), (2, 2), (3, 3), (3, 1), (5, 4)),
            "stride": ((1, 1), (2, 2), (3, 2)),
            "padding": ((0, 0), (1, 0), (1, 1)),
            "ceil_mode": (False, True),
            "more": (0, 0, 1),
        },
        build=_build,
        interesting=(
            {
                "N": 2, "image": (7, 6), "C": 8, "kernel": (2, 2), "stride": (2, 2),
                "padding": (0, 0), "ceil_mode": False, "more": 0,
            },
            {
                "N": 1, "image": (7, 6), "C": 3, "kernel": (3, 3), "stride": (1, 1),
                "padding": (1, 1), "ceil_mode": False, "more": 2,
            },
        ),
        prepare=prepare,
    ),
    aten={"aten.max_unpool2d.default": _capture},
)  # fmt: skip
