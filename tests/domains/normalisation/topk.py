"""Problems of `kernels/normalisation/topk.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.normalisation.topk import TopK

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[TopK, tuple[TensorSpec, ...]]:
    shape = draw["shape"]
    dim = min(draw["dim"], len(shape) - 1)
    layout = draw["layout"] if len(shape) in MEMORY_FORMATS else Layout.DENSE
    x = TensorSpec(shape, torch.float32, layout)
    return TopK(dim, min(draw["k"], shape[dim]), draw["largest"]), (x,)


DOMAINS = {
    "topk": Domain(
        ranges={
            "shape": ((5,), (3, 17), (2, 8, 5, 4), (2, 3, 70), (1, 33, 3, 2, 2)),
            "dim": (0, 1, 2, 3),
            "k": (1, 2, 5, 64),
            "largest": (True, False),
            "layout": tuple(Layout),
        },
        build=_build,
        interesting=(
            {"shape": (2, 2100), "dim": 1, "k": 1, "largest": True, "layout": Layout.DENSE},
            {"shape": (3, 1000), "dim": 1, "k": 5, "largest": True, "layout": Layout.DENSE},
        ),
    ),
}
