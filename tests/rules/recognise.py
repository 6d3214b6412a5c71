"""Examples and near misses of the rules of `compiler/passes/recognise.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .example import IMAGE, Example, example

EXAMPLES = {
    "x / (k + alpha*mean_c(x²))^beta => local_response_norm(x)": Example(
        lambda: example(lambda m, x: F.local_response_norm(x, 5, 1e-3, 0.75, 2.0), IMAGE)
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
