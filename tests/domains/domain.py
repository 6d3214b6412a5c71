"""What a domain of an op is (`properties/domain.py`, which is shipped)."""

from ..properties.domain import Domain as Domain
