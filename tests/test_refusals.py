"""What capture says of modules that it refuses: what was found, where, and what to do instead."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.capture.refusals import why_unknown
from convloom.errors import CaptureError, ConvloomError, UnsupportedOpError
from torch import Tensor, nn

from . import nets
from .nets import make

SHAPE = (2, 6)


def refused(error: type[ConvloomError], module: nn.Module, *parts: str, **options: Any) -> str:
    """The message of a refusal, which has all parts, and asks nobody to call what was called."""
    (x,) = nets.inputs_of(SHAPE)
    with pytest.raises(error) as caught:
        convloom.compile(module.eval(), (x,), target="reference", **options)
    message = str(caught.value)
    assert [part for part in parts if part not in message] == [], message
    assert ".eval()" not in message
    return message


def net(function: Any, **layers: nn.Module) -> nn.Module:
    return make(function, SHAPE, **layers)[0]


def test_random_numbers_in_evaluation() -> None:
    for function, call in (
        (lambda m, x: F.dropout(x), "aten.native_dropout.default"),
        (lambda m, x: x + torch.randn(6), "aten.randn.default"),
    ):
        parts = ("draws random numbers", "in evaluation mode", "the module: ", "nets.py:")
        refused(CaptureError, net(function), *parts, call, "self.training")


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return x + self.calls


def test_buffers_that_are_written_in_evaluation() -> None:
    module = nn.Sequential(Counts())
    refused(CaptureError, module, "writes its buffers", "0.calls", "keeps no state")


def test_networks_prepared_for_quantisation() -> None:
    module = nn.Sequential(nn.Linear(6, 6), nn.ReLU()).train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        prepared = torch.ao.quantization.prepare_qat(module)
    refused(CaptureError, prepared, "prepared for quantisation", "0.weight_fake_quant", "before it")


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.tensor([True, False] * 3))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.mask].relu()


@pytest.mark.parametrize("fallback", ["error", "torch"])
def test_constant_masks_say_nothing_of_a_batch(fallback: str) -> None:
    parts = ("'0': aten.index.Tensor at test_refusals.py:", "mask.nonzero()")
    message = refused(UnsupportedOpError, nn.Sequential(Masked()), *parts, fallback=fallback)
    assert "batch" not in message


def test_scripted_modules_are_named() -> None:
    scripted = torch.jit.script(nn.Linear(6, 6))
    refused(CaptureError, nn.Sequential(scripted), "'0' is a scripted module", "was made from")
    refused(CaptureError, scripted, "the module is a scripted module")


class Keyword(nn.Module):
    def forward(self, x: Tensor, *, y: Tensor) -> Tensor:
        return x + y


def test_keyword_only_arguments() -> None:
    parts = ("forward(x: 'Tensor', *, y: 'Tensor')", "missing a required", "passed as kwargs={...}")
    refused(CaptureError, Keyword(), *parts)


def test_control_flow_by_values(capfd: pytest.CaptureFixture[str]) -> None:
    for function in (
        lambda m, x: x * 2.0 if x.sum() > 0 else x,
        lambda m, x: x[:, : int(x.sum())],
    ):
        message = refused(CaptureError, net(function), "by the values", "py:", "torch.where")
        assert len(message) < 400
    assert "def forward" not in "".join(capfd.readouterr())
    choice = net(lambda m, x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)))
    refused(UnsupportedOpError, choice, "the top module: cond", "torch.where")


def test_unsupported_ops_name_the_line_and_other_overloads() -> None:
    message = refused(
        UnsupportedOpError,
        nn.Sequential(net(lambda m, x: torch.logcumsumexp(x, 1))),
        "'0': aten.logcumsumexp.default(float32[2, 6]) at nets.py:",
        "no kernel for this op",
        "To run it by torch, between the kernels, pass fallback='torch' (--fallback torch)",
    )
    assert len(message.splitlines()) == 3 and len(message) < 400
    assert why_unknown("aten.linalg_svd.default") == "no kernel for this op", "no guesses"
    assert why_unknown("aten.relu.out") == "no kernel for this op, but for aten.relu.default"
    nearby = net(lambda m, x: F.adaptive_avg_pool1d(x[:, None], 2).cummax(1)[0])
    refused(UnsupportedOpError, nearby, "aten.cummax.default")


def layers_of_inference() -> nn.Module:
    with torch.inference_mode():
        return nets.randomise(nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.ReLU()))


@pytest.mark.interpreter
@pytest.mark.parametrize("batch", [None, (1, 3)])
def test_modules_made_in_inference_mode(batch: tuple[int, int] | None) -> None:
    module, (x,) = layers_of_inference(), nets.inputs_of((2, 4, 5))
    held = [id(tensor) for tensor in module.state_dict(keep_vars=True).values()]
    with torch.inference_mode():
        copied = x.clone()
        want = module(x)
    for example in (x, copied):
        exe = convloom.compile(module, (example,), target="interpreter", dynamic_batch=batch)
        torch.testing.assert_close(exe(x), want)
    assert held == [id(tensor) for tensor in module.state_dict(keep_vars=True).values()]


def test_copies_of_executables(tmp_path: Path) -> None:
    module, inputs = make(lambda m, x: m.layer(x), SHAPE, layer=nn.Linear(6, 3))
    exe = convloom.compile(module, inputs, target="reference")
    for twin in (copy.copy(exe), copy.deepcopy(exe), copy.deepcopy([exe])[0]):
        assert torch.equal(twin(*inputs), exe(*inputs))
    exe.save(tmp_path / "net.loom")
    loaded = convloom.load(tmp_path / "net.loom")
    unpickled = [pickle.loads(pickle.dumps(each)) for each in (exe, loaded, *loaded.executables)]
    again = pickle.loads(pickle.dumps(unpickled[0]))
    for twin in (copy.copy(loaded), copy.deepcopy(loaded), *unpickled, again):
        assert torch.equal(twin(*inputs), exe(*inputs))
