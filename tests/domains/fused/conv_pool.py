"""Problems of `kernels/fused/conv_pool.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.fused.conv_pool import PAIR, ConvPool, infer
from convloom.kernels.pooling.pool_window import AvgPool2d, MaxPool2d

from ...properties.domain import Domain
from . import conv_tile


def _build(draw: Mapping[str, Any]) -> tuple[ConvPool, tuple[TensorSpec, ...]] | None:
    ceil = draw["ceil"]
    pool: MaxPool2d | AvgPool2d = MaxPool2d(PAIR, PAIR, ceil_mode=ceil)
    if draw["average"]:
        pool = AvgPool2d(PAIR, PAIR, ceil_mode=ceil, divisor_override=draw["divisor"])
    attributes = ConvPool(*conv_tile.drawn_parts(draw), pool)
    try:
        inputs = conv_tile.drawn_inputs(draw, attributes)
        infer(attributes, inputs)
    except InvalidInputError:
        return None
    return attributes, inputs


def _draw(**changes: Any) -> Mapping[str, Any]:
    """A 3x3 convolution with bias, ReLU and maximum pooling, but for the changes."""
    plain = {
        "N": 2, "image": (8, 6), "C": 16, "K": 24, "filter": (3, 3), "stride": (1, 1),
        "padding": (1, 1, 1, 1), "dilation": (1, 1), "ceil": False, "average": False,
        "divisor": None, "stages": "relu", "before": False,
    }  # fmt: skip
    return {**plain, **changes}


DOMAINS = {
    "conv_pool": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((2, 2), (5, 5), (7, 9), (12, 4), (16, 16)),
            "C": (1, 5, 8, 16, 33),
            "K": (1, 8, 10, 33),
            "filter": ((1, 1), (3, 3), (5, 5), (2, 3)),
            "stride": ((1, 1), (1, 1), (2, 1)),
            "padding": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (0, 1, 2, 0)),
            "dilation": ((1, 1), (1, 1), (2, 1)),
            "ceil": (False, True),
            "average": (False, False, True),
            "divisor": (None, 3),
            "stages": tuple(conv_tile.CHAINS),
            "before": (False, False, True),
        },
        build=_build,
        interesting=(
            _draw(image=(32, 32), C=1, K=6, filter=(5, 5)),
            _draw(image=(9, 7), ceil=True),
            _draw(image=(9, 7), average=True, stages="residual"),
            _draw(before=True, average=True, filter=(1, 1), padding=(0, 0, 0, 0)),
        ),
    ),
}
