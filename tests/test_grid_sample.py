"""Sampling at places that a network computes, and the places of affine maps."""

from __future__ import annotations

from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import InvalidInputError, UnsupportedOpError
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.pooling.grid_sample import BORDERS, MODES, GridSample, infer, reference
from torch import nn

from . import nets

SHAPE = (2, 3, 6, 5)


@pytest.mark.parametrize("corners", [False, True])
@pytest.mark.parametrize("border", BORDERS)
@pytest.mark.parametrize("mode", MODES)
def test_the_reference_is_what_torch_does(mode: str, border: str, corners: bool) -> None:
    for size in ((5, 7), (1, 1), (1, 4)):
        x = nets.inputs_of((2, 3, *size))[0]
        grid = 2.0 * nets.inputs_of((2, 4, 6, 2), seed=1)[0]
        got = reference(GridSample((4, 6), mode, border, corners), x, grid.reshape(2, 24, 2))
        torch.testing.assert_close(got, F.grid_sample(x, grid, mode, border, corners))


def test_a_place_that_is_no_number() -> None:
    """Outside where there are zeros; the first pixel where the border goes on; bicubic none."""
    x, grid = torch.ones(1, 1, 3, 3), torch.full((1, 1, 2), float("nan"))
    for border in BORDERS:
        got = reference(GridSample((1, 1), "bilinear", border), x, grid).item()
        assert got == float(border != "zeros")
        assert reference(GridSample((1, 1), "bicubic", border), x, grid).isnan().all()


class Transformer(nn.Module):
    """A spatial transformer: a network that says how the image is turned, and the turned image."""

    def __init__(self, corners: bool, **options: Any) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, 6)
        self.head = nn.Conv2d(3, 2, 3, padding=1)
        self.corners, self.options = corners, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = F.relu(F.max_pool2d(self.conv(x), 2)).mean((2, 3))
        theta = self.fc(seen).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(x.shape), align_corners=self.corners)
        return self.head(F.grid_sample(x, grid, align_corners=self.corners, **self.options)).relu()


@pytest.mark.interpreter
@pytest.mark.parametrize("batch", [None, (1, 3)])
@pytest.mark.parametrize("corners", [False, True])
@torch.no_grad()
def test_spatial_transformers(corners: bool, batch: tuple[int, int] | None) -> None:
    module = nets.randomise(Transformer(corners))
    for target in ("interpreter", "emulator:sm_80"):
        (x,) = nets.inputs_of(SHAPE)
        exe = convloom.compile(module, (x,), target=target, dynamic_batch=batch)
        for count in (1, 3) if batch else (2,):
            (x,) = nets.inputs_of((count, *SHAPE[1:]), seed=count)
            # A rounding of a place counts by the step between pixels.
            torch.testing.assert_close(exe(x), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", MODES[::2])
def test_in_halves(mode: str) -> None:
    module = nets.randomise(Transformer(False, mode=mode, padding_mode="border"))
    inputs = nets.inputs_of(SHAPE)
    exe = convloom.compile(module, inputs, target="interpreter", dtype=torch.bfloat16)
    exact = nets.run(module, inputs, torch.float64)[0]
    assert ((exe(*inputs) - exact).square().mean() / exact.square().mean()).sqrt() < 0.1


def test_flow_added_to_places() -> None:
    """Of places that are constants with what a network says to add; and a given grid."""
    steps = torch.stack(torch.meshgrid(torch.arange(5.0), torch.arange(6.0), indexing="xy"), -1)

    def warped(m: Any, x: torch.Tensor, grid: torch.Tensor) -> Any:
        flow = m.conv(x).permute(0, 2, 3, 1)
        places = (m.steps.value + flow) / 2.5 - 1.0
        return F.grid_sample(x, places, align_corners=True), F.grid_sample(x, grid, "nearest")

    layers = {"conv": nn.Conv2d(3, 2, 1), "steps": Held(steps)}
    made = nets.make(warped, SHAPE, (2, 4, 4, 2), **layers)
    nets.check(convloom.compile(*made, target="reference")(*made[1]), *made)


class Held(nn.Module):
    """A constant."""

    value: torch.Tensor

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)


def test_volumes_are_refused() -> None:
    made = nets.make(lambda m, x, g: F.grid_sample(x, g), (2, 3, 4, 4, 4), (2, 2, 2, 2, 3))
    message = r"the top module: aten.grid_sampler.* expected an image .* which torch\.gather gives"
    with pytest.raises(UnsupportedOpError, match=message):
        convloom.compile(*made, target="reference")


IMAGE, PLACES = TensorSpec((2, 3, 4, 5), torch.float32), TensorSpec((2, 6, 2), torch.float32)
WRONG = (
    (GridSample((2, 2)), r"expected x \(N, C, H, W\) and a grid \(N, 2\*2, 2\)"),
    (GridSample((2, 3), mode="cubic"), "expected a mode of bilinear, nearest, bicubic"),
    (GridSample((2, 3), border="circular"), "and a border of zeros, border, reflection, got"),
)


@pytest.mark.parametrize(("attributes", "message"), WRONG)
def test_what_is_no_sampling_is_refused(attributes: GridSample, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        infer(attributes, (IMAGE, PLACES))
