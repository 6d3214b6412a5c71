"""Leaves to coverage.py only what it reports: tracing every call inside torch.export, Triton's
compiler, interpreted kernels and comparisons would make the tests slower by half, and shows nothing
of ours."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton
from convloom.kernels.devices import interpreter


def leave_out(patch: pytest.MonkeyPatch) -> None:
    """From now on these run without a trace function."""
    patch.setattr(torch.export, "export", untraced(torch.export.export))
    program = torch.export.ExportedProgram
    patch.setattr(program, "run_decompositions", untraced(program.run_decompositions))
    patch.setattr(triton, "compile", untraced(triton.compile))
    patch.setattr(torch.testing, "assert_close", untraced(torch.testing.assert_close))
    rewritten = interpreter._rewritten
    patch.setattr(interpreter, "_rewritten", lambda function: untraced(rewritten(function)))


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with nobody looking."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with paused():
            return function(*args, **kwargs)

    return call


@contextmanager
def paused() -> Iterator[None]:
    """Without a trace function."""
    tracer = sys.gettrace()
    sys.settrace(None)
    try:
        yield
    finally:
        sys.settrace(tracer)
