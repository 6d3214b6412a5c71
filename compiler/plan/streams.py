"""Runs the launches of a plan in several streams, with events where one must wait for another.

Captured into a CUDA graph, streams and events become nothing but the edges of the graph. Nothing
here knows of kernels; who may run beside whom is decided in `branches.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

import torch

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
        """How many streams there are."""
        return max(self.streams, default=0) + 1

    @property
    def events(self) -> frozenset[int]:
        """The steps that some other step waits for."""
        return frozenset(step for waited in self.waits for step in waited)


class Streams(Protocol):
    """Numbered streams; 0 is the one in which everything begins and ends."""

    def on(self, stream: int) -> AbstractContextManager[Any]:
        """Launches inside go to the stream."""
        ...

    def record(self, stream: int) -> Any:
        """An event after what the stream was given so far."""
        ...

    def wait(self, stream: int, event: Any) -> None:
        """What the stream is given from now on comes after the event."""
        ...


class TorchStreams:
    """Streams of this machine's GPU; stream 0 is the current one."""

    def __init__(self, count: int) -> None:
        make: Any = torch.cuda.Stream
        self._streams = [torch.cuda.current_stream(), *(make() for _ in range(count - 1))]

    def on(self, stream: int) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._streams[stream])

    def record(self, stream: int) -> Any:
        make: Any = torch.cuda.Event
        event = make()
        event.record(self._streams[stream])
        return event

    def wait(self, stream: int, event: Any) -> None:
        self._streams[stream].wait_event(event)


def play(actions: Sequence[Action], schedule: Schedule, streams: Streams) -> None:
    """Gives every launch to its step's stream; stream 0 is behind all of them at the end."""
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
