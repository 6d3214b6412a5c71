"""What tests of ops share (`properties/harness.py`, which is shipped), with the domains of ours."""

from __future__ import annotations

from typing import Any

import torch
from convloom.kernels.contract.op import Op
from hypothesis import strategies as st

from .domains import domain_of
from .properties import harness
from .properties.harness import *  # noqa: F403
from .properties.harness import Case


def case_of(op: Op, draw: Any, dtype: torch.dtype = torch.float32) -> Case | None:
    """The case behind one draw of the op's domain, or None where the draw is impossible."""
    return harness.case_of(op, domain_of(op), draw, dtype)


def cases(op: Op, dtype: torch.dtype = torch.float32) -> st.SearchStrategy[Case]:
    """A strategy over the op's domain."""
    return harness.cases(op, domain_of(op), dtype)
