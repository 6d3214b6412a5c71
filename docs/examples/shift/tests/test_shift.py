"""The extension has every property that ops and fusions of convloom have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom import testing
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom_shift import shift
from convloom_shift.extension import EXTENSION, INTO_SHIFT, Shift


def build(draw: Mapping[str, Any]) -> tuple[Shift, tuple[TensorSpec, ...]]:
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    return Shift(tuple(map(Stage, draw["before"]))), (x,)


DOMAINS = {
    "shift": testing.Domain(
        ranges={
            "N": (1, 2, 3),
            "C": (1, 8, 9, 20, 40),
            "image": ((1, 1), (1, 5), (4, 3), (9, 7)),
            "before": ((), ("relu",), ("hardswish", "bent_identity")),
        },
        build=build,
        interesting=({"N": 2, "C": 33, "image": (5, 8), "before": ("sigmoid",)},),
    )
}
IMAGE = (2, 12, 6, 5)
EXAMPLES = {
    INTO_SHIFT.rules[0].name: testing.Example(
        lambda: testing.example(lambda m, x: shift(torch.relu(x)), IMAGE),
        near_misses=(
            testing.NearMiss(
                lambda: testing.example(lambda m, x, r: shift(torch.relu(x) * r), IMAGE, IMAGE),
                "stages that read tensors",
            ),
        ),
    )
}

test_extension = testing.tests_of(EXTENSION, DOMAINS, EXAMPLES)
