"""What networks compute in half precision, where torch's own half kernels survive."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import convloom
import pytest
import torch
from torch import nn

from . import nets
from .nets import Made, make

HALF = torch.float16
RUNS = [
    (target, passes) for target in ("interpreter", "reference") for passes in ("default", "none")
]


@pytest.fixture(scope="module", autouse=True)
def exporting_once() -> Iterator[None]:
    with nets.exporting_once():
        yield


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest error relative to the largest value; NaN where it is none."""
    return ((y.double() - truth).abs().max() / truth.abs().max()).item()


def check(
    network: Made,
    target: str,
    passes: str = "default",
    dtype: torch.dtype = HALF,
    least: float = 2e-3,
    scales: tuple[float, ...] = (1.0,),
) -> None:
    """A network in half precision is about as near to fp64 as torch's own half kernels, at every
    scale of its inputs."""
    module, inputs = network
    exe = convloom.compile(
        module, inputs, target=target, passes=passes, dtype=dtype, tuning="heuristic"
    )
    for scale in scales:
        scaled = [x * scale for x in inputs]
        with torch.no_grad():
            truth = copy.deepcopy(module).double()(*(x.double() for x in scaled))
            eager = copy.deepcopy(module).to(dtype)(*(x.to(dtype) for x in scaled))
        assert error(exe(*scaled), truth) < max(least, 4 * error(eager, truth)), scale


# Products with constants.


def learned(
    function: Callable[[Any, Any], Any], weight: tuple[int, ...], x: tuple[int, ...]
) -> Made:
    weights = nn.ParameterList([torch.empty(weight)])
    return make(lambda m, x: function(m.weights[0], x), x, weights=weights)


