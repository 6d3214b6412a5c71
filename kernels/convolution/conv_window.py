"""What convolutions of volumes and of images with borders compute: attributes, the output-size
rule, and torch's own results. The kernel that computes them is in `conv_nd.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract.op import Attributes
from ..contract.spec import Layout, TensorSpec
from ..movement.pad import check_border
from ..tile.torch_convolution import convolve

BORDERS = ("reflect", "replicate", "circular")


@dataclass(frozen=True)
class Conv3d(Attributes):
    """stride and dilation in depth, vertical, horizontal; padding as (front, back, top, bottom,
    left, right), negative where the input is cropped; border: how `pad` finds what lies there."""

    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)
    groups: int = 1
    border: str = "constant"


@dataclass(frozen=True)
class BorderConv2d(Attributes):
    """As `Conv2d`, with `pad`'s mode for what lies outside the image."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0, 0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1
    border: str = "reflect"


ConvNd = Conv3d | BorderConv2d


def infer(name: str, attributes: ConvNd, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """O = floor((D + front + back − dd·(T − 1) − 1) / sd) + 1; P and Q likewise."""
    x, w = inputs
    dims = len(attributes.stride)
    if x.rank != dims + 2 or w.rank != dims + 2:
        letters = "DHW"[-dims:], "TRS"[-dims:]
        wanted = f"x (N,C,{','.join(letters[0])}) and w (K,C/G,{','.join(letters[1])})"
        raise InvalidInputError(f"{name}: expected {wanted}, got {x}, {w}")
    groups, (k, per_group), c = attributes.groups, w.shape[:2], x.shape[1]
    if groups < 1 or c % groups or k % groups or per_group != c // groups:
        raise InvalidInputError(
            f"{name}: {c} input and {k} output channels with weight {w} do not divide into "
            f"{groups} groups"
        )
    if min(*attributes.stride, *attributes.dilation) < 1:
        raise InvalidInputError(f"{name}: stride and dilation must be positive: {attributes}")
    sizes = []
    for axis, (stride, dilation) in enumerate(
        zip(attributes.stride, attributes.dilation, strict=True)
    ):
        before, after = attributes.padding[2 * axis : 2 * axis + 2]
        if attributes.border != "constant":
            if min(before, after) < 0:
                raise InvalidInputError(f"{name}: a {attributes.border} border cannot crop {x}")
            check_border(name, attributes.border, x, axis + 2, before, after)
        size, extent = x.shape[axis + 2], dilation * (w.shape[axis + 2] - 1) + 1
        if size + min(before, 0) + min(after, 0) < 1 or size + before + after < extent:
            raise InvalidInputError(
                f"{name}: a filter of {extent} pixels (dilation {dilation} included) does not fit "
                f"dimension {axis + 2} of {x} padded by {before} and {after}"
            )
        sizes.append((size + before + after - extent) // stride + 1)
    return (TensorSpec((x.shape[0], k, *sizes), x.dtype, Layout.NHWC, x.batch),)


def reference(attributes: ConvNd, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    pairs = [attributes.padding[at : at + 2] for at in range(0, len(attributes.padding), 2)]
    if any(attributes.padding):
        sides = [width for pair in reversed(pairs) for width in pair]
        x = F.pad(x, sides, attributes.border)
    return convolve(
        x, w, stride=attributes.stride, dilation=attributes.dilation, groups=attributes.groups
    )


def pack(attributes: ConvNd, w: torch.Tensor) -> torch.Tensor:
    """(K, C/G, T, R, S) -> (K, T·R·S·C/G)."""
    return w.movedim(1, -1).reshape(w.shape[0], -1).contiguous()
