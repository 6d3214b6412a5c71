"""What must be ordered: steps that touch the same memory, one of them writing; and launches in
several CUDA streams, with events where one must wait for another.

The same memory is the same part of one buffer, or buffers that lie on the same bytes of an arena.
The parts of a concatenation that is written in place are disjoint although they alternate in
memory: its branches stay independent. Captured into a CUDA graph, streams and events become nothing
but the edges of the graph. Nothing here knows of kernels or plans: what steps touch may come from a
plan that was just made (`branches.py`, which decides who may run beside whom) or from a file
(`artifact/`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from ...kernels.contract.spec import Operand
from ..graph.memory import Buffer

Action = tuple[str, Callable[[], None]]
"""The name of a step, and one of its launches as a call without arguments."""


@dataclass(frozen=True)
class Schedule:
    """For each step of a plan, in order: its stream, the earlier steps of other streams whose
    events it waits for, and how many launches it has."""

    streams: tuple[int, ...]
    waits: tuple[tuple[int, ...], ...]
    launches: tuple[int, ...]

    @property
    def count(self) -> int:
        return max(self.streams, default=0) + 1

    @property
    def events(self) -> frozenset[int]:
        """The steps that some other step waits for."""
        return frozenset(step for waited in self.waits for step in waited)


MOST_STREAMS = 4
"""As many as the branches of an Inception module."""
ARENAS = ("arena", "fixed")


@dataclass(frozen=True)
class Touch:
    """What a step reads or writes; operand: which part of the buffer, None for all of it."""

    buffer: str
    writes: bool
    operand: Operand | None = None


Overlap = Callable[[Touch, Touch], bool]
"""Whether two touches may reach the same bytes."""


def overlap_in_buffer(one: Touch, other: Touch) -> bool:
    """Whether they touch the same part of one buffer, wherever buffers lie."""
    if one.buffer != other.buffer:
        return False
    return one.operand is None or other.operand is None or not _apart(one.operand, other.operand)


def _apart(one: Operand, other: Operand) -> bool:
    """Whether two parts of a buffer share no element, as far as offsets and pitches show it."""
    if one.extent <= other.offset or other.extent <= one.offset:
        return True
    if one.pitch != other.pitch:
        return False
    (start, end), (begin, stop) = (_columns(operand) for operand in (one, other))
    within = max(end, stop) <= one.pitch
    return within and (end <= begin or stop <= start)


def _columns(operand: Operand) -> tuple[int, int]:
    """The elements of each row of its buffer that an operand covers: first and past-the-end."""
    spec = operand.spec
    row = spec.shape[spec.layout.order(spec.rank)[-1]] if spec.rank else 1
    start = operand.offset % operand.pitch
    return start, start + row


def overlap_in_memory(buffers: Mapping[str, Buffer]) -> Overlap:
    """The overlap of touches of buffers that have been placed.

    Places and sizes of what scales with the batch do so together: the largest stands for all.
    """

    def overlap(one: Touch, other: Touch) -> bool:
        if one.buffer == other.buffer:
            return overlap_in_buffer(one, other)
        a, b = buffers[one.buffer], buffers[other.buffer]
        if a.kind != b.kind or a.kind not in ARENAS:
            return False
        return a.offset < b.offset + b.size_bytes and b.offset < a.offset + a.size_bytes

    return overlap


def dependencies(steps: Sequence[Sequence[Touch]], overlap: Overlap) -> tuple[int, ...]:
    """For each step the earlier ones it must follow, as bits, whatever is implied by others
    included."""
    followed: list[int] = []
    for at, mine in enumerate(steps):
        before = 0
        # The latest first: what they follow need not be looked at.
        for earlier in reversed(range(at)):
            if not before >> earlier & 1 and any(
                (one.writes or other.writes) and overlap(one, other)
                for one in mine
                for other in steps[earlier]
            ):
                before |= followed[earlier] | 1 << earlier
        followed.append(before)
    return tuple(followed)


def waits(before: Sequence[int], chosen: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For each step the steps of other streams to wait for: those that nothing else implies."""
    last: dict[int, int] = {}
    complete_at: list[int] = []  # For each step what is complete when it starts, as bits.
    awaited: list[tuple[int, ...]] = []
    for step, stream in enumerate(chosen):
        complete = 0
        if stream in last:
            complete = complete_at[last[stream]] | 1 << last[stream]
        needed = []
        for earlier in reversed(range(step)):
            if before[step] >> earlier & 1 and not complete >> earlier & 1:
                needed.append(earlier)
                complete |= complete_at[earlier] | 1 << earlier
        last[stream] = step
        complete_at.append(complete)
        awaited.append(tuple(reversed(needed)))
    return tuple(awaited)


def scheduled(
    streams: Sequence[int],
    steps: Sequence[Sequence[Touch]],
    buffers: Mapping[str, Buffer],
    launches: tuple[int, ...],
) -> Schedule | None:
    """How steps in the given streams wait for each other, from what they touch; None for a plan in
    one stream. launches: how many each step has."""
    if not streams:
        return None
    before = dependencies(steps, overlap_in_memory(buffers))
    return Schedule(tuple(streams), waits(before, streams), launches)


# Launching.


class TorchStreams:
    """Numbered streams of this machine's GPU; 0 is the current one, in which everything begins and
    ends."""

    def __init__(self, count: int) -> None:
        make: Any = torch.cuda.Stream
        self._streams = [torch.cuda.current_stream(), *(make() for _ in range(count - 1))]

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """Launches inside go to the stream."""
        return torch.cuda.stream(self._streams[stream])

    def record(self, stream: int) -> Any:
        """An event after what the stream was given so far."""
        return self._streams[stream].record_event()

    def wait(self, stream: int, event: Any) -> None:
        """What the stream is given from now on comes after the event."""
        self._streams[stream].wait_event(event)


def play(actions: Sequence[Action], schedule: Schedule, streams: Any) -> None:
    """Gives every launch to its step's stream; stream 0 is behind all of them at the end. streams:
    as `TorchStreams`."""
    sides = range(1, schedule.count)
    start = streams.record(0)
    for side in sides:
        streams.wait(side, start)
    remaining = iter(actions)
    events: dict[int, Any] = {}
    for step, stream in enumerate(schedule.streams):
        for waited in schedule.waits[step]:
            streams.wait(stream, events[waited])
        with streams.on(stream):
            for _, action in islice(remaining, schedule.launches[step]):
                action()
        if step in schedule.events:
            events[step] = streams.record(stream)
    for side in sides:
        streams.wait(0, streams.record(side))
