"""What Triton 3.6, which torch 2.11 brings, compiles only with help: it takes a field of a tuple of
constants that is handed on to another function apart, into numbers without a type. Newer releases
hand on a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
from triton.compiler.code_generator import CodeGenerator
from triton.language.core import base_value, constexpr


def _with_constants(call: Callable[..., Any]) -> Callable[..., Any]:
    """`CodeGenerator.call_JitFunction` of 3.6, which is given constants as such."""

    def constant(value: Any) -> Any:
        return value if value is None or isinstance(value, base_value) else constexpr(value)

    def call_jit_function(self: Any, function: Any, args: Any, kwargs: Any, **more: Any) -> Any:
        named = {name: constant(value) for name, value in kwargs.items()}
        return call(self, function, [constant(value) for value in args], named, **more)

    return call_jit_function


def help_compiler() -> None:
    """From here on Triton 3.6 compiles what newer releases do; these are left as they are."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
        CodeGenerator.call_JitFunction = _with_constants(CodeGenerator.call_JitFunction)
