"""Problems of `kernels/normalisation/reduce.py` for the tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.normalisation.reduce import Reduce, Variance

from ..domain import Domain


def _build(
    kind: type[Reduce], draw: Mapping[str, Any]
) -> tuple[Reduce, tuple[TensorSpec, ...]] | None:
    shape = tuple(draw["shape"])
    dims = tuple(dim for dim in draw["dims"] if dim < len(shape))
    alone = math.prod(shape[dim] for dim in dims) == 1
    if not dims or (alone and kind is Variance):
        return None
    layout = Layout.NHWC if len(shape) in MEMORY_FORMATS and draw["nhwc"] else Layout.DENSE
    return kind(dims, draw["keepdim"]), (TensorSpec(shape, torch.float32, layout),)


GLOBAL_AVERAGE_POOLING = {"shape": (3, 40, 14, 14), "dims": (2, 3), "keepdim": True, "nhwc": True}


LONG_ROWS = {"shape": (5, 4500), "dims": (1,), "keepdim": False, "nhwc": False}


INTERESTING = (GLOBAL_AVERAGE_POOLING, LONG_ROWS)


def _domain(kind: type[Reduce]) -> Domain:
    return Domain(
        ranges={
            "shape": (
                (1,),
                (37,),
                (4, 21),
                (3, 5, 8),
                (2, 7, 4, 3),
                (1, 33, 5, 5),
                (2, 64, 7, 7),
                (2, 1, 6, 1),
                (2, 3, 4, 2, 5),
            ),
            "dims": (
                (2, 3),
                (0,),
                (1,),
                (2,),
                (3,),
                (0, 1),
                (1, 3),
                (0, 2, 3),
                (2, 3, 4),
                (0, 1, 2, 3, 4),
            ),
            "keepdim": (False, True),
            "nhwc": (True, True, False),
        },
        build=partial(_build, kind),
        interesting=INTERESTING,
    )


DOMAINS = {
    **{name: _domain(Reduce) for name in ("sum", "mean", "amax", "norm")},
    **{name: _domain(Variance) for name in ("var", "std")},
}
