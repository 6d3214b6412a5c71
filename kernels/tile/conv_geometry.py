"""What a convolution is: shapes and reference, and the attributes of two-dimensional ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract.op import Attributes
from ..contract.spec import Layout, TensorSpec
from .torch_convolution import convolve


@dataclass(frozen=True)
class Conv2d(Attributes):
    """stride and dilation as (vertical, horizontal); padding as (top, bottom, left, right)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class SampleConv2d(Conv2d):
    """As `Conv2d`, of weights that are computed (`convolution/sample_conv.py`).

    kernel: (R, S); spread: from one pixel of x to the next in the image that is convolved. Padding
    may be negative, where that is cropped.
    """

    kernel: tuple[int, int] = (1, 1)
    spread: tuple[int, int] = (1, 1)


def is_product(attributes: Any, filters: tuple[int, ...]) -> bool:
    """Whether the input's pixels, as they are, are the rows of a matrix product, with weights of
    the shape `filters`; of any convolution, as the functions below."""
    plain = set(attributes.stride) == {1} and not any(attributes.padding)
    return plain and attributes.groups == 1 and set(filters[2:]) == {1}


def infer(
    attributes: Any, inputs: tuple[TensorSpec, ...], name: str = "conv2d"
) -> tuple[TensorSpec, ...]:
    """P = floor((H + top + bottom − dh·(R − 1) − 1) / sh) + 1, the other dimensions likewise; of
    any convolution whose padding is before and after each dimension."""
    x, w = inputs
    dims = len(attributes.stride)
    if x.rank != dims + 2 or w.rank != dims + 2:
        letters = "DHW"[-dims:], "TRS"[-dims:]
        expected = f"x (N,C,{','.join(letters[0])}) and w (K,C/G,{','.join(letters[1])})"
        raise InvalidInputError(f"{name}: expected {expected}, got {x}, {w}")
    groups, (k, per_group), c = attributes.groups, w.shape[:2], x.shape[1]
    if groups < 1 or c % groups or k % groups or per_group != c // groups:
        raise InvalidInputError(
            f"{name}: {c} input and {k} output channels with weight {w} do not divide into "
            f"{groups} groups"
        )
    if min(*attributes.stride, *attributes.dilation) < 1:
        raise InvalidInputError(f"{name}: stride and dilation must be positive: {attributes}")
    sizes = []
    for at, (stride, dilation) in enumerate(
        zip(attributes.stride, attributes.dilation, strict=True)
    ):
        (before, after), size = attributes.padding[2 * at : 2 * at + 2], x.shape[at + 2]
        extent = dilation * (w.shape[at + 2] - 1) + 1
        if size + min(before, 0) + min(after, 0) < 1 or size + before + after < extent:
            raise InvalidInputError(
                f"{name}: a filter of {extent} pixels (dilation {dilation} included) does not fit "
                f"dimension {at + 2} of {x} padded by {before} and {after}"
            )
        sizes.append((size + before + after - extent) // stride + 1)
    return (TensorSpec((x.shape[0], k, *sizes), x.dtype, Layout.NHWC, x.batch),)


def reference(
    attributes: Any, x: torch.Tensor, w: torch.Tensor, *, border: str = "constant"
) -> torch.Tensor:
    """By torch, of any such convolution; border: a mode of `F.pad`."""
    before, after = attributes.padding[::2], attributes.padding[1::2]
    padding = before
    if before != after or min(before) < 0 or border != "constant":
        sides = [width for pair in zip(before[::-1], after[::-1], strict=True) for width in pair]
        x, padding = F.pad(x, sides, border), 0
    return convolve(
        x,
        w,
        stride=attributes.stride,
        padding=padding,
        dilation=attributes.dilation,
        groups=attributes.groups,
    )


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """Before and after, for an output as large as the input (stride 1): torch puts the odd one
    after."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2
