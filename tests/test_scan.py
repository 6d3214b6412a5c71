"""Running sums and products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
from convloom.errors import InvalidInputError, UnsupportedOpError
from convloom.kernels import registry
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.normalisation.scan import Scan
from torch import nn

from . import nets


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [1, -1])
@pytest.mark.parametrize("name", ["cumsum", "cumprod"])
def test_behind_a_convolution(name: str, dim: int, dtype: torch.dtype) -> None:
    module, inputs = nets.make(
        lambda m, x: getattr(torch.tanh(m.conv(x)), name)(dim) * 2,
        (2, 3, 6, 40),
        conv=nn.Conv2d(3, 8, 3),
    )
    exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype, dynamic_batch=(1, 3))
    for batch in (1, 3):
        x = nets.inputs_of((batch, 3, 6, 40), seed=batch)
        nets.check(exe(*x), module, x, dtype)


def test_nan_and_infinity_last_to_the_end_of_their_row() -> None:
    module, (x,) = nets.make(lambda m, x: (x.cumsum(1), x.cumprod(1)), (3, 20))
    x[0, 7], x[1, 9], x[2, 3], x[2, 11] = float("nan"), float("inf"), float("inf"), -float("inf")
    exe = convloom.compile(module, (x,), target="interpreter")
    for ours, theirs in zip(exe(x), module(x), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(
            ours.isinf(), theirs.isinf()
        )


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.cumsum(0), "the batch dimension of"),
        (lambda x: x.cumsum(1, dtype=torch.float64), "cumsum that changes the dtype"),
    ],
)
def test_what_is_refused(function: Callable[[torch.Tensor], Any], message: str) -> None:
    module, inputs = nets.make(lambda m, x: function(x), (2, 4))
    with pytest.raises(UnsupportedOpError, match=message):
        convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 4))


def test_a_dimension_that_is_not_there_is_named() -> None:
    with pytest.raises(InvalidInputError, match="has no dimension 2"):
        registry.get("cumsum").infer(Scan(2), (TensorSpec((2, 3), torch.float32),))
