"""One model at one batch against its peers, in turns, on one device."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from convloom import zoo
from convloom.compiler.artifact.load import LoadedExecutable
from convloom.compiler.evaluation.evaluate import evaluate
from convloom.compiler.graph.interface import Interface
from convloom.compiler.graph.ir import Graph
from convloom.compiler.plan.plan import KernelStep, Plan
from convloom.errors import ConvloomError, InvalidInputError, TargetUnavailableError
from convloom.kernels import registry
from convloom.kernels.contract import cost_model, targets, tolerance
from torch import nn
from torch.utils import _pytree as pytree

from .bounds import BOUNDS
from .devices import Cpu, Cuda, Device, Sample, channels_last
from .machine_info import git_hash
from .peers import OURS, Absentee, Entrant, check_names, enter, one_line, ours, peer

SEED = 0
DEPTH = 4_608
"""The longest sum of the zoo's convolutions, for the tolerance: 512 channels of 3x3."""
CHECKED_IMAGES = 4
"""Images whose results are compared with fp64: evaluating more takes longer than it tells."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 200
BOUND_DEVICE = "H200"
"""What `bounds.py` is computed for; elsewhere a share of that bound would mean nothing."""
REFERENCE_PEER = "eager"


@dataclass(frozen=True)
class Choices:
    """What is measured. seconds: timing of one model at one batch, all contenders together;
    precision: how all of them compute float32 products, "ieee" or "tf32"."""

    batches: tuple[int, ...]
    dtype: torch.dtype
    target: str
    against: tuple[str, ...]
    tuning: str = "records"
    seconds: float = 10.0
    precision: str = "ieee"

    @property
    def kind(self) -> str:
        """The dtype as tables call it."""
        plain = str(self.dtype).removeprefix("torch.")
        return self.precision if plain == "float32" and self.precision == "tf32" else plain


@dataclass(frozen=True)
class Result:
    """A contender's figures. status: "ok", "wrong" (timed, but outside of the tolerance), or why
    there are none: "not available", "out of memory", "failed".

    median_us, p10_us, p90_us: cold L2 on a GPU, as they come on a CPU. warm_us: warm L2. host_us:
    what the host needs to start a call. ratio: the peer's time over convloom's, the median over
    rounds; above 1 convloom is faster; None on a CPU. error: the largest against fp64, relative to
    the rms.
    """

    name: str
    status: str
    reason: str = ""
    median_us: float | None = None
    p10_us: float | None = None
    p90_us: float | None = None
    warm_us: float | None = None
    host_us: float | None = None
    images_per_s: float | None = None
    ratio: float | None = None
    error: float | None = None
    compile_s: float | None = None
    tuning_s: float | None = None
    kernels: int | None = None
    peak_mb: float | None = None
    rounds: int = 0


@dataclass(frozen=True)
class Row:
    """One model at one batch, measured with the sources of the commit `git`.

    flops, size_bytes: of the plan, each tensor touched once. bound_us: bound T of `bounds.py`;
    plan_bound_us: the roofline of the plan as it is fused; both None where they do not hold for the
    device. steps, tuned: kernels of the plan, and those of them whose configuration comes from a
    record of a measurement.
    """

    model: str
    batch: int
    dtype: str
    target: str
    device: str
    results: tuple[Result, ...]
    tuning: str = "records"
    git: str = ""
    flops: int = 0
    size_bytes: int = 0
    bound_us: float | None = None
    plan_bound_us: float | None = None
    steps: int = 0
    tuned: int = 0

    def result(self, name: str) -> Result | None:
        """The contender's figures, None where it was not asked for."""
        return next((each for each in self.results if each.name == name), None)

    @property
    def ours(self) -> Result:
        """convloom's figures."""
        return self.results[0]

    @property
    def on_gpu(self) -> bool:
        """Whether the times are those of a GPU."""
        return self.target.startswith("cuda")

    def share_of(self, bound_us: float | None) -> float | None:
        """Bound over time: 1 is all that the hardware allows."""
        time_us = self.ours.median_us
        return bound_us / time_us if bound_us and time_us else None


