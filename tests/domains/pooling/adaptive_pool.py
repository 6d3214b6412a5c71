"""Problems of `kernels/pooling/adaptive_pool.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.adaptive_pool import AdaptivePool2d

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[AdaptivePool2d, tuple[TensorSpec, ...]] | None:
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    return AdaptivePool2d(draw["size"]), (x,)


DOMAIN = Domain(
    ranges={
        "N": (1, 2, 3),
        "C": (1, 3, 8, 16, 33),
        "image": ((1, 1), (2, 3), (7, 7), (13, 9), (16, 16), (30, 22)),
        "size": ((1, 1), (1, 3), (2, 2), (3, 2), (6, 6), (7, 7), (9, 13)),
    },
    build=_build,
    interesting=(
        {"N": 1, "C": 33, "image": (7, 7), "size": (1, 1)},
        {"N": 2, "C": 64, "image": (56, 40), "size": (1, 1)},
        {"N": 1, "C": 8, "image": (13, 13), "size": (6, 6)},
        {"N": 1, "C": 8, "image": (1, 1), "size": (7, 7)},
        {"N": 2, "C": 3, "image": (23, 19), "size": (3, 1)},
        {"N": 2, "C": 3, "image": (23, 19), "size": (1, 3)},
        # Windows of different sizes, which overlap.
        {"N": 2, "C": 8, "image": (8, 11), "size": (5, 4)},
    ),
)


DOMAINS = dict.fromkeys(("adaptive_avg_pool2d", "adaptive_max_pool2d"), DOMAIN)
