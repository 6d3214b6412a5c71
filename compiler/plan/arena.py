"""Places buffers whose lifetimes do not overlap on the same memory.

Greedy by size (Pisarchyk & Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020):
the largest buffer first, each at the lowest offset where it disturbs no buffer alive at the same
time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..graph.memory import Buffer

Together = Callable[[str, str], bool]
"""Whether two buffers must not share memory."""


@dataclass(frozen=True)
class Lifetime:
    """A buffer's size and the first and last step that touch it (both inclusive)."""

    size: int
    first: int
    last: int


def allocate(
    lifetimes: Mapping[str, Lifetime], together: Together | None = None
) -> tuple[dict[str, int], int]:
    """Offsets by name, and the size of the arena. Sizes must already be aligned.

    together: for steps that do not follow each other in one line; else lifetimes tell.
    """

    neighbours = {} if together else _alive_together(lifetimes)
    offsets: dict[str, int] = {}
    order = sorted(lifetimes, key=lambda name: (-lifetimes[name].size, lifetimes[name].first, name))
    for name in order:
        if together is None:
            near = (other for other in neighbours[name] if other in offsets)
        else:
            near = (other for other in offsets if together(name, other))
        size, offset = lifetimes[name].size, 0
        for start, other_size in sorted((offsets[other], lifetimes[other].size) for other in near):
            if start >= offset + size:
                break
            offset = max(offset, start + other_size)
        offsets[name] = offset
    total = max((offset + lifetimes[name].size for name, offset in offsets.items()), default=0)
    return offsets, total


def _alive_together(lifetimes: Mapping[str, Lifetime]) -> dict[str, list[str]]:
    """For each buffer those that are alive at some step at which it is."""
    neighbours: dict[str, list[str]] = {name: [] for name in lifetimes}
    alive: list[str] = []
    for name in sorted(lifetimes, key=lambda name: lifetimes[name].first):
        alive = [other for other in alive if lifetimes[other].last >= lifetimes[name].first]
        for other in alive:
            neighbours[name].append(other)
            neighbours[other].append(name)
        alive.append(name)
    return neighbours


def place(
    buffers: dict[str, Buffer],
    steps: Sequence[Collection[str]],
    kept: Collection[str],
    together: Together | None = None,
) -> int:
    """Gives the arena buffers their offsets; the size of all arenas at the largest batch.

    steps: the buffers that each touches, between the first and last of which a buffer is alive;
    kept: those that are read afterwards. Under a dynamic batch, buffers that do not
    scale with it ("fixed") have an arena of their own, so that offsets in the other one scale too.
    """
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    for position, touched in enumerate(steps):
        for name in touched:
            first.setdefault(name, position)
            last[name] = position
    for name in kept:
        first.setdefault(name, 0)
        last[name] = len(steps)
    dynamic = any(buffer.batch is not None for buffer in buffers.values())
    total = 0
    for kind in ("arena", "fixed"):
        members = [
            buffer for buffer in buffers.values() if buffer.kind == "arena"
            and (dynamic and buffer.batch is None) == (kind == "fixed")
        ]  # fmt: skip
        lifetimes = {b.name: Lifetime(b.size_bytes, first[b.name], last[b.name]) for b in members}
        offsets, size = allocate(lifetimes, together)
        for buffer in members:
            buffers[buffer.name] = replace(buffer, kind=kind, offset=offsets[buffer.name])
        total += size
    return total
