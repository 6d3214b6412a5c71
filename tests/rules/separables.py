"""Examples and near misses of the rules of `compiler/passes/fusions/separables.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..properties.example import Example, NearMiss, example


def _net(run: Any, stride: int = 1, results: int = 1) -> Any:
    layers = {
        "depthwise": nn.Conv2d(16, 16 * results, 3, padding=1, groups=16),
        "project": nn.Conv2d(16 * results, 24, 1, stride=stride),
        "expand": nn.Conv2d(24, 40, 1, stride=stride),
    }
    return example(run, (2, 16, 6, 5), **layers)


def _separable(m: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = nn.functional.relu6(m["project"](nn.functional.relu6(m["depthwise"](x))))
    return y


def _inverted(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m["project"](nn.functional.relu6(m["depthwise"](x)))
    z: torch.Tensor = nn.functional.hardswish(m["expand"](y))
    return z


def _inverted_kept(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = m["project"](nn.functional.relu6(m["depthwise"](x)))
    return y, m["expand"](torch.relu(y))


EXAMPLES = {
    "conv1x1(y = conv1x1(depthwise(x))) => separable(x) giving y if read, and the expansion": (
        Example(
            lambda: _net(_inverted),
            (
                NearMiss(lambda: _net(_inverted, stride=2), "with stride 1"),
                NearMiss(lambda: _net(_inverted_kept), "has a prologue"),
            ),
        )
    ),
    "conv1x1(depthwise(x)) => separable(x)": Example(
        lambda: _net(_separable),
        (
            NearMiss(lambda: _net(_separable, stride=2), "with stride 1"),
            NearMiss(lambda: _net(_separable, results=2), "2 results per channel"),
        ),
    ),
}
