"""Problems of `kernels/normalisation/softmax.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.normalisation.softmax import Softmax
from convloom.kernels.normalisation.statistics import WHOLE

from ..domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Softmax, tuple[TensorSpec, ...]] | None:
    shape = tuple(draw["shape"])
    layout = Layout.NHWC if len(shape) in MEMORY_FORMATS and draw["nhwc"] else Layout.DENSE
    return Softmax(draw["dim"] % len(shape)), (TensorSpec(shape, torch.float32, layout),)


def _domain() -> Domain:
    return Domain(
        ranges={
            "shape": (
                (1,),
                (37,),
                (4, 21),
                (1, 1000),
                (3, 5, 8),
                (2, 7, 4, 3),
                (1, 33, 5, 5),
                (2, 1, 6, 1),
                (2, 3, 4, 2, 5),
            ),
            "dim": (0, 1, 2, 3, 4),
            "nhwc": (True, True, False),
        },
        build=_build,
        # Longer than one tile of the smallest looping configuration.
        interesting=(
            {"shape": (3, 1500), "dim": 1, "nhwc": False},
            # Read in several pieces, the last one not full.
            {"shape": (2, WHOLE + 809), "dim": 1, "nhwc": False},
        ),
    )


DOMAINS = dict.fromkeys(("softmax", "log_softmax"), _domain())
