"""Problems of `kernels/pooling/mixed_pool.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.mixed_pool import MixedPool2d, infer

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[MixedPool2d, tuple[TensorSpec, ...]] | None:
    c = draw["C"]
    x = TensorSpec((draw["N"], c, *draw["image"]), torch.float32, Layout.NHWC)
    shapes = {"one": (), "channel": (c, 1, 1), "image": (1, c, 1, 1)}
    weights = (TensorSpec(shapes[draw[name]], torch.float32) for name in ("a", "b"))
    specs = (x, *weights)
    attributes = MixedPool2d(draw["kernel"], draw["stride"])
    try:
        infer(attributes, specs)
    except InvalidInputError:
        return None
    return attributes, specs


DOMAINS = {
    "mixed_pool2d": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (2, 2), (5, 5), (7, 9)),
            "C": (1, 3, 8, 33),
            "kernel": ((1, 1), (2, 2), (3, 3), (1, 3), (6, 5)),
            "stride": ((1, 1), (2, 2), (1, 2)),
            "a": ("channel", "one", "image"),
            "b": ("channel", "one", "image"),
        },
        build=_build,
    ),
}
