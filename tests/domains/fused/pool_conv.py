"""Problems of `kernels/fused/pool_conv.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.pool_conv import PoolConv, infer
from convloom.kernels.pooling.pool_window import AvgPool2d, MaxPool2d

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[PoolConv, tuple[TensorSpec, ...]] | None:
    n, c, k, (h, width) = draw["N"], draw["C"], draw["K"], draw["image"]
    kernel, stride, padding = draw["kernel"], draw["stride"], draw["padding"]
    window: MaxPool2d | AvgPool2d
    if draw["average"] is None:
        window = MaxPool2d(kernel, stride, padding, draw["dilation"], draw["ceil_mode"])
    else:
        window = AvgPool2d(kernel, stride, padding, draw["ceil_mode"], draw["average"])
    add, stages = ep.Stage("add"), draw["stages"]
    after = (add, ep.Stage("leaky_relu", (0.25,))) if "pool" in stages else ()
    before = (ep.Stage("mul"), add, ep.Stage("relu")) if "conv" in stages else ()
    attributes = PoolConv(window, after, before, draw["keep"])
    x = TensorSpec((n, c, h, width), torch.float32, Layout.NHWC)
    channels = TensorSpec((c, 1, 1), torch.float32)
    operands = [channels] * ep.operand_count((*after, *before))
    specs = (x, TensorSpec((k, c, 1, 1), torch.float32), *operands)
    try:
        infer(attributes, specs)
    except InvalidInputError:
        return None
    return attributes, specs


def _draw(**changes: Any) -> Mapping[str, Any]:
    """Inception's pooling branch, but for the changes."""
    plain = {
        "N": 1, "image": (7, 9), "C": 24, "K": 33, "kernel": (3, 3), "stride": (1, 1),
        "padding": (1, 1), "dilation": (1, 1), "ceil_mode": False, "average": None, "stages": (),
        "keep": False,
    }  # fmt: skip
    return {**plain, **changes}


DOMAINS = {
    "pool_conv": Domain(
        ranges={
            "N": (1, 2),
            "image": ((1, 1), (5, 7), (8, 8), (12, 4)),
            "C": (1, 8, 20, 33, 64),
            "K": (1, 8, 33),
            "kernel": ((1, 1), (2, 2), (3, 3), (1, 3), (3, 2)),
            "stride": ((1, 1), (2, 2), (1, 2), (3, 1)),
            "padding": ((0, 0), (1, 1), (0, 1)),
            "dilation": ((1, 1), (2, 2), (1, 3)),
            "ceil_mode": (False, True),
            "average": (None, None, True, False),
            "stages": ((), ("pool",), ("conv",), ("pool", "conv")),
            "keep": (False, True),
        },
        build=_build,
        interesting=(
            _draw(),
            _draw(N=2, keep=True, stages=("pool", "conv"), C=20),
            _draw(image=(8, 8), stride=(2, 2), padding=(0, 0), ceil_mode=True, keep=True),
            _draw(image=(6, 6), stride=(2, 2), ceil_mode=True, average=True),
            _draw(image=(6, 6), stride=(2, 2), ceil_mode=True, average=False, C=33),
            # The only window has its taps above, below and beside the image: -inf times a weight.
            _draw(image=(2, 2), kernel=(2, 2), padding=(1, 1), dilation=(3, 3)),
            _draw(image=(1, 1), kernel=(1, 1), padding=(0, 0), C=1, K=1),
        ),
    ),
}
