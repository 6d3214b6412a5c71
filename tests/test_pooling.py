"""Pooling of every kind through the whole compiler: what the generic tests of ops do not ask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import UnsupportedOpError
from torch import Tensor, nn

from . import nets

IMAGE, SEQUENCE, VOLUME = (2, 6, 9, 7), (2, 6, 19), (2, 4, 5, 6, 7)


def compiled(
    function: Callable[..., Any],
    shape: tuple[int, ...],
    *,
    options: dict[str, Any] | None = None,
    **layers: nn.Module,
) -> Any:
    """A network compiled for the interpreter without torch ops, its results found right."""
    module, inputs = nets.make(function, shape, **layers)
    options = options or {}
    exe = convloom.compile(module, inputs, target="interpreter", **options)
    assert exe.summary["torch_fallbacks"] == 0
    nets.check(exe(*inputs), module, inputs, options.get("dtype"))
    return exe


def ops(exe: Any) -> list[str]:
    """The ops of the steps, without the conversions at the boundary."""
    return [step.op for step in exe.plan.steps if step.op not in ("relayout", "reshape")]


# Indices and unpooling.


class SegNet(nn.Module):
    """An encoder that remembers where its maxima stood, and a decoder that puts values back there
    (V. Badrinarayanan, A. Kendall, R. Cipolla, "SegNet", 2015)."""

    def __init__(self) -> None:
        super().__init__()

        def block(c: int, k: int) -> nn.Module:
            return nn.Sequential(nn.Conv2d(c, k, 3, padding=1), nn.BatchNorm2d(k), nn.ReLU())

        self.enter, self.deeper = block(6, 8), block(8, 12)
        self.rise, self.leave = block(12, 8), nn.Conv2d(8, 3, 3, padding=1)
        self.pool, self.unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        first, at_first = self.pool(self.enter(x))
        second, at_second = self.pool(self.deeper(first))
        y = self.rise(self.unpool(second, at_second, first.shape[2:]))
        result: Tensor = self.leave(self.unpool(y, at_first, x.shape[2:]))
        return result


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("passes", ["default", "none"])
def test_an_encoder_and_decoder_with_indices(passes: str, dtype: torch.dtype | None) -> None:
    module, inputs = nets.randomise(SegNet()), nets.inputs_of((2, 6, 10, 13))
    exe = convloom.compile(module, inputs, target="interpreter", passes=passes, dtype=dtype)
    assert exe.summary["torch_fallbacks"] == 0
    if dtype is None:
        nets.check(exe(*inputs), module, inputs)
    # In half precision near ties may fall to another pixel: the fused graph itself is the truth.
    reference = convloom.compile(module, inputs, target="reference", passes=passes, dtype=dtype)
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype is None else {"rtol": 0.1, "atol": 0.5}
    torch.testing.assert_close(exe(*inputs), reference(*inputs), **close)
    assert ops(exe).count("max_unpool2d") == 2


@pytest.mark.interpreter
def test_indices_are_returned_as_torch_returns_them() -> None:
    module, inputs = nets.make(
        lambda m, x: F.max_pool2d(torch.relu(x), 3, 2, 1, return_indices=True), IMAGE
    )
    for dtype in (None, torch.float16):
        exact = tuple(x.to(dtype).to(x.dtype) if dtype else x for x in inputs)
        exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
        for got, wanted in zip(exe(*exact), module(*exact), strict=True):
            assert got.dtype is wanted.dtype
            assert torch.equal(got, wanted)


@pytest.mark.interpreter
def test_indices_of_any_batch_of_a_range() -> None:
    module, inputs = nets.make(
        lambda m, x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2), (3, 4, 6, 8)
    )
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 4))
    for batch in (1, 4):
        (x,) = nets.inputs_of((batch, 4, 6, 8), seed=batch)
        assert torch.equal(exe(x), module(x))


@pytest.mark.interpreter
def test_sequences_are_unpooled_too() -> None:
    exe = compiled(
        lambda m, x: F.max_unpool1d(*F.max_pool1d(x, 3, 2, 1, return_indices=True), 3, 2, 1, (19,)),
        SEQUENCE,
    )
    assert ops(exe) == ["max_pool2d_with_indices", "max_unpool2d"]


@pytest.mark.interpreter
def test_indices_that_nobody_reads_cost_nothing() -> None:
    exe = compiled(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0] + 1.0, IMAGE)
    assert ops(exe) == ["max_pool2d"]


def refusal(function: Callable[..., Any], shape: tuple[int, ...] = IMAGE) -> str:
    """What compile says of a network that it does not support."""
    module, inputs = nets.make(function, shape)
    with pytest.raises(UnsupportedOpError) as raised:
        convloom.compile(module, inputs, target="reference")
    return str(raised.value)


def test_what_indices_are_not_for_is_refused() -> None:
    pooled = lambda x: F.max_pool2d(x, 2, return_indices=True)  # noqa: E731
    assert "dtype torch.int64 is not supported" in refusal(lambda m, x: pooled(x)[1] + 1)
    flipped = refusal(lambda m, x: F.max_unpool2d(pooled(x)[0], pooled(x)[1].transpose(0, 1), 2),
                      (6, 6, 8, 8))  # fmt: skip
    assert "its indices must come straight from a max pooling" in flipped
    smaller = refusal(lambda m, x: F.max_unpool2d(*pooled(x), 2, output_size=(8, 6)))
    assert "fewer pixels than the image (9, 7)" in smaller
    assert "output_size=(9, 7)" in smaller
