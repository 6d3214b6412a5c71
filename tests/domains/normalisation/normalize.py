"""Problems of `kernels/normalisation/normalize.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.normalisation.normalize import Normalize

from ..domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Normalize, tuple[TensorSpec, ...]] | None:
    shape = tuple(draw["shape"])
    dims = tuple(dim for dim in draw["dims"] if dim < len(shape))
    groups = draw["groups"] if 1 in dims else 1
    if not dims or (groups > 1 and shape[1] % groups):
        return None
    layout = Layout.NHWC if len(shape) in MEMORY_FORMATS and draw["nhwc"] else Layout.DENSE
    attributes = Normalize(dims, groups, draw["eps"], draw["centred"])
    return attributes, (TensorSpec(shape, torch.float32, layout),)


DOMAINS = {
    "normalize": Domain(
        ranges={
            "shape": (
                (1,),
                (37,),
                (4, 21),
                (3, 6, 8),
                (2, 12, 4, 3),
                (1, 36, 5, 5),
                (2, 64, 7, 7),
                (2, 1, 6, 1),
                (2, 4, 3, 2, 5),
            ),
            "dims": (
                (1,),
                (2, 3),
                (1, 2, 3),
                (2,),
                (3,),
                (0,),
                (0, 2, 3),
                (1, 2, 3, 4),
                (2, 3, 4),
                (0, 1, 2, 3, 4),
            ),
            "groups": (1, 1, 2, 4, 12),
            "eps": (1e-5, 1e-3),
            "centred": (True, True, True, False),
            "nhwc": (True, True, False),
        },
        build=_build,
        interesting=(
            # Group, layer (ConvNeXt's) and instance normalisation; more than one program holds.
            {
                "shape": (2, 40, 9, 7),
                "dims": (1, 2, 3),
                "groups": 8,
                "eps": 1e-5,
                "centred": True,
                "nhwc": True,
            },
            {
                "shape": (2, 96, 5, 5),
                "dims": (1,),
                "groups": 1,
                "eps": 1e-5,
                "centred": True,
                "nhwc": True,
            },
            {
                "shape": (2, 5, 40, 30),
                "dims": (2, 3),
                "groups": 1,
                "eps": 1e-5,
                "centred": True,
                "nhwc": True,
            },
            {
                "shape": (2, 17000),
                "dims": (1,),
                "groups": 1,
                "eps": 1e-5,
                "centred": True,
                "nhwc": False,
            },
            {
                "shape": (1, 6, 70, 90),
                "dims": (1, 2, 3),
                "groups": 2,
                "eps": 1e-5,
                "centred": False,
                "nhwc": True,
            },
        ),
    ),
}
