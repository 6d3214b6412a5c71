"""Problems of `kernels/normalisation/lrn.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.normalisation.lrn import LocalResponseNorm

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[LocalResponseNorm, tuple[TensorSpec, ...]] | None:
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    return LocalResponseNorm(draw["size"], draw["alpha"], draw["beta"], draw["k"]), (x,)


DOMAINS = {
    "local_response_norm": Domain(
        ranges={
            "N": (1, 2, 3),
            "C": (1, 3, 8, 16, 24, 33, 96),
            "image": ((1, 1), (5, 5), (7, 9)),
            "size": (1, 2, 3, 4, 5, 9, 20),
            "alpha": (1e-4, 0.5, 2.0),
            "beta": (0.75, 0.5, 1.0, 0.3),
            "k": (1.0, 2.0),
        },
        build=_build,
        interesting=(
            {"N": 1, "C": 1, "image": (1, 1), "size": 5, "alpha": 1.0, "beta": 0.75, "k": 1.0},
            {"N": 2, "C": 64, "image": (5, 3), "size": 5, "alpha": 1.0, "beta": 0.75, "k": 2.0},
            {"N": 1, "C": 33, "image": (3, 3), "size": 4, "alpha": 1.0, "beta": 0.75, "k": 1.0},
            {"N": 1, "C": 8, "image": (3, 3), "size": 17, "alpha": 1.0, "beta": 0.0, "k": 1.0},
        ),
    ),
}
