"""Examples and near misses of the rules of `compiler/passes/fusions/small_nets.py`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..properties.example import Example, NearMiss, example


class _Net(nn.Module):
    """LeNet-like: convolutions, each with its pooling, and two linear layers."""

    def __init__(self, layers: int, channels: int = 8, hidden: int = 12, after: Any = None) -> None:
        super().__init__()
        self.after = after
        widths = [1, *(channels for _ in range(layers))]
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths))
        pixels = (16 >> layers) ** 2
        self.fc1, self.fc2 = nn.Linear(channels * pixels, hidden), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = nn.functional.max_pool2d(conv(x).relu(), 2)
            x = self.after(x) if self.after else x
        result: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return result


def _example(layers: int, **changes: Any) -> Any:
    net = _Net(layers, **changes)
    return example(lambda m, x: m["net"](x), (2, 1, 16, 16), net=net)


TWO_LAYERS = (
    NearMiss(lambda: _example(2, channels=72), "do not fit one tile"),
    NearMiss(lambda: _example(2, channels=64, hidden=500), "do not fit a multiprocessor"),
    NearMiss(lambda: _example(2, after=torch.tanh), "goes on after its pooling"),
)
EXAMPLES = {
    "head(flatten(conv_pool(x, w))) => small_net(x, ...)": Example(lambda: _example(1)),
    "head(flatten(conv_pool(conv_pool(x, w), w))) => small_net(x, ...)": Example(
        lambda: _example(2), TWO_LAYERS
    ),
    "head(flatten(conv_pool(conv_pool(conv_pool(x, w), w), w))) => small_net(x, ...)": Example(
        lambda: _example(3)
    ),
}
