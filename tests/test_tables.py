"""Rows of tables that a network computes, and products whose weights it computes."""

from __future__ import annotations

from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.capture import refusals
from convloom.kernels import registry
from torch import Tensor, nn

from . import nets

SHAPE = (2, 4, 5, 6)


def code_book(m: Any, x: Tensor) -> Tensor:
    """The nearest code of each pixel, as VQ-VAEs have it."""
    pixels = x.permute(0, 2, 3, 1).flatten(0, 2)
    codes = F.embedding(torch.cdist(pixels, m.book).argmin(1), m.book)
    return codes.view(x.shape[0], 5, 6, 4).permute(0, 3, 1, 2)


def best(x: Tensor) -> Tensor:
    """Of each image, the three pixels with the largest sums."""
    return x.sum(1).flatten(1).topk(3).indices


def hyper(m: Any, x: Tensor) -> Tensor:
    """A linear layer whose weights are computed from each image are one from parameters alone."""
    return F.linear(x, m.linear.weight / m.linear.weight.norm(), m.linear.bias)


FUNCTIONS: dict[str, Any] = {
    "code book": code_book,
    "indexed": lambda m, x: m.book[x.argmax(1)],
    "from the end": lambda m, x: m.book[x[:, 0].clamp(-3, 3).round().long()],
    "index_select": lambda m, x: m.cubes.index_select(0, x[:, :, 0, 0].argmax(1)),
    "gather": lambda m, x: x.gather(1, x.argmax(1, keepdim=True)),
    "gather of fewer": lambda m, x: x.gather(-1, x[:, :3, 1:, :4].argsort(-1).argsort(-1)),
    "tokens": lambda m, x: x.flatten(2).mT.gather(1, best(x)[..., None].expand(-1, -1, 4)),
    "places apart": lambda m, x: x[..., m.apart] + x.index_select(3, m.apart.flatten().abs()).sum(),
    "scattered": lambda m, x: x.repeat(1, 10, 1, 1)[:, [at * at % 40 for at in range(40)]],
    "channels": lambda m, x: m.cubes[:, :, x.argmax(3)[0, 0]] + x[0, 0, 0, 0],
    "row of numbers": lambda m, x: torch.gather(m.book[:, 0], 0, x[:, 0, 0, 0].abs().long()),
    "one_hot": lambda m, x: (F.one_hot(x.argmax(1), 4).permute(0, 3, 1, 2) * x).sum(1),
    "compared": lambda m, x: (x.argmax(1) == x.argmin(1)).float() + (x.argmax(1) > 2),
    "masked mean": lambda m, x: (x * (x > 0)).sum(1) / (x > 0).sum(1).clamp(min=1, max=3),
    "counted": lambda m, x: torch.count_nonzero(x > 0, dim=(2, 3)).float(),
    "windows": lambda m, x: (x.unfold(2, 3, 2).unfold(3, 2, 1).sum(-1) + 1).movedim(-1, 1),
    "linear": hyper,
    "addmm": lambda m, x: torch.addmm(
        m.linear.bias, x[:, 0, 0], m.linear.weight.t(), beta=0.5, alpha=2
    ),
    "addmm, beta 0": lambda m, x: torch.addmm(
        m.linear.bias / 0, x[:, 0, 0], m.linear.weight.t(), beta=0, alpha=2
    ),
    "baddbmm": lambda m, x: torch.baddbmm(
        x[:, 0, :, :5], x[:, 1], x[:, 2].transpose(1, 2), beta=0.5, alpha=0.3
    ),
    "baddbmm, beta 0": lambda m, x: torch.baddbmm(
        x[:, 0, :, :5] / 0, x[:, 1], x[:, 2].transpose(1, 2), beta=0, alpha=0.3
    ),
    "affine_grid of volumes": lambda m, x: F.affine_grid(
        x[:, :3, 0, :4], (x.shape[0], 1, 2, 3, 4), align_corners=False
    ),
}
QUICK = (
    "code book", "from the end", "tokens", "scattered", "one_hot", "addmm", "baddbmm, beta 0"
)  # fmt: skip
STATIC = ("channels", "places apart")
"""Of all samples of a batch, which a smaller one has not."""


