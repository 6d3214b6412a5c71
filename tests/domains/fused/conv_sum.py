"""Problems of `kernels/fused/conv_sum.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.conv_sum import ConvSum
from convloom.kernels.tile.conv_geometry import Conv2d

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[ConvSum, tuple[TensorSpec, ...]] | None:
    (p, q), n, k = draw["result"], draw["N"], draw["K"]
    attributes, specs = [], []
    for at in ("1", "2"):
        (r, s), (sh, sw), pad = draw["filter" + at], draw["stride" + at], draw["padding" + at]
        dilation, channels = draw["dilation" + at], draw["C" + at]
        # The largest image that gives p x q: strides leave its last rows unread.
        h = p * sh + dilation * (r - 1) - 2 * pad
        width = q * sw + dilation * (s - 1) - 2 * pad
        if h < 1 or width < 1:
            return None
        attributes.append(Conv2d((sh, sw), (pad,) * 4, (dilation, dilation)))
        specs.append(TensorSpec((n, channels, h, width), torch.float32, Layout.NHWC))
        specs.append(TensorSpec((k, channels, r, s), torch.float32))
    return ConvSum(*attributes), tuple(specs)


DOMAINS = {
    "conv_sum": Domain(
        ranges={
            "N": (1, 2),
            "result": ((1, 1), (4, 5), (7, 3), (8, 8)),
            "K": (1, 8, 33),
            "C1": (3, 8, 20, 40),
            "C2": (1, 8, 20, 33),
            "filter1": ((3, 3), (1, 1), (1, 7)),
            "filter2": ((1, 1), (1, 1), (2, 3)),
            "stride1": ((1, 1), (1, 1), (2, 1)),
            "stride2": ((1, 1), (2, 2), (3, 1)),
            "padding1": (0, 1),
            "padding2": (0, 0, 1),
            "dilation1": (1, 2),
            "dilation2": (1, 1, 2),
        },
        build=_build,
    ),
}
