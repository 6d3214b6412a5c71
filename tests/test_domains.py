"""Every op has a domain, and every domain an op."""

from __future__ import annotations

from dataclasses import replace

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