def made(function: Any, *shapes: tuple[int, ...]) -> tuple[Any, tuple[Tensor, ...]]:
    module, inputs = nets.make(function, *shapes, linear=nn.Linear(6, 5))
    generator = torch.Generator().manual_seed(0)
    module.register_buffer("book", torch.randn(7, 4, generator=generator))
    module.register_buffer("cubes", torch.randn(4, 2, 6, generator=generator))
    module.register_buffer("apart", torch.tensor([[0, -1, 2], [5, 1, 3]]))
    return module, inputs


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FUNCTIONS],
)
def test_rows_and_products(name: str) -> None:
    module, inputs = made(FUNCTIONS[name], SHAPE)
    for target in ("reference", "interpreter"):
        batches = None if name in STATIC else (1, 2)
        exe = convloom.compile(module, inputs, target=target, dynamic_batch=batches)
        assert exe.summary["torch_fallbacks"] == 0
        for batch in batches or (2,):
            nets.check(exe(inputs[0][:batch]), module, (inputs[0][:batch],))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_with_an_input_as_the_weight(dtype: torch.dtype) -> None:
    module, inputs = made(lambda m, x, w: F.linear(x, w, m.linear.bias), SHAPE, (5, 6))
    exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
    nets.check(exe(*inputs), module, inputs, dtype)


