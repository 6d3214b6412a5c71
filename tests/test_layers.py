"""Shuffles, products of activations, attention: torch's numbers, and copies only where needed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import InvalidInputError, UnsupportedOpError
from convloom.kernels import registry
from convloom.kernels.contract.op import Attributes
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.movement.rearrange import Flip, rearrange
from convloom.kernels.movement.rearrangement import Rearrange, composed, permutation, rearrangement
from convloom.kernels.products.bmm import Bmm
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from . import nets

X4, X3 = (2, 8, 6, 4), (2, 8, 6)
SEEN = torch.arange(36).view(6, 6) % 4 != 1


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> Any:
        return self.function(*tensors)


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def exporting_once() -> Iterator[None]:
    with nets.exporting_once():
        yield


# What torch offers to move, select and reduce; fp32, fp16 and a range of batches.
FUNCTIONS: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[int, ...]]] = {
    "pixel_shuffle": (lambda x: F.pixel_shuffle(x, 2), X4),
    "pixel_unshuffle": (lambda x: F.pixel_unshuffle(x, 2) * 2, X4),
    "channel_shuffle": (lambda x: F.channel_shuffle(x, 4), X4),
    "flip": (lambda x: x.flip(1, 3) + x, X4),
    "roll": (lambda x: x.roll((1, -2), (2, 3)), X4),
    "repeat": (lambda x: x.repeat(1, 2, 1, 3), X4),
    "tile": (lambda x: x.tile(2, 3), X4),
    "repeat_interleave": (lambda x: x.repeat_interleave(3, 1), X4),
    "unbind": (lambda x: x.unbind(2)[1:3], X4),
    "stack": (lambda x: torch.stack((x, -x), 2), X3),
    "index": (lambda x: x[:, [5, 3, 1, 0, 2, 7]], X4),
    "index_select": (lambda x: x.index_select(2, torch.tensor([5, 5, -1 + 1])), X4),
    "strided slice": (lambda x: x[:, ::3, 1:5:2, -1], X4),
    "glu": (lambda x: (F.glu(x, 1), F.glu(x)), X4),
    "rsub": (lambda x: torch.rsub(x, x * 3, alpha=2), X4),
    "std": (lambda x: x.std((2, 3)), X4),
    "var_mean": (lambda x: torch.var_mean(x, 1, correction=0, keepdim=True), X4),
    "normalize": (lambda x: F.normalize(x, dim=1), X4),
    "norms": (lambda x: (x.norm(1, 2), x.norm(float("inf"), 1)), X4),
    "extremes": (lambda x: (x.amin(1), x.max(2).values, x.min(3, keepdim=True).values), X4),
    "softmax over rows": (lambda x: x.softmax(2), X4),
    "pools of lines": (lambda x: (F.max_pool1d(x, 2), F.avg_pool1d(x, 2)), (2, 4, 7)),
    "pools of volumes": (lambda x: (F.max_pool3d(x, 2), F.avg_pool3d(x, 2)), (2, 4, 5, 5, 7)),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_torchs(name: str) -> None:
    function, shape = FUNCTIONS[name]
    module, x = Call(function), draw(*shape)
    for dtype in (torch.float32, torch.float16):
        exe = convloom.compile(
            module, (x,), target="interpreter", dtype=dtype, dynamic_batch=(1, 2)
        )
        nets.check(exe(x), module, (x,), dtype)
        nets.check(exe(x[:1]), module, (x[:1],), dtype)


@pytest.mark.interpreter
def test_what_one_batch_can_do_and_a_range_cannot() -> None:
    """Dimensions in front of the batch, and one number of all samples."""
    module = Call(
        lambda x: (
            torch.stack((x, -x)), x.repeat(2, 1, 3, 1), x.tile(2, 1, 1, 1),
            torch.linalg.vector_norm(x), x.amax(),
        )
    )  # fmt: skip
    x = draw(*X3)
    nets.check(convloom.compile(module, (x,), target="interpreter")(x), module, (x,))


class Attention(nn.Module):
    """Self-attention of an image's pixels between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 2, 2), nn.Conv2d(16, 4, 1)
        self.norm, self.qkv, self.project = nn.LayerNorm(16), nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        n, c, h, w = y.shape
        tokens = y.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norm(tokens)).chunk(3, -1)
        q, k, v = (t.view(n, h * w, 4, 4).transpose(1, 2) for t in (q, k, v))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, h * w, c)
        tokens = tokens + self.project(seen)
        return self.head(tokens.transpose(1, 2).reshape(n, c, h, w))


