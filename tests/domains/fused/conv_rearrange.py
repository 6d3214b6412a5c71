"""Problems of `kernels/fused/conv_rearrange.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.fused.conv_rearrange import ConvRearrange, infer
from convloom.kernels.movement.rearrangement import Rearrange
from convloom.kernels.tile import conv_geometry

from ...properties.domain import Domain
from . import conv_tile


def _build(draw: Mapping[str, Any]) -> tuple[ConvRearrange, tuple[TensorSpec, ...]] | None:
    """Pixel shuffle by r, pixel unshuffle by -r, or the channels split in two and their halves
    interleaved, for r = 0."""
    conv, before, stages = conv_tile.drawn_parts(draw)
    r, n, per = draw["r"], draw["N"], draw["K"]
    k = per * max(r, 1) ** 2 if r else 2 * per
    x = TensorSpec((n, draw["C"], *draw["image"]), torch.float32)
    w = TensorSpec((k, draw["C"], *draw["filter"]), torch.float32)
    try:
        _, _, p, q = conv_geometry.infer(conv, (x, w))[0].shape
        if r > 0:
            then = Rearrange((n, per, r, r, p, q), (0, 1, 4, 2, 5, 3), (n, per, p * r, q * r))
        elif r == 0:
            then = Rearrange((n, 2, per, p, q), (0, 2, 1, 3, 4), (n, k, p, q))
        elif p % -r or q % -r:
            return None
        else:
            split, shape = (n, k, p // -r, -r, q // -r, -r), (n, k * r * r, p // -r, q // -r)
            then = Rearrange(split, (0, 1, 3, 5, 2, 4), shape)
        attributes = ConvRearrange(conv, before, stages, then)
        inputs = conv_tile.drawn_inputs({**draw, "K": k}, attributes)
        infer(attributes, inputs)
    except InvalidInputError:
        return None
    return attributes, inputs


def _draw(**changes: Any) -> Mapping[str, Any]:
    """The end of ESPCN: a 3x3 convolution to 27 channels, shuffled by 3."""
    plain = {
        "N": 2, "image": (8, 6), "C": 32, "K": 3, "r": 3, "filter": (3, 3), "stride": (1, 1),
        "padding": (1, 1, 1, 1), "dilation": (1, 1), "stages": "relu", "before": False,
    }  # fmt: skip
    return {**plain, **changes}


DOMAINS = {
    "conv_rearrange": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((2, 2), (5, 5), (7, 9), (12, 4), (16, 16)),
            "C": (1, 5, 8, 16, 33),
            "K": (1, 3, 8, 10),
            "r": (0, 2, 2, 3, -2),
            "filter": ((1, 1), (3, 3), (5, 5), (2, 3)),
            "stride": ((1, 1), (1, 1), (2, 1)),
            "padding": ((0, 0, 0, 0), (1, 1, 1, 1), (2, 2, 2, 2), (0, 1, 2, 0)),
            "dilation": ((1, 1), (1, 1), (2, 1)),
            "stages": tuple(conv_tile.CHAINS),
            "before": (False, False, True),
        },
        build=_build,
        interesting=(
            _draw(),
            _draw(K=64, r=2),
            _draw(r=-2, stages="residual", image=(16, 12)),
            _draw(r=0, K=20, before=True, filter=(1, 1), padding=(0, 0, 0, 0)),
        ),
    ),
}
