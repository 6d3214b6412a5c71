"""Problems of `kernels/pooling/max_pool_indices.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.max_pool_indices import infer
from convloom.kernels.pooling.pool_window import MaxPool2d

from ..domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[MaxPool2d, tuple[TensorSpec, ...]] | None:
    attributes = MaxPool2d(
        draw["kernel"], draw["stride"], draw["padding"], draw["dilation"], draw["ceil_mode"]
    )
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    try:
        infer(attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


DOMAINS = {
    "max_pool2d_with_indices": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (2, 2), (5, 5), (7, 9), (12, 4)),
            "C": (1, 3, 8, 33),
            "kernel": ((1, 1), (2, 2), (3, 3), (1, 3), (7, 6)),
            "stride": ((1, 1), (2, 2), (1, 2), (4, 4)),
            "padding": ((0, 0), (1, 1), (0, 1)),
            "dilation": ((1, 1), (2, 2), (1, 3)),
            "ceil_mode": (False, True),
        },
        build=_build,
        interesting=(
            {
                "N": 2,
                "image": (6, 6),
                "C": 8,
                "kernel": (3, 3),
                "stride": (2, 2),
                "padding": (1, 1),
                "dilation": (1, 1),
                "ceil_mode": True,
            },
            # The only window has its taps above, below and beside the image.
            {
                "N": 1,
                "image": (2, 2),
                "C": 3,
                "kernel": (2, 2),
                "stride": (1, 1),
                "padding": (1, 1),
                "dilation": (3, 3),
                "ceil_mode": False,
            },
        ),
    ),
}
