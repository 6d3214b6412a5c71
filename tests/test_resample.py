"""Bicubic and antialiased resizing: torch's pixels and weights, whatever way the size is given."""

from __future__ import annotations

from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.op import Attributes
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.resample import CUBIC, Resample
from torch import nn

from . import nets

MODES: dict[str, dict[str, Any]] = {
    "bicubic": {"mode": "bicubic"},
    "bicubic, corners": {"mode": "bicubic", "align_corners": True},
    "antialiased bilinear": {"mode": "bilinear", "antialias": True},
    "antialiased bicubic": {"mode": "bicubic", "antialias": True},
    "antialiased, corners": {"mode": "bicubic", "antialias": True, "align_corners": True},
}
WAYS: tuple[dict[str, Any], ...] = (
    {"scale_factor": 2},
    {"scale_factor": 1.7},
    {"scale_factor": 0.37},
    {"scale_factor": 0.6, "recompute_scale_factor": True},
    {"size": (5, 16)},
    {"size": (1, 9)},
)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_the_kernel_is_torchs(mode: str, way: dict[str, Any]) -> None:
    module, _ = nets.make(lambda m, x: F.interpolate(x, **way, **MODES[mode]), (1, 1, 1, 1))
    inputs = nets.inputs_of((2, 3, 9, 9))
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 2))
    for batch in (1, 2):
        x = nets.inputs_of((batch, 3, 9, 9), seed=batch)
        nets.check(exe(*x), module, x)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
def test_the_same_pixels_are_read(mode: str, special: float) -> None:
    """A weight of zero times NaN is NaN: what lies beyond the filter must not be read, what lies
    under it must."""
    module, _ = nets.make(lambda m, x: F.interpolate(x, size=(9, 13), **MODES[mode]), (1, 1, 1, 1))
    (x,) = nets.inputs_of((1, 2, 9, 7))
    x[0, 1, 4, 3] = special
    exe = convloom.compile(module, (x,), target="interpreter")
    assert torch.equal(exe(x).isnan(), module(x).isnan())
    assert torch.equal(exe(x).isinf(), module(x).isinf())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_between_convolutions_in_half_precision(dtype: torch.dtype) -> None:
    module, inputs = nets.make(
        lambda m, x: m.last(torch.relu(F.interpolate(m.first(x), scale_factor=2, mode="bicubic"))),
        (2, 3, 6, 5),
        first=nn.Conv2d(3, 16, 3),
        last=nn.Conv2d(16, 4, 1),
    )
    exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
    nets.check(exe(*inputs), module, inputs, dtype)
    assert len(exe.kernels) <= 4, "the activation rides on the resizing"


@pytest.mark.parametrize(
    ("attributes", "spec", "message"),
    [
        (Resample((2, 2)), (1, 3, 4), "cannot resize float32[1, 3, 4]"),
        (Resample((0, 2)), (1, 3, 4, 4), "pixels in both"),
        (Resample((2, 2), filter="lanczos"), (1, 3, 4, 4), "expected a filter of cubic"),
        (Resample((2, 2), (float("inf"), 1.0), CUBIC), (1, 3, 4, 4), "pixels below 2^24"),
    ],
)
def test_impossible_sizes_are_named(
    attributes: Attributes, spec: tuple[int, ...], message: str
) -> None:
    layout = Layout.NHWC if len(spec) == 4 else Layout.DENSE
    with pytest.raises(InvalidInputError) as caught:
        registry.get("resample").infer(attributes, (TensorSpec(spec, torch.float32, layout),))
    assert message in str(caught.value)
