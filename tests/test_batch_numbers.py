"""A dynamic batch that the module computes with: computed for the batch of the call, or refused."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import CaptureError, ConvloomError, InvalidInputError, UnsupportedOpError
from torch import Tensor, nn

from . import nets
from .nets import make

RANGE = (1, 5)
SHAPE = (2, 6)
Function = Callable[[Any, Tensor], Any]


class Weights(nn.Module):
    """Constants of all shapes that meet a batch."""

    def __init__(self) -> None:
        super().__init__()
        shapes = {"token": (1, 3, 6), "square": (6, 6), "heads": (2, 6, 4), "table": (9, 6)}
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def compiled(function: Function, bounds: tuple[int, int] = RANGE, **options: Any) -> Any:
    module, inputs = make(function, SHAPE, of=Weights())
    options = {"target": "reference", "tuning": "heuristic", **options}
    return module, convloom.compile(module, inputs, dynamic_batch=bounds, **options)


def hold(function: Function, batches: Sequence[int] = (5, 1, 3), **options: Any) -> Any:
    """Asserts that an executable computes what the module does at every batch."""
    module, exe = compiled(function, **options)
    for batch in batches:
        (x,) = nets.inputs_of((batch, *SHAPE[1:]), seed=batch)
        nets.check(exe(x), module, (x,))
    return exe


# Constants that become samples.

PREFIXES: dict[str, Function] = {
    "expand": lambda m, x: m.of.token[0, :1].expand(x.shape[0], -1) + x,
    "class token": lambda m, x: torch.cat([m.of.token.expand(len_of(x), -1, -1), x[:, None]], 1),
    "repeat": lambda m, x: m.of.token.repeat(len_of(x), 1, 1).softmax(-1) * x[:, None],
    "repeat rows": lambda m, x: m.of.square.repeat(len_of(x), 1).view(-1, 6, 6) @ x[:, :, None],
    "returned": lambda m, x: (x, m.of.token.expand(len_of(x), -1, -1).transpose(1, 2)),
    "first rows": lambda m, x: x + m.of.table[: len_of(x)],
    "all rows": lambda m, x: x[: len_of(x)] * 2.0,
    "new zeros": lambda m, x: torch.cat([x.new_zeros(len_of(x), 2), x], 1),
    "new full": lambda m, x: x.new_full((len_of(x), 1), 2.5) * x,
    "ones like": lambda m, x: torch.ones_like(x) - x,
    "zeros": lambda m, x: torch.cat([torch.zeros(len_of(x), 2), x], 1),
    "arange": lambda m, x: x + torch.arange(len_of(x), dtype=torch.float32)[:, None],
}


def len_of(x: Tensor) -> int:
    return x.shape[0]


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
@pytest.mark.parametrize("name", PREFIXES)
def test_constants_that_become_samples(name: str, target: str) -> None:
    exe = hold(PREFIXES[name], target=target)
    assert exe.summary["torch_fallbacks"] == 0


PRODUCTS: dict[str, Function] = {
    "left": lambda m, x: m.of.square @ (x[:, :, None] * m.of.square),
    "right, per head": lambda m, x: (x[:, None, :, None] * m.of.square) @ m.of.heads,
    "left, per head": lambda m, x: m.of.heads.transpose(1, 2) @ (x[:, None, :, None] * m.of.square),
    "bmm": lambda m, x: torch.bmm(
        m.of.token.expand(len_of(x), -1, -1), x[:, :, None] * m.of.square
    ),
    "baddbmm": lambda m, x: torch.baddbmm(
        m.of.token, m.of.token.expand(len_of(x), -1, -1), x[:, :, None] * m.of.square
    ),
    "queries": lambda m, x: F.scaled_dot_product_attention(
        m.of.token.expand(len_of(x), -1, -1), x[:, :, None] * m.of.square,
        x[:, :, None].expand(-1, -1, 2),
    ),
    "keys and values": lambda m, x: F.scaled_dot_product_attention(
        x[:, None], m.of.token, m.of.token
    ),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_with_what_all_samples_share(name: str, target: str) -> None:
    assert hold(PRODUCTS[name], target=target).summary["torch_fallbacks"] == 0


# Numbers.

NUMBERS: dict[str, Callable[[Tensor], Any]] = {
    "N": lambda x: x.shape[0], "numel": lambda x: x.numel(), "N - 1": lambda x: x.shape[0] - 1,
    "root": lambda x: x.shape[0] ** 0.5, "half": lambda x: x.shape[0] / 2,
    "max": lambda x: max(x.shape[0], 3), "min": lambda x: min(x.shape[0], 3),
    "floor": lambda x: x.shape[0] // 2, "rest": lambda x: x.shape[0] % 3,
    "whole": lambda x: int(x.shape[0] / 2), "condition": lambda x: x.shape[0] > 3,
    "minus": lambda x: -x.shape[0],
}  # fmt: skip
PLACES: dict[str, Callable[[Any, Tensor, Any], Any]] = {
    "div": lambda m, x, n: x / n, "rdiv": lambda m, x, n: n / x, "mul": lambda m, x, n: x * n,
    "add": lambda m, x, n: x + n, "sub": lambda m, x, n: n - x, "pow": lambda m, x, n: x.abs() ** n,
    "alpha": lambda m, x, n: torch.add(x, x, alpha=n), "clamp": lambda m, x, n: x.clamp(max=n),
    "slope": lambda m, x, n: F.leaky_relu(x, n), "roll": lambda m, x, n: torch.roll(x, n, 1),
    "select": lambda m, x, n: x[:, n], "slice": lambda m, x, n: x[:, :n],
    "start": lambda m, x, n: x[:, n:], "narrow": lambda m, x, n: x.narrow(1, n, 1),
    "rows": lambda m, x, n: x[:n], "row": lambda m, x, n: x[n], "step": lambda m, x, n: x[:, ::n],
    "repeat": lambda m, x, n: x[:, :1].repeat(1, n),
    "expand": lambda m, x, n: x[..., None].expand(-1, -1, n),
    "token": lambda m, x, n: m.of.token.expand(n, -1, -1),
    "tile": lambda m, x, n: torch.tile(x, (n, 1)),
    "interleave": lambda m, x, n: x.repeat_interleave(n, 1), "view": lambda m, x, n: x.view(n, -1),
    "split": lambda m, x, n: x.split(n, 1)[0], "pad": lambda m, x, n: F.pad(x, (n, 0)),
    "arange": lambda m, x, n: x[:, :1] + torch.arange(n),
    "zeros": lambda m, x, n: torch.zeros(n, 6) + x,
    "full": lambda m, x, n: x.new_full((1, 6), n) + x,
    "linspace": lambda m, x, n: torch.linspace(0, 1, n),
    "tensor": lambda m, x, n: x * torch.tensor(n), "returned": lambda m, x, n: (x, n),
    "norm": lambda m, x, n: F.layer_norm(x, (6,), eps=n),
    "softmax": lambda m, x, n: (x * n).softmax(1),
    "pool": lambda m, x, n: F.adaptive_avg_pool1d(x[:, None], n),
    "interpolate": lambda m, x, n: F.interpolate(x[:, None], size=n),
    "where": lambda m, x, n: torch.where(x > n, x, -x),
    "constant": lambda m, x, n: m.of.square[:1] * n + x,
}  # fmt: skip


def held_or_refused(place: str, number: str, options: dict[str, Any]) -> bool:
    """Whether a number at a place is computed, for every batch; otherwise it was refused."""

    def function(m: Any, x: Tensor) -> Any:
        return PLACES[place](m, x, NUMBERS[number](x))

    try:
        module, exe = compiled(function, **options)
    except (CaptureError, UnsupportedOpError):
        return False
    low, high = options.get("bounds", RANGE)
    for batch in range(high, low - 1, -1):
        (x,) = nets.inputs_of((batch, *SHAPE[1:]), seed=batch)
        try:
            want = module(x)
        except (RuntimeError, IndexError):
            continue  # What torch refuses has no right answer.
        got = exe(x)
        ours, theirs = nets.tensors_of(got), nets.tensors_of(want)
        assert [t.shape for t in ours] == [t.shape for t in theirs], f"{place} {number} at {batch}"
        nets.check(got, module, (x,))
        if isinstance(want, tuple):
            assert got[1] == want[1], f"{place} {number} at {batch}"
    return True


DRAWN = random.Random(0).sample([(p, n) for p in PLACES for n in NUMBERS], 24)


@pytest.mark.parametrize(("place", "number"), DRAWN)
def test_numbers_are_computed_or_refused(place: str, number: str) -> None:
    assert held_or_refused(place, number, {}) in (True, False)
    held_or_refused(place, number, {"fallback": "torch"})


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_every_number_at_every_place(place: str) -> None:
    ways: list[dict[str, Any]] = [
        {}, {"fallback": "torch"}, {"bounds": (2, 4)}, {"bounds": (3, 3)},
        {"target": "interpreter", "passes": "none"},
    ]  # fmt: skip
    for number in NUMBERS:
        for options in ways:
            held_or_refused(place, number, options)


@pytest.mark.parametrize("place", ["div", "alpha", "clamp", "roll", "select", "pow"])
@pytest.mark.parametrize("target", ["reference", "interpreter"])
@pytest.mark.interpreter
def test_numbers_are_refused_by_name_and_run_by_torch(place: str, target: str) -> None:
    def function(m: Any, x: Tensor) -> Any:
        return PLACES[place](m, x, x.shape[0] - 1 if place == "select" else x.shape[0])

    with pytest.raises(UnsupportedOpError) as caught:
        compiled(function)
    parts = ("the top module: aten.", "nets.py:", "its argument '", "is N", "torch")
    assert [part for part in parts if part not in str(caught.value)] == []
    exe = hold(function, target=target, fallback="torch")
    assert exe.summary["torch_fallbacks"] == 1


def test_a_range_of_one_batch_knows_its_numbers() -> None:
    exe = hold(lambda m, x: (x / x.shape[0], x.shape[0]), (4,), bounds=(4, 4))
    assert exe(torch.zeros(4, 6))[1] == 4


@pytest.mark.parametrize("bounds", [(1, 1), (1, 2), (2, 2)])
def test_two_inputs_share_a_batch_of_few(bounds: tuple[int, int]) -> None:
    """Of a range that leaves torch.export one size, each input would have had its own."""
    module, inputs = nets.make(lambda m, x, y: (x - y, (x * y).sum(1)), (2, 3), (2, 3))
    exe = convloom.compile(module, inputs, target="reference", dynamic_batch=bounds)
    for batch in set(bounds):
        given = nets.inputs_of((batch, 3), (batch, 3), seed=batch)
        nets.check(exe(*given), module, given)


def test_a_returned_batch_size_is_refused() -> None:
    with pytest.raises(UnsupportedOpError, match=r"output 1 is the number 6\*N \(N is the batch\)"):
        compiled(lambda m, x: (x, x.numel()))


# Decisions.

DECISIONS: dict[str, Function] = {
    "equal": lambda m, x: x * 2.0 if x.shape[0] == 1 else x,
    "more": lambda m, x: x * 2.0 if x.size(0) > 1 else x,
    "truth": lambda m, x: x * 2.0 if x.shape[0] - 1 else x,
    "elements": lambda m, x: x * 2.0 if x.numel() == 6 else x,
    "shape": lambda m, x: x * 2.0 if x.shape == (1, 6) else x,
}


@pytest.mark.parametrize("name", DECISIONS)
def test_code_that_treats_one_sample_otherwise_is_refused(name: str) -> None:
    function = DECISIONS[name]
    with pytest.raises(CaptureError, match=r"Net decides by the batch: .*N.* at test_batch_numb"):
        compiled(function)
    with pytest.raises(CaptureError, match="not the same for a batch of 1"):
        compiled(function, bounds=(0, 4))
    hold(function, (2, 4), bounds=(2, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * 2.0 if x.shape[0] > 0 else x,
        lambda m, x: x * 2.0 if x.numel() else x,
        lambda m, x: x * 2.0 if x.shape[1] == 6 and x.dim() == 2 else x,
    ],
)
def test_decisions_that_no_batch_changes_are_taken(function: Function) -> None:
    hold(function)


def test_other_decisions_name_the_line() -> None:
    with pytest.raises(CaptureError) as caught:
        compiled(lambda m, x: x * 2.0 if x.shape[0] < 4 else x)
    parts = ("depends on the value of the batch: N < 4 at test_batch_numbers.py:", "without")
    assert [part for part in parts if part not in str(caught.value)] == []


@pytest.mark.parametrize("fallback", ["error", "torch"])
@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (x[:, :1] * 2.0).squeeze(),
        lambda m, x: (x * 2.0).squeeze(0),
        lambda m, x: (x[:, None] * 2.0).squeeze((0, 1)),
    ],
)
def test_ranks_that_differ_at_a_batch_of_one_are_refused(function: Function, fallback: str) -> None:
    with pytest.raises(UnsupportedOpError, match="drops dimension 0 where the batch is 1"):
        compiled(function, fallback=fallback)
    hold(function, (2, 5), bounds=(2, 5))


def test_examples_without_samples() -> None:
    module, _ = make(lambda m, x: m.layer(x), SHAPE, layer=nn.Linear(6, 3))
    for dtype in (torch.float32, torch.bfloat16):
        example = torch.empty(0, 6, dtype=dtype)
        exe = convloom.compile(module.to(dtype), (example,), target="reference",
                               dynamic_batch=(0, 4))  # fmt: skip
        assert exe(example).shape == (0, 3)
        x = torch.ones(3, 6, dtype=dtype)
        torch.testing.assert_close(exe(x), module(x), rtol=0.02, atol=0.02)


def test_an_example_that_is_an_empty_batch() -> None:
    """It is enough to compile for it, and for one sample."""
    module, _ = make(lambda m, x: torch.relu(m.layer(x)), SHAPE, layer=nn.Conv2d(3, 4, 3))
    empty = torch.empty(0, 3, 6, 5)
    exe = convloom.compile(module, (empty,), target="interpreter")
    for x in (empty, torch.ones(1, 3, 6, 5)):
        torch.testing.assert_close(exe(x), module(x))
    with pytest.raises(InvalidInputError, match="expected at least one element"):
        convloom.compile(nn.ReLU(), (torch.empty(2, 0, 4),), target="interpreter")


def test_refusals_are_of_one_family() -> None:
    assert issubclass(CaptureError, ConvloomError) and issubclass(UnsupportedOpError, ConvloomError)
