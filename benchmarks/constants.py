"""Measures what the cost model assumes of a machine, and fits what cannot be measured by itself.

Measured: what a dependent kernel adds inside a CUDA graph, with and without programmatic dependent
launch; reads out of the L2 cache, by pointers and in boxes; copies through DRAM; a large matrix
product. Fitted, to the times of many configurations: `fill_cycles`, `end_cycles` and `store_bytes`,
which no simple experiment shows. Nothing is written
into `kernels/contract/cost_model.py`: `constants.json` says what should stand there.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from convloom import zoo
from convloom.compiler.api import lowered
from convloom.compiler.records import rank
from convloom.compiler.run.workers import WorkerError
from convloom.compiler.tuning.search import Work, problems_of, works_for
from convloom.compiler.tuning.timers import measuring
from convloom.errors import ConvloomError, KernelError
from convloom.kernels.contract import cost_model
from convloom.kernels.contract.cost_model import Machine
from convloom.kernels.contract.op import Config
from convloom.kernels.contract.targets import Target
from convloom.kernels.devices import offline
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .devices import Device
from .report import write_text

GAP_LAUNCHES = 1_000
NEAR_BYTES, FAR_BYTES = 8 << 20, 1 << 30
PRODUCT = 8_192
REPLAYS = 20
FILL_CYCLES = (250.0, 750.0, 1_500.0, 3_000.0, 4_500.0)
END_CYCLES = (200.0, 400.0, 800.0)
STORE_BYTES = (11.0, 16.0, 22.0, 32.0)
TRIAL_S = 60.0


# What a machine does.


@triton.jit  # type: ignore[untyped-decorator]
def _bump_kernel(x, EARLY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds one to x[0]: the least that depends on the kernel before."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    tl.store(x, tl.load(x) + 1)


def gap_us(early: bool) -> float:
    """What one dependent kernel adds inside a CUDA graph; early: by programmatic launch.

    Raises: RuntimeError where the result shows that a kernel did not wait for the one before.
    """
    counter = torch.zeros(32, dtype=torch.int32, device="cuda")

    def launch() -> None:
        for _ in range(GAP_LAUNCHES):
            _bump_kernel[(1,)](counter, EARLY=early, num_warps=1, launch_pdl=early)

    _bump_kernel[(1,)](counter, EARLY=early, num_warps=1, launch_pdl=early)
    time_us, replays = graph_us(launch)
    launched = 1 + GAP_LAUNCHES * replays
    if int(counter[0]) != launched:
        raise RuntimeError(f"a chain of {launched} kernels counted to {int(counter[0])}")
    return time_us / GAP_LAUNCHES


def graph_us(work: Callable[[], Any]) -> tuple[float, int]:
    """(median time of a replay, how often it was replayed) of the work in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        work()
    times = []
    for _ in range(REPLAYS + 3):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        stop = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(float(start.elapsed_time(stop)) * 1e3)
    return statistics.median(times[3:]), len(times)


READ_ROWS, READ_COLUMNS, READ_ROUNDS = 64, 64, 200


