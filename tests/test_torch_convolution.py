"""Geometries at which torch's own half-precision convolutions crashed or were wrong on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convloom.kernels.tile.torch_convolution import SoundConvolutions, convolve, convolve_transposed
from torch import nn

HALF = pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)

CASES: list[tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = [
    ((3, 6, 1, 1), (6, 1, 1, 1), {"stride": (1, 2), "padding": 3, "dilation": 2, "groups": 6}),
    ((3, 16, 1, 1), (8, 16, 1, 1), {"stride": (1, 2), "padding": 3, "dilation": (1, 3)}),
    ((1, 1, 12, 1), (1, 1, 5, 2), {"stride": 2, "padding": (0, 3), "dilation": (1, 2)}),
    ((1, 8, 12, 1), (4, 8, 5, 5), {"stride": 2, "padding": (3, 2), "dilation": (2, 1)}),
    ((3, 2, 12, 1), (16, 1, 2, 3), {"stride": (1, 3), "padding": (0, 1), "groups": 2}),
    ((3, 1, 13, 5), (8, 1, 2, 2), {"stride": (1, 3), "dilation": (1, 3)}),
    ((3, 16, 1, 7, 2), (8, 8, 2, 3, 1),
     {"stride": (2, 3, 3), "padding": (2, 1, 2), "dilation": (3, 1, 3), "groups": 2}),
]  # fmt: skip


@HALF
@pytest.mark.parametrize(("image", "filters", "attributes"), CASES)
def test_narrow_images(
    image: tuple[int, ...],
    filters: tuple[int, ...],
    attributes: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, image, generator=generator).to(dtype)
    w = torch.randint(-2, 3, filters, generator=generator).to(dtype)
    plain = {4: F.conv2d, 5: F.conv3d}[x.dim()]
    exact = plain(x.double(), w.double(), **attributes)
    for _ in range(20):
        y = convolve(x, w, **attributes)
        assert y.dtype is dtype and torch.equal(y.double(), exact)
    with SoundConvolutions():
        assert torch.equal(plain(x, w, **attributes), y)


@HALF
def test_a_transposed_filter_that_is_wider_than_the_image(dtype: torch.dtype) -> None:
    x = torch.ones(3, 18, 1, 12, dtype=dtype)
    w = torch.ones(18, 1, 2, 5, dtype=dtype)
    attributes: dict[str, Any] = {"padding": (1, 0), "dilation": (3, 1), "groups": 6}
    exact = F.conv_transpose2d(x.double(), w.double(), **attributes)
    for _ in range(20):
        y = convolve_transposed(x, w, **attributes)
        assert y.dtype is dtype and torch.equal(y.double(), exact)


@HALF
def test_a_module_with_a_bias(dtype: torch.dtype) -> None:
    layer = nn.Conv2d(16, 8, 1, stride=(1, 2), padding=3, dilation=(1, 3)).to(dtype)
    x = torch.randn(3, 16, 1, 1, generator=torch.Generator().manual_seed(1)).to(dtype)
    with torch.no_grad(), SoundConvolutions():
        y = layer(x)
    assert y.dtype is dtype
    exact = layer.double()(x.double())
    assert ((y.double() - exact).abs() <= 2 * torch.finfo(dtype).eps * exact.abs() + 1e-3).all()


def test_other_types_are_left_to_torch() -> None:
    x, w = torch.randn(1, 4, 5, 5), torch.randn(4, 4, 3, 3)
    with SoundConvolutions():
        assert torch.equal(F.conv2d(x, w), convolve(x, w))
    assert torch.equal(F.conv2d(input=x, weight=w), convolve(x, w))
