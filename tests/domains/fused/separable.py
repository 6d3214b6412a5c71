"""Problems of `kernels/fused/chains/separable.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.chains.separable import Separable
from convloom.kernels.tile import conv_geometry
from convloom.kernels.tile.conv_geometry import Conv2d

from ...properties.domain import Domain

RELU6 = ep.Stage("clamp", (0.0, 6.0))


def _build(draw: Mapping[str, Any]) -> tuple[Separable, tuple[TensorSpec, ...]] | None:
    (h, width), (r, s), c, k = draw["image"], draw["filter"], draw["C"], draw["K"]
    conv = Conv2d(draw["stride"], draw["padding"], draw["dilation"], c)
    has_expand = draw["L"] is not None
    x = TensorSpec((draw["N"], c, h, width), torch.float32, Layout.NHWC)
    w1 = TensorSpec((c, 1, r, s), torch.float32)
    try:
        (t,) = conv_geometry.infer(conv, (x, w1))
    except InvalidInputError:
        return None
    y = t.with_(shape=(t.shape[0], k, *t.shape[2:]))
    project = (ep.Stage("add"), ep.Stage("add")) if draw["residual"] else (ep.Stage("add"), RELU6)
    attributes = Separable(
        conv, (ep.Stage("add"), RELU6), project, has_expand,
        (ep.Stage("add"), ep.Stage("relu")) if has_expand else (),
        keep=draw["keep"] or not has_expand,
    )  # fmt: skip
    specs = [x, w1, _channels(c), TensorSpec((k, c, 1, 1), torch.float32), _channels(k)]
    specs += [y] if draw["residual"] else []
    if has_expand:
        specs += [TensorSpec((draw["L"], k, 1, 1), torch.float32), _channels(draw["L"])]
    return attributes, tuple(specs)


def _channels(count: int) -> TensorSpec:
    return TensorSpec((count, 1, 1), torch.float32)


DOMAINS = {
    "separable": Domain(
        ranges={
            "N": (1, 2),
            "image": ((1, 1), (5, 7), (8, 8)),
            "C": (8, 20, 33, 72),
            "K": (8, 16, 33, 72),
            "L": (None, None, 24, 40, 72),
            "filter": ((3, 3), (3, 3), (5, 5), (2, 3)),
            "stride": ((1, 1), (2, 2), (1, 2)),
            "padding": ((1, 1, 1, 1), (2, 2, 2, 2), (0, 1, 2, 0)),
            "dilation": ((1, 1), (1, 1), (2, 1)),
            "residual": (False, True),
            "keep": (False, True),
        },
        build=_build,
    ),
}
