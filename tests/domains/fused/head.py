"""Problems of `kernels/fused/head.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.head import SOFTMAX, Head

from ..domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Head, tuple[TensorSpec, ...]] | None:
    n, c, average = draw["N"], draw["C"], draw["average"]
    shape = (n, c, *draw["image"]) if average else (n, c)
    layout = Layout.NHWC if average else Layout.DENSE
    # The sigmoid is not zero at zero: columns past the width must not leak.
    stages = (ep.Stage("add"), ep.Stage("sigmoid")) if draw["stages"] else ()
    specs, width = [TensorSpec(shape, torch.float32, layout)], c
    for wide in draw["widths"]:
        specs.append(TensorSpec((wide, width), torch.float32))
        specs += [TensorSpec((wide,), torch.float32)] if stages else []
        width = wide
    attributes = Head((stages,) * len(draw["widths"]), average, draw["softmax"])
    return attributes, tuple(specs)


DOMAINS = {
    "head": Domain(
        ranges={
            "N": (1, 2, 5, 33),
            "C": (1, 8, 20, 64, 130),
            "image": ((1, 1), (3, 5), (8, 8)),
            "widths": ((10,), (16,), (100,), (24, 10), (20, 36), (24, 20, 10)),
            "average": (False, False, True),
            "softmax": SOFTMAX,
            "stages": (True, False),
        },
        build=_build,
        interesting=(
            {
                "N": 3,
                "C": 400,
                "image": (1, 1),
                "widths": (120, 84, 10),
                "average": False,
                "softmax": "softmax",
                "stages": True,
            },
            {
                "N": 20,
                "C": 64,
                "image": (7, 7),
                "widths": (10,),
                "average": True,
                "softmax": "log_softmax",
                "stages": False,
            },
            {
                "N": 2,
                "C": 72,
                "image": (3, 3),
                "widths": (1000,),
                "average": True,
                "softmax": "softmax",
                "stages": True,
            },
        ),
    ),
}
