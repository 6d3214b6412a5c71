"""Problems of `kernels/movement/gather.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.movement.gather import Gather

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Gather, tuple[TensorSpec, ...]]:
    """Of x with an index of its own for each element, or one of all that lie behind it."""
    shape = draw["shape"]
    dim = min(draw["dim"], len(shape) - 1)
    sizes = list(shape)
    if draw["repeats"] != "nothing":
        behind = draw["repeats"] == "index"
        sizes = [1 if (at > dim) is behind or at == dim else size for at, size in enumerate(shape)]
    sizes[dim] = draw["count"]
    layouts = (
        draw["layout"] if len(each) in MEMORY_FORMATS else Layout.DENSE for each in (shape, sizes)
    )
    pair = zip((shape, tuple(sizes)), (torch.float32, torch.int64), layouts, strict=True)
    x, index = (TensorSpec(*each) for each in pair)
    return Gather(dim, draw["from_end"]), (x, index)


DOMAINS = {
    "gather": Domain(
        ranges={
            "shape": ((5,), (17, 3), (2, 8, 5, 4), (2, 3, 70), (1, 33, 3, 2, 2)),
            "dim": (0, 1, 2, 3),
            "count": (1, 2, 30),
            "repeats": ("nothing", "index", "front"),
            "from_end": (True, False),
            "layout": tuple(Layout),
        },
        build=_build,
        interesting=(
            {"shape": (300, 64), "dim": 0, "count": 40, "repeats": "index", "from_end": False,
             "layout": Layout.DENSE},
            {"shape": (2, 9, 7, 20), "dim": 3, "count": 5, "repeats": "nothing",
             "from_end": True, "layout": Layout.NHWC},
        ),
    ),
}  # fmt: skip
