"""What a two-dimensional convolution is: its attributes, shapes and reference."""

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

    def is_product(self, filters: tuple[int, ...]) -> bool:
        """Whether the input's pixels, as they are, are the rows of a matrix product, with weights
        of the shape `filters`."""
        plain = self.stride == (1, 1) and not any(self.padding) and self.groups == 1
        return plain and filters[2:] == (1, 1)


@dataclass(frozen=True)
class SampleConv2d(Conv2d):
    """As `Conv2d`, of weights that are computed (`convolution/sample_conv.py`).

    kernel: (R, S); spread: from one pixel of x to the next in the image that is convolved. Padding
    may be negative, where that is cropped.
    """

    kernel: tuple[int, int] = (1, 1)
    spread: tuple[int, int] = (1, 1)


def infer(attributes: Conv2d, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """P = floor((H + top + bottom − dh·(R − 1) − 1) / sh) + 1, Q likewise."""
    x, w = inputs
    if x.rank != 4 or w.rank != 4:
        raise InvalidInputError(f"conv2d: expected x (N,C,H,W) and w (K,C/G,R,S), got {x}, {w}")
    n, c, h, width = x.shape
    k, per_group, r, s = w.shape
    groups = attributes.groups
    if groups < 1 or c % groups or k % groups or per_group != c // groups:
        raise InvalidInputError(
            f"conv2d: {c} input and {k} output channels with weight {w} do not divide into "
            f"{groups} groups"
        )
    top, bottom, left, right = attributes.padding
    (sh, sw), (dh, dw) = attributes.stride, attributes.dilation
    p = (h + top + bottom - dh * (r - 1) - 1) // sh + 1
    q = (width + left + right - dw * (s - 1) - 1) // sw + 1
    if p < 1 or q < 1:
        raise InvalidInputError(
            f"conv2d: a {r}x{s} filter with dilation {dh}x{dw} does not fit the padded input "
            f"{h + top + bottom}x{width + left + right}"
        )
    return (TensorSpec((n, k, p, q), x.dtype, Layout.NHWC, x.batch),)


def reference(attributes: Conv2d, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    top, bottom, left, right = attributes.padding
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    else:
        padding = (top, left)
    return convolve(
        x,
        w,
        stride=attributes.stride,
        padding=padding,
        dilation=attributes.dilation,
        groups=attributes.groups,
    )


def pair(value: Any) -> tuple[int, int]:
    """One number for both dimensions, or a number for each, as (vertical, horizontal)."""
    values = [value] if isinstance(value, int) else list(value)
    return (int(values[0]), int(values[-1]))


def same_padding(kernel: int, dilation: int) -> tuple[int, int]:
    """Before and after, for an output as large as the input (stride 1): torch puts the odd one
    after."""
    total = dilation * (kernel - 1)
    return total // 2, total - total // 2
