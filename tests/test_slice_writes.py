"""Writes into slices: what is captured of them, and what is left of their concatenations."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.capture.decompositions import _slice_scatter
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.passes import run_passes
from convloom.compiler.passes.slice_writes import simplify_slice_writes
from convloom.errors import InvalidInputError, UnsupportedOpError
from convloom.kernels import registry
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.movement.unfold import Fold, Unfold
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from . import nets

IMAGE = (2, 6, 8, 8)


def filled(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, 2] = 0.5
    y[..., -1] = x[..., 0]
    return y


def shifted(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros_like(x)
    y[:, :2, 1:] = x[:, :2, :-1]
    y[:, 2:4] = x[:, 1:3] * 2
    y[:, 4:] = x[:, 4:]
    return y


def pasted(x: torch.Tensor) -> torch.Tensor:
    y = x.new_zeros(x.shape[0], 6, 11, 12)
    y[:, :, 2:-1, 1:-3] = x
    return y


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 1.0
    y[:, 1:3] += 1
    y[:, :, 2:5] *= x[:, :, 1:4]
    y[:, 5] = x[:, 0]
    return y


def everything(x: torch.Tensor) -> torch.Tensor:
    y = torch.ones_like(x)
    y[:] = x * 2
    y[:, :, 3].fill_(-1.0)
    return y


def every_other(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[:, ::2] = x[:, 1::2]
    return y


def spread(x: torch.Tensor) -> torch.Tensor:
    """Sub-pixels, and one element of two."""
    y = x.new_zeros(x.shape[0], 6, 16, 8)
    y[:, :, ::2] = x
    y[:, :, 1::2] = x * 2
    y[:, 1::3, 5:-1:4, 7::2] = 1.5
    return y


WRITES = (filled, shifted, pasted, in_place, everything, every_other, spread)


def written(write: Callable[..., Any]) -> nets.Made:
    return nets.make(
        lambda m, x: torch.relu(m.last(write(m.first(x)))),
        IMAGE,
        first=nn.Conv2d(6, 6, 3, padding=1),
        last=nn.Conv2d(6, 4, 3),
    )


@pytest.mark.parametrize("dynamic", [None, (1, 4)])
@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_writes_agree_with_torch(write: Callable[..., Any], dynamic: Any) -> None:
    module, inputs = written(write)
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=dynamic)
    for batch in (2,) if dynamic is None else (1, 3, 4):
        x = nets.inputs_of((batch, *IMAGE[1:]), seed=batch)
        nets.check(exe(*x), module, x)


def test_writes_of_whole_numbers() -> None:
    module, inputs = nets.make(lambda m, x: every_other((x * 1000).long()), (2, 4, 6, 8))
    exe = convloom.compile(module, inputs, target="interpreter", dtype=torch.bfloat16)
    assert torch.equal(exe(*inputs), module(inputs[0].bfloat16().float()))


def test_sub_pixels_take_few_kernels() -> None:
    """Each write chooses between what it reads, repeated, and what was there, in both directions;
    what is in other places is not seen, NaN neither."""

    def fourth(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x / 0
        y[:, :, 1::2, ::2] = x[:, :, :3, :4]
        return y

    module, inputs = nets.make(fourth, (2, 4, 6, 8))
    exe = convloom.compile(module, inputs, target="interpreter")
    torch.testing.assert_close(exe(*inputs), module(*inputs), equal_nan=True)
    assert exe.summary["kernels"] <= 14


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_writes_in_half_precision(dtype: torch.dtype) -> None:
    module, inputs = written(shifted)
    exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
    nets.check(exe(*inputs), module, inputs, dtype)


def test_an_image_pasted_into_zeros_is_the_padding_of_its_convolution() -> None:
    module, inputs = nets.make(lambda m, x: m.conv(pasted(x)), IMAGE, conv=nn.Conv2d(6, 4, 3))
    graph = run_passes(nets.captured(module, inputs), Ledger())
    ops = [node.op for node in graph.compute_nodes()]
    assert "concat" not in ops and "pad" not in ops
    (conv,) = (node for node in graph.compute_nodes() if node.op in ("conv2d", "stem"))
    assert conv.attributes.padding == (2, 1, 1, 3)


def test_a_border_of_another_number_is_a_pad() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = torch.full((2, 6, 10, 10), -1.5)
        y[:, :, 1:9, 1:9] = x
        return y

    module, inputs = nets.make(function, IMAGE)
    graph = simplify_slice_writes(nets.captured(module, inputs).copy(), Ledger())
    graph = run_passes(graph, Ledger())
    (pad,) = (node for node in graph.compute_nodes() if node.op == "pad")
    assert pad.attributes.value == -1.5 and pad.attributes.before == (0, 0, 1, 1)


def test_constants_of_several_numbers_stay_joined() -> None:
    module, inputs = nets.make(lambda m, x: torch.cat((m.table, x, m.table), 2), IMAGE)
    module.register_buffer("table", torch.arange(96.0).reshape(2, 6, 1, 8))
    graph = run_passes(nets.captured(module, inputs), Ledger())
    assert "pad" not in {node.op for node in graph.compute_nodes()}


@given(seed=st.integers(0, 10**6))
def test_any_slices_of_any_concatenations(seed: int) -> None:
    """Nested, along either dimension, with steps, constants and epilogues in between."""
    draw = random.Random(seed)
    plan = []
    for _ in range(draw.randint(2, 6)):
        plan.append((draw.choice("csssz"), draw.random(), draw.random(), draw.choice((1, 1, 2))))

    def function(m: Any, x: torch.Tensor) -> Any:
        values = [x]
        for kind, first, second, step in plan:
            y, other = values[-1], values[int(first * len(values))]
            dim = 1 + int(second * 2)
            size = y.shape[dim]
            if kind == "s" and size > 1:
                start = int(first * (size - 1))
                stop = start + 1 + int(second * (size - start))
                y = y[:, start:stop:step] if dim == 1 else y[:, :, start:stop:step]
            elif kind == "c" and other.shape[3 - dim] == y.shape[3 - dim]:
                y = torch.cat((y, other, y), dim)
            else:
                y = torch.cat((torch.full_like(y, 0.5), y), dim)
            values.append(torch.relu(y) if first < 0.2 else y)
        return values[-1], values[len(values) // 2] * 2

    module, inputs = nets.make(function, (2, 4, 5, 3))
    before = nets.captured(module, inputs)
    after = simplify_slice_writes(before.copy(), Ledger())
    nets.assert_same_meaning(before, after, inputs)
    again = simplify_slice_writes(after.copy(), Ledger())
    assert [node.op for node in again.nodes()] == [node.op for node in after.nodes()]
    nets.forget(module)


def first_sample(x: torch.Tensor) -> torch.Tensor:
    y = x.clone()
    y[0] = 0.0
    return y


def test_writes_into_some_samples_are_refused() -> None:
    module, inputs = written(first_sample)
    message = "aten.select_scatter.default.*a write into some samples of a batch that varies; join"
    with pytest.raises(UnsupportedOpError, match=message):
        convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 4))


@given(
    size=st.integers(1, 9), start=st.integers(-10, 10), end=st.integers(-10, 10),
    step=st.integers(1, 4), dim=st.integers(-2, 1),
)  # fmt: skip
def test_every_slice_is_written(size: int, start: int, end: int, step: int, dim: int) -> None:
    x = torch.arange(1.0, size * size + 1).view(size, size)
    source = -torch.ones_like(torch.ops.aten.slice.Tensor(x, dim, start, end, step))
    wanted = torch.slice_scatter(x, source, dim, start, end, step)
    assert torch.equal(_slice_scatter(x, source, dim, start, end, step), wanted)


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_windows_as_columns_and_back(padding: int, stride: int) -> None:
    """unfold of halo attention and involution, and fold, which adds what overlaps."""

    def function(m: Any, x: torch.Tensor) -> Any:
        columns = F.unfold(m.conv(x), 3, padding=padding, stride=stride)
        weighted = columns * 0.5 + 0.25
        return weighted, F.fold(weighted, (8, 8), 3, padding=padding, stride=stride)

    module, _ = nets.make(function, IMAGE, conv=nn.Conv2d(6, 6, 3, padding=1))
    exe = convloom.compile(
        module, nets.inputs_of(IMAGE), target="interpreter", dynamic_batch=(1, 3)
    )
    for batch in (1, 3):
        x = nets.inputs_of((batch, *IMAGE[1:]), seed=batch)
        nets.check(exe(*x), module, x)


def test_an_infinite_pixel_is_in_its_windows_only() -> None:
    module, (x,) = nets.make(
        lambda m, x: F.fold(F.unfold(x, 3, padding=1), (8, 8), 3, padding=1), IMAGE
    )
    x[0, 1, 3, 4] = float("inf")
    exe = convloom.compile(module, (x,), target="interpreter")
    assert torch.equal(exe(x).isinf(), module(x).isinf())


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: F.unfold(x[0], 3), "unfold of an unbatched image; pass a batch dimension"),
        (
            lambda m, x: F.fold(x.flatten(2)[0, :4], (8, 8), 2, stride=4),
            "fold of unbatched columns; pass a batch dimension",
        ),
    ],
)
def test_columns_without_a_batch_are_refused(
    function: Callable[..., Any], message: str
) -> None:
    module, inputs = nets.make(function, (2, 4, 8, 8) if "unfold" in message else (2, 4, 2, 2))
    with pytest.raises(UnsupportedOpError, match=message):
        convloom.compile(module, inputs, target="interpreter")


@pytest.mark.parametrize(
    ("name", "attributes", "shape", "message"),
    [
        ("unfold", Unfold((3, 3)), (2, 3, 2, 5), "a 3x3 window does not fit"),
        ("unfold", Unfold((3, 3)), (2, 3, 9), "expected x (N, C, H, W)"),
        ("fold", Fold((2, 2), (2, 2), image=(4, 6)), (2, 8, 7), "expected x (N, C*2*2, 2*3)"),
        ("fold", Fold((2, 2), image=(4, 6)), (2, 7, 15), "expected x (N, C*2*2, 3*5)"),
    ],
)
def test_windows_that_do_not_fit_are_named(
    name: str, attributes: Unfold, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        registry.get(name).infer(attributes, (TensorSpec(shape, torch.float32),))
    assert message in str(caught.value)
