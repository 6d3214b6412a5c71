"""Examples and near misses of the rules of `compiler/passes/recognise.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from ..properties.example import IMAGE, Example, example


def _lrn_of_squares(m: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
    """As torch's own is taken apart, once x·x is a square."""
    n, c, h, w = x.shape
    padded = F.pad(x.square().view(n, 1, c, h, w), (0, 0, 0, 0, 2, 2))
    mean = F.avg_pool3d(padded, (5, 1, 1), stride=1).squeeze(1).view(n, c, h, w)
    return x / (mean * 1e-3 + 2.0) ** 0.75


EXAMPLES = {
    "x / (k + alpha*mean_c(x²))^beta => local_response_norm(x)": Example(
        lambda: example(_lrn_of_squares, IMAGE)
    ),
    "x·x => square(x)": Example(lambda: example(lambda m, x: x * x, IMAGE)),
    "(R·S·avg_pool(x^p))^(1/p) => lp_pool2d(x, p)": Example(
        lambda: example(lambda m, x: F.lp_pool2d(x, 3.0, 2), IMAGE)
    ),
    "(R·S·avg_pool(x^p))^(1/p) => lp_pool2d(x, p) (2)": Example(
        lambda: example(lambda m, x: F.lp_pool1d(x, 3.0, 2), (2, 6, 15))
    ),
    "x·sigmoid(x) => silu(x)": Example(lambda: example(lambda m, x: x * torch.sigmoid(x), IMAGE)),
    "x·hardsigmoid(x) => hardswish(x)": Example(
        lambda: example(lambda m, x: x * F.hardsigmoid(x), IMAGE)
    ),
    "x·tanh(softplus(x)) => mish(x)": Example(
        lambda: example(lambda m, x: x * torch.tanh(F.softplus(x)), IMAGE)
    ),
    "threshold(x, w) - threshold(-x, w) => hardshrink(x, w)": Example(
        lambda: example(lambda m, x: F.hardshrink(x, 0.4), IMAGE)
    ),
    "x - clamp(x, -w, w) => softshrink(x, w)": Example(
        lambda: example(lambda m, x: F.softshrink(x, 0.4), IMAGE)
    ),
}
