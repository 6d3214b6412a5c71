"""How tests run here: hypothesis profiles, and every pass checked before and after.

Few examples by default, many with `--hypothesis-profile=thorough`. Draws are random; a failure
prints the smallest failing draw and a `@reproduce_failure` line, and hypothesis replays it first on
the next run.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}
settings.register_profile("quick", max_examples=8, **COMMON)
settings.register_profile("thorough", max_examples=200, **COMMON)
settings.load_profile("quick")


@pytest.fixture(scope="session", autouse=True)
def checked_passes() -> Iterator[None]:
    """Graphs are verified around every pass, whoever compiles."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVLOOM_CHECK", "1")
        yield
