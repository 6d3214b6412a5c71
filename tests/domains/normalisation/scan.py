"""Problems of `kernels/normalisation/scan.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.normalisation.scan import Scan

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Scan, tuple[TensorSpec, ...]]:
    shape = draw["shape"]
    layout = draw["layout"] if len(shape) in MEMORY_FORMATS else Layout.DENSE
    x = TensorSpec(shape, torch.float32, layout)
    return Scan(min(draw["dim"], len(shape) - 1)), (x,)


RANGES = {
    "shape": ((5,), (3, 17), (2, 8, 5, 4), (2, 3, 70), (1, 33, 3, 2, 2)),
    "dim": (0, 1, 2, 3),
    "layout": tuple(Layout),
}
LONG = {"shape": (2, 2100), "dim": 1, "layout": Layout.DENSE}
DOMAINS = {
    "cumsum": Domain(RANGES, _build, interesting=(LONG,)),
    # Products of many numbers leave what fp32 can hold.
    "cumprod": Domain(RANGES, _build),
}
