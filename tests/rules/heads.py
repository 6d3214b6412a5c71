"""Examples and near misses of the rules of `compiler/passes/fusions/heads.py`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..properties.example import Example, NearMiss, example


class _Stack(nn.Module):
    """Linear layers with ReLU between them, and what comes after them."""

    def __init__(self, *widths: int, end: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.end = end or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for position, layer in enumerate(self.layers):
            x = layer(torch.relu(x) if position else x)
        result: Tensor = self.end(x)
        return result


def _chain(*widths: int, end: nn.Module | None = None, shape: tuple[int, ...] = (5,)) -> Any:
    return example(lambda m, x: m["fc"](x), (*shape, widths[0]), fc=_Stack(*widths, end=end))


def _averaged(*, keepdim: bool, activation: Any = None) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=keepdim)
        result: Tensor = m["fc"]((activation(s) if activation else s).flatten(1))
        return result

    return example(run, (3, 16, 5, 4), fc=nn.Linear(16, 10))


NARROW = (40, 24, 16, 10)


TOO_WIDE = (64, 1024, 1024)


EXAMPLES = {
    "linear(linear(linear(x, u), v), w) => head(x, u, v, w)": Example(
        lambda: _chain(*NARROW),
        (NearMiss(lambda: _chain(64, 512, 512, 10), "bytes of shared memory"),),
    ),
    "linear(linear(x, v), w) => head(x, v, w)": Example(
        lambda: _chain(*NARROW[:3]),
        (
            NearMiss(lambda: _chain(*TOO_WIDE), "bytes of shared memory"),
            NearMiss(lambda: _chain(*NARROW[:3], shape=(2, 3)), "one row per sample"),
        ),
    ),
    "linear(flatten(mean(x)), w) => head(x, w)": Example(
        lambda: _averaged(keepdim=True),
        (NearMiss(lambda: _averaged(keepdim=True, activation=torch.tanh), "has an epilogue"),),
    ),
    "linear(mean(x), w) => head(x, w)": Example(lambda: _averaged(keepdim=False)),
    "softmax(linear(linear(linear(x, u), v), w)) => head(x, u, v, w, softmax)": Example(
        lambda: _chain(*NARROW, end=nn.Softmax(1))
    ),
    "softmax(linear(linear(x, v), w)) => head(x, v, w, softmax)": Example(
        lambda: _chain(*NARROW[:3], end=nn.Softmax(1))
    ),
    "softmax(linear(x, w)) => head(x, w, softmax)": Example(
        lambda: _chain(*NARROW[:2], end=nn.Softmax(1)),
        (NearMiss(lambda: _chain(*NARROW[:2], end=nn.Softmax(0)), "over the classes"),),
    ),
}
