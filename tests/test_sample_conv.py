"""Convolutions whose weights are computed: modulated, dynamic and cross-correlating ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import InvalidInputError, UnsupportedOpError
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.convolution.sample_conv import SampleConv2d, infer
from torch import Tensor, nn

from . import nets

IMAGE, STYLE = (2, 6, 5, 4), (2, 7)


def modulated(m: Any, x: Tensor, style: Tensor, up: bool = False) -> Tensor:
    """StyleGAN2's: filters scaled by a style and normalised, per sample, by way of groups."""
    n, c, h, w = x.shape
    filters = m.conv.weight.unsqueeze(0) * (m.style(style) + 1.0).view(n, 1, c, 1, 1)
    filters = filters * torch.rsqrt(filters.pow(2).sum((2, 3, 4), keepdim=True) + 1e-6)
    if up:
        filters = filters.transpose(1, 2).reshape(n * c, 8, 3, 3)
        y = F.conv_transpose2d(
            x.reshape(1, n * c, h, w), filters, stride=2, padding=1, output_padding=1, groups=n
        )
    else:
        filters = filters.view(n * 8, c, 3, 3)
        y = F.conv2d(x.reshape(1, n * c, h, w), filters, padding=1, groups=n)
    return F.leaky_relu(y.view(n, 8, *y.shape[2:]), 0.2)


def correlated(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """Channel by channel with another image of each sample."""
    n, c, h, w = x.shape
    other = m.style(style).view(n * c, 1, 1, 1) + x[:, :, :2, :2].reshape(n * c, 1, 2, 2)
    y = F.conv2d(x.reshape(1, n * c, h, w), other, groups=n * c)
    return y.view(n, c, *y.shape[2:])


def rows(m: Any, x: Tensor, style: Tensor) -> Tensor:
    """A sequence, with biases of each sample's own."""
    n = x.shape[0]
    bias = style[:, :3].reshape(3 * n)
    filters = m.style(style).view(n * 3, 2, 1)
    y = F.conv1d(x[:, :2, 0].reshape(1, n * 2, 4), filters, bias, groups=n)
    return y.view(n, 3, 4)


NETWORKS: dict[str, Callable[..., Tensor]] = {
    "modulated": modulated,
    "modulated, upsampling": lambda m, x, style: modulated(m, x, style, up=True),
    "cross-correlation": correlated,
    "sequence": rows,
    "constant image": lambda m, x, style: modulated(m, m.conv.weight[:2, :, :, :], style),
}


def made(function: Callable[..., Tensor]) -> nets.Made:
    layers = {"conv": nn.Conv2d(6, 8, 3), "style": nn.Linear(7, 6)}
    return nets.make(function, IMAGE, STYLE, **layers)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", NETWORKS)
def test_each_sample_has_its_own_filters(name: str) -> None:
    """In any precision, for one batch and for any."""
    module, inputs = made(NETWORKS[name])
    halves = (torch.float16, torch.bfloat16) if name == "modulated" else ()
    for dtype in (torch.float32, *halves):
        dynamic = dtype is torch.float32 and name != "constant image"
        options: dict[str, Any] = {"dynamic_batch": (1, 3)} if dynamic else {}
        exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype, **options)
        assert [step.op for step in exe.plan.steps].count("sample_conv2d") == 1
        nets.check(exe(*inputs), module, inputs, dtype)
        if dynamic:
            first = tuple(x[:1] for x in inputs)
            nets.check(exe(*first), module, first)


@pytest.mark.interpreter
def test_filters_of_all_samples_may_be_computed() -> None:
    """SiamFC's pair: one exemplar's features are the filter of another image's."""
    module, inputs = nets.make(
        lambda m, x, z: F.conv2d(m.conv(x), m.conv(z)), (1, 3, 9, 8), (1, 3, 5, 5),
        conv=nn.Conv2d(3, 4, 3),
    )  # fmt: skip
    exe = convloom.compile(module, inputs, target="interpreter")
    assert exe.summary["torch_fallbacks"] == 0
    nets.check(exe(*inputs), module, inputs)


@pytest.mark.interpreter
def test_a_constant_image_is_sampled_at_computed_places() -> None:
    """What reads images by their pixels does so of constant ones, too."""
    module, (grid,) = nets.make(
        lambda m, grid: F.grid_sample(m.conv.weight[:2], grid.tanh(), align_corners=False),
        (2, 4, 3, 2), conv=nn.Conv2d(6, 8, 3),
    )  # fmt: skip
    exe = convloom.compile(module, (grid,), target="interpreter")
    nets.check(exe(grid), module, (grid,))


def test_volumes_with_computed_filters_are_refused_by_name() -> None:
    module, inputs = nets.make(lambda m, x, w: F.conv3d(x, w), (1, 2, 3, 4, 4), (2, 2, 1, 1, 1))
    with pytest.raises(UnsupportedOpError, match="conv3d with computed weights; only images"):
        convloom.compile(module, inputs, target="reference")


X = TensorSpec((2, 4, 5, 5), torch.float32, Layout.NHWC)
REFUSED = {
    "expected x": TensorSpec((2, 3, 9), torch.float32),
    "for each sample": TensorSpec((3, 3, 4), torch.float32),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_impossible_geometry_is_refused(reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        infer(SampleConv2d(), (X, REFUSED[reason]))
