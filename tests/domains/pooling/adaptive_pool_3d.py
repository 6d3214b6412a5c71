"""Problems of volumes of `kernels/pooling/adaptive_pool.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.pool_window import AdaptivePool3d

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[AdaptivePool3d, tuple[TensorSpec, ...]] | None:
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    return AdaptivePool3d(draw["size"]), (x,)


DOMAIN = Domain(
    ranges={
        "N": (1, 2, 3),
        "C": (1, 3, 8, 33),
        "image": ((1, 1, 1), (2, 3, 5), (4, 7, 6), (5, 4, 9)),
        "size": ((1, 1, 1), (1, 2, 3), (2, 2, 2), (4, 3, 5), (3, 6, 2)),
    },
    build=_build,
    interesting=(
        {"N": 1, "C": 33, "image": (4, 13, 12), "size": (2, 2, 2)},
        {"N": 2, "C": 8, "image": (1, 1, 1), "size": (2, 3, 4)},
    ),
)


DOMAINS = dict.fromkeys(("adaptive_avg_pool3d", "adaptive_max_pool3d"), DOMAIN)
