"""Problems of `kernels/pooling/max_unpool.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling import max_pool_indices
from convloom.kernels.pooling.max_unpool import MaxUnpool2d
from convloom.kernels.pooling.pool_window import MaxPool2d

from ..domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[MaxUnpool2d, tuple[TensorSpec, ...]] | None:
    pool = MaxPool2d(draw["kernel"], draw["stride"], draw["padding"], ceil_mode=draw["ceil_mode"])
    image = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    try:
        x, where = max_pool_indices.infer(pool, (image,))
    except InvalidInputError:
        return None
    height, width = draw["image"]
    size = (height + draw["more"], width + draw["more"])
    return MaxUnpool2d(size, (height, width), pool), (x, where)


DOMAINS = {
    "max_unpool2d": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (4, 4), (5, 7), (9, 6)),
            "C": (1, 3, 8, 33),
            "kernel": ((1, 1), (2, 2), (3, 3), (3, 1), (5, 4)),
            "stride": ((1, 1), (2, 2), (3, 2)),
            "padding": ((0, 0), (1, 0), (1, 1)),
            "ceil_mode": (False, True),
            "more": (0, 0, 1),
        },
        build=_build,
        interesting=(
            {
                "N": 2,
                "image": (7, 6),
                "C": 8,
                "kernel": (2, 2),
                "stride": (2, 2),
                "padding": (0, 0),
                "ceil_mode": False,
                "more": 0,
            },
            {
                "N": 1,
                "image": (7, 6),
                "C": 3,
                "kernel": (3, 3),
                "stride": (1, 1),
                "padding": (1, 1),
                "ceil_mode": False,
                "more": 2,
            },
        ),
    ),
}