@pytest.mark.interpreter
def test_attention_reads_heads_where_they_lie() -> None:
    """The only copy joins the heads again; tokens are views of the image."""
    module, x = nets.randomise(Attention()).eval(), draw(2, 3, 8, 6)
    exe = convloom.compile(module, (x,), target="interpreter", dynamic_batch=(1, 2))
    ops = [step.op for step in exe.plan.steps]
    assert ops[1:-1] == [
        "normalize", "linear", "bmm", "softmax", "bmm", "rearrange", "linear", "conv2d"
    ]  # fmt: skip
    nets.check(exe(x), module, (x,))
    nets.check(exe(x[:1]), module, (x[:1],))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, layer norm and two linear layers over channels, scaled, added."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.spatial = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.wide, self.narrow = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.gamma = nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.norm(self.spatial(x).permute(0, 2, 3, 1))
        y = self.gamma * self.narrow(F.gelu(self.wide(y)))
        return (x + y.permute(0, 3, 1, 2)).mean((2, 3))


@pytest.mark.interpreter
def test_channels_last_layers_need_no_transposition() -> None:
    module, x = nets.randomise(ConvNeXtBlock()).eval(), draw(2, 3, 9, 7)
    exe = convloom.compile(module, (x,), target="interpreter")
    ops = [step.op for step in exe.plan.steps]
    first = ops.index("normalize")
    # The permutation back carries the residual addition, which is a pass over the image anyhow.
    assert ops[first:] == ["normalize", "linear", "linear", "permute", "mean"]
    nets.check(exe(x), module, (x,))


PRODUCTS: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "matmul, transposed": (lambda a: a @ a.transpose(2, 3), (X4,)),
    "matmul, broadcast": (lambda a, b: a @ b, (X4, (2, 1, 4, 5))),
    "bmm": (torch.bmm, ((3, 5, 20), (3, 20, 7))),
    "baddbmm": (
        lambda a, b, c: torch.baddbmm(c, a, b, alpha=0.5), ((3, 5, 4), (3, 4, 6), (3, 5, 6))
    ),
    "attention, causal": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True), (X4, (2, 8, 9, 4))
    ),
    "attention, seen": (
        lambda q: F.scaled_dot_product_attention(q, q, q, SEEN), (X4,)
    ),
    "attention, scaled and masked": (
        lambda q, mask: F.scaled_dot_product_attention(q, q, q, mask, scale=0.3),
        (X4, (2, 1, 6, 6)),
    ),
}  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_activations(name: str) -> None:
    function, shapes = PRODUCTS[name]
    module, tensors = Call(function), tuple(draw(*shape) for shape in shapes)
    for dtype in (torch.float32, torch.float16):
        exe = convloom.compile(
            module, tensors, target="interpreter", dtype=dtype, dynamic_batch=(1, 3)
        )
        nets.check(exe(*tensors), module, tensors, dtype)


shapes = st.lists(st.sampled_from((1, 2, 3, 4)), min_size=1, max_size=4)


@given(shape=shapes, data=st.data())
def test_any_reshape_permute_reshape(shape: list[int], data: st.DataObject) -> None:
    """Where a rearrangement is found, it is that of torch."""
    middle = data.draw(st.permutations(shape))
    dims = tuple(data.draw(st.permutations(range(len(shape)))))
    result = data.draw(st.permutations(shape))
    x = draw(*shape)
    truth = x.reshape(middle).permute(dims).reshape(result)
    made = rearrangement(tuple(shape), tuple(middle), dims, tuple(result))
    if made is None:
        assert tuple(middle) != tuple(shape) or [middle[dim] for dim in dims] != list(result)
        return
    ours = x.reshape(made.split).permute(made.dims).reshape(made.shape)
    assert torch.equal(ours, truth)
    again = composed(made, permutation(made.shape, tuple(reversed(range(len(result))))))
    assert again is not None
    assert torch.equal(rearrange(again, x), truth.permute(*reversed(range(len(result)))))


