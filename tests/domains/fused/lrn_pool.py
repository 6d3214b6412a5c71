"""Problems of `kernels/fused/lrn_pool.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.lrn_pool import LrnPool, infer
from convloom.kernels.normalisation.lrn import LocalResponseNorm
from convloom.kernels.pooling.pool_window import MaxPool2d

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[LrnPool, tuple[TensorSpec, ...]] | None:
    x = TensorSpec((draw["N"], draw["C"], *draw["image"]), torch.float32, Layout.NHWC)
    norm = LocalResponseNorm(draw["size"], draw["alpha"], draw["beta"], draw["k"])
    window = MaxPool2d(
        draw["kernel"], draw["stride"], draw["padding"], draw["dilation"], draw["ceil_mode"]
    )
    attributes = LrnPool(norm, window, draw["lrn_first"])
    try:
        infer(attributes, (x,))
    except InvalidInputError:
        return None
    return attributes, (x,)


def _draw(**changes: Any) -> Mapping[str, Any]:
    """AlexNet's, but for the changes."""
    plain = {
        "N": 1, "C": 24, "image": (7, 9), "size": 5, "alpha": 1.0, "beta": 0.75, "k": 2.0,
        "kernel": (3, 3), "stride": (2, 2), "padding": (0, 0), "dilation": (1, 1),
        "ceil_mode": False, "lrn_first": True,
    }  # fmt: skip
    return {**plain, **changes}


DOMAINS = {
    "lrn_pool": Domain(
        ranges={
            "N": (1, 2),
            "C": (1, 8, 24, 33, 64),
            "image": ((1, 1), (5, 5), (7, 9)),
            "size": (1, 4, 5, 11),
            "alpha": (0.5, 2.0),
            "beta": (0.75, 0.5, 0.3),
            "k": (1.0, 2.0),
            "kernel": ((1, 1), (2, 2), (3, 3), (1, 3)),
            "stride": ((1, 1), (2, 2), (1, 2)),
            "padding": ((0, 0), (1, 1), (0, 1)),
            "dilation": ((1, 1),),
            "ceil_mode": (False, True),
            "lrn_first": (True, False),
        },
        build=_build,
        interesting=(
            _draw(),
            _draw(lrn_first=False, padding=(1, 1), ceil_mode=True, N=2),
            _draw(lrn_first=False, C=33, size=4),
            # The only window has its taps above, below and beside the image.
            _draw(image=(2, 2), kernel=(2, 2), padding=(1, 1), dilation=(3, 3), stride=(1, 1)),
        ),
    ),
}
