"""unfold and fold: the windows of an image as columns, and columns added up to an image.

    unfold   y[n, (c·R + r)·S + s, p·Q + q] = x[n, c, p·sh + r·dh, q·sw + s·dw]
    fold     y[n, c, h, w] = Σ x[n, (c·R + r)·S + s, p·Q + q]  over  p·sh + r·dh − top = h,
                                                                     q·sw + s·dw − left = w

unfold: x (N, C, H, W) in any layout -> y (N, C·R·S, P·Q); one strided copy, a padded image is
padded before. fold, its transpose: x (N, C·R·S, P·Q) -> y (N, C, H, W), summed in fp32. Known as
im2col and col2im (Chellapilla, Puri, Simard, 2006).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.aten import Arguments, Builder
from ..contract.op import Attributes, Config, Launch, Op, Problem, config, counted, tile_config
from ..contract.spec import Layout, TensorSpec, rows_and_columns
from ..contract.targets import Target
from ..tile.finish import put
from ..tile.geometry import Window, tile_launch
from ..tile.space import output_tile
from . import pointwise
from .arguments import numbers
from .pad import Pad


@dataclass(frozen=True)
class Unfold(Attributes):
    """The window, the step between windows and that between its elements, as (vertical,
    horizontal)."""

    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    dilation: tuple[int, ...] = (1, 1)

    def places(self, height: int, width: int) -> tuple[int, int]:
        """How many windows an image has, downwards and sideways."""
        p, q = (
            (size - d * (k - 1) - 1) // s + 1
            for size, k, s, d in zip(
                (height, width), self.kernel, self.stride, self.dilation, strict=True
            )
        )
        return p, q


@dataclass(frozen=True)
class Fold(Unfold):
    """image: the result's (H, W); padding: rows and columns around it that are dropped."""

    image: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)


def infer(attributes: Unfold, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, C·R·S, P·Q)."""
    (x,) = inputs
    if x.rank != 4:
        raise InvalidInputError(f"unfold: expected x (N, C, H, W), got {x}")
    n, c, h, w = x.shape
    r, s = attributes.kernel
    p, q = attributes.places(h, w)
    if p < 1 or q < 1:
        raise InvalidInputError(f"unfold: a {r}x{s} window does not fit {x}")
    return (TensorSpec((n, c * r * s, p * q), x.dtype, batch=x.batch),)


def infer_fold(attributes: Fold, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """(N, C, H, W)."""
    (x,) = inputs
    (r, s), (h, w), (top, left) = attributes.kernel, attributes.image, attributes.padding
    p, q = attributes.places(h + 2 * top, w + 2 * left)
    if x.rank != 3 or x.shape[1] % (r * s) or min(p, q) < 1 or x.shape[2] != p * q:
        raise InvalidInputError(
            f"fold: expected x (N, C*{r}*{s}, {max(p, 0)}*{max(q, 0)}), got {x}"
        )
    shape = (x.shape[0], x.shape[1] // (r * s), h, w)
    return (TensorSpec(shape, x.dtype, Layout.NHWC, x.batch),)


def unfold(attributes: Unfold, x: torch.Tensor) -> torch.Tensor:
    return F.unfold(x, attributes.kernel, attributes.dilation, 0, attributes.stride)


def fold(attributes: Fold, x: torch.Tensor) -> torch.Tensor:
    a = attributes
    return F.fold(x, a.image, a.kernel, a.dilation, a.padding, a.stride)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One copy in the output's memory order, with the strides of windows that overlap."""
    attributes, x = problem.attributes.expect(Unfold), problem.inputs[0]
    n, c, h, w = x.shape
    (r, s), (p, q) = attributes.kernel, attributes.places(h, w)
    of_n, of_c, of_h, of_w = x.strides
    (sh, sw), (dh, dw) = attributes.stride, attributes.dilation
    read = (of_n, of_c, of_h * dh, of_w * dw, of_h * sh, of_w * sw)

    def split(strides: Sequence[int]) -> tuple[int, ...]:
        """Of the six parts of the output's dimensions."""
        rows, columns, pixels = strides
        return rows, columns * r * s, columns * s, columns, pixels * q, pixels

    return (pointwise.launch_parts(problem, tile, (n, c, r, s, p, q), read, split),)


