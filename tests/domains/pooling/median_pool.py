"""Problems of `kernels/pooling/median_pool.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.median_pool import MedianPool2d, infer

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[MedianPool2d, tuple[TensorSpec, ...]] | None:
    attributes = MedianPool2d(draw["kernel"], draw["stride"])
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    try:
        infer(attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


DOMAINS = {
    "median_pool2d": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (2, 2), (5, 5), (7, 9)),
            "C": (1, 3, 8, 33),
            "kernel": ((1, 1), (2, 2), (3, 3), (1, 3), (3, 2), (5, 5)),
            "stride": ((1, 1), (2, 2), (1, 2)),
        },
        build=_build,
        interesting=({"N": 1, "image": (8, 7), "C": 8, "kernel": (7, 7), "stride": (1, 1)},),
    ),
}
