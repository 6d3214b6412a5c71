"""The output-size rule of every layer with a geometry, against torch's own, and what is said where
a filter, a window or a border does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import CaptureError, InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.op import Attributes
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.convolution.conv_nd import BorderConv2d, Conv3d
from convloom.kernels.convolution.conv_phases import ConvTranspose2d, ConvTranspose3d
from convloom.kernels.movement.pad import Pad
from convloom.kernels.pooling.max_unpool import MaxUnpool2d
from convloom.kernels.pooling.median_pool import MedianPool2d
from convloom.kernels.pooling.pool_window import (
    AdaptivePool2d,
    AdaptivePool3d,
    AvgPool2d,
    AvgPool3d,
    LpPool2d,
    MaxPool2d,
    MaxPool3d,
)
from convloom.kernels.tile.conv_geometry import Conv2d
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from . import nets

Drawn = tuple[str, Attributes, tuple[Tensor, ...], Callable[[], Any]]
"""An op, its attributes and inputs, and the same by torch."""


class Draw:
    """Geometry for `dims` dimensions, each number from a small range that holds impossible ones."""

    def __init__(self, data: st.DataObject, dims: int) -> None:
        self.data, self.dims = data, dims
        self.sizes, self.kernel = self.numbers(1, 9), self.numbers(1, 6)
        self.stride, self.padding = self.numbers(1, 4), self.numbers(0, 3)
        self.dilation, self.ceil_mode = self.numbers(1, 3), self.flag()

    def number(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def numbers(self, low: int, high: int, count: int | None = None) -> tuple[int, ...]:
        return tuple(self.number(low, high) for _ in range(self.dims if count is None else count))

    def flag(self) -> bool:
        return self.data.draw(st.booleans())

    def image(self, channels: int = 2) -> Tensor:
        return torch.zeros(1, channels, *self.sizes)


def conv(d: Draw) -> Drawn:
    groups = d.number(1, 3)
    x, w = d.image(d.number(1, 6)), torch.zeros(d.number(1, 6), d.number(1, 3), *d.kernel)
    both = tuple(side for side in d.padding for _ in (0, 1))
    make, run = (Conv2d, F.conv2d) if d.dims == 2 else (Conv3d, F.conv3d)
    attributes = make(d.stride, both, d.dilation, groups)  # type: ignore[operator]
    return f"conv{d.dims}d", attributes, (x, w), lambda: run(
        x, w, None, d.stride, d.padding, d.dilation, groups  # type: ignore[arg-type]
    )


def same_conv(d: Draw) -> Drawn:
    """"same" pads one more at the end where a filter reaches over an odd number of pixels."""
    x, w = d.image(), torch.zeros(2, 2, *d.kernel)
    reach = [dilation * (size - 1) for dilation, size in zip(d.dilation, d.kernel, strict=True)]
    both = tuple(side for total in reach for side in (total // 2, total - total // 2))
    ones = (1,) * d.dims
    make, run = (Conv2d, F.conv2d) if d.dims == 2 else (Conv3d, F.conv3d)
    attributes = make(ones, both, d.dilation)  # type: ignore[operator]
    return f"conv{d.dims}d", attributes, (x, w), lambda: run(
        x, w, padding="same", dilation=d.dilation  # type: ignore[arg-type]
    )


def border_conv(d: Draw) -> Drawn:
    """A border of another mode than zeros, asymmetric, then the convolution."""
    x, w, sides = d.image(), torch.zeros(2, 2, *d.kernel), d.numbers(0, 9, 4)
    mode = d.data.draw(st.sampled_from(("reflect", "replicate", "circular")))
    attributes = BorderConv2d(d.stride, sides, d.dilation, 1, mode)
    around = (*sides[2:], *sides[:2])
    return "border_conv2d", attributes, (x, w), lambda: F.conv2d(
        F.pad(x, around, mode), w, None, d.stride, 0, d.dilation  # type: ignore[arg-type]
    )


def transposed(d: Draw) -> Drawn:
    groups, more = d.number(1, 3), d.numbers(0, 4)
    x, w = d.image(d.number(1, 6)), torch.zeros(d.number(1, 6), d.number(1, 3), *d.kernel)
    two = d.dims == 2
    make, run = (ConvTranspose2d, F.conv_transpose2d) if two else (
        ConvTranspose3d, F.conv_transpose3d
    )  # fmt: skip
    attributes = make(d.stride, d.padding, more, d.dilation, groups)  # type: ignore[operator]
    return f"conv_transpose{d.dims}d", attributes, (x, w), lambda: run(
        x, w, None, d.stride, d.padding, more, groups, d.dilation  # type: ignore[arg-type]
    )


def max_pool(d: Draw) -> Drawn:
    x, indices = d.image(), d.dims == 2 and d.flag()
    make, run = (MaxPool2d, F.max_pool2d) if d.dims == 2 else (MaxPool3d, F.max_pool3d)
    window = (d.kernel, d.stride, d.padding, d.dilation, d.ceil_mode)
    name = "max_pool2d_with_indices" if indices else f"max_pool{d.dims}d"
    return name, make(*window), (x,), lambda: run(x, *window, indices)  # type: ignore[operator]


def avg_pool(d: Draw) -> Drawn:
    x = d.image()
    make, run = (AvgPool2d, F.avg_pool2d) if d.dims == 2 else (AvgPool3d, F.avg_pool3d)
    window = (d.kernel, d.stride, d.padding, d.ceil_mode)
    return f"avg_pool{d.dims}d", make(*window), (x,), lambda: run(x, *window)  # type: ignore


def lp_pool(d: Draw) -> Drawn:
    x = d.image()
    attributes = LpPool2d(2.0, d.kernel, d.stride, d.ceil_mode)  # type: ignore[arg-type]
    return "lp_pool2d", attributes, (x,), lambda: F.lp_pool2d(
        x, 2.0, d.kernel, d.stride, d.ceil_mode  # type: ignore[arg-type]
    )


def median_pool(d: Draw) -> Drawn:
    x = d.image()
    attributes = MedianPool2d(d.kernel, d.stride)  # type: ignore[arg-type]
    (r, s), (sh, sw) = d.kernel, d.stride
    return "median_pool2d", attributes, (x,), lambda: x.unfold(2, r, sh).unfold(3, s, sw)[..., 0, 0]


def unpool(d: Draw) -> Drawn:
    pool = MaxPool2d(d.kernel, d.stride, tuple(k // 2 for k in d.kernel))  # type: ignore[arg-type]
    x, where = F.max_pool2d(d.image(), pool.kernel, pool.stride, pool.padding, return_indices=True)
    size = tuple(extent + d.number(0, 2) for extent in d.sizes)
    attributes = MaxUnpool2d(size, d.sizes, pool)  # type: ignore[arg-type]
    # The op itself: torch.nn.functional allows only sizes that the pooling could have come from.
    run = torch.ops.aten.max_unpool2d.default
    return "max_unpool2d", attributes, (x, where), lambda: run(x, where, size)


def adaptive(d: Draw) -> Drawn:
    x, kind = d.image(), d.data.draw(st.sampled_from(("avg", "max")))
    name = f"adaptive_{kind}_pool{d.dims}d"
    attributes = (AdaptivePool2d if d.dims == 2 else AdaptivePool3d)(d.kernel)  # type: ignore
    return name, attributes, (x,), lambda: getattr(F, name)(x, d.kernel)


def pad(d: Draw) -> Drawn:
    x, mode = d.image(), d.data.draw(st.sampled_from(("constant", "reflect", "replicate")))
    before, after = (0, 0, *d.numbers(-3, 8)), (0, 0, *d.numbers(-3, 8))
    sides = [side for at in reversed(range(d.dims)) for side in (before[2 + at], after[2 + at])]
    return "pad", Pad(before, after, 0.0, mode), (x,), lambda: F.pad(x, sides, mode)


LAYERS: dict[str, tuple[Callable[[Draw], Drawn], tuple[int, ...]]] = {
    "convolution": (conv, (2, 3)), "same": (same_conv, (2, 3)), "border": (border_conv, (2,)),
    "transposed": (transposed, (2, 3)), "maximum": (max_pool, (2, 3)),
    "average": (avg_pool, (2, 3)), "norm": (lp_pool, (2,)), "median": (median_pool, (2,)),
    "unpooling": (unpool, (2,)), "adaptive": (adaptive, (2, 3)), "pad": (pad, (2, 3)),
}  # fmt: skip


def spec_of(tensor: Tensor, weight: bool) -> TensorSpec:
    image = tensor.dim() in MEMORY_FORMATS and not weight
    return TensorSpec(tuple(tensor.shape), tensor.dtype, Layout.NHWC if image else Layout.DENSE)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("layer", LAYERS)
@given(data=st.data())
@settings(max_examples=80)
def test_output_sizes_are_those_of_torch(layer: str, data: st.DataObject) -> None:
    """Where torch computes, the rule gives its sizes; where torch refuses, or would return nothing,
    the rule refuses and says which op does not fit what."""
    make, dims = LAYERS[layer]
    draw = Draw(data, data.draw(st.sampled_from(dims)))
    try:
        name, attributes, tensors, run = make(draw)
    except RuntimeError:
        return  # The pooling in front of an unpooling did not fit.
    packed = registry.get(name).packs(attributes)
    specs = tuple(spec_of(tensor, at in packed) for at, tensor in enumerate(tensors))
    try:
        wanted = run()
    except (RuntimeError, ValueError, NotImplementedError):
        wanted = None
    truths = list(wanted if isinstance(wanted, tuple) else [wanted])
    if wanted is None or any(math.prod(truth.shape) == 0 for truth in truths):
        with pytest.raises(InvalidInputError) as raised:
            registry.get(name).infer(attributes, specs)
        assert str(raised.value).startswith(f"{name}: ")
        assert any(character.isdigit() for character in str(raised.value)), "no numbers to act on"
        return
    outputs = registry.get(name).infer(attributes, specs)
    assert [spec.shape for spec in outputs] == [tuple(truth.shape) for truth in truths]


# Through the whole compiler.


def message(error: type[Exception], layer: nn.Module, *shapes: tuple[int, ...]) -> str:
    """What compile says of a layer that cannot be."""
    with pytest.raises(error) as raised:
        convloom.compile(nn.Sequential(layer).eval(), nets.inputs_of(*shapes), target="reference")
    return str(raised.value)


IMAGE = (1, 6, 5, 5)
IMPOSSIBLE = (
    (nn.Conv2d(6, 8, 7), "Kernel size: (7 x 7)"),
    (nn.Conv2d(6, 8, 3, dilation=3), "5 x 5"),
    (nn.MaxPool2d(6), "Output size is too small"),
    (nn.AvgPool2d(6), "Output size is too small"),
    (nn.ReflectionPad2d(5), "Padding size should be less than"),
    (nn.ConvTranspose2d(6, 8, 1, padding=3), "per channel: [5, 5]"),
)


@pytest.mark.parametrize(("layer", "words"), IMPOSSIBLE, ids=str)
def test_what_cannot_be_is_refused_with_its_sizes(layer: nn.Module, words: str) -> None:
    told = message(CaptureError, layer, IMAGE)
    assert told.startswith("torch.export could not capture Sequential: ") and words in told


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="divisible by groups"):
        nn.Conv2d(6, 8, 3, groups=4)  # Torch's own layers cannot even be made.

    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 2, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight, groups=4)

    assert "groups=4" in message(CaptureError, Grouped(), IMAGE)


# Tensors without elements.


def parts() -> Iterator[Any]:
    yield pytest.param(lambda m, x: torch.cat([x, x[:, :0]], 1) + 1.0, id="joined")
    yield pytest.param(lambda m, x: (x[:, :0], torch.relu(x[:, 4:4])), id="returned")
    yield pytest.param(lambda m, x: m.conv(x)[:, :, :0].sum((2, 3)), id="summed")
    yield pytest.param(lambda m, x: x[:, :, :0].mean((2, 3)), id="averaged: NaN")
    yield pytest.param(lambda m, x: x.split([0, 6], 1)[1] * 2.0, id="split")


@pytest.mark.interpreter
@pytest.mark.parametrize("function", list(parts()))
def test_parts_without_elements_are_as_in_torch(function: Callable[..., Any]) -> None:
    module, inputs = nets.make(function, IMAGE, conv=nn.Conv2d(6, 4, 1))
    exe = convloom.compile(module, inputs, target="interpreter")
    nets.check(exe(*inputs), module, inputs)


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["interpreter", "reference"])
def test_empty_batches(target: str) -> None:
    module, (x,) = nets.make(
        lambda m, x: {"y": m.conv(x).relu(), "at": F.max_pool2d(x, 2, return_indices=True)[1]},
        (2, 6, 5, 5),
        conv=nn.Conv2d(6, 4, 3),
    )
    exe = convloom.compile(module, (x,), target=target, dynamic_batch=(0, 4))
    got, wanted = exe(x[:0]), module(x[:0])
    for name, tensor in wanted.items():
        assert got[name].shape == tensor.shape and got[name].dtype is tensor.dtype
    torch.testing.assert_close(exe(x)["y"], module(x)["y"], rtol=1e-4, atol=1e-5)


def test_an_empty_batch_that_was_not_asked_for_is_refused() -> None:
    module, (x,) = nets.make(lambda m, x: x + 1.0, (2, 6, 5, 5))
    exe = convloom.compile(module, (x,), target="reference", dynamic_batch=(1, 4))
    with pytest.raises(InvalidInputError, match=r"a batch from 1 to 4, got .*\(0, 6, 5, 5\)"):
        exe(x[:0])
    asked = convloom.compile(module, (x[:0],), target="reference")
    assert asked(x[:0]).shape == (0, 6, 5, 5)
    with pytest.raises(InvalidInputError, match=r"a batch from 0 to 1, got .*\(2, 6, 5, 5\)"):
        asked(x)


def test_a_result_without_a_batch_needs_samples() -> None:
    module, (x,) = nets.make(lambda m, x: (x + 1.0, m.scale * 2.0), (2, 6, 5, 5))
    module.scale = nn.Parameter(torch.ones(3))
    exe = convloom.compile(module, (x,), target="reference", dynamic_batch=(0, 4))
    with pytest.raises(InvalidInputError, match=r"output1 float32\[3\] does not depend on the ba"):
        exe(x[:0])
