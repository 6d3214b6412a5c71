"""Problems of `kernels/fused/chains/conv_chain.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.chains.conv_chain import ConvChain, middle
from convloom.kernels.tile.conv_geometry import Conv2d

from ..domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[ConvChain, tuple[TensorSpec, ...]] | None:
    n, (h, width), c, wide = draw["N"], draw["image"], draw["C"], draw["E"]
    bias, residual = (ep.Stage("add"), ep.Stage("relu")), (ep.Stage("add"),) * 2
    r, pad = draw["filter"]
    stride, step = draw["stride"], draw["shortcut"]
    front = Conv2d((stride, stride), (pad,) * 4) if draw["front"] else None
    beside = Conv2d((step, step)) if step else None
    mid = draw["M"] if front else c
    attributes = ConvChain(
        front, bias if front else (), (*residual, ep.Stage("relu")), draw["reduce"],
        bias if draw["reduce"] else (), beside,
    )  # fmt: skip
    x = TensorSpec((n, c, h, width), torch.float32, Layout.NHWC)

    def weight(k: int, c: int, size: int = 1) -> TensorSpec:
        return TensorSpec((k, c, size, size), torch.float32)

    def vector(k: int) -> TensorSpec:
        return TensorSpec((k, 1, 1), torch.float32)

    specs = [x, *((weight(mid, c, r), vector(mid)) if front else ())]
    try:
        p, q = middle(attributes, tuple(specs)).shape[2:]
    except InvalidInputError:
        return None
    specs.append(weight(wide, mid))
    if beside is not None:
        specs += [x.with_(shape=(n, draw["D"], p * step, q * step)), weight(wide, draw["D"])]
    specs += [vector(wide), x.with_(shape=(n, wide, p, q))]
    if draw["reduce"]:
        specs += [weight(draw["O"], wide), vector(draw["O"])]
    return attributes, tuple(specs)


DOMAINS = {
    "conv_chain": Domain(
        ranges={
            "N": (1, 2),
            "image": ((1, 1), (5, 7), (8, 8)),
            "C": (8, 20, 33),
            "M": (8, 16, 20),
            "E": (8, 40, 72),
            "O": (8, 16, 33),
            "filter": ((3, 1), (1, 0), (5, 1)),
            "stride": (1, 2),
            "front": (True, True, False),
            "reduce": (True, True, False),
            "shortcut": (0, 0, 1, 2),
            "D": (8, 20, 72),
        },
        build=_build,
        interesting=(
            # A shortcut of more channels than stay in shared memory, and one that ends a net.
            {
                "N": 2,
                "image": (5, 7),
                "C": 20,
                "M": 16,
                "E": 40,
                "O": 33,
                "filter": (3, 1),
                "stride": 1,
                "front": True,
                "reduce": True,
                "shortcut": 2,
                "D": 300,
            },
            {
                "N": 1,
                "image": (8, 8),
                "C": 20,
                "M": 16,
                "E": 72,
                "O": 8,
                "filter": (3, 1),
                "stride": 2,
                "front": True,
                "reduce": False,
                "shortcut": 1,
                "D": 20,
            },
        ),
    ),
}
