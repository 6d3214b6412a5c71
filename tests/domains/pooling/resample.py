"""Problems of `kernels/pooling/resample.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.resample import REACH, Resample
from convloom.kernels.pooling.upsample import pixels_per_output

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Resample, tuple[TensorSpec, ...]]:
    image, size, corners = draw["image"], draw["size"], draw["corners"]
    vertical, horizontal = (
        pixels_per_output(old, new, None, corners) for old, new in zip(image, size, strict=True)
    )
    x = TensorSpec((draw["N"], draw["C"], *image), torch.float32, Layout.NHWC)
    return Resample(size, (vertical, horizontal), draw["filter"], corners), (x,)


DOMAINS = {
    "resample": Domain(
        ranges={
            "N": (1, 2),
            "C": (1, 3, 8, 33),
            "image": ((1, 1), (2, 3), (7, 5), (9, 12)),
            "size": ((1, 1), (4, 6), (7, 7), (5, 13)),
            "filter": tuple(REACH),
            "corners": (False, True),
        },
        build=_build,
        interesting=tuple(
            {"N": 2, "C": 20, "image": (9, 7), "size": size, "filter": kind, "corners": False}
            for kind in REACH
            for size in ((4, 7), (18, 10))
        ),
    ),
}