@triton.jit
def fold_kernel(
    x, y, extras, m, WINDOW: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
    X_OFFSET: tl.constexpr, X_STRIDES: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Rows are pixels, columns are channels; of the columns of x a tile reads one element per tap.
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    H: tl.constexpr = OUTPUT.P
    WIDTH: tl.constexpr = OUTPUT.Q
    rows, channels, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    h = (rows // WIDTH % H).to(tl.int32) + WINDOW.top
    w = (rows % WIDTH).to(tl.int32) + WINDOW.left
    image = x + X_OFFSET + (rows // (H * WIDTH) * X_STRIDES[0])[:, None]
    acc = tl.zeros((M, N), tl.float32)
    for r in range(WINDOW.R):
        for s in range(WINDOW.S):
            down = h - r * WINDOW.dilation_h
            side = w - s * WINDOW.dilation_w
            p = down // WINDOW.stride_h
            q = side // WINDOW.stride_w
            there = (down >= 0) & (side >= 0) & (p < P) & (q < Q)
            there = there & (down % WINDOW.stride_h == 0) & (side % WINDOW.stride_w == 0) & row_mask
            terms = ((channels * WINDOW.R + r) * WINDOW.S + s) * X_STRIDES[1]
            address = image + terms[None, :] + ((p * Q + q) * X_STRIDES[2])[:, None]
            mask = there[:, None] & column_mask[None, :]
            acc += tl.load(address, mask=mask, other=0.0).to(tl.float32)
    put(acc, y, rows, row_mask, channels, column_mask, extras, OUTPUT)


def launches_fold(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes, x = problem.attributes.expect(Fold), problem.inputs[0]
    (h, w), (top, left) = attributes.image, attributes.padding
    p, q = attributes.places(h + 2 * top, w + 2 * left)
    constexprs = {
        "WINDOW": Window.of(attributes.kernel, attributes), "P": p, "Q": q,
        "X_OFFSET": x.offset, "X_STRIDES": x.strides,
    }  # fmt: skip
    return (tile_launch(problem, tile, fold_kernel, constexprs=constexprs),)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    for elements in (512, 1024, 2048):
        for columns in (8, 32, 128):
            yield config(4, 1, BLOCK_ROWS=elements // columns, BLOCK_COLUMNS=columns)


def default(problem: Problem, target: Target) -> Config:
    rows, columns = rows_and_columns(problem.output.spec)
    return tile_config(rows, columns, target, elements=1024)


@counted
def cost(problem: Problem) -> int:
    """fold adds every element that it reads."""
    return problem.inputs[0].spec.numel


def _capture_unfold(g: Builder, a: Arguments) -> Any:
    if g.spec(a.self).rank != 4:
        return g.refuse("unfold of an unbatched image; pass a batch dimension")
    x, (top, left) = a.self, numbers(a.padding, 2)
    if top or left:
        sides = (0, 0, top, left)
        x = g.apply("pad", (x,), Pad(sides, sides))
    windows = (numbers(each, 2) for each in (a.kernel_size, a.stride, a.dilation))
    return g.apply("unfold", (x,), Unfold(*windows))


def _capture_fold(g: Builder, a: Arguments) -> Any:
    if g.spec(a.self).rank != 3:
        return g.refuse("fold of unbatched columns; pass a batch dimension")
    given = (a.kernel_size, a.stride, a.dilation, a.output_size, a.padding)
    return g.apply("fold", (a.self,), Fold(*(numbers(each, 2) for each in given)))


OPS = (
    pointwise.copying(
        "unfold", Unfold, infer, unfold, launches, follows=True,
        aten={"aten.im2col.default": _capture_unfold},
    ),
    Op(
        "fold", Fold, infer_fold, fold, launches_fold, cost, configs, default,
        aten={"aten.col2im.default": _capture_fold},
    ),
)  # fmt: skip
