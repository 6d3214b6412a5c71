"""Problems of `kernels/fused/squeeze_excite.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.squeeze_excite import SqueezeExcite

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[SqueezeExcite, tuple[TensorSpec, ...]] | None:
    n, c, d, (h, width) = draw["N"], draw["C"], draw["D"], draw["image"]
    ones = (1, 1) if draw["convolutions"] else ()
    # The sigmoid is not zero at zero: units outside the layer must not leak.
    stages = (ep.Stage("add"), ep.Stage("sigmoid")) if draw["stages"] else ()
    x = TensorSpec((n, c, h, width), torch.float32, Layout.NHWC)
    specs = [x, TensorSpec((d, c, *ones), torch.float32), TensorSpec((c, d, *ones), torch.float32)]
    if stages:
        specs.append(TensorSpec((d, *ones), torch.float32))
    return SqueezeExcite(stages), tuple(specs)


DOMAINS = {
    "squeeze_excite": Domain(
        ranges={
            "N": (1, 2, 3),
            "C": (1, 8, 33, 64, 120),
            "D": (1, 6, 16, 20),
            "image": ((1, 1), (5, 7), (14, 14)),
            "convolutions": (True, False),
            "stages": (True, False),
        },
        build=_build,
        interesting=(
            {"N": 2, "C": 72, "D": 24, "image": (28, 28), "convolutions": True, "stages": True},
            {"N": 1, "C": 33, "D": 5, "image": (1, 1), "convolutions": False, "stages": True},
        ),
    ),
}
