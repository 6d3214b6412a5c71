"""Examples and near misses of the rules of `compiler/passes/fusions/pooled_convs.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..properties.example import Example, NearMiss, example

IMAGE = (2, 16, 8, 6)


def _pooled(**changes: Any) -> Any:
    """relu(conv2d(x)) and a pooling of it."""
    groups = changes.get("groups", 1)
    layers = {
        "conv": nn.Conv2d(IMAGE[1], 24, 3, padding=1, groups=groups),
        "pool": changes.get("pool", nn.MaxPool2d(2)),
    }

    def run(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m["pool"](m["conv"](x).relu())
        return result

    return example(run, changes.get("image", IMAGE), **layers)


def _shuffled(groups: int = 1, residual: bool = False) -> Any:
    """The end of ESPCN: a convolution, its result's channels as 2x2 pixels, and something more."""
    conv = nn.Conv2d(IMAGE[1], 12, 3, padding=1, groups=groups)

    def run(m: Any, x: Tensor, r: Tensor) -> Tensor:
        y = nn.functional.pixel_shuffle(m["conv"](x), 2)
        return y + r if residual else torch.relu(y)

    return example(run, IMAGE, (2, 3, 16, 12), conv=conv)


class _Mean(nn.Module):
    """The average over the pixels, without keeping their dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


POOL_NEAR_MISSES = (
    NearMiss(lambda: _pooled(pool=nn.MaxPool2d(3, 2)), "window is 3x3"),
    NearMiss(lambda: _pooled(pool=nn.MaxPool2d(2, 2, dilation=2)), "dilation is 2x2"),
    NearMiss(lambda: _pooled(pool=nn.MaxPool2d(2, 1)), "stride is 1x1"),
    NearMiss(lambda: _pooled(pool=nn.MaxPool2d(2, 2, 1)), "padding is 1x1"),
    NearMiss(lambda: _pooled(groups=2), "the convolution has 2 groups"),
)


AVERAGE_NEAR_MISSES = (
    NearMiss(
        lambda: _pooled(pool=nn.AvgPool2d(2, ceil_mode=True), image=(2, 16, 9, 6)), "overhang"
    ),
)


MEAN_NEAR_MISSES = (
    NearMiss(lambda: _pooled(pool=nn.AdaptiveAvgPool2d(1), groups=2), "has 2 groups"),
    NearMiss(lambda: _pooled(pool=nn.AdaptiveAvgPool2d(1), image=(1, 16, 17, 16)), "17x16 pixels"),
)


EXAMPLES = {
    "max_pool2d(conv2d(x, w)) => conv_pool(x, w)": Example(_pooled, POOL_NEAR_MISSES),
    "avg_pool2d(conv2d(x, w)) => conv_pool(x, w)": Example(
        lambda: _pooled(pool=nn.AvgPool2d(2)), AVERAGE_NEAR_MISSES
    ),
    "adaptive_avg_pool2d(conv2d(x, w)) => conv_mean(x, w)": Example(
        lambda: _pooled(pool=nn.AdaptiveAvgPool2d(1)), MEAN_NEAR_MISSES
    ),
    "mean(conv2d(x, w)) => conv_mean(x, w)": Example(lambda: _pooled(pool=_Mean())),
    "avg_pool2d(conv2d(x, w)) => conv_mean(x, w)": Example(
        lambda: _pooled(pool=nn.AvgPool2d(IMAGE[2:]))
    ),
    "rearrange(conv2d(x, w)) => conv_rearrange(x, w)": Example(
        _shuffled,
        (
            NearMiss(lambda: _shuffled(groups=4), "the convolution has 4 groups"),
            NearMiss(lambda: _shuffled(residual=True), "reads a tensor"),
        ),
    ),
}
