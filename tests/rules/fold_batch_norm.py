"""Examples and near misses of the rules of `compiler/passes/fold_batch_norm.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..properties.example import IMAGE, Example, NearMiss, example


def _norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(6)
    norm.running_mean, norm.running_var = torch.linspace(-1, 1, 6), torch.linspace(0.5, 2, 6)
    return norm


def _convolved() -> Any:
    layers = {"conv": nn.Conv2d(IMAGE[1], 6, 3, groups=2), "norm": _norm()}
    return example(lambda m, x: m["norm"](m["conv"](x)).relu(), IMAGE, **layers)


def _shared() -> Any:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.cat((m["norm"](m["conv"](x)), m["norm"](m["conv"](x + 1.0))), 1)

    return example(run, IMAGE, conv=nn.Conv2d(IMAGE[1], 6, 3), norm=_norm())


def _sequence() -> Any:
    layers = {"linear": nn.Linear(5, 7), "norm": nn.BatchNorm1d(6)}
    return example(lambda m, x: m["norm"](m["linear"](x)), (2, 6, 5), **layers)


EXAMPLES = {
    "batch_norm(heavy(x, w) + b) => heavy(x, s*w) + (s*b + t)": Example(
        _convolved,
        (
            NearMiss(_shared, "the weight is shared by"),
            NearMiss(_sequence, "linear layers are folded at rank 2"),
        ),
    ),
}
