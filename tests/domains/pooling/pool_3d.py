"""Problems of volumes of `kernels/pooling/pool.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.pool_window import AvgPool3d, MaxPool3d, Pool, infer

from ...properties.domain import Domain


def _build(name: str, draw: Mapping[str, Any]) -> tuple[Pool, tuple[TensorSpec, ...]] | None:
    window = (draw["kernel"], draw["stride"], draw["padding"])
    attributes: Pool
    if name == "max_pool3d":
        attributes = MaxPool3d(*window, draw["dilation"], draw["ceil_mode"])
    else:
        attributes = AvgPool3d(
            *window, draw["ceil_mode"], draw["count_include_pad"], draw["divisor"]
        )
    shape = (draw["N"], draw["C"], *draw["image"])
    x = TensorSpec(shape, torch.float32, Layout.NHWC)
    try:
        infer(name, attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


def _draw(**changes: Any) -> Mapping[str, Any]:
    plain = {
        "N": 1, "image": (4, 7, 5), "C": 8, "kernel": (3, 3, 3), "stride": (2, 2, 2),
        "padding": (1, 1, 1), "dilation": (1, 1, 1), "ceil_mode": False,
        "count_include_pad": True, "divisor": None,
    }  # fmt: skip
    return {**plain, **changes}


INTERESTING = (
    _draw(),
    _draw(ceil_mode=True, image=(4, 6, 6), count_include_pad=False),
    _draw(image=(1, 1, 1), C=1),
    _draw(kernel=(2, 6, 5), padding=(1, 3, 2), stride=(1, 1, 1), C=33),
    _draw(kernel=(2, 2, 2), padding=(0, 0, 0), ceil_mode=True, C=3),
)


def _domain(name: str) -> Domain:
    return Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1, 1), (2, 5, 4), (4, 7, 5), (5, 4, 8)),
            "C": (1, 3, 8, 33),
            "kernel": ((1, 1, 1), (2, 2, 2), (3, 3, 3), (1, 3, 2), (3, 1, 1), (2, 5, 6)),
            "stride": ((1, 1, 1), (2, 2, 2), (1, 2, 3), (3, 1, 2)),
            "padding": ((0, 0, 0), (1, 1, 1), (0, 1, 0), (1, 0, 1)),
            "dilation": ((1, 1, 1), (1, 1, 1), (2, 1, 2)),
            "ceil_mode": (False, True),
            "count_include_pad": (True, False),
            "divisor": (None, None, 7, -3),
        },
        build=partial(_build, name),
        interesting=tuple(draw for draw in INTERESTING if _build(name, draw) is not None),
    )


DOMAINS = {name: _domain(name) for name in ("max_pool3d", "avg_pool3d")}
