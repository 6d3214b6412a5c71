"""The table of torch's pointwise family in the documentation, and functions made of others.

`CONVLOOM_UPDATE_GOLDEN=1 pytest tests/test_pointwise_table.py -m slow` rewrites docs/pointwise.md.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.capture import decompositions
from convloom.kernels import registry

from . import nets

PAGE = Path(__file__).resolve().parents[1] / "docs" / "pointwise.md"
UPDATE = "run: CONVLOOM_UPDATE_GOLDEN=1 pytest tests/test_pointwise_table.py -m slow"
HEAD = """# Pointwise functions

Every overload of ATen that torch marks as pointwise, but for those that write into their
arguments (torch.export replaces them by these). *kernel*: captured as the op of that name, alone or
as a stage of another kernel; some refuse arguments by name (division with a rounding mode). *taken
apart*: made of others while the module is captured. Whatever is refused runs with
`fallback="torch"`. This page is written by `tests/test_pointwise_table.py`.

| overload | how |
|---|---|
"""
REASONS = {
    r"(special_(airy|bessel|.*polynomial|i[01]|.*modified|spherical|erfcx|ndtri|zeta)|digamma|erfc"
    r"|erfinv|i0|igamma|lgamma|polygamma)": "a special function; no kernel",
    r"(__.shift__|bitwise|gcd|lcm)": "whole numbers are not computed with",
    r"(angle|conj_physical)": "complex numbers are not computed with",
    r"equal": "is a number of Python, which torch.export cannot trace",
    r"rrelu": "draws random numbers",
    r"frexp": "has two results, one of them whole numbers",
    r"(sinh|cosh|acosh|asinh)": "no kernel; by exp, log and sqrt it overflows before it ends",
    r"(copysign|signbit|nextafter|ldexp|positive)": "no kernel; torch.where and products do it",
}


def rows() -> Iterator[tuple[str, str]]:
    """(overload, what becomes of it)."""
    taken_apart = {**decompositions.own(), **decompositions.table()}
    for name in sorted(dir(torch.ops.aten)):
        packet = getattr(torch.ops.aten, name)
        for kind in getattr(packet, "overloads", list)():
            overload = getattr(packet, kind)
            if torch.Tag.pointwise not in overload.tags or overload._schema.is_mutable:
                continue
            spelt = str(overload)
            if spelt in registry.CAPTURES:
                yield spelt, f"kernel: {registry.CAPTURES[spelt].name}"
            elif overload in taken_apart:
                yield spelt, "taken apart"
            else:
                reasons = [text for known, text in REASONS.items() if re.match(known, name)]
                yield spelt, f"refused: {reasons[0] if reasons else 'no kernel'}"


@pytest.mark.slow
@pytest.mark.skipif(not torch.__version__.startswith("2.13"), reason="written with torch 2.13")
def test_the_table_is_up_to_date() -> None:
    text = HEAD + "".join(f"| `{spelt}` | {how} |\n" for spelt, how in rows())
    if os.environ.get("CONVLOOM_UPDATE_GOLDEN", "0") not in ("", "0"):
        PAGE.write_text(text)
    assert PAGE.read_text() == text, UPDATE


def test_each_refusal_has_a_reason() -> None:
    assert [spelt for spelt, how in rows() if how == "refused: no kernel"] == []


NAN = float("nan")
MADE: dict[str, Callable[..., Any]] = {
    "acos": lambda m, x, y: torch.acos(x.tanh()),
    "asin": lambda m, x, y: torch.asin(x.tanh()),
    "atanh": lambda m, x, y: torch.atanh(x.tanh() * 0.75),
    "exp2": lambda m, x, y: torch.exp2(x),
    "fmax": lambda m, x, y: torch.fmax(torch.where(x > 1, NAN, x), y),
    "fmin": lambda m, x, y: torch.fmin(x, torch.where(y > 1, NAN, y)),
    "frac": lambda m, x, y: (x.sin() * 0.5).frac(),
    "hypot": lambda m, x, y: torch.hypot(x * 300, y * 200),
    "log2": lambda m, x, y: torch.log2(x.abs() + 0.1),
    "log10": lambda m, x, y: torch.log10(x.abs() + 0.1),
    "logaddexp": lambda m, x, y: torch.logaddexp(x, y),
    "tan": lambda m, x, y: torch.tan(x.tanh()),
    "xlogy": lambda m, x, y: torch.xlogy(x, y.abs() + 0.5),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", MADE)
def test_functions_that_are_made_of_others(name: str) -> None:
    module, inputs = nets.make(MADE[name], (3, 5, 8), (3, 5, 8))
    for dtype in (torch.float32, torch.float16):
        exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
        assert exe.summary["torch_fallbacks"] == 0
        nets.check(exe(*inputs), module, inputs, dtype)
