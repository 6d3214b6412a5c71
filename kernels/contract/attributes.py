"""What an op's attributes have in common."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TypeVar

A = TypeVar("A", bound="Attributes")


@dataclass(frozen=True)
class Attributes:
    """Base of every op's attributes; prints the fields that differ from their defaults."""

    def __str__(self) -> str:
        shown = []
        for item in fields(self):
            value = getattr(self, item.name)
            if value != item.default:
                shown.append(f"{item.name}={_short(value)}")
        return ", ".join(shown)

    def expect(self, kind: type[A]) -> A:
        """Itself, as the attributes of the op that the caller knows it to be of."""
        assert isinstance(self, kind), f"expected {kind.__name__}, got {type(self).__name__}"
        return self


def _short(value: object) -> str:
    if isinstance(value, tuple):
        if value and all(isinstance(item, int) for item in value):
            return "x".join(map(str, value))
        return f"({', '.join(map(_short, value))})"
    if isinstance(value, Attributes):
        return f"({value})"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).removeprefix("torch.")
