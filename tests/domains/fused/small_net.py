"""Problems of `kernels/fused/small_net.py` for the tests."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused import conv_pool
from convloom.kernels.fused.conv_pool import ConvPool
from convloom.kernels.fused.head import Head
from convloom.kernels.fused.small_net import SmallNet
from convloom.kernels.pooling.pool_window import AvgPool2d, MaxPool2d
from convloom.kernels.tile.conv_geometry import Conv2d

from ...properties.domain import Domain

BIASED = (ep.Stage("add"), ep.Stage("relu"))


def _build(draw: Mapping[str, Any]) -> tuple[SmallNet, tuple[TensorSpec, ...]] | None:
    n, (h, width), c = draw["N"], draw["image"], draw["C"]
    specs = [TensorSpec((n, c, h, width), torch.float32, Layout.NHWC)]
    layers, t = [], specs[0]
    for k in draw["filters"]:
        pool: MaxPool2d | AvgPool2d = MaxPool2d((2, 2), (2, 2), ceil_mode=draw["ceil"])
        if draw["average"]:
            pool = AvgPool2d((2, 2), (2, 2))
        stages = BIASED if draw["stages"] else ()
        each = ConvPool(Conv2d(padding=draw["padding"]), (), stages, pool)
        w = TensorSpec((k, t.shape[1], *draw["filter"]), torch.float32)
        part = [w, TensorSpec((k, 1, 1), torch.float32)] if stages else [w]
        try:
            (t,) = conv_pool.infer(each, (t, *part))
        except InvalidInputError:
            return None
        layers.append(each)
        specs += part
    inner = math.prod(t.shape[1:])
    links: list[ep.Epilogue] = []
    for out in draw["widths"]:
        specs.append(TensorSpec((out, inner), torch.float32))
        specs += [TensorSpec((out,), torch.float32)] if draw["stages"] else []
        links.append(BIASED if draw["stages"] else ())
        inner = out
    if links[-1]:
        links[-1] = BIASED[:1]
    return SmallNet(tuple(layers), Head(tuple(links), softmax=draw["softmax"])), tuple(specs)


LENET = {
    "N": 3, "image": (32, 32), "C": 1, "filters": (6, 16), "filter": (5, 5),
    "padding": (0, 0, 0, 0), "ceil": False, "average": False, "widths": (120, 84, 10),
    "softmax": "", "stages": True,
}  # fmt: skip


DOMAINS = {
    "small_net": Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((8, 8), (9, 7), (12, 10)),
            "C": (1, 3, 8, 32),
            "filters": ((6,), (8, 16), (5, 33), (4, 8, 8)),
            "filter": ((3, 3), (1, 1), (3, 2)),
            "padding": ((1, 1, 1, 1), (0, 0, 0, 0), (0, 1, 1, 2)),
            "ceil": (False, True),
            "average": (False, False, True),
            "widths": ((10,), (24, 10), (20, 16, 10)),
            "softmax": ("", "", "softmax"),
            "stages": (True, False),
        },
        build=_build,
        interesting=(LENET, {**LENET, "average": True, "softmax": "log_softmax"}),
    ),
}
