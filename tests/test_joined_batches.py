"""Batches that are joined and parted again: Siamese networks, test-time augmentation."""

from __future__ import annotations

from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import UnsupportedOpError
from torch import Tensor, nn

from . import nets

SHAPE = (3, 4, 6, 6)


def features(m: Any, x: Tensor) -> Tensor:
    """Every kind of layer that computes each sample alone."""
    y = F.max_pool2d(m.norm(m.conv(x)).relu() * m.gain, 2)
    y = F.interpolate(F.group_norm(y, 2) + m.conv(x)[:, :, ::2, ::2], scale_factor=2)
    return m.linear(F.adaptive_avg_pool2d(y, 2).flatten(1)).softmax(1)


def siamese(m: Any, x: Tensor, y: Tensor) -> Tensor:
    halves = torch.chunk(torch.cat([x, y]), dim=1, chunks=2)
    first, second = torch.chunk(features(m, torch.cat(halves, 1)), chunks=2, dim=0)
    return F.cosine_similarity(first, second)


def sliced(m: Any, x: Tensor, y: Tensor) -> Tensor:
    n = x.shape[0]
    z = features(m, torch.cat([x, y, x + y], 0))
    return (z[:n] - z[n : 2 * n]).abs() + z[-n:]


def parted(m: Any, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """Two of three batches, joined again with one more."""
    first, *others = torch.cat([x, y, x * y]).split(split_size=x.shape[0], dim=0)
    joined = torch.cat([torch.cat(others), first])
    return tuple(m.conv(joined).amax((2, 3)).split(x.shape[0]))


def augmented(m: Any, x: Tensor) -> Tensor:
    y = features(m, torch.cat([x, x.flip(3)]))
    return y.view(2, -1, y.shape[1]).mean(0)


def stacked(m: Any, x: Tensor) -> Tensor:
    y = m.conv(torch.stack([x, x.flip(2), x.flip(3)]).flatten(0, 1)).mean((2, 3))
    return y.unflatten(0, (3, x.shape[0])).amax(0)


def repeated(m: Any, x: Tensor) -> Tensor:
    return features(m, x.repeat(2, 1, 1, 1)).chunk(2)[1]


def positions(m: Any, x: Tensor) -> Tensor:
    """The samples and rows of two images in one dimension."""
    rows = [y.permute(0, 2, 3, 1).flatten(0, 2) for y in (x, x.flip(3))]
    return F.linear(torch.cat(rows), m.rows).chunk(2)[0].reshape(x.shape[0], -1)


def made(function: Any) -> tuple[Any, tuple[Tensor, ...]]:
    count = function.__code__.co_argcount - 1
    module, inputs = nets.make(
        function, *(SHAPE,) * count, conv=nn.Conv2d(4, 4, 3, padding=1), norm=nn.BatchNorm2d(4),
        linear=nn.Linear(16, 5),
    )  # fmt: skip
    module.register_buffer("gain", torch.rand(1, 4, 1, 1))
    module.register_buffer("rows", torch.rand(3, 4))
    return module, inputs


SLOW = (parted, stacked, repeated)
CASES = [
    pytest.param(function, marks=pytest.mark.slow if function in SLOW else ())
    for function in (siamese, sliced, augmented, positions, *SLOW)
]


@pytest.mark.interpreter
@pytest.mark.parametrize("function", CASES)
def test_joined_batches(function: Any) -> None:
    module, inputs = made(function)
    target = "interpreter" if function is siamese else "reference"
    exe = convloom.compile(module, inputs, target=target, dynamic_batch=(1, 3))
    assert exe.summary["torch_fallbacks"] == 0
    for batch in (1, 3, 2):
        given = tuple(x[:batch] for x in inputs)
        nets.check(exe(*given), module, given)


REFUSED: dict[str, tuple[Any, str]] = {
    "returned": (lambda m, x: torch.cat([x, x]), r"there several times, .* part it again"),
    "some samples": (lambda m, x: torch.cat([x, x])[: x.shape[0] + 1], "takes some samples"),
    "of several sizes": (
        lambda m, x: torch.cat([x.flatten(0, 1), x[:, :1].flatten(0, 1)]).sum(1),
        "batch is in different places",
    ),
    "over the samples": (lambda m, x: torch.cat([x, x]).sum(0), "joins samples of the batch"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_joined_says_so(name: str) -> None:
    function, reason = REFUSED[name]
    module, inputs = made(function)
    with pytest.raises(UnsupportedOpError, match=reason):
        convloom.compile(module, inputs, target="reference", dynamic_batch=(1, 3))