@pytest.mark.parametrize("passes", ["default", "none"])
def test_tf32_rounds_no_row(passes: str) -> None:
    """Only products of numbers are rounded to tf32."""

    def looked_up(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        given = x[:, :7, 0].round().clamp(-7, 6).long()
        chosen = F.one_hot(given.clamp(0, 6), 7).float() @ m.book
        return torch.cat((m.book[given], chosen)).flatten(1), m.linear(x[:, 0])

    module, (x,) = made(looked_up, (2, 8, 6))
    exe = convloom.compile(module, (x,), target="emulator:sm_90", precision="tf32", passes=passes)
    rows, products = exe(x)
    precisions = {step.problem.precision for step in exe.plan.steps if step.op == "linear"}
    assert torch.equal(rows, module(x)[0]) and precisions == {"ieee", "tf32"}
    torch.testing.assert_close(products, module(x)[1], rtol=1e-2, atol=1e-2)


LARGE: dict[str, Any] = {
    "row": lambda m, x: F.embedding(x.argmax(1), m.signs),
    "row, from the end": lambda m, x: m.signs[x.argmax(1)],
    "place": lambda m, x: (x.argmax(1, keepdim=True) == m.places).float(),
    "moved": lambda m, x: (x.argmax(1).float()[:, None, None].transpose(1, 2) == m.places).float(),
    "clamped": lambda m, x: x.argmax(1).clamp(2, 4990),
    "returned": lambda m, x: x.argmax(1).float(),
    "counted": lambda m, x: (x > -1).sum(1),
    "counted, as floats": lambda m, x: (x > -1).sum(1).float(),
    "quotient": lambda m, x: (x.argmax(1) // 3, torch.div(x.argmax(1), -7, rounding_mode="trunc")),
    "rest": lambda m, x: (x.argmax(1) % -999).float(),
    "row of an image": lambda m, x: (x.argmax(1) / 7).int(),
    "chosen": lambda m, x: torch.where(x[:, 0] > 0, x.argmax(1), x.argmin(1)),
    "added": lambda m, x: x.argmax(1).float() + x[:, 0] * 0,
    "multiplied": lambda m, x: x.argmax(1, keepdim=True).float() @ m.places[:1, None].float(),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", LARGE)
def test_halves_round_no_index(name: str, dtype: torch.dtype) -> None:
    """Beyond 256 bfloat16 has no odd number, beyond 2048 float16 none; what is computed with them
    is computed in halves."""
    module, (x,) = made(LARGE[name], (6, 5000))
    module.register_buffer("places", torch.arange(5000) if name != "multiplied" else torch.ones(1))
    module.register_buffer("signs", torch.tensor([[-1.0], [1.0]]).repeat(2500, 1))
    x = x.bfloat16().float()
    rounding = torch.finfo(dtype).eps if name in ("added", "multiplied") else 0.0
    for target, passes in (("reference", "none"), ("interpreter", "default")):
        exe = convloom.compile(module, (x,), target=target, dtype=dtype, passes=passes)
        torch.testing.assert_close(exe(x), module(x), rtol=rounding, atol=0.0)


ROUNDED: dict[str, Any] = {
    "floor": lambda x, y: (torch.div(x, y, rounding_mode="floor"), x // 0.7, 3.0 // x),
    "trunc": lambda x, y: (torch.div(x, y, rounding_mode="trunc"), torch.div(x, 49.0).trunc()),
    "rest": lambda x, y: (x % y, torch.fmod(x, 0.7), 3.0 % x),
    "whole": lambda x, y: (x.long() // y.round().long(), x.long() % 7, torch.fmod(x.long(), -4)),
    "of an index": lambda x, y: torch.take_along_dim(x, x.argmin(2, keepdim=True), 2),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter", "emulator:sm_90"])
@pytest.mark.parametrize("name", ROUNDED)
def test_rounded_quotients(name: str, target: str) -> None:
    """Exactly torch's, where a quotient is a whole number too: what a GPU makes of a / b is not."""
    module, _ = made(lambda m, x, y: ROUNDED[name](x, y))
    y = torch.tensor([41.0, 49.0, -3.0, 0.3, 7.0]).repeat(2, 6, 1)
    x = y * torch.arange(-30.0, 30.0).reshape(2, 6, 5) + torch.arange(60).view_as(y) % 2 * 0.1
    y = y.clamp(min=1.0) if name == "whole" else y
    exe = convloom.compile(module, (x, y), target=target)
    torch.testing.assert_close(exe(x, y), module(x, y), rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
def test_whole_numbers_as_results(target: str) -> None:
    module, (x,) = made(lambda m, x: (F.one_hot(x.argmax(1), 5), (x > 0).long()), SHAPE)
    exe = convloom.compile(module, (x,), target=target)
    for result, expected in zip(exe(x), module(x), strict=True):
        assert torch.equal(result, expected) and result.dtype is torch.int64


def test_constants_are_compared_as_whole_numbers() -> None:
    module, (x,) = made(lambda m, x: x * (2**24 + torch.arange(6) == 2**24 + 1), SHAPE)
    exe = convloom.compile(module, (x,), target="reference")
    assert torch.equal(exe(x), module(x))


@pytest.mark.parametrize("name", refusals.INSTEAD)
def test_refusals_say_what_else_to_do(name: str) -> None:
    (overload, *_) = getattr(torch.ops.aten, name).overloads()
    target = str(getattr(getattr(torch.ops.aten, name), overload))
    assert target not in registry.CAPTURES
    assert refusals.why_unknown(target).endswith(refusals.INSTEAD[name])


def test_a_refused_call_says_what_else_to_do() -> None:
    module, (x,) = made(lambda m, x: x.scatter(1, x.argmax(1, keepdim=True), 0.0), SHAPE)
    with pytest.raises(convloom.UnsupportedOpError, match="compare the indices with"):
        convloom.compile(module, (x,), target="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target", ["reference", "interpreter", "emulator:sm_80", "emulator:sm_90"])
def test_rows_are_copied_bit_by_bit(target: str, dtype: torch.dtype) -> None:
    """Next to rows that are no numbers too; where there is no row there is zero."""

    def looked_up(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        places = x[:, 0].round().long()
        return F.embedding(places, m.wide), m.wide[places], x.gather(1, places[:, None])

    module, (x,) = made(looked_up, (3, 5, 8))
    module.register_buffer("wide", torch.randn(20, 70).to(dtype).float())
    module.wide[2], module.wide[3], module.wide[4, ::2] = torch.nan, torch.inf, -0.0
    x = x.to(dtype).float()
    x[:, 0] = torch.tensor([[0, 19, 2, 3, 4, 5, 18, 17], [20, -1, -20, -21, 1e9, 7, 0, 1], [1] * 8])
    exe = convloom.compile(module, (x,), target=target, dtype=dtype, dynamic_batch=(1, 3))
    for batch in (2, 3):
        places = x[:batch, 0].long()
        there = (places >= 0) & (places < 20)
        first = module.wide[places.clamp(0, 19)]
        first[~there] = 0.0
        counted = torch.where(places < 0, places + 20, places)
        second = module.wide[counted.clamp(0, 19)]
        second[(counted < 0) | (counted >= 20)] = 0.0
        of_x = x[:batch].gather(1, places.clamp(0, 4)[:, None])
        of_x[((places < 0) | (places > 4))[:, None]] = 0.0
        for result, exact in zip(exe(x[:batch]), (first, second, of_x), strict=True):
            assert torch.equal(result.isnan(), exact.isnan())
            bits = [each.nan_to_num(7.0).view(torch.int32) for each in (result, exact)]
            assert torch.equal(*bits)


@pytest.mark.parametrize(
    ("function", "message"),
    {
        "beyond": (lambda m, x: x[:, m.apart], "indices outside dimension 1"),
        "pairs": (lambda m, x: x[:, m.apart[0], x.argmax(3)[0, 0, :3]], "indexing of 2 dimensions"),
        "batch": (lambda m, x: x.gather(0, x.argmax(1, keepdim=True) * 0), "batch"),
    }.values(),
)  # fmt: skip
def test_indices_that_are_refused(function: Any, message: str) -> None:
    module, (x,) = made(function, SHAPE)
    batches = (1, 2) if message == "batch" else None
    with pytest.raises(convloom.UnsupportedOpError, match=message):
        convloom.compile(module, (x,), target="reference", dynamic_batch=batches)
