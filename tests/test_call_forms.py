"""Constants by name and by position, images of bytes, results without elements."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

import convloom
import numpy as np
import pytest
import torch
from convloom.errors import InvalidInputError
from torch import nn

TARGETS = ["reference", pytest.param("interpreter", marks=pytest.mark.interpreter)]
X, Y = torch.randn(2, 3), torch.randn(2, 3)


class Flags(nn.Module):
    def forward(
        self,
        x: torch.Tensor,
        flag: bool = False,
        y: torch.Tensor | None = None,
        *,
        scale: float = 1.0,
    ) -> torch.Tensor:
        x = x * 2 if flag else x
        x = x if y is None else x + y
        return x * scale


GIVEN: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((X, True, Y), {}), ((X, True), {"y": Y}), ((X,), {"flag": True, "y": Y}),
    ((X,), {"y": Y, "flag": True}), ((), {"x": X, "flag": True, "y": Y}),
]  # fmt: skip


@pytest.mark.parametrize("example", GIVEN)
@pytest.mark.parametrize("saved", [False, True])
def test_what_is_given_by_name_is_taken_by_position(
    example: tuple[tuple[Any, ...], dict[str, Any]], saved: bool
) -> None:
    arguments, keywords = example
    exe = convloom.compile(Flags(), arguments, kwargs=keywords, target="reference")
    if saved:
        exe = convloom.load(io.BytesIO(exe.to_bytes()), "reference")
    for positional, named in GIVEN:
        torch.testing.assert_close(exe(*positional, **named), Flags()(X, True, Y))
    with pytest.raises(InvalidInputError, match="expected the constant True of the example"):
        exe(X, False, Y)
    with pytest.raises(InvalidInputError, match="'flag' is given by position and by name"):
        exe(X, True, flag=True, y=Y)
    for wrong in ((X, True), (X, True, Y, 1.0), (X,)):
        with pytest.raises(InvalidInputError, match="structured as the example"):
            exe(*wrong)


def test_what_was_left_out_stays_out() -> None:
    """A position that the example skipped is not taken for the next one."""
    exe = convloom.compile(Flags(), (X,), kwargs={"y": Y, "scale": 3.0}, target="reference")
    torch.testing.assert_close(exe(X, y=Y, scale=3.0), Flags()(X, y=Y, scale=3.0))
    with pytest.raises(InvalidInputError, match="structured as the example"):
        exe(X, Y, scale=3.0)
    with pytest.raises(InvalidInputError, match="structured as the example"):
        exe(X, False, Y, 3.0)


# Images of bytes.


class Images(nn.Module):
    """The first thing that becomes of an image: `prepare`."""

    def __init__(self, prepare: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> None:
        super().__init__()
        self.prepare = prepare
        self.conv = nn.Conv2d(3, 4, 3, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.prepare(x))


MEAN = torch.rand(3, 1, 1)
PREPARED: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cast": lambda x: x.float(),
    "divided": lambda x: x / 255,
    "normalised": lambda x: (x - MEAN) / 0.5,
    "both": lambda x: x.permute(0, 2, 1, 3).float().mul(1 / 255).permute(0, 2, 1, 3) + x / 3,
    "cut and turned": lambda x: x.flip(3)[:, :, 1:].to(torch.float32).sub(127.5),
}
BYTES = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)


@pytest.mark.parametrize("prepare", PREPARED.values(), ids=PREPARED)
@pytest.mark.parametrize("target", TARGETS)
def test_images_of_bytes(prepare: Callable[[torch.Tensor], torch.Tensor], target: str) -> None:
    torch.manual_seed(0)
    model = Images(prepare, torch.float32).eval()
    exe = convloom.compile(model, BYTES, target=target)
    assert exe.inputs[0].spec.dtype is torch.uint8
    torch.testing.assert_close(exe(BYTES), model(BYTES), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(exe(BYTES.numpy()), exe(BYTES), atol=0, rtol=0)
    again = convloom.load(io.BytesIO(exe.to_bytes()), target)
    torch.testing.assert_close(again(BYTES), exe(BYTES), atol=0, rtol=0)
    with pytest.raises(InvalidInputError, match=r"expected dtype torch\.uint8, got torch\.float32"):
        exe(BYTES.float())


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_into_half_and_any_batch(target: str) -> None:
    model = Images(lambda x: x.half() / 255, torch.float16).eval()
    exe = convloom.compile(model, BYTES, target=target, dynamic_batch=(1, 4))
    for batch in (1, 3):
        x = torch.randint(0, 256, (batch, 3, 8, 8), dtype=torch.uint8)
        torch.testing.assert_close(exe(x), model(x), atol=2e-3, rtol=2e-3)
    computed = convloom.compile(
        Images(PREPARED["divided"], torch.float32).eval(), BYTES, target=target, dtype="float16"
    )
    assert computed(BYTES).dtype is torch.float32 and computed(BYTES).isfinite().all()


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda x: (x + 1).float(), "goes into aten.add.Tensor"),
        (lambda x: (x // 2).float(), "goes into aten.floor_divide.default"),
        (lambda x: (x.permute(0, 1, 3, 2) * 2).float(), "goes into aten.mul"),
        (lambda x: (x > 7).float(), "goes into aten.gt"),
        (lambda x: (x - x.flip(3)).float(), "goes into aten.sub"),
        (lambda x: x.int().float(), "goes into aten._to_copy"),
        (lambda x: x.sum((2, 3), keepdim=True).expand(2, 3, 8, 8).float(), "goes into aten.sum"),
    ],
)  # fmt: skip
def test_arithmetic_of_bytes_is_refused(
    prepare: Callable[[torch.Tensor], torch.Tensor], why: str
) -> None:
    with pytest.raises(InvalidInputError, match="expected a uint8 image that is cast") as error:
        convloom.compile(Images(prepare, torch.float32).eval(), BYTES, target="reference")
    assert why in str(error.value) and "test_call_forms.py:" in str(error.value)


def test_bytes_that_are_returned_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"such as x\.float\(\) / 255; it is returned"):
        convloom.compile(nn.Identity(), BYTES, target="reference")


def test_every_byte_is_exact() -> None:
    every = torch.from_numpy(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16).copy())

    class Cast(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x / 255

    exe = convloom.compile(Cast(), every, target="interpreter")
    assert torch.equal(exe(every), every / 255)


# Results without elements.


class Applied(nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor], layer: nn.Module) -> None:
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer, x)


EMPTY: Mapping[str, tuple[Callable[..., torch.Tensor], nn.Module, tuple[int, ...]]] = {
    "no rows": (lambda f, x: f(x[:0]), nn.Linear(4, 5), (2, 4)),
    "no columns": (lambda f, x: f(x[:, :0]), nn.Identity(), (2, 4)),
    "no features": (lambda f, x: torch.cat([f(x[:0]), x @ f.weight.T]), nn.Linear(4, 5), (2, 4)),
    "no images": (lambda f, x: f(x[:0]), nn.Conv2d(3, 4, 3), (2, 3, 6, 6)),
    "a sum of nothing": (lambda f, x: f(x[:, :0].sum(1)), nn.ReLU(), (2, 4)),
    "a product of nothing": (lambda f, x: f(x[:, :0] @ x[:0]), nn.ReLU(), (2, 4)),
}


@pytest.mark.parametrize("name", EMPTY)
@pytest.mark.parametrize("target", TARGETS)
def test_results_without_elements(name: str, target: str) -> None:
    function, layer, shape = EMPTY[name]
    model, x = Applied(function, layer).eval(), torch.randn(shape)
    exe = convloom.compile(model, x, target=target)
    torch.testing.assert_close(exe(x), model(x).detach())
    convloom.compile(model, x, target="cuda:sm_90")
