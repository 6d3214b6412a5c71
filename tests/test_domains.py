"""Every op has a domain, and every domain an op."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from pathlib import Path

import convloom
import pytest
from convloom.kernels import registry
from convloom.kernels.contract.op import Op

from . import harness
from .domains import DOMAINS, domain_of

BY_NAME = [pytest.param(op, id=op.name) for op in registry.OPS]


@pytest.mark.parametrize("op", BY_NAME)
def test_every_op_has_a_domain(op: Op) -> None:
    """Its interesting draws are possible, and have every name that its ranges have."""
    domain = domain_of(op)
    for draw in domain.interesting:
        assert domain.ranges.keys() <= draw.keys()
        assert harness.case_of(op, draw) is not None, draw


def test_every_domain_is_that_of_an_op() -> None:
    assert DOMAINS.keys() == {op.name for op in registry.OPS}


def test_an_op_without_a_domain_says_where_to_add_one() -> None:
    with pytest.raises(LookupError) as caught:
        domain_of(replace(registry.get("conv2d"), name="conv7d"))
    assert caught.value.args == (
        'op conv7d has no domain: add "conv7d": Domain(...) to DOMAINS in the file of '
        "tests/domains that is named as the op's file in kernels",
    )


def test_every_file_that_has_ops_is_found() -> None:
    """Whichever folder of kernels it is in, and whether it has one op or several."""
    room = Path(convloom.__file__).parent / "kernels"
    files = [path for path in room.rglob("*.py") if re.search(r"^OPS?\b", path.read_text(), re.M)]
    tables = []
    for path in files:
        name = ".".join(path.relative_to(room.parent).with_suffix("").parts)
        module = vars(importlib.import_module(f"convloom.{name}"))
        tables += [module["OP"]] if "OP" in module else module.get("OPS", ())
    ours = [op for op in registry.OPS if op.name not in registry.OWNERS]
    assert len(files) > 30 and len(tables) == len(ours)
    assert {id(op) for op in tables} == {id(op) for op in ours}
