"""What Triton 3.6 is helped with; what it compiles then, the whole set shows on the oldest pair."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import triton
from convloom.kernels.devices import older_triton
from triton.compiler.code_generator import CodeGenerator
from triton.language.core import constexpr


class Sizes(NamedTuple):
    height: int
    width: int


def test_only_older_releases_are_helped(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = CodeGenerator.call_JitFunction
    monkeypatch.setattr(CodeGenerator, "call_JitFunction", plain)
    for version in ("3.7.1", "3.10.0"):
        monkeypatch.setattr(triton, "__version__", version)
        older_triton.help_compiler()
        assert CodeGenerator.call_JitFunction is plain
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    older_triton.help_compiler()
    assert CodeGenerator.call_JitFunction is not plain


def test_constants_are_handed_on_as_constants() -> None:
    """Tuples of them, names and numbers; what a kernel computes, and None, as they are."""
    given: list[Any] = []

    def call(generator: Any, function: Any, args: Any, kwargs: Any, context: Any = None) -> str:
        given.extend((function, *args, kwargs, context))
        return "result"

    computed, constant = triton.language.core.tensor(None, triton.language.int32), constexpr(3)
    helped = older_triton._with_constants(call)
    arguments = [Sizes(2, 3), "ieee", computed, constant, None]
    assert helped(None, torch, arguments, {"size": 4}, context="there") == "result"
    assert given[0] is torch and given[3] is computed and given[4] is constant
    assert given[5] is None and given[7] == "there"
    assert isinstance(given[1], constexpr) and given[1].value == Sizes(2, 3)
    assert given[2].value == "ieee" and given[6]["size"].value == 4
