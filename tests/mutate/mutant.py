"""A mutant: the project with a small change of one file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Mutant:
    """One changed file.

    function: the qualified name around the change, empty at the top of a module; before, after: the
    changed lines; code: the whole file; judges_of, lines: the tests that run one of these lines
    (first to last) of this file judge the mutant; is_kernel: whether a jit function is changed.
    """

    file: str
    function: str
    before: str
    after: str
    code: str
    judges_of: str
    lines: tuple[int, int]
    is_kernel: bool = False

    @property
    def key(self) -> str:
        """Stays the same wherever the lines move."""
        return f"{self.file}::{self.function}: {self.before} => {self.after}"


def changed_lines(old: str, new: str) -> tuple[str, str]:
    """The lines that differ, without indentation, as one line before and one after."""
    before, after = old.splitlines(), new.splitlines()
    pairs = zip(before, after, strict=False)
    first = next(index for index, (a, b) in enumerate(pairs) if a != b)
    pairs = zip(before[:first:-1], after[:first:-1], strict=False)
    same = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    if same is None:
        same = min(len(before), len(after)) - first - 1
    return _joined(before[first : len(before) - same]), _joined(after[first : len(after) - same])


def _joined(lines: list[str]) -> str:
    return " ".join(line.strip() for line in lines)


@cache
def order(seed: int, text: str) -> bytes:
    """A place in the order of a seed."""
    return hashlib.sha256(f"{seed} {text}".encode()).digest()
