"""Problems of `kernels/movement/pad.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.movement.pad import MODES, Pad, infer

from ...properties.domain import Domain

NHWC, DENSE = Layout.NHWC, Layout.DENSE


def _build(draw: Mapping[str, Any]) -> tuple[Pad, tuple[TensorSpec, ...]] | None:
    shape, rank = draw["shape"], len(draw["shape"])
    layout = draw["layout"] if rank in MEMORY_FORMATS else Layout.DENSE
    before, after = draw["before"][-rank:], draw["after"][-rank:]
    attributes = Pad(before, after, draw["value"], draw["mode"])
    x = TensorSpec(shape, torch.float32, layout)
    try:
        infer(attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


def _draw(shape: tuple[int, ...], before: Any, after: Any, **changes: Any) -> Mapping[str, Any]:
    plain = {"shape": shape, "before": before, "after": after, "layout": NHWC}
    return {**plain, "value": 0.0, "mode": "constant", **changes}


DOMAINS = {
    "pad": Domain(
        ranges={
            "shape": (
                (1,),
                (7,),
                (4, 6),
                (2, 3, 5),
                (2, 4, 3, 5),
                (1, 33, 7, 9),
                (3, 8, 1, 1),
                (2, 3, 4, 5, 3),
                (1, 8, 2, 3, 4),
            ),
            "before": (
                (0, 0, 0, 1, 1),
                (0, 0, 1, 2, 0),
                (1, 1, 2, 0, 1),
                (0, 0, 3, -1, 2),
                (0, -1, -2, 2, -1),
                (0, 0, 0, 0, 2),
            ),
            "after": (
                (0, 0, 0, 1, 1),
                (0, 0, 1, 0, 2),
                (0, 2, 1, 0, 0),
                (0, 0, -1, 2, -1),
                (0, 0, 0, -1, 0),
                (0, 0, 0, 0, 4),
            ),
            "value": (0.0, 1.5, -2.0, float("-inf")),
            "mode": MODES,
            "layout": (NHWC, NHWC, DENSE),
        },
        build=_build,
        interesting=(
            # Nothing of the image is left, only its border.
            _draw((1, 3, 2, 2), (0, 0, -2, 0), (0, 0, 3, 0), value=1.0),
            _draw((2, 8, 5, 5), (0, 0, -1, -1), (0, 0, -1, -1)),
            _draw((2, 3, 4, 5), (1, 1, 1, 1), (1, 1, 1, 1), value=float("inf"), layout=DENSE),
            _draw((1,), (3,), (2,), value=-1.0, layout=DENSE),
            # The widest borders that torch takes, and a crop on the other side.
            _draw((1, 8, 5, 4), (0, 0, 4, 3), (0, 0, 4, 3), mode="reflect"),
            _draw((1, 8, 5, 4), (0, 0, 5, 4), (0, 0, 5, 4), mode="circular"),
            _draw((1, 8, 1, 4), (0, 0, 7, 9), (0, 0, 3, -3), mode="replicate"),
            _draw((2, 3, 4, 5), (0, 2, -1, 3), (0, 1, 2, -2), mode="reflect", layout=DENSE),
            _draw((2, 3, 4, 5, 3), (0, 0, 3, -2, 1), (0, 0, -1, 3, 2), mode="circular"),
            _draw((2, 3, 4), (0, 2, 1), (0, 1, 3), mode="reflect", layout=DENSE),
        ),
    ),
}
