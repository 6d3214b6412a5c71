"""The arguments of ATen calls: names and defaults of the schema, and what nobody has read."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.errors import UnsupportedOpError
from convloom.kernels import registry
from convloom.kernels.contract.aten import Arguments
from convloom.kernels.contract.op import Builder
from convloom.kernels.movement.pointwise import Pointwise

from . import nets

POOL = "pool(Tensor self, int[2] kernel_size, int[2] stride=[], bool ceil_mode=False) -> Tensor"


def arguments(schema: str, *args: Any, **keywords: Any) -> Arguments:
    return Arguments(torch._C.parse_schema(schema), args, keywords)


def test_names_and_defaults_are_those_of_the_schema() -> None:
    a = arguments(POOL, "x", [3, 3], ceil_mode=True)
    assert (a.self, a.kernel_size, a.stride, a.ceil_mode) == ("x", [3, 3], [], True)
    assert a.first == "x" and a["stride"] == [] and "divisor" not in a and a.get("divisor", 1) == 1
    with pytest.raises(AttributeError, match="pool has no argument 'divisor'"):
        _ = a.divisor


def test_arguments_are_replaced_where_they_stand() -> None:
    a = arguments(POOL, "x", [3, 3], ceil_mode=True).replaced(self="y", stride=[2, 2])
    assert a.args == ("y", [3, 3])
    assert a.keywords == {"ceil_mode": True, "stride": [2, 2]}


def test_only_what_differs_and_has_an_effect_counts_as_unread() -> None:
    schema = "f(Tensor self, int p, float a=1.0, int? b=None, bool? pin_memory=None) -> Tensor"
    a = arguments(schema, "x", 3, 1.0, 5, True)
    assert a.unread == ["b"]
    assert a.replaced(self="y").b == 5
    assert a.unread == []


def _ignorant_gelu(g: Builder, a: Arguments) -> Any:
    return g.apply("gelu", (a.self,), Pointwise())


def test_an_argument_that_capture_does_not_know_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As if another version of torch had added it."""
    target = "aten.gelu.default"
    op = replace(registry.CAPTURES[target], aten={target: _ignorant_gelu})
    monkeypatch.setattr(registry, "CAPTURES", registry.CAPTURES | {target: op})
    module, inputs = nets.make(lambda m, x: F.gelu(x), nets.IMAGE)
    convloom.compile(module, inputs, target="reference")
    module, inputs = nets.make(lambda m, x: F.gelu(x, approximate="tanh"), nets.IMAGE)
    with pytest.raises(UnsupportedOpError, match="argument 'approximate' is 'tanh': only the def"):
        convloom.compile(module, inputs, target="reference")
    exe = convloom.compile(module, inputs, target="reference", fallback="torch")
    nets.check(exe(*inputs), module, inputs)
