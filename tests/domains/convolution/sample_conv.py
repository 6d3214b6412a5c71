"""Problems of `kernels/convolution/sample_conv.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.convolution.sample_conv import SampleConv2d, infer

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[SampleConv2d, tuple[TensorSpec, ...]] | None:
    groups, per_group, out = draw["groups"], draw["C"], draw["K"]
    if draw["depthwise"]:
        groups, per_group, out = groups * per_group, 1, 1
    r, s = draw["filter"]
    attributes = SampleConv2d(
        draw["stride"], draw["padding"], draw["dilation"], groups, (r, s), draw["spread"]
    )
    shape = (draw["N"], groups * per_group, *draw["image"])
    banks = 1 if draw["shared"] else draw["N"]
    x = TensorSpec(shape, torch.float32, Layout.NHWC)
    w = TensorSpec((banks, groups * out, r * s * per_group), torch.float32)
    try:
        infer(attributes, (x, w))
    except InvalidInputError:
        return None
    return attributes, (x, w)


def _draw(**changes: Any) -> Mapping[str, Any]:
    plain = {
        "N": 2, "image": (6, 5), "C": 16, "K": 8, "filter": (3, 3), "stride": (1, 1),
        "padding": (1, 1, 1, 1), "dilation": (1, 1), "groups": 1, "spread": (1, 1),
        "depthwise": False, "shared": False,
    }  # fmt: skip
    return {**plain, **changes}


DOMAINS = {
    "sample_conv2d": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (5, 5), (4, 7)),
            "C": (1, 3, 16, 20),
            "K": (1, 8, 18),
            "filter": ((1, 1), (3, 3), (2, 5)),
            "stride": ((1, 1), (2, 1)),
            "padding": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 0, 1, -1)),
            "dilation": ((1, 1), (1, 2)),
            "groups": (1, 2),
            "spread": ((1, 1), (2, 3)),
            "depthwise": (False, True),
            "shared": (False, True),
        },
        build=_build,
        interesting=(
            _draw(),
            _draw(C=3, K=18, groups=2, shared=True),
            _draw(spread=(2, 2), padding=(2, 1, 2, 1)),
            _draw(depthwise=True, filter=(2, 5), stride=(2, 1)),
        ),
    ),
}
