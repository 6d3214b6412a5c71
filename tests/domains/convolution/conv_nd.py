"""Problems of `kernels/convolution/conv_nd.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.convolution.conv_nd import BorderConv2d, Conv3d, infer

from ...properties.domain import Domain


def _build(
    make: type[Conv3d], draw: Mapping[str, Any]
) -> tuple[Conv3d, tuple[TensorSpec, ...]] | None:
    dims = 3 if make is Conv3d else 2
    groups, per_group, per_group_out = draw["groups"], draw["C"], draw["K"]
    if draw["depthwise"]:
        groups, per_group, per_group_out = groups * per_group, 1, min(per_group_out, 2)
    attributes = make(
        draw["stride"][-dims:],
        draw["padding"][-2 * dims :],
        draw["dilation"][-dims:],
        groups,
        draw["border"],
    )
    shape = (draw["N"], groups * per_group, *draw["image"][-dims:])
    x = TensorSpec(shape, torch.float32, Layout.NHWC)
    filters = draw["filter"][-dims:]
    w = TensorSpec((groups * per_group_out, per_group, *filters), torch.float32)
    try:
        infer("conv", attributes, (x, w))
    except InvalidInputError:
        return None
    return attributes, (x, w)


def _draw(**changes: Any) -> Mapping[str, Any]:
    plain = {
        "N": 1, "image": (3, 5, 4), "C": 16, "K": 8, "filter": (3, 3, 3), "stride": (1, 1, 1),
        "padding": (1, 1, 1, 1, 1, 1), "dilation": (1, 1, 1), "groups": 1, "depthwise": False,
        "border": "reflect",
    }  # fmt: skip
    return {**plain, **changes}


def _domain(make: type[Conv3d], borders: tuple[str, ...]) -> Domain:
    return Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1, 1), (3, 5, 5), (5, 6, 4), (4, 9, 7)),
            "C": (1, 3, 8, 16, 20),
            "K": (1, 8, 10, 33),
            "filter": ((1, 1, 1), (3, 3, 3), (1, 3, 3), (3, 1, 1), (2, 1, 5), (3, 5, 2)),
            "stride": ((1, 1, 1), (2, 2, 2), (1, 2, 1), (3, 1, 2)),
            "padding": (
                (0, 0, 0, 0, 0, 0),
                (1, 1, 1, 1, 1, 1),
                (0, 0, 2, 2, 2, 2),
                (0, 1, 2, 0, 1, 3),
                (1, 0, -1, 0, 2, -1),
            ),
            "dilation": ((1, 1, 1), (1, 1, 1), (2, 2, 2), (1, 3, 2)),
            "groups": (1, 2, 3),
            "depthwise": (False, False, True),
            "border": borders,
        },
        build=partial(_build, make),
        interesting=(
            # The widest borders: all of the input is repeated on both sides.
            _draw(image=(3, 4, 3), padding=(2, 2, 3, 3, 2, 2)),
            _draw(image=(2, 4, 3), padding=(2, 2, 4, 4, 3, 3), border="circular", C=3),
            _draw(image=(1, 1, 1), padding=(1, 1, 5, 0, 3, 3), border="replicate", C=20),
            _draw(stride=(2, 2, 2), dilation=(1, 2, 1), groups=2, C=8, border="circular"),
        ),
    )


BORDERS = ("reflect", "replicate", "circular")
DOMAINS = {
    "conv3d": _domain(Conv3d, ("constant", "constant", *BORDERS)),
    "border_conv2d": _domain(BorderConv2d, BORDERS),
}
