"""Problems of `kernels/products/linear.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.products.linear import Linear

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Linear, tuple[TensorSpec, ...]] | None:
    x = TensorSpec((*draw["leading"], draw["C"]), torch.float32)
    return Linear(), (x, TensorSpec((draw["K"], draw["C"]), torch.float32))


DOMAINS = {
    "linear": Domain(
        ranges={
            "leading": ((1,), (5,), (2, 3), (33,)),
            "C": (1, 8, 20, 64, 130),
            "K": (1, 10, 16, 72),
        },
        build=_build,
    ),
}
