"""Leaves to coverage.py only what it reports: tracing every call inside torch.export, Triton's
compiler, interpreted or emulated kernels and comparisons would make the tests slower by half, and
shows nothing of ours."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import triton
from convloom.compiler.capture import export
from convloom.kernels.devices import interpreter
from convloom.kernels.devices.emulator import launch as emulated

TRACER = sys.gettrace()
"""The trace function that all tests run with: coverage.py's, where it is used."""


def leave_out(patch: pytest.MonkeyPatch) -> None:
    """From now on these run without a trace function."""
    patch.setattr(torch.export, "export", untraced(torch.export.export))
    # Errors name the user's last line on the way to them: `call` below is none of those.
    patch.setattr(export, "LIBRARIES", (*export.LIBRARIES, __file__))
    program = torch.export.ExportedProgram
    patch.setattr(program, "run_decompositions", untraced(program.run_decompositions))
    patch.setattr(triton, "compile", untraced(triton.compile))
    patch.setattr(torch.testing, "assert_close", untraced(torch.testing.assert_close))
    # The emulator's own tests call what the package offers, not what its launches call.
    patch.setattr(emulated, "emulate", untraced(emulated.emulate))
    patch.setattr(emulated.source, "parse", untraced(emulated.source.parse))
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
def traced(tracer: Any = TRACER) -> Iterator[None]:
    """With this trace function: that of the tests, if they have one."""
    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        yield
    finally:
        sys.settrace(before)


def paused() -> AbstractContextManager[None]:
    """Without a trace function."""
    return traced(None)
