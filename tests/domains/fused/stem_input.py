"""Problems of `kernels/fused/stem_input.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.stem_input import StemInput

from ...properties.domain import Domain

MEANS = (0.485, 0.25, -0.125, 1.5)


SCALES = (2.0, -0.5, 4.25, 1.0)


def draw_image(draw: Mapping[str, Any]) -> tuple[TensorSpec, tuple[Any, Any]]:
    """An image, and the mean and scale for its channels, from one draw of a domain."""
    c = draw["C"]
    x = TensorSpec((draw["N"], c, *draw["image"]), torch.float32, draw["layout"])
    numbers = (MEANS[:c], SCALES[:c]) if draw["normalise"] else ((), ())
    return x, numbers


def _build(draw: Mapping[str, Any]) -> tuple[StemInput, tuple[TensorSpec, ...]] | None:
    x, (mean, scale) = draw_image(draw)
    left = draw["left"]
    width = left + x.shape[3] + draw["right"]
    if width <= left:
        return None
    return StemInput(draw["dtype"], draw["channels"], left, width, mean, scale), (x,)


DOMAINS = {
    "stem_input": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (5, 5), (7, 9), (12, 4), (3, 33)),
            "C": (1, 2, 3, 4),
            "channels": (4, 8),
            "layout": tuple(Layout),
            "left": (0, 1, 3),
            "right": (-1, 0, 2),
            "normalise": (False, True),
            "dtype": (torch.float32, torch.float16, torch.bfloat16),
        },
        build=_build,
    ),
}
