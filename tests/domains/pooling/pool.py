"""Problems of `kernels/pooling/pool.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.pool_window import AvgPool2d, LpPool2d, MaxPool2d, Pool, infer

from ...properties.domain import Domain


def _build(name: str, draw: Mapping[str, Any]) -> tuple[Pool, tuple[TensorSpec, ...]] | None:
    kernel, stride, ceil_mode = draw["kernel"], draw["stride"], draw["ceil_mode"]
    attributes: Pool
    if name == "max_pool2d":
        attributes = MaxPool2d(kernel, stride, draw["padding"], draw["dilation"], ceil_mode)
    elif name == "avg_pool2d":
        counts = draw["count_include_pad"], draw["divisor"]
        attributes = AvgPool2d(kernel, stride, draw["padding"], ceil_mode, *counts)
    else:
        attributes = LpPool2d(draw["norm"], kernel, stride, ceil_mode)
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    try:
        infer(name, attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


def _draw(**changes: Any) -> Mapping[str, Any]:
    """A draw of every op's domain: a 3x3 window with stride 2, but for the changes."""
    plain = {
        "N": 1, "image": (7, 9), "C": 8, "kernel": (3, 3), "stride": (2, 2), "padding": (0, 0),
        "dilation": (1, 1), "ceil_mode": False, "count_include_pad": True, "divisor": None,
        "norm": 2.0,
    }  # fmt: skip
    return {**plain, **changes}


INTERESTING = (
    _draw(image=(6, 6), padding=(1, 1), ceil_mode=True),
    _draw(image=(6, 6), padding=(1, 1), ceil_mode=True, count_include_pad=False),
    _draw(image=(2, 2), kernel=(5, 5), stride=(4, 4), ceil_mode=True),
    # The only window has its taps above, below and beside the image.
    _draw(image=(2, 2), kernel=(2, 2), stride=(1, 1), padding=(1, 1), dilation=(3, 3)),
    _draw(image=(1, 1), padding=(1, 1), C=1),
    _draw(image=(1, 1), kernel=(1, 1), stride=(1, 1), C=33),
    _draw(kernel=(7, 7), padding=(3, 3), stride=(1, 1), C=3),
    _draw(image=(3, 3), kernel=(2, 2), ceil_mode=True),
    _draw(divisor=-3, C=33, N=2),
    _draw(norm=3.0),
)


def _domain(name: str, **changes: Any) -> Domain:
    ranges: dict[str, Any] = {
        "N": (1, 2, 3),
        "image": ((1, 1), (2, 2), (5, 5), (7, 9), (12, 4), (16, 16)),
        "C": (1, 3, 8, 16, 33),
        "kernel": ((1, 1), (2, 2), (3, 3), (5, 5), (1, 3), (3, 2), (7, 6)),
        "stride": ((1, 1), (2, 2), (1, 2), (3, 1), (4, 4)),
        "padding": ((0, 0), (1, 1), (0, 1), (2, 2)),
        "ceil_mode": (False, True),
        **changes,
    }
    possible = tuple(draw for draw in INTERESTING if _build(name, draw) is not None)
    return Domain(ranges, partial(_build, name), possible)


DOMAINS = {
    "max_pool2d": _domain("max_pool2d", dilation=((1, 1), (2, 2), (1, 3))),
    "avg_pool2d": _domain(
        "avg_pool2d", count_include_pad=(True, False), divisor=(None, None, 1, 7)
    ),
    "lp_pool2d": _domain(
        "lp_pool2d", norm=(1.0, 2.0, 3.0, 4.0, 17.0, 1.5), padding=((0, 0),)
    ),
}
