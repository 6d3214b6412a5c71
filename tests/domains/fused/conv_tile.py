"""Problems of `kernels/fused/conv_tile.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.fused.conv_tile import StagedConv
from convloom.kernels.tile import conv_geometry
from convloom.kernels.tile.conv_geometry import Conv2d

CHAINS: Mapping[str, ep.Epilogue] = {
    "none": (),
    "relu": (ep.Stage("add"), ep.Stage("relu")),
    "tanh": (ep.Stage("add"), ep.Stage("tanh")),
    "silu": (ep.Stage("add"), ep.Stage("silu")),
    "leaky": (ep.Stage("add"), ep.Stage("leaky_relu", (0.1,))),
    "falling": (ep.Stage("add"), ep.Stage("leaky_relu", (-0.5,))),
    "residual": (ep.Stage("add"), ep.Stage("add"), ep.Stage("relu")),
}
"""Chains behind the convolution."""


def drawn_parts(draw: Mapping[str, Any]) -> tuple[Conv2d, ep.Epilogue, ep.Epilogue]:
    """A drawn convolution, the stages in front of it and those behind."""
    before = (ep.Stage("mul"), ep.Stage("add"), ep.Stage("relu")) if draw["before"] else ()
    conv = Conv2d(draw["stride"], draw["padding"], draw["dilation"])
    return conv, before, CHAINS[draw["stages"]]


def drawn_inputs(draw: Mapping[str, Any], attributes: StagedConv) -> tuple[TensorSpec, ...]:
    """A drawn image, filter and operands. Raises: InvalidInputError where the filter does not
    fit."""
    c, k = draw["C"], draw["K"]
    x = TensorSpec((draw["N"], c, *draw["image"]), torch.float32, Layout.NHWC)
    w = TensorSpec((k, c, *draw["filter"]), torch.float32)
    scale, bias = TensorSpec((c, 1, 1), torch.float32), TensorSpec((k, 1, 1), torch.float32)
    result = conv_geometry.infer(attributes.conv, (x, w)) if draw["stages"] == "residual" else ()
    first = (scale, scale) if attributes.before else ()
    return (x, w, *first, *result, *((bias,) if attributes.stages else ()))
