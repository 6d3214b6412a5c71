"""Shape rules refuse what does not fit, for every op of the registry."""

from __future__ import annotations

from typing import Any

import pytest
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.op import Op
from hypothesis import given, settings
from hypothesis import strategies as st

from . import harness

PRIME = 97
"""A size that no domain has."""
ANY_WIDTH = {
    "conv_transpose2d": "a filter may have any width",
    "conv_transpose3d": "a filter may have any width",
    "concat": "parts may differ along the dimension that joins them",
    "bmm": "the second factor may have any number of columns",
    "gather": "any number of places may be named along the dimension that is searched",
}
POINTWISE = {op.name for op in registry.OPS if op.attributes.__name__ == "Pointwise"}


@pytest.mark.parametrize("op", registry.OPS, ids=lambda op: op.name)
@settings(max_examples=10)
@given(data=st.data())
def test_an_input_of_another_width_is_refused(op: Op, data: Any) -> None:
    """Weights and the operands of stages inside an op: whatever is read beside the image."""
    if op.name in ANY_WIDTH or op.name in POINTWISE:
        return  # These broadcast.
    case = data.draw(harness.cases(op))
    for at in range(1, len(case.specs)):
        spec = case.specs[at]
        other = spec.with_(shape=(*spec.shape[:-1], PRIME))
        specs = (*case.specs[:at], other, *case.specs[at + 1 :])
        with pytest.raises(InvalidInputError):
            op.infer(case.attributes, specs)
