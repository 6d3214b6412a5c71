"""Examples and near misses of the rules of `compiler/passes/pool_order.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..properties.example import Example, NearMiss, example

IMAGE = (2, 16, 7, 5)


def _module(**changes: Any) -> Any:
    stride, channels = changes.get("stride", 1), changes.get("channels", 8)
    layers = {
        "pool": nn.AvgPool2d(3, stride, 1),
        "a": nn.Conv2d(IMAGE[1], channels, 1),
        "b": nn.Conv2d(IMAGE[1], 8, 3 if changes.get("alone") else 1),
    }

    def run(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.relu(m["a"](m["pool"](x))), torch.relu(m["b"](x))

    return example(run, IMAGE, **layers)


EXAMPLES = {
    "conv1x1(avg_pool2d(x)) => avg_pool2d(conv1x1(x))": Example(
        _module,
        (
            NearMiss(lambda: _module(stride=2), "drops"),
            NearMiss(lambda: _module(channels=24), "would average more"),
            NearMiss(lambda: _module(alone=True), "no other 1x1 convolution"),
        ),
    ),
}
