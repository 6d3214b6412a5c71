"""Problems of `kernels/pooling/grid_sample.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.grid_sample import BORDERS, MODES, GridSample

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[GridSample, tuple[TensorSpec, ...]]:
    (p, q), n = draw["size"], draw["N"]
    x = TensorSpec((n, draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    grid = TensorSpec((n, p * q, 2), torch.float32)
    return GridSample((p, q), draw["mode"], draw["border"], draw["corners"]), (x, grid)


DOMAINS = {
    "grid_sample": Domain(
        ranges={
            "N": (1, 2),
            "C": (1, 3, 8, 33),
            "image": ((1, 1), (2, 3), (7, 5), (9, 12)),
            "size": ((1, 1), (4, 6), (5, 13)),
            "mode": MODES,
            "border": BORDERS,
            "corners": (False, True),
        },
        build=_build,
        interesting=tuple(
            {"N": 2, "C": 20, "image": (9, 7), "size": (4, 7), "mode": mode, "border": border,
             "corners": at % 2 == 0}
            for at, (mode, border) in enumerate(zip(MODES, BORDERS, strict=True))
        ),
    ),
}  # fmt: skip
