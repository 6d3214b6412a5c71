"""Where contenders run and how their time is taken: the GPU by events, the CPU by the wall clock.

On the GPU a sample is one call between two events. The device is kept busy while the host enqueues
it, so that the time is the device's and not the host's; what the host needs is sampled apart. Cold:
a buffer larger than the L2 cache was written just before. Warm: the same call ran just before.
"""

from __future__ import annotations

import gc
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from convloom.compiler.tuning.cuda import driver_version

Call = Callable[[], Any]
FLUSH_FACTOR = 4
"""The buffer that displaces everything else is so many times as large as the L2 cache."""
BUSY_CYCLES = 300_000
"""About 170 us on an H200: longer than the host needs to enqueue any contender's graph."""
CLOCKS = (
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu",
)  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One call, in microseconds. warm_us: None where there is no cache to speak of."""

    cold_us: float
    warm_us: float | None
    host_us: float | None


class Device(Protocol):
    """Something contenders run on. kind: "cuda" or "cpu"; name: as reports call it."""

    kind: str
    name: str

    @property
    def place(self) -> torch.device:
        """Where tensors lie."""
        ...

    def sample(self, call: Call) -> Sample:
        """Times one call."""
        ...

    def reset_peak(self) -> None:
        """Starts counting memory anew."""
        ...

    def peak_mb(self) -> float | None:
        """Megabytes allocated at most since `reset_peak`, beyond what was then; None: unknown."""
        ...

    def kernels_of(self, call: Call) -> int | None:
        """Kernels that one call launches; None: unknown."""
        ...

    def free(self) -> None:
        """Gives back what nobody holds any more."""
        ...


class Cpu:
    """The wall clock: what it says holds for this CPU, and says nothing about a GPU."""

    kind = "cpu"

    def __init__(self) -> None:
        self.name = f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"

    @property
    def place(self) -> torch.device:
        return torch.device("cpu")

    def sample(self, call: Call) -> Sample:
        """One call; caches are as they happen to be."""
        start = time.perf_counter()
        call()
        return Sample((time.perf_counter() - start) * 1e6, None, None)

    def reset_peak(self) -> None:
        """Nothing to count."""

    def peak_mb(self) -> float | None:
        """Unknown: torch does not count memory on the CPU."""
        return None

    def kernels_of(self, call: Call) -> int | None:
        """Unknown: what runs here are no kernels."""
        return None

    def free(self) -> None:
        """Collects what is unreachable."""
        gc.collect()


class Cuda:
    """The current CUDA device."""

    kind = "cuda"

    def __init__(self) -> None:
        self._place = torch.device("cuda", torch.cuda.current_device())
        properties: Any = torch.cuda.get_device_properties(self._place)
        self.name: str = properties.name
        cache_bytes = int(getattr(properties, "L2_cache_size", 0)) or (50 << 20)
        self._flush = torch.empty(FLUSH_FACTOR * cache_bytes, dtype=torch.uint8, device=self._place)
        self._before = 0

    @property
    def place(self) -> torch.device:
        return self._place

    def sample(self, call: Call) -> Sample:
        """One call with a cold cache, one with a warm one, and the host's share of a call."""
        cold = self._timed(self._flush.zero_, call)
        warm = self._timed(call, call)
        start = time.perf_counter()
        call()
        host = (time.perf_counter() - start) * 1e6
        torch.cuda.synchronize()
        return Sample(cold, warm, host)

    def _timed(self, prepare: Call, call: Call) -> float:
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        prepare()
        torch.cuda._sleep(BUSY_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        call()
        stop.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(stop)) * 1e3

    def reset_peak(self) -> None:
        """Starts from what is allocated now."""
        torch.cuda.synchronize()
        self._before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

    def peak_mb(self) -> float | None:
        """Of PyTorch's allocator, weights and graph pools included."""
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - self._before) / 1e6

    def kernels_of(self, call: Call) -> int | None:
        """Counted by the profiler where it works; the driver's copies and fills are no kernels."""
        from torch.profiler import ProfilerActivity, profile

        try:
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                call()
                torch.cuda.synchronize()
        except (RuntimeError, AssertionError):  # Not allowed to: the contender can still be timed.
            return None
        names = [event.name for event in seen.events() if event.device_type.name == "CUDA"]
        return sum(not name.startswith(("Memcpy", "Memset")) for name in names) or None

    def free(self) -> None:
        """Empties the allocator's cache."""
        gc.collect()
        torch.cuda.empty_cache()


def gpu_state() -> dict[str, str]:
    """Driver, clocks and power limit as nvidia-smi tells them; empty where there is no GPU."""
    program = shutil.which("nvidia-smi")
    if program is None or not torch.cuda.is_available():
        return {}
    command = [program, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return {"driver": driver_version()}
    first = (done.stdout.splitlines() or [""])[0]
    values = [value.strip() for value in first.split(",")]
    return {"driver": driver_version(), **dict(zip(CLOCKS, values, strict=False))}