@given(data=st.data())
def test_two_rearrangements_are_one(data: st.DataObject) -> None:
    """Where two of them compose, it is to what torch makes of one after the other."""
    shape: Sequence[int] = data.draw(shapes)
    steps = []
    for _ in range(2):
        middle = data.draw(st.permutations(shape))
        dims = tuple(data.draw(st.permutations(range(len(shape)))))
        result = data.draw(st.permutations(shape))
        step = rearrangement(tuple(shape), tuple(middle), dims, tuple(result))
        assume(step is not None)
        steps.append(step)
        shape = result
    both = composed(*steps)
    if both is not None:
        x = draw(*both.split)
        assert torch.equal(rearrange(both, x), rearrange(steps[1], rearrange(steps[0], x)))


def spec(*shape: int, batch: int | None = None) -> TensorSpec:
    return TensorSpec(shape, torch.float32, batch=batch)


MESSAGES: tuple[tuple[str, Attributes, tuple[TensorSpec, ...], str], ...] = (
    ("rearrange", Rearrange((2, 6), (0, 0), (12,)), (spec(2, 6),), "does not permute the parts"),
    ("rearrange", Rearrange((4, 3), (1, 0), (12,)), (spec(2, 6),), "does not split"),
    ("rearrange", Rearrange((2, 6), (1, 0), (4, 3)), (spec(2, 6),), "does not merge into (4, 3)"),
    ("rearrange", Rearrange((2, 6), (1, 0), (6, 2)), (spec(2, 6, batch=2),), "must stay whole"),
    ("flip", Flip((2,)), (spec(2, 6),), "has no dimensions (2,)"),
    ("flip", Flip((0,)), (spec(2, 6, batch=2),), "must stay in order"),
    ("bmm", Bmm(), (spec(2, 3, 4), spec(2, 5, 6)), "expected (..., M, K) and (..., K, N)"),
    ("bmm", Bmm(), (spec(2, 3, 4, batch=2), spec(2, 4, 6)), "one sample of the batch"),
)


@pytest.mark.parametrize(("name", "attributes", "specs", "message"), MESSAGES)
def test_impossible_arguments_are_named(
    name: str, attributes: Attributes, specs: tuple[TensorSpec, ...], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        registry.get(name).infer(attributes, specs)
    assert str(raised.value).startswith(f"{name}: ")


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "all rolled": (lambda x: x.roll(3), "pass dims"),
    "two indices": (lambda x: x[:, [0, 1], [2, 3]], "indexing of 2 dimensions"),
    "3-norm": (lambda x: x.norm(3, 1), "the 3"),
    "one number": (lambda x: x[:, :1].std(1), "the variance of 1 numbers"),
    "grouped queries": (
        lambda x: F.scaled_dot_product_attention(x, x, x, enable_gqa=True), "enable_gqa"
    ),
    "computed mask": (
        lambda x: F.scaled_dot_product_attention(x, x, x, torch.ones(6, 6).tril() > 0), "a buffer"
    ),
    "vector": (lambda x: x @ x[0, 0, 0], "products with vectors"),
    "pad of rank 6": (lambda x: F.pad(x[:, None, None], (1, 0)), "a rank-6 tensor; ranks 1 to 5"),
    "pixels of rank 5": (lambda x: F.pixel_unshuffle(x[:, None], 2), "other ranks than 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name: str) -> None:
    function, reason = REFUSED[name]
    with pytest.raises(UnsupportedOpError, match=reason):
        convloom.compile(Call(function), (draw(*X4),), target="reference")
