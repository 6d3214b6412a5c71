"""Leaves to coverage.py only what it reports: tracing every call inside torch.export, Triton's
compiler and interpreted kernels would make the tests slower by half, and shows nothing of ours."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from convloom.kernels import interpreter


def leave_out(patch: pytest.MonkeyPatch) -> None:
    """From now on these run without a trace function."""
    patch.setattr(torch.export, "export", untraced(torch.export.export))
    program = torch.export.ExportedProgram
    patch.setattr(program, "run_decompositions", untraced(program.run_decompositions))
    patch.setattr(triton, "compile", untraced(triton.compile))
    rewritten = interpreter._rewritten
    patch.setattr(interpreter, "_rewritten", lambda function: untraced(rewritten(function)))


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, with nobody looking."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        tracer = sys.gettrace()
        if tracer is None:
            return function(*args, **kwargs)
        sys.settrace(None)
        try:
            return function(*args, **kwargs)
        finally:
            sys.settrace(tracer)

    return call
