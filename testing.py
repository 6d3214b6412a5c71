"""The properties that hold for every op and every fusion, for the tests of an extension:

    from convloom import testing
    from my_package.extension import EXTENSION

    test_extension = testing.tests_of(EXTENSION, DOMAINS, EXAMPLES)

Needs pytest and hypothesis, which `import convloom` does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite(f"{__package__}.tests.properties")

from . import extensions  # noqa: E402
from .errors import ExtensionError  # noqa: E402
from .extensions import Extension  # noqa: E402
from .tests.properties.domain import Domain, domain_of  # noqa: E402
from .tests.properties.example import Example, NearMiss, example  # noqa: E402

__all__ = ["Domain", "Example", "NearMiss", "example", "tests_of"]


def tests_of(
    extension: Extension,
    domains: Mapping[str, Domain] | None = None,
    examples: Mapping[str, Example] | None = None,
    draws: int = 5,
) -> Callable[..., None]:
    """A test for pytest, of all that an extension adds: one parameter for each property of each
    pointwise function, op and fusion. The extension must be installed or registered.

    domains: for each of its ops, by name, where problems are drawn from. examples: for each of its
    fusions, by the rule's name, a module on which it fires, and those on which it must refuse.
    draws: how many problems each property is tried on.

    Raises: ExtensionError where an op has no domain, a fusion no example, or the other way round.
    """
    # Here, because it makes the tables of ops: whoever imports this module may register first.
    from .kernels import registry
    from .tests.properties import ops, rules, scalars

    domains, examples = domains or {}, examples or {}
    if extension not in extensions.loaded():
        raise ExtensionError(
            f"{extension} is not among the extensions of this process: install the package, or "
            "give it to convloom.register before anything is compiled"
        )
    _check_names("domains", "op", domains, [op.name for op in extension.ops])
    _check_names("examples", "fusion", examples, [rule.name for rule in extension.fusions])
    found: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = []
    drawn = {scalar.name: domain_of(scalar) for scalar in extension.scalars} | {**domains}
    for name, domain in drawn.items():
        subject = ops.Subject(registry.get(name), domain)
        found += [(f"{name}-{what}", check, given) for what, check, given in ops.of(subject)]
    for scalar in extension.scalars:
        found.append((f"{scalar.name}-becomes_a_stage", scalars.becomes_a_stage, (scalar,)))
    for rule in extension.fusions:
        of_rule = rules.of(rules.Subject(rule, examples[rule.name]))
        found += [(f"{rule.label}-{what}", check, given) for what, check, given in of_rule]
    profile = settings(
        settings.default,
        max_examples=draws,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )

    @pytest.mark.parametrize(
        ("check", "given"), [pytest.param(check, given, id=name) for name, check, given in found]
    )
    def test(check: Callable[..., None], given: tuple[Any, ...]) -> None:
        drawing = ops.with_draws(check)
        (drawing if drawing is check else profile(drawing))(*given)

    made: Callable[..., None] = test
    return made


def _check_names(argument: str, kind: str, given: Mapping[str, Any], wanted: list[str]) -> None:
    for name in wanted:
        if name not in given:
            raise ExtensionError(f"{argument}: the {kind} {name!r} has none; add one by that name")
    for name in given:
        if name not in wanted:
            raise ExtensionError(f"{argument}: the extension has no {kind} {name!r}")
