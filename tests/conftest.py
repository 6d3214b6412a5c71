"""How hypothesis runs here: few examples by default, many with `--hypothesis-profile=thorough`.

Draws are random; a failure prints the smallest failing draw and a `@reproduce_failure` line, and
hypothesis replays it first on the next run.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

COMMON = {
    "deadline": None,
    "print_blob": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.filter_too_much],
}
settings.register_profile("quick", max_examples=10, **COMMON)
settings.register_profile("thorough", max_examples=200, **COMMON)
settings.load_profile("quick")
