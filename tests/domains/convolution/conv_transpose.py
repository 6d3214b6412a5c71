"""Problems of `kernels/convolution/conv_transpose.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from convloom.errors import InvalidInputError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.convolution.conv_phases import ConvTranspose2d, ConvTranspose3d, infer

from ...properties.domain import Domain


def _build(
    make: type[ConvTranspose2d], draw: Mapping[str, Any]
) -> tuple[ConvTranspose2d, tuple[TensorSpec, ...]] | None:
    dims = 2 if make is ConvTranspose2d else 3
    groups, per_group, per_group_out = draw["groups"], draw["C"], draw["K"]
    if draw["depthwise"]:
        groups, per_group, per_group_out = groups * per_group, 1, min(per_group_out, 2)
    attributes = make(
        draw["stride"][-dims:],
        draw["padding"][-dims:],
        draw["output_padding"][-dims:],
        draw["dilation"][-dims:],
        groups,
    )
    x = TensorSpec(
        (draw["N"], groups * per_group, *draw["image"][-dims:]), torch.float32, Layout.NHWC
    )
    w = TensorSpec((groups * per_group, per_group_out, *draw["filter"][-dims:]), torch.float32)
    try:
        infer("conv_transpose", attributes, (x, w))
    except InvalidInputError:
        return None
    return attributes, (x, w)


def _draw(**changes: Any) -> Mapping[str, Any]:
    plain = {
        "N": 2, "image": (2, 4, 3), "C": 16, "K": 8, "filter": (3, 3, 3), "stride": (2, 2, 2),
        "padding": (1, 1, 1), "output_padding": (1, 1, 1), "dilation": (1, 1, 1), "groups": 1,
        "depthwise": False,
    }  # fmt: skip
    return {**plain, **changes}


def _domain(make: type[ConvTranspose2d]) -> Domain:
    return Domain(
        ranges={
            "N": (1, 2),
            "image": ((1, 1, 1), (2, 5, 5), (3, 4, 6), (2, 7, 3)),
            "C": (1, 3, 8, 16),
            "K": (1, 8, 10),
            "filter": ((1, 1, 1), (3, 3, 3), (2, 2, 2), (1, 5, 2), (2, 1, 6)),
            "stride": ((1, 1, 1), (2, 2, 2), (1, 2, 3), (3, 4, 1)),
            "padding": ((0, 0, 0), (1, 1, 1), (0, 2, 1), (3, 0, 2)),
            "output_padding": ((0, 0, 0), (1, 1, 1), (0, 2, 1)),
            "dilation": ((1, 1, 1), (1, 1, 1), (2, 2, 2), (1, 3, 4)),
            "groups": (1, 2, 3),
            "depthwise": (False, False, True),
        },
        build=partial(_build, make),
        interesting=(
            _draw(),
            # The upsampling of U-Net, of DCGAN and of FCN.
            _draw(filter=(2, 2, 2), padding=(0, 0, 0), output_padding=(0, 0, 0)),
            _draw(filter=(4, 4, 4), output_padding=(0, 0, 0), K=33),
            _draw(filter=(4, 4, 4), output_padding=(0, 0, 0), depthwise=True),
            # Phases without taps: dilation and stride share a factor; fewer taps than phases.
            _draw(dilation=(2, 2, 2), C=3),
            _draw(filter=(1, 1, 1), stride=(3, 3, 3), padding=(0, 0, 0), groups=2),
            _draw(stride=(2, 4, 3), dilation=(1, 6, 2), filter=(1, 3, 2), C=20),
        ),
    )


DOMAINS = {
    "conv_transpose2d": _domain(ConvTranspose2d),
    "conv_transpose3d": _domain(ConvTranspose3d),
}
