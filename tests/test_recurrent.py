"""Recurrent layers over a fixed length: products and pointwise work, step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from . import nets

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": lambda: nn.LSTM(8, 6, bidirectional=True, batch_first=True),
    "lstm, projected": lambda: nn.LSTM(8, 6, proj_size=3, bias=False),
    "gru": lambda: nn.GRU(8, 6, num_layers=2),
    "rnn": lambda: nn.RNN(8, 6, nonlinearity="relu", batch_first=True),
    "rnn, tanh": lambda: nn.RNN(8, 6, bidirectional=True),
}


class Recurrent(nn.Module):
    """A convolutional network's columns, in order, through a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.layer = nn.Conv2d(1, 8, (4, 2), (4, 2)), layer
        self.batch_first = bool(layer.batch_first)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x).flatten(2).transpose(1, 2)
        sequence, state = self.layer(y if self.batch_first else y.transpose(0, 1))
        state = state[0] if isinstance(state, tuple) else state
        return sequence if self.batch_first else sequence.transpose(0, 1), state[-1]


@pytest.mark.interpreter
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_recurrent_layers(name: str, dynamic: bool) -> None:
    module = nets.randomise(Recurrent(LAYERS[name]())).eval()
    (x,) = nets.inputs_of((2, 1, 4, 6))
    options: dict[str, Any] = {"dynamic_batch": (1, 2)} if dynamic else {}
    exe = convloom.compile(module, (x,), target="interpreter", **options)
    assert exe.summary["torch_fallbacks"] == 0
    for batch in (1, 2) if dynamic else (2,):
        nets.check(exe(x[:batch]), module, (x[:batch],))


class Cell(nn.Module):
    """A cell and a second output of its state."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor) -> Any:
        return self.cell(x, (h, h * 0.5) if isinstance(self.cell, nn.LSTMCell) else h)


@pytest.mark.interpreter
@pytest.mark.parametrize("kind", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_cells(kind: type[nn.Module]) -> None:
    """In any precision, with the state of any batch."""
    module, inputs = nets.randomise(Cell(kind(8, 6))).eval(), nets.inputs_of((2, 8), (2, 6))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        exe = convloom.compile(
            module, inputs, target="interpreter", dtype=dtype, dynamic_batch=(1, 3)
        )
        assert exe.summary["torch_fallbacks"] == 0
        nets.check(exe(*inputs), module, inputs, dtype)


def test_dropout_between_recurrent_layers_that_train_is_refused() -> None:
    module = Recurrent(nn.GRU(8, 6, num_layers=2, dropout=0.5)).train()
    with pytest.raises(convloom.CaptureError, match="would still train"):
        convloom.compile(module, nets.inputs_of((2, 1, 4, 6)), target="reference")


def stepwise(m: Any, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """A convolutional LSTM's step."""
    i, f, o, g = m.conv(torch.cat([x, h], 1)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def batch_first(m: Any, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    y, h = m.layer(x, h.transpose(0, 1).contiguous())
    return y, h.transpose(0, 1)


def shifted(m: Any, x: Tensor) -> Tensor:
    """A temporal shift in place, of frames that are merged with the batch."""
    frames = x.view(-1, 4, *x.shape[1:])
    y = torch.zeros_like(frames)
    y[:, :-1, :2], y[:, 1:, 2:4] = frames[:, 1:, :2], frames[:, :-1, 2:4]
    y[:, :, 4:] = frames[:, :, 4:]
    return y.view(x.shape)


STATES: dict[str, Any] = {
    "cell": (lambda m, x, h: m.cell(x, h), (2, 8), (2, 5)),
    "named": (lambda m, x, h: {"y": m.cell(x, h).relu(), "h": m.cell(x, h)}, (2, 8), (2, 5)),
    "images": (stepwise, (2, 3, 4, 4), (2, 4, 4, 4), (2, 4, 4, 4)),
    "layer": (batch_first, (2, 3, 8), (2, 1, 5)),
    "frames": (lambda m, x: shifted(m, x.flatten(0, 1)).view(x.shape), (2, 4, 6, 3, 3)),
}


def with_state(function: Any, *shapes: tuple[int, ...]) -> Any:
    conv, layer = nn.Conv2d(7, 16, 3, padding=1), nn.GRU(8, 5, batch_first=True)
    return nets.make(function, *shapes, conv=conv, cell=nn.GRUCell(8, 5), layer=layer)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_states_go_in_and_out(name: str, dynamic: bool) -> None:
    """What the user hands from one call to the next."""
    module, inputs = with_state(*STATES[name])
    options: dict[str, Any] = {"dynamic_batch": (1, 2)} if dynamic else {}
    exe = convloom.compile(module, inputs, target="interpreter", **options)
    assert exe.summary["torch_fallbacks"] == 0
    for batch in (1, 2) if dynamic else (2,):
        given = tuple(x[:batch] for x in inputs)
        for result, exact in zip(*map(tree_leaves, (exe(*given), module(*given))), strict=True):
            torch.testing.assert_close(result, exact)


REFUSED: dict[str, Any] = {
    "states": (lambda m, x, h: m.layer(x, h), (2, 3, 8), (1, 2, 5)),
    "frames": (shifted, (8, 6, 3, 3)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_batches_elsewhere_are_refused(name: str) -> None:
    """They are taken for one batch."""
    module, inputs = with_state(*REFUSED[name])
    convloom.compile(module, inputs, target="reference")
    message = r"Net cannot be compiled with a dynamic batch: .*, at .*Dimension 0 of every input is"
    with pytest.raises(convloom.CaptureError, match=message):
        convloom.compile(module, inputs, target="reference", dynamic_batch=(1, 8))


def test_a_layer_alone_has_no_line_of_its_users() -> None:
    """Nor one of the standard library between torch and us."""
    x, state = torch.zeros(5, 2, 8), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    message = r"Expected hidden\[0\] size .* at an unknown line\. Dimension 0"
    with pytest.raises(convloom.CaptureError, match=message):
        convloom.compile(
            nn.LSTM(8, 4).eval(), (x, state), target="reference", dynamic_batch=(1, 4)
        )
