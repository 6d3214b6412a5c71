"""Places buffers whose lifetimes do not overlap on the same memory.

Greedy by size (Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020):
the largest buffer first, each at the lowest offset where it disturbs no buffer alive at the same
time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetime:
    """A buffer's size and the first and last step that touch it (both inclusive)."""

    size: int
    first: int
    last: int


def allocate(lifetimes: Mapping[str, Lifetime]) -> tuple[dict[str, int], int]:
    """Offsets by name, and the size of the arena. Sizes must already be aligned."""
    placed: list[tuple[int, int, Lifetime]] = []
    offsets: dict[str, int] = {}
    order = sorted(lifetimes, key=lambda name: (-lifetimes[name].size, lifetimes[name].first, name))
    for name in order:
        wanted = lifetimes[name]
        offset = 0
        for start, end, other in placed:
            overlaps = other.first <= wanted.last and wanted.first <= other.last
            if overlaps and start < offset + wanted.size and offset < end:
                offset = end
        offsets[name] = offset
        placed.append((offset, offset + wanted.size, wanted))
        placed.sort(key=lambda item: item[:2])
    total = max((offset + lifetimes[name].size for name, offset in offsets.items()), default=0)
    return offsets, total
