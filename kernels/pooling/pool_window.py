"""What windowed pooling computes: attributes, the output-size rule, and torch's own results.

The kernels that compute it are in `pool.py` and, of volumes, in `pool_nd.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract.op import Attributes
from ..contract.spec import Layout, Operand, TensorSpec


@dataclass(frozen=True)
class MaxPool2d(Attributes):
    """Everything as (vertical, horizontal); `padding` is on both sides, with -inf."""

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True)
class AvgPool2d(Attributes):
    """Everything as (vertical, horizontal); `padding` is on both sides, with zeros.

    The divisor is `divisor_override`, or how many pixels of the window lie in the padded image
    (in the image itself without `count_include_pad`).
    """

    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    dilation = (1, 1)


@dataclass(frozen=True)
class LpPool2d(Attributes):
    """The norm's p > 0, and the window as (vertical, horizontal)."""

    norm: float = 2.0
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    ceil_mode: bool = False

    padding = (0, 0)
    dilation = (1, 1)


@dataclass(frozen=True)
class MaxPool3d(Attributes):
    """`MaxPool2d` with the depth in front."""

    kernel: tuple[int, ...] = (1, 1, 1)
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True)
class AvgPool3d(Attributes):
    """`AvgPool2d` with the depth in front."""

    kernel: tuple[int, ...] = (1, 1, 1)
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    dilation = (1, 1, 1)


@dataclass(frozen=True)
class AdaptivePool3d(Attributes):
    """The output's depth, height and width."""

    size: tuple[int, int, int] = (1, 1, 1)


Pool2d = MaxPool2d | AvgPool2d | LpPool2d
Pool3d = MaxPool3d | AvgPool3d
POOLS = (MaxPool2d, AvgPool2d, LpPool2d, MaxPool3d, AvgPool3d)


def output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """Windows along one dimension by ATen's rule: with `ceil_mode` the last one may overhang, but
    must start inside the image or its leading padding."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def infer(
    name: str, attributes: Pool2d | Pool3d, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """P = floor or ceil of (H + 2·ph − dh·(R − 1) − 1) / sh, plus 1; the others likewise."""
    (x,) = inputs
    dims = len(attributes.kernel)
    if x.rank != dims + 2:
        wanted = "(N,C,H,W)" if dims == 2 else "(N,C,D,H,W)"
        raise InvalidInputError(f"{name}: expected x {wanted}, got {x}")
    if min(*attributes.kernel, *attributes.stride, *attributes.dilation) < 1:
        raise InvalidInputError(f"{name}: window, stride, dilation must be positive: {attributes}")
    if isinstance(attributes, (AvgPool2d, AvgPool3d)) and attributes.divisor_override == 0:
        raise InvalidInputError(f"{name}: divisor_override must not be zero")
    if isinstance(attributes, LpPool2d) and not 0 < attributes.norm < math.inf:
        raise InvalidInputError(f"{name}: the norm must be positive, got {attributes.norm}")
    sizes = []
    for axis in range(dims):
        kernel, dilation = attributes.kernel[axis], attributes.dilation[axis]
        padding, stride = attributes.padding[axis], attributes.stride[axis]
        if not 0 <= padding <= kernel // 2:
            raise InvalidInputError(
                f"{name}: padding {attributes.padding} must be at most half the window "
                f"{attributes.kernel}, as in torch"
            )
        size = output_size(
            x.shape[2 + axis], kernel, stride, padding, dilation, attributes.ceil_mode
        )
        # Torch wants windows of average pooling in three dimensions to fit without padding.
        unpadded = isinstance(attributes, AvgPool3d) and kernel > x.shape[2 + axis]
        if size < 1 or unpadded:
            raise InvalidInputError(
                f"{name}: a window of {dilation * (kernel - 1) + 1} pixels does not fit dimension "
                f"{axis + 2} of {x} padded by {padding}"
            )
        sizes.append(size)
    n, c = x.shape[:2]
    return (TensorSpec((n, c, *sizes), x.dtype, Layout.NHWC, x.batch),)


def reference_max(attributes: MaxPool2d, x: torch.Tensor) -> torch.Tensor:
    return F.max_pool2d(
        x,
        attributes.kernel,
        attributes.stride,
        attributes.padding,
        attributes.dilation,
        attributes.ceil_mode,
    )


def reference_avg(attributes: AvgPool2d, x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(
        x,
        attributes.kernel,
        attributes.stride,
        attributes.padding,
        attributes.ceil_mode,
        attributes.count_include_pad,
        attributes.divisor_override,
    )


def reference_max_3d(attributes: MaxPool3d, x: torch.Tensor) -> torch.Tensor:
    return F.max_pool3d(
        x,
        attributes.kernel,
        attributes.stride,
        attributes.padding,
        attributes.dilation,
        attributes.ceil_mode,
    )


def reference_avg_3d(attributes: AvgPool3d, x: torch.Tensor) -> torch.Tensor:
    return F.avg_pool3d(
        x,
        attributes.kernel,
        attributes.stride,
        attributes.padding,
        attributes.ceil_mode,
        attributes.count_include_pad,
        attributes.divisor_override,
    )


def reference_lp(attributes: LpPool2d, x: torch.Tensor) -> torch.Tensor:
    return F.lp_pool2d(
        x, attributes.norm, attributes.kernel, attributes.stride, attributes.ceil_mode
    )


def window_sizes(
    pool: MaxPool2d | AvgPool2d | LpPool2d, x: TensorSpec | Operand, y: TensorSpec | Operand
) -> dict[str, int]:
    """The constants of a kernel that walks a pooling's windows."""
    _, c, h, width = x.shape
    return {
        "H": h, "WIDTH": width, "C": c, "P": y.shape[2], "Q": y.shape[3],
        "R": pool.kernel[0], "S": pool.kernel[1],
        "STRIDE_H": pool.stride[0], "STRIDE_W": pool.stride[1],
        "PADDING_H": pool.padding[0], "PADDING_W": pool.padding[1],
        "DILATION_H": pool.dilation[0], "DILATION_W": pool.dilation[1],
    }  # fmt: skip
