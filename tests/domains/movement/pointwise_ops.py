"""Problems of `kernels/movement/pointwise_ops.py` for the tests."""

from __future__ import annotations

from convloom.kernels.contract.scalars import SCALARS

from ...properties.domain import domain_of

DOMAINS = {scalar.name: domain_of(scalar) for scalar in SCALARS}