PRODUCTS = {
    "left": learned(lambda w, x: w @ x, (6, 4), (2, 4, 5)),
    "right": learned(lambda w, x: x @ w, (2, 4, 5), (2, 6, 4)),
    "broadcast": learned(lambda w, x: x @ w, (3, 4, 5), (2, 3, 6, 4)),
    "transposed": learned(lambda w, x: x @ w.transpose(1, 2), (2, 5, 4), (2, 6, 4)),
    "folded": learned(lambda w, x: torch.relu(w * 2) @ x, (6, 4), (2, 4, 5)),
    "factor and bias": learned(lambda w, x: (w @ x) + w, (4, 4), (2, 4, 4)),
    "queries": learned(
        lambda w, x: nn.functional.scaled_dot_product_attention(w.expand(2, 3, 8), x, x),
        (1, 3, 8),
        (2, 10, 8),
    ),
    "capsules": learned(
        lambda w, x: (w[None] @ x[:, :, None, :, None]).squeeze(-1), (5, 3, 6, 4), (2, 5, 4)
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize(("target", "passes"), RUNS)
def test_learned_factors_of_products(name: str, target: str, passes: str) -> None:
    check(PRODUCTS[name], target, passes)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["left", "right"])
def test_learned_factors_in_other_types_and_targets(name: str) -> None:
    module, inputs = PRODUCTS[name]
    check((module, inputs), "interpreter", dtype=torch.bfloat16, least=2e-2)
    module, inputs = copy.deepcopy(module).half(), tuple(x.half() for x in inputs)
    exe = convloom.compile(module, inputs, target="interpreter", tuning="heuristic")
    with torch.no_grad():
        assert error(exe(*inputs), module(*inputs).double()) < 2e-3


@pytest.mark.interpreter
def test_learned_factors_compile_for_a_gpu() -> None:
    check(PRODUCTS["left"], "emulator:sm_90")


# What torch sums in fp32.

REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "var": lambda x: x.var((2, 3), unbiased=False),
    "std": lambda x: x.std(1, keepdim=True),
    "var_mean": lambda x: torch.cat(torch.var_mean(x, (2, 3))),
    "norm": lambda x: x.norm(dim=1),
    "1-norm": lambda x: x[:, :2].norm(p=1, dim=1),
    "norm of pixels": lambda x: torch.linalg.vector_norm(x, dim=(2, 3)),
    "normalize": lambda x: nn.functional.normalize(x, dim=1),
    "standardised": lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize(("target", "passes"), RUNS)
def test_squares_neither_overflow_nor_vanish(name: str, target: str, passes: str) -> None:
    """Above 256 and below 2.4e-4 they do in half precision."""
    # Of 500 the variance itself overflows.
    scales = (100.0, 1e-4) if name.startswith("var") else (100.0, 500.0, 1e-4)
    network = make(lambda m, x: REDUCTIONS[name](x), (2, 8, 8, 8))
    check(network, target, passes, scales=scales)


def test_the_variance_of_large_numbers_does_not_cancel() -> None:
    module, (x,) = make(lambda m, x: (x.var((2, 3)), x.std(1)), (2, 8, 8, 8))
    exe = convloom.compile(module, (x,), target="interpreter", tuning="heuristic")
    for got, wanted in zip(exe(x + 1000), module((x + 1000).double()), strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=0)


PASSES = [*(passes for _, passes in RUNS[:2]), ("lower_batch_norm",), ("fold_batch_norm",)]


@pytest.mark.interpreter
@pytest.mark.parametrize("passes", PASSES, ids=str)
@pytest.mark.parametrize("target", ["interpreter", "reference"])
@pytest.mark.parametrize("folds", [True, False])
def test_running_variances_above_the_largest_half(target: str, passes: Any, folds: bool) -> None:
    """As of images of 14 bits."""
    module, (x,) = make(
        lambda m, x: torch.relu(m.norm(m.conv(x) if folds else torch.cat((x, x), 1))),
        (2, 4, 8, 8),
        conv=nn.Conv2d(4, 8, 3, bias=False),
        norm=nn.BatchNorm2d(8),
    )
    x = x.abs().mul(16383).clamp(max=60000)
    with torch.no_grad():
        y = module.conv(x) if folds else torch.cat((x, x), 1)
        module.norm.running_mean.copy_(y.mean((0, 2, 3)))
        module.norm.running_var.copy_(y.var((0, 2, 3)))
        truth = copy.deepcopy(module).double()(x.double())
    assert module.norm.running_var.min() > torch.finfo(HALF).max
    exe = convloom.compile(
        module, (x,), target=target, passes=passes, dtype=HALF, tuning="heuristic"
    )
    assert error(exe(x), truth) < 1e-2


# Calls of torch that are several ops here.

COMPOSITES: dict[str, tuple[Callable[..., torch.Tensor], tuple[tuple[int, ...], ...]]] = {
    "addcmul": (lambda x, a, b: torch.addcmul(x, a, b, value=0.01), ((2, 8), (2, 8), (2, 8))),
    "addcmul of rows": (lambda x, a, b: torch.addcmul(x, a, b, value=0.01), ((2, 8), (8,), (1, 8))),
    "addcdiv": (
        lambda x, a, b: torch.addcdiv(x, a, b.abs() * 1e-5 + 1e-3, value=1e-3),
        ((2, 8), (2, 8), (2, 1)),
    ),
    "baddbmm": (
        lambda c, a, b: torch.baddbmm(c, a, b, alpha=1e-3),
        ((2, 4, 4), (2, 4, 8), (2, 8, 4)),
    ),
}


@pytest.mark.interpreter
@pytest.mark.parametrize(("target", "passes"), RUNS)
def test_scores_of_attention_may_be_larger_than_halves(target: str, passes: str) -> None:
    module, (x,) = make(
        lambda m, x: nn.functional.scaled_dot_product_attention(x, x, x), (2, 4, 16)
    )
    x = x * 100
    assert (x @ x.transpose(1, 2)).max() / 4 > torch.finfo(HALF).max
    check((module, (x,)), target, passes)
    exe = convloom.compile(module, (x.half(),), target=target, passes=passes, tuning="heuristic")
    with torch.no_grad():
        assert error(exe(x.half()), module(x.double())) < 4e-3


@pytest.mark.interpreter
@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize(("target", "passes"), RUNS)
def test_what_is_one_call_in_torch_is_rounded_once(name: str, target: str, passes: str) -> None:
    function, shapes = COMPOSITES[name]
    module, inputs = make(lambda m, *tensors: function(*tensors), *shapes)
    check((module, tuple(x * 1000 for x in inputs)), target, passes)


@pytest.mark.parametrize("first", [True, False])
def test_addcmul_of_what_has_no_batch(first: bool) -> None:
    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        row, column = torch.arange(6.0), torch.arange(5.0).reshape(5, 1)
        a, b = (x[:, :1], row) if first else (column, row)
        return torch.addcmul(x, a, b, value=2)

    module, (x,) = make(function, (4, 5, 6))
    exe = convloom.compile(
        module, (x,), target="interpreter", dynamic_batch=(1, 4), tuning="heuristic"
    )
    for batch in (4, 1, 3):
        torch.testing.assert_close(exe(x[:batch]), module(x[:batch]))
