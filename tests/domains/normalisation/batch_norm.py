"""Problems of `kernels/normalisation/batch_norm.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.normalisation.batch_norm import BatchNorm

from ..domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[BatchNorm, tuple[TensorSpec, ...]] | None:
    shape = tuple(draw["shape"])
    attributes = BatchNorm(draw["eps"], draw["weight"], draw["bias"])
    layout = Layout.NHWC if len(shape) in MEMORY_FORMATS and draw["nhwc"] else Layout.DENSE
    channel = TensorSpec((shape[1],), torch.float32)
    x = TensorSpec(shape, torch.float32, layout)
    return attributes, (x, *(channel for _ in attributes.inputs[1:]))


DOMAINS = {
    "batch_norm": Domain(
        ranges={
            "shape": (
                (4, 1),
                (3, 10),
                (2, 5, 7),
                (1, 3, 9, 8),
                (2, 16, 5, 1),
                (2, 33, 3, 4),
                (1, 1, 1, 1),
                (2, 3, 2, 4, 3),
            ),
            "nhwc": (True, True, False),
            "weight": (True, True, False),
            "bias": (True, True, False),
            "eps": (1e-5, 1e-3),
        },
        build=_build,
    ),
}
