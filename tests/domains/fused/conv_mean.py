"""Problems of `kernels/fused/conv_mean.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.fused.conv_mean import ConvMean, infer

from ...properties.domain import Domain
from . import conv_tile


def _build(draw: Mapping[str, Any]) -> tuple[ConvMean, tuple[TensorSpec, ...]] | None:
    attributes = ConvMean(*conv_tile.drawn_parts(draw), draw["keepdim"])
    try:
        inputs = conv_tile.drawn_inputs(draw, attributes)
        infer(attributes, inputs)
    except InvalidInputError:
        return None
    return attributes, inputs


def _draw(**changes: Any) -> Mapping[str, Any]:
    """A 1x1 convolution with bias and ReLU of three images, but for the changes."""
    plain = {
        "N": 2, "image": (7, 7), "C": 16, "K": 24, "filter": (1, 1), "stride": (1, 1),
        "padding": (0, 0, 0, 0), "dilation": (1, 1), "stages": "relu", "before": False,
        "keepdim": True,
    }  # fmt: skip
    return {**plain, **changes}


DOMAINS = {
    "conv_mean": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (2, 2), (7, 7), (7, 9), (12, 4), (16, 16)),
            "C": (1, 5, 8, 16, 33),
            "K": (1, 8, 10, 33),
            "filter": ((1, 1), (1, 1), (3, 3), (2, 3)),
            "stride": ((1, 1), (1, 1), (2, 1)),
            "padding": ((0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 2, 0)),
            "dilation": ((1, 1), (1, 1), (2, 1)),
            "stages": ("none", "relu", "silu", "residual"),
            "before": (False, False, True),
            "keepdim": (True, False),
        },
        build=_build,
        interesting=(
            _draw(image=(7, 7), stages="residual", K=40),
            _draw(image=(13, 13), keepdim=False),
            _draw(image=(8, 8), filter=(3, 3), padding=(1, 1, 1, 1), stages="residual", N=3),
            _draw(image=(1, 1), before=True),
            _draw(image=(16, 16), stages="none", N=1, C=33, K=1),
        ),
    ),
}
