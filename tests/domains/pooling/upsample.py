"""Problems of `kernels/pooling/upsample.py` for the tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.upsample import LINEARLY, RULES, Upsample, step_of

from ...properties.domain import Domain


def _build(name: str, draw: Mapping[str, Any]) -> tuple[Upsample, tuple[TensorSpec, ...]] | None:
    extents = draw["image"]
    size, rule, scale = draw["size"][: len(extents)], RULES[name][draw["rule"]], draw["scale"]
    if scale is not None:
        size = tuple(math.floor(extent * scale) for extent in extents)
        if min(size) < 1:
            return None
    steps = tuple(step_of(old, new, scale, rule) for old, new in zip(extents, size, strict=True))
    x = TensorSpec((draw["N"], draw["C"], *extents), torch.float32, Layout.NHWC)
    sequence = name == LINEARLY and extents[0] == size[0] == 1 and len(extents) == 2
    return Upsample(size, steps, rule, sequence), (x,)


def _domain(name: str) -> Domain:
    return Domain(
        ranges={
            "N": (1, 2, 3),
            "C": (1, 3, 8, 33),
            "image": ((1, 1), (2, 3), (7, 5), (9, 12), (1, 6), (2, 3, 4), (1, 4, 3)),
            "size": ((1, 1, 1), (4, 6, 8), (7, 7, 3), (5, 13, 9), (1, 10, 2)),
            "scale": (None, None, 2.0, 1.5, 2.3, 0.6),
            "rule": (0, 1),
        },
        build=partial(_build, name),
        interesting=(
            {"N": 2, "C": 21, "image": (7, 7), "size": (20, 23), "scale": None, "rule": 0},
            {"N": 1, "C": 8, "image": (4, 5), "size": (), "scale": 2.0, "rule": 1},
            {"N": 1, "C": 8, "image": (1, 6), "size": (1, 10), "scale": None, "rule": 0},
        ),
    )


DOMAINS = {name: _domain(name) for name in RULES}
