"""Pixel shuffle behind a convolution, as super-resolution networks end."""

from __future__ import annotations

from typing import Any

import convloom
import pytest
import torch
from convloom.kernels.contract.spec import Layout
from torch import nn

from . import nets


def espcn(r: int) -> Any:
    """The last two layers of ESPCN (Shi et al., 2016) and an image's features."""
    layers = nn.Conv2d(8, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 3 * r * r, 3, padding=1)
    return nn.Sequential(*layers, nn.PixelShuffle(r)).eval(), (torch.randn(2, 8, 6, 5),)


@pytest.mark.interpreter
@pytest.mark.parametrize("r", (2, 3))
def test_the_convolution_writes_its_result_shuffled(r: int) -> None:
    module, inputs = espcn(r)
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 2))
    ops = [node.op for node in exe.graph.compute_nodes()]
    assert "conv_rearrange" in ops and "rearrange" not in ops
    for batch in (1, 2):
        x = inputs[0][:batch]
        nets.check(exe(x), module, (x,))


@pytest.mark.interpreter
def test_the_image_is_written_as_it_is_returned() -> None:
    module, inputs = espcn(2)
    exe = convloom.compile(module, inputs, target="interpreter")
    (last,) = [node for node in exe.graph.compute_nodes() if node.op == "conv_rearrange"]
    assert last.spec.layout is Layout.DENSE and exe.graph.outputs()[0].node == last.name
    nets.check(exe(*inputs), module, inputs)


@pytest.mark.interpreter
def test_what_is_pooled_next_is_written_for_the_pooling() -> None:
    module, inputs = espcn(2)
    pooled = nn.Sequential(module, nn.MaxPool2d(3, 2)).eval()
    exe = convloom.compile(pooled, inputs, target="interpreter")
    (shuffled,) = [node for node in exe.graph.compute_nodes() if node.op == "conv_rearrange"]
    assert shuffled.spec.layout is Layout.NHWC
    nets.check(exe(*inputs), pooled, inputs)


def test_it_can_be_forbidden_by_its_label() -> None:
    module, inputs = espcn(2)
    exe = convloom.compile(module, inputs, target="reference", forbid=("sub-pixel",))
    assert "rearrange" in [node.op for node in exe.graph.compute_nodes()]
    reasons = [event.reason for event in exe.ledger.events if not event.accepted]
    assert "forbidden by forbid='sub-pixel'" in reasons
