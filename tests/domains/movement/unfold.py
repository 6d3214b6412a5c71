"""Problems of `kernels/movement/unfold.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.movement.unfold import Fold, Unfold

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Unfold, tuple[TensorSpec, ...]] | None:
    attributes = Unfold(draw["kernel"], draw["stride"], draw["dilation"])
    n, c, h, w = draw["shape"]
    if min(attributes.places(h, w)) < 1:
        return None
    return attributes, (TensorSpec((n, c, h, w), torch.float32, draw["layout"]),)


def _build_fold(draw: Mapping[str, Any]) -> tuple[Fold, tuple[TensorSpec, ...]] | None:
    n, c, h, w = draw["shape"]
    top, left = draw["padding"]
    attributes = Fold(draw["kernel"], draw["stride"], draw["dilation"], (h, w), (top, left))
    p, q = attributes.places(h + 2 * top, w + 2 * left)
    if min(p, q) < 1:
        return None
    r, s = attributes.kernel
    return attributes, (TensorSpec((n, c * r * s, p * q), torch.float32),)


WINDOWS = {
    "shape": ((1, 1, 1, 1), (2, 3, 5, 4), (2, 8, 7, 9), (1, 33, 6, 6)),
    "kernel": ((1, 1), (2, 2), (3, 3), (1, 4), (3, 2)),
    "stride": ((1, 1), (2, 2), (1, 3)),
    "dilation": ((1, 1), (2, 1)),
}

DOMAINS = {
    "unfold": Domain({**WINDOWS, "layout": (Layout.NHWC, Layout.DENSE)}, _build),
    "fold": Domain({**WINDOWS, "padding": ((0, 0), (1, 1), (0, 2))}, _build_fold),
}
