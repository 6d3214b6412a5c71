"""The fusions of extensions, checked: what they may not be is refused by the extension's name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ... import extensions
from ...errors import ExtensionError
from ...kernels import registry
from .pattern import Rule

RULES: tuple[Rule, ...] = tuple(
    rule for extension in extensions.loaded() for rule in extension.fusions
)
REWRITES = tuple(rule for rule in RULES if isinstance(rule, Rule) and rule.build is None)
"""Applied before everything else: what is recognised as another op."""
PROPOSALS = tuple(rule for rule in RULES if isinstance(rule, Rule) and rule.build is not None)
"""Among which, and ours, the partition chooses."""


def check(names: Iterable[str], labels: Iterable[str]) -> None:
    """Refuses rules that clash with ours, of these names and labels, or with one another's.

    Raises: ExtensionError.
    """
    taken, used = {*names}, dict.fromkeys(labels, "convloom")
    for extension in extensions.loaded():
        for rule in extension.fusions:
            for problem in _faults(rule):
                raise ExtensionError(
                    f"the extension {extension}: {problem}. {extensions.LEAVE_OUT}"
                )
            owner = used.setdefault(rule.label, extension.name) if rule.label else extension.name
            if rule.name in taken or owner != extension.name:
                what = f"label {rule.label!r}" if owner != extension.name else f"rule {rule.name!r}"
                raise ExtensionError(
                    f"the extension {extension}: there is a fusion of {what} already; choose "
                    f"another. {extensions.LEAVE_OUT}"
                )
            taken.add(rule.name)


def _faults(rule: Rule) -> Iterator[str]:
    if not isinstance(rule, Rule):
        yield f"fusions: expected Rules, got {type(rule).__name__}"
        return
    if " => " not in rule.name:
        yield f"{rule.name!r}: expected an equation, 'f(g(x)) => h(x)', as the name of a fusion"
    if (rule.rewrite is None) == (rule.build is None):
        yield f"{rule.name!r}: expected a rewrite or a build, got {_both(rule)}"
    if rule.build is not None and not rule.label:
        yield f"{rule.name!r}: expected a label, by which users force and forbid it"
    for name in rule.pattern.ops:
        if name not in registry.BY_NAME and "." not in name:
            yield f"{rule.name!r}: there is no op {name!r}"


def _both(rule: Rule) -> str:
    return "neither" if rule.build is None else "both"
