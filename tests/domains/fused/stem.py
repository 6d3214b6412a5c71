"""Problems of `kernels/fused/stem.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.stem import Stem, infer
from convloom.kernels.tile.conv_geometry import Conv2d

from ...properties.domain import Domain
from .stem_input import draw_image


def _build(draw: Mapping[str, Any]) -> tuple[Stem, tuple[TensorSpec, ...]] | None:
    x, (mean, scale) = draw_image(draw)
    conv = Conv2d(draw["stride"], draw["padding"], draw["dilation"])
    w = TensorSpec((draw["K"], draw["C"], *draw["filter"]), torch.float32)
    attributes = Stem(conv, mean, scale)
    try:
        infer(attributes, (x, w))
    except InvalidInputError:
        return None
    return attributes, (x, w)


DOMAINS = {
    "stem": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (5, 5), (7, 9), (12, 4), (16, 40)),
            "C": (1, 2, 3, 4),
            "K": (1, 6, 10, 33, 70),
            "filter": ((1, 1), (3, 3), (5, 5), (2, 3), (1, 7)),
            "stride": ((1, 1), (2, 2), (1, 2), (3, 1)),
            "padding": ((0, 0, 0, 0), (1, 1, 1, 1), (3, 3, 3, 3), (0, 1, 2, 0)),
            "dilation": ((1, 1), (2, 2), (1, 3)),
            "layout": (Layout.DENSE, Layout.DENSE, Layout.NHWC),
            "normalise": (False, True),
        },
        build=_build,
    ),
}