@dataclass(frozen=True)
class Other:
    """A model that is not of the zoo, as a function of tensors. tensors: those of a batch. ready,
    plan, dtype: of a saved executable; its model is then what its graph computes."""

    model: nn.Module
    tensors: Callable[[int], Sequence[torch.Tensor]]
    ready: LoadedExecutable | None = None
    plan: Plan | None = None
    dtype: torch.dtype | None = None


class OfTensors(nn.Module):
    """A model as a function of the tensors among its arguments and keywords."""

    def __init__(self, model: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        super().__init__()
        self.model = model
        self.leaves, self.structure = pytree.tree_flatten(example)

    def forward(self, *xs: torch.Tensor) -> Any:
        given = iter(xs)
        leaves = [next(given) if torch.is_tensor(leaf) else leaf for leaf in self.leaves]
        arguments, keywords = pytree.tree_unflatten(leaves, self.structure)
        return self.model(*arguments, **keywords)


class GraphModule(nn.Module):
    """A saved graph by torch ops, in fp64 once `double` has been called."""

    def __init__(self, graph: Graph, interface: Interface) -> None:
        super().__init__()
        self.graph, self.interface = graph, interface
        self.register_buffer("kind", torch.zeros(()))

    def forward(self, *xs: torch.Tensor) -> Any:
        kind = self.get_buffer("kind").dtype
        dtype = torch.float64 if kind is torch.float64 else None
        values = evaluate(self.graph, [x.cpu() for x in xs], dtype)
        return self.interface.unflatten([values[y].to(xs[0].device) for y in self.graph.outputs()])


def check(names: Sequence[str], choices: Choices, others: Mapping[str, Other] = {}) -> None:
    """Raises: InvalidInputError for a model, batch or peer that cannot be meant;
    TargetUnavailableError where the target does not run here."""
    for name in names:
        if name not in others:
            zoo.entry(name)
    for batch in choices.batches:
        if batch < 1:
            raise InvalidInputError(f"batch: expected at least 1, got {batch}")
    check_names(choices.against)
    device_for(choices.target)


def device_for(target: str) -> Device:
    """The device of this machine that runs the target.

    Raises: TargetUnavailableError where there is none, with what works instead.
    """
    absent = TargetUnavailableError(
        f"target {target}: this machine has no such GPU to measure on. `--target interpreter` "
        "and `--target reference` time the CPU; `convloom profile NAME --target cuda:sm_90` "
        "shows modelled times"
    )
    capability = targets.local_capability()
    if target == "cuda" and capability is None:
        raise absent
    chosen = targets.parse(target)
    if not chosen.is_gpu:
        return Cpu()
    if capability is None or targets.nearest(capability) is not chosen:
        raise absent
    return Cuda()


def measured(
    name: str,
    batch: int,
    choices: Choices,
    device: Device,
    tell: Callable[[str], None] = lambda text: None,
    other: Other | None = None,
) -> Row:
    """The model at one batch: every contender prepared, checked, and timed in turns. other: what
    the name stands for where it is no model of the zoo.

    A contender that fails is a row that says so; nothing is raised for it.
    """
    if other is not None and other.dtype is not None:
        choices = replace(choices, dtype=other.dtype)
    with products(tf32=choices.kind == "tf32"):
        return _measured(name, batch, choices, device, tell, other)


@contextmanager
def products(tf32: bool) -> Iterator[None]:
    """PyTorch computes fp32 products and convolutions in TF32, or not."""
    backends: Any = torch.backends
    owners = backends.cuda.matmul, backends.cudnn
    before = [owner.allow_tf32 for owner in owners]
    try:
        for owner in owners:
            owner.allow_tf32 = tf32
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.allow_tf32 = value


def _measured(
    name: str,
    batch: int,
    choices: Choices,
    device: Device,
    tell: Callable[[str], None],
    other: Other | None,
) -> Row:
    model, xs = subject(name, batch, choices.dtype, device.place, other)
    ready = None if other is None else other.ready
    prepare: dict[str, Callable[[], Entrant]] = {
        OURS: partial(
            ours, model, xs, device, choices.target, choices.tuning, choices.precision, ready
        ),
        **{
            each: partial(peer, each, model if ready is None else None, xs, device)
            for each in choices.against
        },
    }
    field: list[Entrant | Absentee] = []
    for each, make in prepare.items():
        tell(f"{name}, batch {batch}: preparing {each}")
        field.append(enter(each, make, device))
    tell(f"{name}, batch {batch}: errors")
    errors = Errors(model, xs)
    checked = [
        (each, *(errors.of(each) if isinstance(each, Entrant) else (None, None))) for each in field
    ]
    entrants = [each for each in field if isinstance(each, Entrant)]
    tell(f"{name}, batch {batch}: timing {len(entrants)} contenders in turns")
    rounds = in_turns(entrants, device, choices.seconds)
    results = tuple(_result(each, error, wrong, rounds, batch) for each, error, wrong in checked)
    if device.place.type == "cpu":  # How an interpreter compares with a library says nothing.
        results = tuple(replace(each, ratio=None) for each in results)
    first = field[0]
    plan = first.executable.plan if isinstance(first, Entrant) and first.executable else None
    plan = plan if ready is None or other is None else other.plan
    row = Row(
        name, batch, choices.kind, choices.target, device.name, results, choices.tuning, git_hash()
    )
    row = row if plan is None else _with_plan(row, plan, choices.dtype)
    field.clear()
    entrants.clear()
    device.free()
    return row


def subject(
    name: str, batch: int, dtype: torch.dtype, place: torch.device, other: Other | None = None
) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The zoo model with seeded weights, or a copy of another model, and its tensors: floats in the
    dtype, images in channels_last, and of whole numbers and masks zeros and ones, which are valid
    as indices too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = zoo.build(name).eval() if other is None else copy.deepcopy(other.model)
        own = (batch, *zoo.entry(name).input_shape) if other is None else ()
        xs = [torch.zeros(own)] if other is None else other.tensors(batch)
        drawn = [
            torch.randn(x.shape).to(dtype) if x.is_floating_point() else torch.randint_like(x, 2)
            for x in xs
        ]
    return model.to(place, dtype), tuple(channels_last(x.to(place)) for x in drawn)


# Errors.


class Errors:
    """Measures contenders against the model in fp64, on the first images of the batch."""

    def __init__(self, model: nn.Module, xs: Sequence[torch.Tensor]) -> None:
        self._reason: str | None = None
        with torch.no_grad():
            try:
                given = [x[:CHECKED_IMAGES] for x in xs] if len(xs) == 1 and xs[0].dim() else xs
                self._eager = _tensors(model(*given))
                if any(y.shape[:1] != given[0].shape[:1] for y in self._eager):  # No batch.
                    given, self._eager = xs, _tensors(model(*xs))
                exact = copy.deepcopy(model).double()
                doubled = (x.double() if x.is_floating_point() else x for x in given)
                self._exact = _tensors(exact(*doubled))
            except (RuntimeError, NotImplementedError) as error:
                self._reason = f"fp64 cannot be evaluated: {one_line(error)}"

    def of(self, entrant: Entrant) -> tuple[float | None, str | None]:
        """(largest error relative to the rms, what is wrong or None)."""
        if self._reason is not None:
            return None, None
        try:
            results = _tensors(entrant.call())
        except (RuntimeError, ConvloomError) as failure:
            return None, one_line(failure)
        if len(results) != len(self._exact):
            return None, f"{len(results)} results, expected {len(self._exact)}"
        errors, wrong = [], []
        for result, exact, eager in zip(results, self._exact, self._eager, strict=True):
            result = result[: len(exact)] if result.dim() and exact.dim() else result
            if result.shape != exact.shape:
                return None, f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
            rms = exact.double().square().mean().sqrt().clamp_min(1e-30)
            errors.append(((result.double() - exact).abs().max() / rms).item())
            wrong.append(tolerance.compare(result, exact, eager, DEPTH))
        return max(errors), next(filter(None, wrong), None)


def _tensors(result: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(result) if torch.is_tensor(leaf)]


# Time.


@dataclass
class Rounds:
    """Samples by contender, one per round; a contender that fails on the way has a reason."""

    samples: dict[str, list[Sample]]
    failed: dict[str, Absentee]


def in_turns(entrants: Sequence[Entrant], device: Device, seconds: float) -> Rounds:
    """Times the contenders one after the other, again and again, each round from another one.

    What a drifting clock does to one, it does to all.
    """
    rounds = Rounds({each.name: [] for each in entrants}, {})
    active = list(entrants)
    started = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - started > seconds:
            break
        at = number % max(len(active), 1)
        for entrant in (*active[at:], *active[:at]):
            try:
                rounds.samples[entrant.name].append(device.sample(entrant.call))
            except torch.OutOfMemoryError as error:
                rounds.failed[entrant.name] = Absentee(
                    entrant.name, "out of memory", one_line(error)
                )
                device.free()
            except (RuntimeError, ConvloomError) as error:
                rounds.failed[entrant.name] = Absentee(entrant.name, "failed", one_line(error))
        active = [each for each in active if each.name not in rounds.failed]
    return rounds


def _result(
    each: Entrant | Absentee, error: float | None, wrong: str | None, rounds: Rounds, batch: int
) -> Result:
    lost = each if isinstance(each, Absentee) else rounds.failed.get(each.name)
    if lost is not None:
        return Result(lost.name, lost.status, lost.reason)
    assert isinstance(each, Entrant)
    samples = rounds.samples[each.name]
    cold = [sample.cold_us for sample in samples]
    low, median, high = spread(cold)
    paired = zip(cold, rounds.samples.get(OURS, ()), strict=False)
    ratios = [theirs / mine.cold_us for theirs, mine in paired if mine.cold_us > 0]
    has_ratio = each.name != OURS and OURS not in rounds.failed and bool(ratios)
    return Result(
        each.name,
        "ok" if wrong is None else "wrong",
        wrong or "",
        median,
        low,
        high,
        _median([s.warm_us for s in samples]),
        _median([s.host_us for s in samples]),
        batch / median * 1e6 if median > 0 else None,
        statistics.median(ratios) if has_ratio else None,
        error,
        each.compile_s,
        each.tuning_s,
        each.kernels,
        each.peak_mb,
        len(samples),
    )


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """The 10th, 50th and 90th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[0], tenths[4], tenths[8]


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


# Bounds.


def _with_plan(row: Row, plan: Plan, dtype: torch.dtype) -> Row:
    flops = size_bytes = tuned = steps = 0
    bound_us = 0.0
    for step in plan.steps:
        if not isinstance(step, KernelStep):
            continue
        cost = registry.get(step.op).cost(step.problem)
        flops, size_bytes = flops + cost.flops, size_bytes + cost.size_bytes
        bound_us += roofline_us(step, plan)
        steps += 1
        tuned += "measured" in step.chosen_by
    here = BOUND_DEVICE in row.device
    known: Any = BOUNDS.get(row.model) if here and dtype is torch.float16 else None
    return replace(
        row,
        flops=flops,
        size_bytes=size_bytes,
        bound_us=known.at(row.batch)["T"] if known else None,
        plan_bound_us=bound_us if here else None,
        steps=steps,
        tuned=tuned,
    )


def roofline_us(step: KernelStep, plan: Plan) -> float:
    """The longer of a step's products and its traffic with DRAM, at full rate, on the plan's
    machine (the H200 where the plan's target is not a GPU)."""
    cost = registry.get(step.op).cost(step.problem)
    what = cost_model.machine_for(plan.target)
    dtype = step.problem.output.spec.dtype
    rate = what.tensor_tflops * 1e6 * cost_model.RATE.get(dtype, 1.0)
    return max(cost.flops / rate, cost.size_bytes / (what.memory_gbps * 1e3))
