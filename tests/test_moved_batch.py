"""Attention as it is usually written: between two layers the batch is in another dimension."""

from __future__ import annotations

from collections.abc import Callable

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.capture.capture import capture
from convloom.errors import UnsupportedOpError
from torch import Tensor, nn

from . import nets


class Joined(nn.Module):
    """Queries, keys and values of one linear layer, as vision transformers compute them."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, 4, c // 4).permute(2, 0, 3, 1, 4).unbind(0)
        seen = ((q * 0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        result: Tensor = self.project(seen.transpose(1, 2).reshape(n, length, c))
        return result


class Torchs(nn.Module):
    """torch's own attention; its weights are averaged over the heads, or not computed."""

    def __init__(self, batch_first: bool, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = (
            nn.MultiheadAttention(16, 4, batch_first=batch_first),
            weights,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.attention.batch_first:
            seen, weights = self.attention(x, x, x, need_weights=self.weights)
        else:
            x = x.transpose(0, 1)
            seen, weights = self.attention(x, x, x, need_weights=self.weights)
            seen = seen.transpose(0, 1)
        return (seen, weights) if self.weights else (seen,)


class LengthFirst(nn.Module):
    """Everything that is understood of (length, batch, features) but attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(16), nn.Linear(16, 16)
        self.register_buffer("scale", torch.linspace(-1, 1, 16))

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        n = y.shape[1]
        z = F.gelu(self.linear(self.norm(y))) * self.scale + y
        a, b = z[1:4].chunk(2, 2)
        a, b = (a - b).softmax(0), (b * 2).reshape(3 * n, 8)
        joined = torch.sigmoid(b).view(3, n, 2, 4).permute(2, 0, 1, 3)[1] * a[..., :4]
        return joined.unsqueeze(0).squeeze(0).reshape(3, n * 4).view(3, n, 4).permute(1, 2, 0)


class Merged(nn.Module):
    """Positions and samples in one dimension, while others change their places."""

    def forward(self, x: Tensor) -> Tensor:
        n, length, c = x.shape
        halves = x.transpose(0, 1).reshape(length * n, 2, c // 2).permute(1, 0, 2)
        turned = torch.tanh(halves).permute(1, 0, 2)
        return turned.reshape(length, n, c).transpose(0, 1)


class Steps(nn.Module):
    """What recurrent layers do with (length, batch, features)."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        several = torch.cat([y[:2], y.flip(0)], 0)
        stacked = 1.0 - torch.stack([x[:, 0], x[:, 1]], 0)
        state = torch.zeros(2, x.shape[0], 16) + torch.full((2, x.shape[0], 1), 0.5)
        last = x[:, 2] + (stacked - state) * x[:, 3:4].transpose(0, 1)
        return torch.cat([several, last], 0).transpose(0, 1)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "joined": Joined,
    "batch first": lambda: Torchs(batch_first=True, weights=False),
    "length first, with weights": lambda: Torchs(batch_first=False, weights=True),
    "other ops": LengthFirst,
    "merged": Merged,
    "steps": Steps,
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MODULES)
def test_the_batch_may_leave_its_dimension_and_return(name: str) -> None:
    module = nets.randomise(MODULES[name]()).eval()
    (x,) = nets.inputs_of((3, 5, 16))
    exe = convloom.compile(module, (x,), target="interpreter", dynamic_batch=(1, 4))
    assert exe.summary["torch_fallbacks"] == 0
    for batch in (1, 3):
        nets.check(exe(x[:batch]), module, (x[:batch],))


def test_moving_the_batch_alone_copies_nothing() -> None:
    """(batch, length, ...) to (length, batch, ...) and back: the layers do not notice."""
    module = nn.Linear(16, 8)

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = module

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x.transpose(0, 1).reshape(-1, 16))
            return y.view(5, -1, 8).transpose(0, 1)

    exe = convloom.compile(
        Around(), nets.inputs_of((3, 5, 16)), target="reference", dynamic_batch=(1, 4)
    )
    assert [step.op for step in exe.plan.steps] == ["linear"]


def leading(x: Tensor) -> Tensor:
    """The first four positions, in front of the batch."""
    return x[:, :4].transpose(0, 1)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "met in another order": (
        lambda x: leading(x).reshape(4 * x.shape[0], 16)
        + x[:, :4].reshape(-1, 2, 2, 16).transpose(0, 1).reshape(4 * x.shape[0], 16),
        "whose batch is elsewhere",
    ),
    "summed": (lambda x: x.transpose(0, 1).sum(1), "its batch is not in dimension 0"),
    "selected": (lambda x: x.transpose(0, 1)[:, 0], "joins samples"),
    "sliced": (lambda x: x.transpose(0, 1)[:, :1].transpose(0, 1), "joins samples"),
    "softmax": (lambda x: x.transpose(0, 1).softmax(1), "goes along dimension 1"),
    "joined in another order": (
        lambda x: torch.cat(
            (leading(x).reshape(4, -1), x[:, :4].permute(1, 2, 0).reshape(4, -1)), 0
        ),
        "batch is in different places",
    ),
    "filled with whole numbers": (
        lambda x: torch.zeros(5, x.shape[0], dtype=torch.int64), "expected floats"
    ),
    "returned": (
        lambda x: x.transpose(0, 1), "batch must be in dimension 0, but is in .* 1.* Move it there"
    ),
    "met by positions": (lambda x: x.transpose(0, 1) + torch.ones(5, 1, 16), "meets float32"),
}  # fmt: skip


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_batch_in_front_says_so(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(UnsupportedOpError, match=reason):
        capture(Call(function), nets.inputs_of((3, 5, 16)), (1, 4))
