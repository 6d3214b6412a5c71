"""Examples and near misses of every rule of the compiler: one file per file of rules.

A file gives `EXAMPLES`, an `Example` for each rule by the rule's name; where several rules have one
name, those after the first are called "name (2)", "name (3)". Files are found by being there.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from ..properties.example import Example, NearMiss


def _collected() -> dict[str, Example]:
    examples: dict[str, Example] = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        module: Any = import_module(f".{path.stem}", __name__) if path.stem != "__init__" else None
        given = getattr(module, "EXAMPLES", {})
        assert not examples.keys() & given.keys(), f"{path}: a second example of one rule"
        examples.update(given)
    return examples


EXAMPLES = _collected()
"""By the name of the rule."""


def example_for(name: str) -> Example:
    """The example of a rule. Raises: LookupError where it has none, with what to do."""
    if name not in EXAMPLES:
        raise LookupError(
            f'rule "{name}" has no example: add "{name}": Example(...) to EXAMPLES in the '
            "file of tests/rules that is named as the rule's file in compiler"
        )
    return EXAMPLES[name]


__all__ = ["EXAMPLES", "Example", "NearMiss", "example_for"]
