"""Problems of `kernels/convolution/conv2d.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.tile.conv_geometry import Conv2d, infer

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Conv2d, tuple[TensorSpec, ...]] | None:
    groups, per_group, per_group_out = draw["groups"], draw["C"], draw["K"]
    if draw["depthwise"]:
        groups, per_group = groups * draw["C"], 1
        per_group_out = min(per_group_out, 2)
    (h, width), (r, s) = draw["image"], draw["filter"]
    attributes = Conv2d(draw["stride"], draw["padding"], draw["dilation"], groups)
    x = TensorSpec((draw["N"], groups * per_group, h, width), torch.float32, Layout.NHWC)
    w = TensorSpec((groups * per_group_out, per_group, r, s), torch.float32)
    try:
        infer(attributes, (x, w))
    except InvalidInputError:
        return None
    return attributes, (x, w)


def _rows_draw(channels: int, filters: tuple[int, int], stride: tuple[int, int]) -> dict[str, Any]:
    """A problem of the algorithm `rows`, with a border above and below."""
    return {
        "N": 2, "image": (12, 16), "C": channels, "K": 33, "filter": filters, "stride": stride,
        "padding": (3, 2, 0, 0), "dilation": (1, 1), "groups": 1, "depthwise": False,
    }  # fmt: skip


DOMAINS = {
    "conv2d": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (5, 5), (7, 9), (12, 4), (16, 16)),
            "C": (1, 3, 4, 8, 16, 20, 33),
            "K": (1, 8, 10, 33),
            "filter": ((1, 1), (3, 3), (5, 5), (1, 7), (2, 3), (7, 7)),
            "stride": ((1, 1), (2, 2), (1, 2), (3, 1)),
            "padding": ((0, 0, 0, 0), (1, 1, 1, 1), (3, 3, 3, 3), (0, 1, 2, 0), (2, 3, 0, 0)),
            "dilation": ((1, 1), (2, 2), (1, 3)),
            "groups": (1, 2, 3),
            "depthwise": (False, False, True),
        },
        build=_build,
        interesting=(
            _rows_draw(4, (7, 7), (2, 2)),
            _rows_draw(4, (3, 5), (1, 1)),
            _rows_draw(8, (5, 5), (2, 1)),
            # Blocks of groups, the last of them not full.
            {**_rows_draw(4, (3, 3), (1, 1)), "K": 4, "groups": 9},
            {**_rows_draw(3, (3, 3), (2, 2)), "K": 5, "groups": 7, "dilation": (1, 2)},
            # Depthwise, with a border on every side, each of another width.
            {**_rows_draw(20, (3, 3), (1, 1)), "padding": (1, 2, 2, 1), "depthwise": True},
            {**_rows_draw(33, (5, 5), (2, 2)), "padding": (2, 2, 2, 2), "depthwise": True},
        ),
    ),
}
