"""Examples and near misses of the rules of `compiler/passes/recognise_pools.py`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..properties.example import IMAGE, Example, NearMiss, example


def _unfolded(x: torch.Tensor) -> torch.Tensor:
    return x.unfold(2, 3, 1).unfold(3, 3, 1).flatten(-2).median(dim=-1).values


def _columns(x: torch.Tensor) -> torch.Tensor:
    columns = F.unfold(x, 3)
    return columns.view(*x.shape[:2], 9, columns.shape[2]).median(dim=2).values


def _mixed(learned: bool, padding: int = 0) -> Any:
    """A blend of both poolings; with padding their windows are no longer the same."""

    def blend(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = (torch.sigmoid(m.a.bias), m.a.bias) if learned else (0.25, 0.75)
        return a * F.max_pool2d(x, 2, 2, padding) + b * F.avg_pool2d(x, 2, 2, padding)

    return example(blend, IMAGE, a=torch.nn.Linear(1, 1))


EXAMPLES = {
    "values of max_pool2d_with_indices(x) => max_pool2d(x)": Example(
        lambda: example(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0], IMAGE)
    ),
    "a·max_pool(x) + b·avg_pool(x) => mixed_pool2d(x, a, b)": Example(
        lambda: _mixed(True), (NearMiss(lambda: _mixed(True, padding=1), "the windows differ"),)
    ),
    "0.5·max_pool(x) + 0.5·avg_pool(x) => mixed_pool2d(x, 0.5, 0.5)": Example(
        lambda: _mixed(False), (NearMiss(lambda: _mixed(False, padding=1), "the windows differ"),)
    ),
    "median(flatten(copy(unfold(unfold(x))))) => median_pool2d(x)": Example(
        lambda: example(lambda m, x: _unfolded(x), IMAGE)
    ),
    "median(flatten(unfold(unfold(x)))) => median_pool2d(x)": Example(
        lambda: example(lambda m, x: _unfolded(x), (*IMAGE[:3], 3))
    ),
    "median(im2col(x)) => median_pool2d(x)": Example(
        lambda: example(lambda m, x: _columns(x), IMAGE)
    ),
}
