"""Problems of `kernels/movement/rearrange.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.movement.rearrange import Flip
from convloom.kernels.movement.rearrangement import Rearrange

from ...properties.domain import Domain
from .movement_ops import SHAPES

REARRANGEMENTS = (
    # x, parts, their order, y: pixel shuffle and back, channel shuffle, windows and back, tokens.
    ((2, 8, 3, 2), (2, 2, 2, 2, 3, 2), (0, 1, 4, 2, 5, 3), (2, 2, 6, 4)),
    ((2, 3, 4, 6), (2, 3, 2, 2, 3, 2), (0, 1, 3, 5, 2, 4), (2, 12, 2, 3)),
    ((2, 12, 3, 5), (2, 3, 4, 3, 5), (0, 2, 1, 3, 4), (2, 12, 3, 5)),
    ((2, 4, 6, 5), (2, 2, 2, 3, 2, 5), (0, 1, 3, 2, 4, 5), (12, 4, 5)),
    ((12, 4, 5), (2, 2, 3, 2, 2, 5), (0, 1, 3, 2, 4, 5), (2, 4, 6, 5)),
    ((2, 6, 5), (2, 2, 3, 5), (0, 2, 3, 1), (2, 3, 5, 2)),
    ((2, 3, 4, 1, 5), (2, 3, 4, 1, 5), (0, 2, 4, 1, 3), (2, 20, 3)),
)


def _build(draw: Mapping[str, Any]) -> tuple[Rearrange, tuple[TensorSpec, ...]]:
    shape, split, dims, result = REARRANGEMENTS[draw["case"]]
    nhwc = draw["nhwc"] and len(shape) in MEMORY_FORMATS
    x = TensorSpec(shape, torch.float32, Layout.NHWC if nhwc else Layout.DENSE)
    return Rearrange(split, dims, result), (x,)


def _build_flip(draw: Mapping[str, Any]) -> tuple[Flip, tuple[TensorSpec, ...]]:
    shape = draw["shape"]
    dims = tuple(dim for dim in draw["dims"] if dim < len(shape))
    nhwc = draw["nhwc"] and len(shape) in MEMORY_FORMATS
    x = TensorSpec(shape, torch.float32, Layout.NHWC if nhwc else Layout.DENSE)
    return Flip(dims), (x,)


DOMAINS = {
    "rearrange": Domain({"case": range(len(REARRANGEMENTS)), "nhwc": (True, False)}, _build),
    "flip": Domain(
        {
            "shape": SHAPES,
            "dims": ((0,), (1,), (2, 3), (1, 2), (3,), (0, 1, 2, 3, 4)),
            "nhwc": (True, False),
        },
        _build_flip,
    ),
}
