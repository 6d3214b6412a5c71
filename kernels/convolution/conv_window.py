"""What convolutions of volumes and of images with borders compute: attributes, the output-size
rule, and torch's own results. The kernel that computes them is in `conv_nd.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import InvalidInputError
from ..contract.op import Attributes, TensorSpec
from ..movement.pad import check_border
from ..tile import conv_geometry


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
    """As of any convolution; a border that is not zero must be found in the input."""
    specs, x = conv_geometry.infer(attributes, inputs, name), inputs[0]
    if attributes.border != "constant":
        if min(attributes.padding) < 0:
            raise InvalidInputError(f"{name}: a {attributes.border} border cannot crop {x}")
        pairs = zip(attributes.padding[::2], attributes.padding[1::2], strict=True)
        for dim, (before, after) in enumerate(pairs, 2):
            check_border(name, attributes.border, x, dim, before, after)
    return specs


def reference(attributes: ConvNd, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    border = attributes.border if any(attributes.padding) else "constant"
    return conv_geometry.reference(attributes, x, w, border=border)


def pack(attributes: ConvNd, w: torch.Tensor) -> torch.Tensor:
    """(K, C/G, T, R, S) -> (K, T·R·S·C/G)."""
    return w.movedim(1, -1).reshape(w.shape[0], -1).contiguous()
