"""Calls without a kernel of their own that torch takes apart into calls with kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.capture import decompositions
from torch.export import exported_program

from . import nets

SHAPE = (2, 6, 5, 4)
CALLS: dict[str, Callable[..., Any]] = {
    "aminmax": lambda m, x, y: torch.aminmax(x, dim=1),
    "binary_cross_entropy_with_logits": lambda m, x, y: F.binary_cross_entropy_with_logits(
        x, y.sigmoid(), reduction="none"
    ),
    "diff": lambda m, x, y: x.diff(dim=1),
    "l1_loss": lambda m, x, y: F.l1_loss(x, y, reduction="none").mean((1, 2, 3)),
    "nansum": lambda m, x, y: (x / x.relu()).nansum(1),
    "outer": lambda m, x, y: torch.einsum("nc,nd->ncd", x[:, :, 0, 0], y[:, :, 0, 0]),
    "smooth_l1_loss": lambda m, x, y: F.smooth_l1_loss(x, y, reduction="none"),
    "tensordot": lambda m, x, y: torch.tensordot(x, m.linear.weight, dims=([3], [1])),
    "trapezoid": lambda m, x, y: torch.trapezoid(x, dim=2),
    "tril": lambda m, x, y: x.tril() + y.triu(1),
}


@pytest.mark.interpreter
@pytest.mark.parametrize("name", CALLS)
def test_calls_that_torch_takes_apart(name: str) -> None:
    module, inputs = nets.make(CALLS[name], SHAPE, SHAPE, linear=torch.nn.Linear(4, 3))
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 2))
    assert exe.summary["torch_fallbacks"] == 0
    for batch in (1, 2):
        given = tuple(x[:batch] for x in inputs)
        nets.check(exe(*given), module, given)


def test_what_torch_takes_apart_into_effects_is_refused_by_name() -> None:
    """The error where a matrix has no inverse is none of a dataflow graph."""
    module, inputs = nets.make(lambda m, x: torch.inverse(x), (2, 3, 3))
    with pytest.raises(convloom.UnsupportedOpError, match=r"aten\.linalg_inv"):
        convloom.compile(module, inputs, target="reference")


def test_other_tables_are_torchs_while_a_program_is_traced_again() -> None:
    """Another thread may be tracing for itself, with a table of its own."""
    torchs = exported_program._split_decomp_table_to_cia_and_python_decomp

    class Program:
        def run_decompositions(self, table: Any) -> Any:
            split = exported_program._split_decomp_table_to_cia_and_python_decomp
            return split(dict(table)), split({})

    (composites, others), own = decompositions.trace_again(Program())
    assert exported_program._split_decomp_table_to_cia_and_python_decomp is torchs
    assert own[0].keys() == torchs({})[0].keys() > composites.keys() and not own[1]
    assert torch.ops.aten.conv2d.default in composites
    assert torch.ops.aten.select_scatter.default in others
