"""Upsampling: the same pixels and weights as torch's, whatever way the size is given."""

from __future__ import annotations

import re
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.op import Attributes
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.pooling.upsample import LINEAR, Upsample, step_of
from torch import nn

from . import harness

WAYS: tuple[dict[str, Any], ...] = (
    {"scale_factor": 2},
    {"scale_factor": 1.7},
    {"scale_factor": 1.7, "recompute_scale_factor": True},
    {"scale_factor": 0.6},
    {"size": 13},
)
MODES = ("nearest", "nearest-exact", "linear", "corners")


class Resize(nn.Module):
    """F.interpolate as a module; `mode` as this file's `MODES`."""

    def __init__(self, mode: str, **way: Any) -> None:
        super().__init__()
        self.mode, self.way = mode, way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        linear = {3: "linear", 4: "bilinear", 5: "trilinear"}[x.dim()]
        corners = {"linear": False, "corners": True}.get(self.mode)
        mode = self.mode if corners is None else linear
        return F.interpolate(x, mode=mode, align_corners=corners, **self.way)


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


KEPT: tuple[tuple[dict[str, Any], tuple[int, ...]], ...] = (
    ({"size": (3, 3)}, (3, 3)),
    ({"size": (3, 5)}, (3, 3)),
    ({"scale_factor": 1.2}, (3, 4)),
    ({"scale_factor": (1.2, 2.3)}, (4, 3)),
)


@pytest.mark.interpreter
@pytest.mark.parametrize(("way", "size"), KEPT, ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_dimension_that_keeps_its_size(
    mode: str, way: dict[str, Any], size: tuple[int, int]
) -> None:
    """Its pixels stay, whatever scale led to the size, and a NaN does not reach its neighbour;
    nearest pixels of a doubled dimension are each repeated once."""
    x = image(1, 2, *size)
    x[0, 0, 1, 1], x[0, 1, 2, 0] = float("nan"), float("inf")
    model = Resize(mode, **way)
    expected = model(x)
    for target in ("reference", "interpreter"):
        ours = convloom.compile(model, (x,), target=target)(x)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("rank", [3, 4, 5])
def test_the_reference_is_torchs(rank: int, mode: str, way: dict[str, Any]) -> None:
    """Nearest pixels bit for bit, interpolated ones to a few roundings."""
    x = image(2, 3, 7, 5, 4)[(..., *[0] * (5 - rank))]
    model = Resize(mode, **way)
    ours = convloom.compile(model, (x,), target="reference")(x)
    if mode.startswith("nearest"):
        assert torch.equal(ours, model(x))
    torch.testing.assert_close(ours, model(x), rtol=1e-6, atol=2e-6)


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", ["linear", "corners"])
@pytest.mark.parametrize("size", [(1, 5), (2, 10), (3, 19), (6, 10), (7, 19)], ids=str)
def test_infinite_pixels_of_sequences(size: tuple[int, int], mode: str) -> None:
    """0 * Inf is NaN exactly where torch has it: positions are rounded alike, and there is no
    second row that counts 0. The build of torch 2.15 rounds differently, 0 where others have a tiny
    part of the next pixel."""
    if mode == "linear" and size[0] <= 3 and torch.__version__.startswith("2.15."):
        pytest.skip("another rounding of positions")
    x = torch.full((2, 3, size[0]), float("inf"))
    x[1, 1, -1] = 2.0
    model = Resize(mode, size=size[1])
    expected = model(x)
    assert not expected.isfinite().all()
    for target in ("reference", "interpreter", "emulator:sm_90"):
        exe = convloom.compile(model, (x,), target=target)
        torch.testing.assert_close(exe(x), expected, rtol=1e-6, atol=2e-6, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_compiled_between_convolutions(mode: str, dtype: torch.dtype) -> None:
    """With a range of batches; the addition behind it rides on it."""
    x = image(2, 4, 6, 5)

    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 8, 3, 2, 1), nn.Conv2d(4, 8, 1)
            self.resize = Resize(mode, size=(6, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.resize(self.first(x)) + self.second(x))

    model = Pyramid().eval()
    exe = convloom.compile(model, (x,), target="interpreter", dtype=dtype, dynamic_batch=(1, 3))
    assert not any("add" in kernel.name or "relu" in kernel.name for kernel in exe.kernels)
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-2}[dtype]
    for batch in (1, 2, 3):
        samples = image(batch, 4, 6, 5)
        torch.testing.assert_close(exe(samples), model(samples), rtol=tolerance, atol=tolerance)


@pytest.mark.interpreter
def test_a_million_pixels_in_a_row_find_their_source() -> None:
    """Positions are fp32: what they lose is what torch's lose."""
    step = step_of(1000, 1_000_000, None, LINEAR)
    op = registry.get("upsample_nearest")
    spec = TensorSpec((1, 1, 1, 1000), torch.float32, Layout.NHWC)
    attributes = Upsample((1, 1_000_000), (1.0, step))
    problem = harness.problem_for(op, attributes, (spec,))
    x = torch.arange(1000.0).view(spec.shape)
    (ours,) = harness.run_interpreted(op, problem, (x,))
    assert torch.equal(ours, F.interpolate(x, (1, 1_000_000)))


X4 = TensorSpec((1, 3, 4, 4), torch.float32, Layout.NHWC)
MESSAGES: tuple[tuple[str, Attributes, TensorSpec, str], ...] = (
    ("upsample_nearest", Upsample((2,), (1.0,)), X4, "as many sizes and steps as it has"),
    ("upsample_nearest", Upsample(), TensorSpec((1, 3, 4), torch.float32), "expected x (N,C,H,W)"),
    ("upsample_nearest", Upsample((0, 4)), X4, "both need pixels"),
    ("upsample_linear", Upsample((8, 8)), X4, "expected a rule of ('linear', 'corners')"),
    ("upsample_linear", Upsample((8, 8), (float("nan"), 1.0), LINEAR), X4, "pixels below 2^24"),
    ("upsample_linear", Upsample((8, 8), (1e30, 1.0), LINEAR), X4, "pixels below 2^24"),
    ("upsample_linear", Upsample((1, 8), (1.0, 1.0), LINEAR, True), X4, "image of one row before"),
)


@pytest.mark.parametrize(("name", "attributes", "spec", "message"), MESSAGES)
def test_impossible_sizes_are_named(
    name: str, attributes: Attributes, spec: TensorSpec, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        registry.get(name).infer(attributes, (spec,))
    assert str(raised.value).startswith(f"{name}: ")
