"""torch.cuda as far as `compiler/run/cuda_graphs.py` uses it, on the CPU: launches run at once, a
graph runs again what was launched while it was recorded, events are written down, and a launch
outside of the current stream must come after what that stream was given."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from convloom.compiler.graph.memory import Memory
from convloom.compiler.plan.plan import KernelStep, Plan
from convloom.compiler.run import runtime
from convloom.compiler.run.cuda_graphs import Action, GraphRunner
from convloom.compiler.run.executable import Executable
from convloom.kernels.devices import execute, interpreter


class FakeCuda:
    """What was asked of the device."""

    def __init__(self) -> None:
        self.recorded: list[Callable[[], None]] | None = None
        self.waits: list[Any] = []
        self.emptied = 0
        self.synchronize_error: Exception | None = None
        self.first: Any = None
        self.stream: Any = None

    def install(self, patch: pytest.MonkeyPatch) -> None:
        """Puts it in the place of torch.cuda."""
        cuda = self

        class Stream:
            def __init__(self) -> None:
                self.waited: list[Any] = []

            def wait_stream(self, other: Any) -> None:
                self.waited.append(other)

            def wait_event(self, event: Any) -> None:
                cuda.waits.append(event)

            def record_event(self) -> object:
                return object()

        class Graph:
            def __init__(self) -> None:
                self.actions: list[Callable[[], None]] = []

            def replay(self) -> None:
                for action in self.actions:
                    action()

        @contextmanager
        def graph(recorder: Graph) -> Iterator[None]:
            cuda.recorded = recorder.actions
            yield
            cuda.recorded = None

        @contextmanager
        def stream(chosen: Stream) -> Iterator[None]:
            before, cuda.stream = cuda.stream, chosen
            try:
                yield
            finally:
                cuda.stream = before

        self.stream = self.first = Stream()
        names = {"Stream": Stream, "CUDAGraph": Graph, "graph": graph, "stream": stream,
                 "current_stream": lambda: self.stream, "synchronize": self._synchronize,
                 "empty_cache": self._empty}  # fmt: skip
        for name, value in names.items():
            patch.setattr(torch.cuda, name, value)

    def _synchronize(self) -> None:
        if self.synchronize_error is not None:
            raise self.synchronize_error

    def _empty(self) -> None:
        self.emptied += 1

    def bind(self, plan: Plan, memory: Memory) -> list[Action]:
        """The plan's launches, interpreted."""
        return [
            (step.name, partial(self._launch, partial(_interpret, step, launch, memory)))
            for step in plan.steps
            if isinstance(step, KernelStep)
            for launch in step.launches
        ]

    def _launch(self, action: Callable[[], None]) -> None:
        if self.recorded is not None:
            self.recorded.append(action)
            return
        # The memory that it finds was prepared in the first stream.
        assert self.stream is self.first or self.first in self.stream.waited, "not ordered"
        action()


def _interpret(step: KernelStep, launch: Any, memory: Memory) -> None:
    with interpreter.interpreting():
        execute.interpret(launch, lambda ref: memory.flat(step.buffers[ref]), memory.batch)


def on_fake_cuda(exe: Executable, cuda: FakeCuda) -> Executable:
    """An executable of the interpreter, run as one of a GPU is."""
    constants = runtime.constants_on(exe.plan, torch.device("cpu"))
    exe._runner = GraphRunner(exe.plan, constants, partial(cuda.bind, exe.plan))
    return exe
