"""Networks that are trained for quantisation: their fake quantisations are arithmetic."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
from torch import nn
from torch.ao import quantization

from . import nets

IMAGE = (2, 3, 6, 5)
SCALES, ZEROS = torch.tensor([0.03, 0.25, 0.011]), torch.tensor([0, 3, -5], dtype=torch.int32)


class Quantised(nn.Module):
    """A function with the buffers that quantisations have."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        for name, tensor in {"scales": SCALES, "zeros": ZEROS}.items():
            self.register_buffer(name, tensor)
            self.register_buffer(name[:-1], tensor[1:2].clone())

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


CALLS: dict[str, Callable[..., Any]] = {
    "numbers": lambda m, x: torch.fake_quantize_per_tensor_affine(x, 0.03, 128, 0, 255),
    "tensors": lambda m, x: torch.fake_quantize_per_tensor_affine(x, m.scale, m.zero, -8, 7),
    "channels": lambda m, x: torch.fake_quantize_per_channel_affine(
        x, m.scales, m.zeros, 1, -128, 127
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CALLS)
def test_fake_quantisation_is_exact(name: str) -> None:
    """One kernel, equal to torch's in every bit, of what is no number too."""
    module = Quantised(CALLS[name])
    (x,) = nets.inputs_of((2, 3, 30))
    x[0, 0, :2] = torch.tensor([float("nan"), 1e6])
    exe = convloom.compile(module, (x,), target="interpreter")
    assert [step.op for step in exe.plan.steps] == ["mul"]
    assert torch.equal(exe(x), module(x))


def test_a_computed_scale_is_refused_by_name() -> None:
    module = Quantised(
        lambda m, x: torch.fake_quantize_per_tensor_affine(x, x.amax()[None], m.zero, 0, 255)
    )
    with pytest.raises(convloom.UnsupportedOpError, match="a scale or zero point that is computed"):
        convloom.compile(module, nets.inputs_of(IMAGE), target="reference")


def prepared(kind: str) -> nn.Module:
    """A small residual network whose observers have seen two batches."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.relu, self.second = nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
            self.add, self.enter = nn.quantized.FloatFunctional(), quantization.QuantStub()
            self.classify = nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> Any:
            y = self.relu(self.norm(self.conv(self.enter(x))))
            return self.classify(self.add.add(y, self.second(y)).mean((2, 3)))

    torch.manual_seed(0)
    module = Block().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "fused":
            module.qconfig = quantization.get_default_qat_qconfig("x86")
        else:
            module.qconfig = quantization.QConfig(
                quantization.default_fake_quant, quantization.default_per_channel_weight_fake_quant
            )
        quantization.fuse_modules_qat(module, [["conv", "norm", "relu"]], inplace=True)
        quantization.prepare_qat(module, inplace=True)
    for _ in range(2):
        module(torch.randn(2, 3, 6, 5))
    return module.eval().apply(quantization.disable_observer)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", ["fused", "python"])
def test_networks_of_quantisation_aware_training(kind: str) -> None:
    """Both of torch's implementations; nothing is left of them but stages of the products."""
    module = prepared(kind)
    (x,) = nets.inputs_of(IMAGE)
    # torch does not know the op of the second of a batch that varies.
    options: dict[str, Any] = {"dynamic_batch": (1, 2)} if kind == "fused" else {}
    exe = convloom.compile(module, (x,), target="interpreter", **options)
    assert exe.summary["torch_fallbacks"] == 0
    # A number in the middle between two steps may become either: most are equal.
    with torch.no_grad():
        wanted = module(x)
    assert torch.allclose(exe(x), wanted, atol=0.05 * wanted.abs().max().item())
    module.apply(quantization.disable_fake_quant)
    exe = convloom.compile(module, (x,), target="interpreter")
    nets.check(exe(x), module, (x,))


def test_observers_that_are_on_say_how_to_turn_them_off() -> None:
    module = prepared("fused").apply(quantization.enable_observer)
    with pytest.raises(convloom.CaptureError, match="disable_observer"):
        convloom.compile(module, nets.inputs_of(IMAGE), target="reference")
