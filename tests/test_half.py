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
) -> None:
    """A network in half precision is about as near to fp64 as torch's own half kernels."""
    module, inputs = network
    exe = convloom.compile(
        module, inputs, target=target, passes=passes, dtype=dtype, tuning="heuristic"
    )
    with torch.no_grad():
        truth = copy.deepcopy(module).double()(*(x.double() for x in inputs))
        eager = copy.deepcopy(module).to(dtype)(*(x.to(dtype) for x in inputs))
    assert error(exe(*inputs), truth) < max(least, 4 * error(eager, truth))


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
