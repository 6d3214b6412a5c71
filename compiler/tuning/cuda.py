"""Verifies and times configurations on this machine's GPU.

Times are those of CUDA graphs whose launches take turns over copies of all tensors, weights
included, that together exceed the L2 cache: what a kernel costs inside a network. The same graph on
one copy gives the time with a warm cache. Clocks are left as they are.
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...errors import KernelError
from ...kernels.contract import targets
from ...kernels.contract.op import Config, Launch, Problem
from ...kernels.devices import offline
from ..records import rank
from ..run.runtime import bind_launch
from ..run.workers import PoisonedError
from .bench import Bench, Buffers, Trial, runs_to_verify

CACHE_FACTOR = 2.5
"""Copies of a problem's tensors take together so many times the size of the L2 cache."""
MOST_COPIES = 256
"""Of the tensors of tiny problems: binding and capturing more takes longer than it tells."""
GRAPH_US = 2_000.0
"""A graph replays for at least so long, so that the clock's resolution does not matter."""
MOST_LAUNCHES = 4_000
WARM_UP = 3
REPLAYS = 15

Action = Callable[[], None]


class CudaBackend:
    """The current CUDA device. The process must end after a fault: it ruins the CUDA context."""

    def __init__(self) -> None:
        if targets.local_capability() is None:
            raise KernelError("this machine has no usable NVIDIA GPU")
        self._target = targets.parse("cuda")
        self._place = torch.device("cuda", torch.cuda.current_device())
        properties: Any = torch.cuda.get_device_properties(self._place)
        self.device: str = properties.name
        self.driver = driver_version()
        self._cache_bytes = int(getattr(properties, "L2_cache_size", 0)) or (50 << 20)
        self._bench: Bench | None = None
        self._copies: list[Buffers] = []

    def trial(self, problem: Problem, config: Config) -> Trial:
        """Builds, runs, verifies, then times the configuration.

        Raises: KernelError where it does not compile, does not launch or does not fit in memory;
        PoisonedError where the device faulted.
        """
        try:
            return self._trial(problem, config)
        except torch.OutOfMemoryError as error:
            self._forget()
            raise KernelError(f"out of GPU memory: {error}") from error
        except RuntimeError as error:
            # Some launch errors leave the context usable (too much shared memory); a fault does
            # not, and then every further call fails.
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                raise PoisonedError(f"the device faulted: {error}") from error
            raise KernelError(f"cannot be launched: {error}") from error

    def _forget(self) -> None:
        """Gives all memory back."""
        self._bench, self._copies = None, []
        torch.cuda.empty_cache()

    def _trial(self, problem: Problem, config: Config) -> Trial:
        if self._bench is None or self._bench.problem != problem:
            self._forget()
            # PyTorch's own error widens the tolerance: it must be that of the precision asked for.
            tf32 = problem.precision == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
            self._bench = Bench(problem, self._place)
        bench = self._bench
        launches = bench.op.launches(problem, config, self._target)
        requests = rank.requests(bench.op, problem, launches, self._target)
        compiled = [offline.compile_request(request) for request in requests]
        buffers = bench.buffers()
        actions = _bound(bench, launches, compiled, buffers)
        for _ in range(runs_to_verify(launches)):
            for action in actions:
                action()
        torch.cuda.synchronize()
        if (reason := bench.wrong(buffers)) is not None:
            return Trial(wrong=reason)
        if not self._copies:
            self._copies = self._copied(bench)
        turns = [_bound(bench, launches, compiled, each) for each in self._copies]
        cold = _timed(turns)
        warm = _timed(turns[:1])
        spread = statistics.quantiles(cold, n=10)
        return Trial(None, statistics.median(cold), spread[-1] - spread[0], statistics.median(warm))

    def _copied(self, bench: Bench) -> list[Buffers]:
        """Enough copies of the problem's tensors that none is still in the cache at its turn."""
        first = bench.buffers()
        size = sum(tensor.numel() * tensor.element_size() for tensor in first.values())
        needed = int(CACHE_FACTOR * self._cache_bytes / max(size, 1)) + 2
        free, _ = torch.cuda.mem_get_info(self._place)
        count = max(1, min(needed, MOST_COPIES, int(0.5 * free / max(size, 1))))
        return [first, *(bench.buffers() for _ in range(count - 1))]


def _bound(
    bench: Bench, launches: Sequence[Launch], compiled: Sequence[Any], buffers: Buffers
) -> list[Action]:
    """The launches as calls; they keep their scratch memory alive."""
    bound = zip(bench.arguments(launches, buffers), compiled, strict=True)
    return [bind_launch(it, code, given.__getitem__, bench.batch) for (it, given), code in bound]


def _timed(turns: Sequence[Sequence[Action]]) -> list[float]:
    """Microseconds of one turn, for each replay of a graph of many turns."""
    graph, count = _captured(turns, len(turns))
    graph.replay()
    estimate = _replayed_us(graph)
    rounds = max(1, min(int(GRAPH_US / max(estimate, 1.0)) + 1, MOST_LAUNCHES // count))
    if rounds > 1:
        graph, count = _captured(turns, rounds * len(turns))
    for _ in range(WARM_UP):
        graph.replay()
    return [_replayed_us(graph) / count for _ in range(REPLAYS)]


def _captured(turns: Sequence[Sequence[Action]], count: int) -> tuple[Any, int]:
    """A CUDA graph of `count` turns, one copy of the tensors after the other."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    # Modules are loaded at the first launch, which must not be inside a capture.
    with torch.cuda.stream(stream):
        for action in turns[0]:
            action()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for turn in range(count):
            for action in turns[turn % len(turns)]:
                action()
    return graph, count


def _replayed_us(graph: Any) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    graph.replay()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) * 1e3


def driver_version() -> str:
    """The NVIDIA driver's version, "unknown" where nobody tells."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return (done.stdout.split() or ["unknown"])[0]