@triton.jit  # type: ignore[untyped-decorator]
def _read_kernel(  # type: ignore[no-untyped-def]
    x, y, rows, ROUNDS: tl.constexpr, BOXES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Every program reads tiles of x [rows, COLUMNS] round and round, from a place of its own."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for each in range(ROUNDS):
        first = (tl.program_id(0) + each) * ROWS % rows
        if BOXES:
            tile = x.load([first, 0])
        else:
            offsets = (first + tl.arange(0, ROWS))[:, None] * COLUMNS
            tile = tl.load(x + offsets + tl.arange(0, COLUMNS)[None, :])
        total += tile.to(tl.float32)
    tl.store(y + tl.program_id(0), tl.sum(total))


def read_gbps(size_bytes: int, boxes: bool) -> float:
    """Bytes per second that all multiprocessors read of a tensor that stays in the L2 cache.

    Raises: RuntimeError where the sums show that something else was read.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    rows = size_bytes // (2 * READ_COLUMNS)
    x = torch.ones(rows, READ_COLUMNS, dtype=torch.float16, device="cuda")
    programs = 8 * torch.cuda.get_device_properties(0).multi_processor_count
    y = torch.zeros(programs, device="cuda")
    block = [READ_ROWS, READ_COLUMNS]
    source = TensorDescriptor(x, list(x.shape), list(x.stride()), block) if boxes else x

    def launch() -> None:
        _read_kernel[(programs,)](
            source, y, rows, READ_ROUNDS, boxes, READ_ROWS, READ_COLUMNS, num_warps=4, num_stages=4
        )

    launch()
    time_us, _ = graph_us(launch)
    expected = READ_ROUNDS * READ_ROWS * READ_COLUMNS
    if not bool((y == expected).all()):
        raise RuntimeError(f"sums of {expected} ones came out as {y.unique().tolist()[:4]}")
    return programs * expected * 2 / time_us / 1e3


def copy_gbps(size_bytes: int, device: Device, rounds: int) -> float:
    """Bytes read and written per second by copies of so many bytes."""
    source = torch.zeros(size_bytes, dtype=torch.uint8, device=device.place)
    goal = torch.empty_like(source)
    time_us = _median_us(lambda: [goal.copy_(source) for _ in range(rounds)], device)
    return 2 * size_bytes * rounds / time_us / 1e3


def product_tflops(size: int, dtype: torch.dtype, device: Device) -> float:
    """TFLOP/s of a square matrix product."""
    a = torch.randn(size, size, device=device.place).to(dtype)
    time_us = _median_us(lambda: a @ a, device)
    return float(2 * size**3 / time_us / 1e6)


def _median_us(work: Callable[[], Any], device: Device) -> float:
    work()
    samples = (device.sample(work) for _ in range(REPLAYS if device.kind == "cuda" else 3))
    return statistics.median(s.cold_us if s.warm_us is None else s.warm_us for s in samples)


def measure(device: Device) -> tuple[dict[str, float], dict[str, str]]:
    """(constants, why others are missing). On a CPU only small versions, to try the program."""
    on_gpu = device.kind == "cuda"
    near, far = NEAR_BYTES, FAR_BYTES if on_gpu else 1 << 22
    size, dtype = (PRODUCT, torch.float16) if on_gpu else (256, torch.float32)
    wanted: dict[str, Callable[[], float]] = {
        "memory_gbps": lambda: copy_gbps(far, device, 1),
        "tensor_tflops": lambda: product_tflops(size, dtype, device),
    }
    if on_gpu:
        wanted["cache_gbps"] = lambda: read_gbps(near, boxes=False)
        wanted["launch_us"] = lambda: gap_us(early=False)
        if torch.cuda.get_device_capability()[0] >= 9:
            wanted["cache_by_boxes_gbps"] = lambda: read_gbps(near, boxes=True)
            wanted["programmatic_launch_us"] = lambda: gap_us(early=True)
    found: dict[str, float] = {}
    missing: dict[str, str] = {}
    for name, take in wanted.items():
        try:
            found[name] = take()
        except Exception as error:  # one failed experiment must not hide the others
            missing[name] = f"{type(error).__name__}: {error}"
    return found, missing


# How well the model ranks.


@dataclass(frozen=True)
class Trial:
    """One configuration of one problem; wrong: why it has no time."""

    problem: str
    work: Work
    config: Config
    time_us: float | None
    wrong: str | None = None


class Trials:
    """Times configurations here, and keeps in a file what was found, to go on with later."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._known: dict[str, Any] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._known = {}

    def of(
        self, works: Sequence[Work], per_problem: int, target: Target, tell: Callable[[str], None]
    ) -> Iterator[Trial]:
        """The default and some other configurations of each problem, verified and timed."""
        _compile_ahead(works, per_problem, target)
        timer = measuring(target)
        timer.open()
        try:
            for number, work in enumerate(works):
                tell(f"problem {number + 1} of {len(works)}: {work.key}")
                for config in _spaced(work, per_problem):
                    yield self._trial(timer, work, config)
        finally:
            timer.close()

    def _trial(self, timer: Any, work: Work, config: Config) -> Trial:
        name, key = str(work.key), f"{work.key.digest} {config}"
        if (known := self._known.get(key)) is None:
            found = _trial(timer, work, config)
            self._known[key] = known = [found.time_us, found.wrong]
            write_text(self._path, json.dumps(self._known, indent=1) + "\n")
        return Trial(name, work, config, known[0], known[1])


def _compile_ahead(works: Sequence[Work], per_problem: int, target: Target) -> None:
    """Side by side, what would otherwise be compiled one after the other; what does not compile is
    told by its trial."""
    if not target.is_gpu:
        return
    wanted = []
    for work in works:
        for config in _spaced(work, per_problem):
            launches = work.op.launches(work.problem, config, target)
            wanted += rank.requests(work.op, work.problem, launches, target)
    with suppress(KernelError):
        offline.compile_all(wanted)


def _spaced(work: Work, count: int) -> list[Config]:
    """The default, and configurations from all over the tuning space."""
    default, *others = (
        config
        for config in rank.space(work.op, work.problem, work.target)
        if work.op.legal(work.problem, config, work.target) is None
    )
    step = max(1, len(others) // max(count - 1, 1))
    return [default, *others[::step][: count - 1]]


def _trial(timer: Any, work: Work, config: Config) -> Trial:
    name = str(work.key)
    try:
        found = timer.trial(work.problem, config, (), TRIAL_S)
    except (WorkerError, ConvloomError) as error:
        return Trial(name, work, config, None, f"{type(error).__name__}: {error}")
    if found.wrong is not None:
        return Trial(name, work, config, None, found.wrong)
    return Trial(name, work, config, found.time_us)


def problems(
    names: Sequence[str], batches: Sequence[int], dtype: torch.dtype | None, target: str
) -> list[Work]:
    """The distinct problems of models, the heaviest first."""
    wanted = []
    for name in names:
        model = zoo.build(name).eval()
        for batch in batches:
            x = torch.zeros(batch, *zoo.entry(name).input_shape)
            wanted += problems_of(lowered(model, (x,), target=target, dtype=dtype)[1])
    return works_for(wanted)


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float:
    """Spearman's: 1 where both columns order everything alike; NaN for fewer than two pairs."""
    if len(pairs) < 2:
        return math.nan
    first, second = (_ranks([pair[at] for pair in pairs]) for at in (0, 1))
    mean = (len(pairs) - 1) / 2
    above = sum((a - mean) * (b - mean) for a, b in zip(first, second, strict=True))
    below = math.sqrt(sum((a - mean) ** 2 for a in first) * sum((b - mean) ** 2 for b in second))
    return above / below if below else math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    """Positions in order; equal values share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    for _, group in itertools.groupby(enumerate(order), key=lambda item: values[item[1]]):
        members = list(group)
        mean = statistics.fmean(position for position, _ in members)
        for _, index in members:
            ranks[index] = mean
    return ranks


@dataclass(frozen=True)
class Fit:
    """How far the model is off. correlation: over all configurations; within: the median over
    problems with three or more, which is what tuning needs; off: the median factor."""

    count: int
    correlation: float
    within: float
    off: float


def quality(timed: Sequence[Trial], target: Target) -> Fit:
    """The model, as `cost_model.MACHINES` has it now, against what was measured."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for each in timed:
        if each.time_us is not None:
            modelled = rank.modelled_us(each.work.op, each.work.problem, target, each.config)
            pairs.setdefault(each.problem, []).append((modelled, each.time_us))
    every = [pair for group in pairs.values() for pair in group]
    groups = [rank_correlation(group) for group in pairs.values() if len(group) >= 3]
    known = [value for value in groups if not math.isnan(value)]
    off = [abs(math.log(a / b)) for a, b in every if a > 0 and b > 0]
    return Fit(
        len(every),
        rank_correlation(every),
        statistics.median(known) if known else math.nan,
        math.exp(statistics.median(off)) if off else math.nan,
    )


@contextmanager
def assuming(target: Target, what: Machine) -> Iterator[None]:
    """The target's machine is another one inside the block."""
    before = cost_model.machine_for(target)
    cost_model.MACHINES[target.capability] = what
    try:
        yield
    finally:
        cost_model.MACHINES[target.capability] = before


def fit(timed: Sequence[Trial], target: Target, found: dict[str, float]) -> tuple[Machine, Fit]:
    """The machine with its measured constants, and those cycles and bytes of a tile's ends that
    leave the model least off; and how good that is."""
    known: dict[str, Any] = {
        name: value for name, value in found.items() if name in Machine.__dataclass_fields__
    }
    base = replace(cost_model.machine_for(target), **known)
    best: tuple[Machine, Fit] | None = None
    for fill, end, store in itertools.product(FILL_CYCLES, END_CYCLES, STORE_BYTES):
        tried = replace(base, fill_cycles=fill, end_cycles=end, store_bytes=store)
        with assuming(target, tried):
            now = quality(timed, target)
        if best is None or now.off < best[1].off:
            best = tried, now
    assert best is not None
    return best


def summary(timed: Sequence[Trial], target: Target, found: dict[str, float]) -> dict[str, Any]:
    """Rank correlation before and after fitting, the proposed constants, and what went wrong."""
    answer: dict[str, Any] = {
        "configurations": len(timed),
        "before": asdict(quality(timed, target)),
        "wrong_or_failed": [
            {"problem": each.problem, "config": str(each.config), "reason": each.wrong}
            for each in timed
            if each.wrong is not None
        ],
    }
    if target.is_gpu:
        fitted, after = fit(timed, target, found)
        answer |= {"after": asdict(after), "proposed": asdict(fitted)}
    return answer


def read(path: Path) -> dict[str, float]:
    """Constants measured before; none where there are none."""
    if not path.exists():
        return {}
    stored: dict[str, float] = json.loads(path.read_text())["measured"]
    return stored


