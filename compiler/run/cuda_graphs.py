"""Replays a list of launches as one CUDA graph per batch, whoever made the launches: kernels that
were compiled in this process (`runtime.py`), or loaded from a file (`artifact/device.py`)."""

from __future__ import annotations

import traceback
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Protocol

import torch

from ...errors import KernelError
from ...kernels.devices.language import forkable_lock
from ..graph.interface import Port
from ..graph.memory import Buffered, Memory
from ..plan.streams import Action, Schedule, TorchStreams, play

GRAPHS_KEPT = 8
"""CUDA graphs kept under a dynamic batch; the least recently used one goes first."""

QUEUEING_CYCLES = 50_000_000
"""About 30 ms: longer than the host takes to queue the launches of any network of the zoo."""


class Ported(Buffered, Protocol):
    """A plan, or the program of a saved executable."""

    @property
    def inputs(self) -> tuple[Port, ...]: ...

    @property
    def outputs(self) -> tuple[Port, ...]: ...


class GraphRunner:
    """Runs a plan on this machine's GPU; `bind` gives its launches on some memory, in order.

    schedule: how they are spread over streams inside the CUDA graph; None: all in one.

    One thread at a time, the others wait; and on the device a call waits for the one before, which
    another thread may have queued on a stream of its own. After a fault of the device the runner is
    dead: every CUDA call of the process fails from then on.
    """

    def __init__(
        self,
        plan: Ported,
        constants: Mapping[str, torch.Tensor],
        bind: Callable[[Memory], Sequence[Action]],
        schedule: Schedule | None = None,
    ) -> None:
        self._plan, self._constants, self._bind = plan, constants, bind
        self._schedule = schedule
        self._graphs: OrderedDict[int, _CapturedPlan] = OrderedDict()
        self._lock = forkable_lock()
        self._before: Any = None
        self._dead = ""

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def run(self, inputs: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
        """The outputs, owned by the caller.

        Raises: KernelError where the GPU has not enough memory (what was taken is given back, and
        the next call may work), or where it has failed (none will).
        """
        with self._lock, self._watched(f"batch {batch}"):
            if self._before is not None:
                torch.cuda.current_stream().wait_event(self._before)
            captured = self._graphs.pop(batch, None) or self._capture(batch)
            self._graphs[batch] = captured
            while len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)
            outputs = captured.replay(inputs)
            self._before = torch.cuda.current_stream().record_event()
            return outputs

    def _capture(self, batch: int) -> _CapturedPlan:
        """The plan in memory of its own for a batch."""
        device = None if self._constants else self.device
        memory = Memory(self._plan, self._constants, batch, device)
        return _CapturedPlan(self._plan, self._bind(memory), memory, self._schedule)

    @contextmanager
    def _watched(self, call: str) -> Iterator[None]:
        """Turns what goes wrong on the device into a KernelError that says what to do."""
        if self._dead:
            raise KernelError(self._dead)
        try:
            yield
        except torch.OutOfMemoryError as error:
            kept = len(self._graphs)
            self._graphs.clear()
            # The frames of the failed call hold the memory that it had got.
            traceback.clear_frames(error.__traceback__)
            torch.cuda.empty_cache()
            raise KernelError(
                f"{call} needs more GPU memory than there is: {error}; {kept} other batches "
                "kept by this executable were dropped, call it again or with a smaller batch"
            ) from error
        except RuntimeError as error:
            if not _is_fault(error):
                raise
            where = f"in {error.step}" if isinstance(error, _StepError) else "in one of its kernels"
            shapes = ", ".join(f"{port.name} {port.spec}" for port in self._plan.inputs)
            self._dead = (
                f"the GPU failed {where}, {call}, inputs {shapes}: {error}. Every CUDA call of "
                "this process fails from now on: restart the process. This executable is dead"
            )
            self._graphs.clear()
            raise KernelError(self._dead) from error

    def time_steps(self, inputs: Sequence[torch.Tensor], batch: int) -> list[tuple[str, float]]:
        """(step, microseconds) for each step launched by itself, outside the CUDA graph.

        Raises: KernelError as `run` does.
        """
        with self._lock, self._watched(f"batch {batch}"):
            return self._capture(batch).time_steps(inputs)


FAULTS = (
    "illegal memory access", "illegal_address", "misaligned address", "misaligned_address",
    "illegal instruction", "illegal_instruction", "invalid program counter", "device-side assert",
    "unspecified launch failure", "launch_failed", "hardware stack error", "uncorrectable ecc",
    "invalid address space", "mmu fault",
)  # fmt: skip
"""Words of the errors after which a CUDA context is of no more use, as torch, Triton and the driver
tell them."""


class _StepError(RuntimeError):
    """A device error while one step ran by itself."""

    def __init__(self, step: str, error: Exception) -> None:
        super().__init__(str(error).strip().partition("\n")[0])
        self.step = step


def _is_fault(error: Exception) -> bool:
    text = str(error).lower()
    return any(words in text for words in FAULTS)


class _CapturedPlan:
    """A plan bound to memory, recorded into a CUDA graph."""

    def __init__(
        self, plan: Ported, actions: Sequence[Action], memory: Memory, schedule: Schedule | None
    ) -> None:
        self._plan, self._memory, self._actions = plan, memory, actions
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        # Modules load, and torch ops of fallback steps warm up, outside the capture. Each launch is
        # waited for, once: an error of the device is told by whatever waits for it, and nothing of
        # the stream is left to wait for.
        with torch.cuda.stream(stream):
            for name, action in self._actions:
                try:
                    action()
                    torch.cuda.synchronize()
                except torch.OutOfMemoryError:
                    raise
                except (RuntimeError, KernelError) as error:
                    if _is_fault(error):
                        raise _StepError(name, error) from error
                    raise
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            if schedule is not None:
                play(self._actions, schedule, TorchStreams(schedule.count))
                return
            for _, action in self._actions:
                action()

    def _load(self, inputs: Sequence[torch.Tensor]) -> None:
        for port, tensor in zip(self._plan.inputs, inputs, strict=True):
            self._memory.view(port.place).copy_(tensor)

    def replay(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._load(inputs)
        self._graph.replay()
        return [self._memory.view(port.place).clone() for port in self._plan.outputs]

    def time_steps(self, inputs: Sequence[torch.Tensor]) -> list[tuple[str, float]]:
        self._load(inputs)
        make: Any = torch.cuda.Event
        start, *ends = (make(enable_timing=True) for _ in range(len(self._actions) + 1))
        # The GPU waits until every launch is queued: otherwise the host's own time is measured.
        torch.cuda._sleep(QUEUEING_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        for (_, action), event in zip(self._actions, ends, strict=True):
            action()
            event.record()
        torch.cuda.synchronize()
        pairs = zip(self._actions, pairwise((start, *ends)), strict=True)
        return [(name, one.elapsed_time(other) * 1e3) for (name, _), (one, other) in pairs]
