"""Examples and near misses of the rules of `compiler/passes/fusions/shortcuts.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..properties.example import Example, NearMiss, example


def _sum(function: Any, groups: int = 1) -> Any:
    layers = {
        "conv": nn.Conv2d(8, 12, 3, padding=1, groups=groups),
        "shortcut": nn.Conv2d(6, 12, 1, stride=2),
        "table": _Table(),
    }
    return example(function, (2, 8, 5, 6), (2, 6, 10, 12), **layers)


class _Table(nn.Module):
    """A constant for every element of the sum."""

    def __init__(self) -> None:
        super().__init__()
        values = torch.arange(12.0 * 5 * 6).reshape(12, 5, 6)
        self.values = nn.Parameter(values / 360)


def _residual(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
    return torch.relu(m["conv"](x) + m["shortcut"](r))


def _after_the_activation(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
    return torch.relu(m["conv"](x)) + m["shortcut"](r)


def _product(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
    return m["conv"](x) * m["shortcut"](r)


def _with_a_prologue(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
    return m["conv"](x) + m["shortcut"](torch.tanh(r))


def _with_a_table(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
    return m["conv"](x) + m["table"].values + m["shortcut"](r)


def _of_one_pixel() -> Any:
    return _sum(lambda m, x, r: m["conv"](x) + m["shortcut"](r[:, :, :1, :1]))


EXAMPLES = {
    "conv2d(x, w) + conv2d(s, v) => conv_sum(x, w, s, v)": Example(
        lambda: _sum(_residual),
        (
            NearMiss(lambda: _sum(_residual, groups=2), "is grouped"),
            NearMiss(lambda: _sum(_with_a_prologue), "has a prologue"),
            NearMiss(_of_one_pixel, ", but conv2d"),
            NearMiss(lambda: _sum(_product), "does not simply add"),
            NearMiss(lambda: _sum(_after_the_activation), "applies relu before it adds"),
            NearMiss(lambda: _sum(_with_a_table), "not one number per channel"),
        ),
    ),
}
