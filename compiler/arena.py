"""Places buffers whose lifetimes do not overlap on the same memory.

Greedy by size (Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020):
the largest buffer first, each at the lowest offset where it disturbs no buffer alive at the same
time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from .memory import Buffer


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


def place(buffers: dict[str, Buffer], first: Mapping[str, int], last: Mapping[str, int]) -> int:
    """Gives the arena buffers their offsets; the size of all arenas at the largest batch.

    first, last: the steps between which each is alive. Under a dynamic batch, buffers that do not
    scale with it ("fixed") have an arena of their own, so that offsets in the other one scale too.
    """
    dynamic = any(buffer.batch is not None for buffer in buffers.values())
    total = 0
    for kind in ("arena", "fixed"):
        members = [
            buffer
            for buffer in buffers.values()
            if buffer.kind == "arena"
            and ("fixed" if dynamic and buffer.batch is None else "arena") == kind
        ]
        lifetimes = {b.name: Lifetime(b.size_bytes, first[b.name], last[b.name]) for b in members}
        offsets, size = allocate(lifetimes)
        for buffer in members:
            buffers[buffer.name] = replace(buffer, kind=kind, offset=offsets[buffer.name])
        total += size
    return total
