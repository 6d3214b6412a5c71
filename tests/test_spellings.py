"""ATen calls that are captured as several ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch

from . import nets

PLANE, CHANNEL = (2, 6, 7, 5), (6, 1, 1)
SPELLINGS: dict[str, Callable[..., torch.Tensor]] = {
    "addcmul": lambda m, x, a, b: torch.addcmul(x, a, b),
    "addcmul, value": lambda m, x, a, b: torch.addcmul(x, a, b, value=-0.5),
    "addcmul, broadcast": lambda m, x, a, b: torch.addcmul(a, b, x, value=2.0),
    "addcdiv": lambda m, x, a, b: torch.addcdiv(x, a, b.abs() + 1.0, value=3.0),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("target", ["reference", "interpreter"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_calls_that_become_several_ops(name: str, target: str) -> None:
    function: Any = SPELLINGS[name]
    second = CHANNEL if "broadcast" in name else PLANE
    module, inputs = nets.make(function, PLANE, second, CHANNEL)
    exe = convloom.compile(module, inputs, target=target)
    assert exe.summary["torch_fallbacks"] == 0
    nets.check(exe(*inputs), module, inputs)
