"""Tunes problems: enumerates, prunes, compiles, verifies, times, and keeps the best as a record.

Any-time: the heaviest problems come first, each gets a quick look before any gets a thorough one,
and the best so far is written as soon as it is known. An interrupted run goes on where it stopped.
No candidate ends the run: one that does not compile, crashes or is wrong is recorded as such.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass, field

from ...errors import ArtifactError, ConvloomError, KernelError
from ...kernels import registry
from ...kernels.contract.op import Config, Op, Problem
from ...kernels.contract.targets import Target
from ...kernels.devices import offline
from ...kernels.devices.offline import CompileRequest, Resources
from ..plan.plan import KernelStep, Plan
from ..records import rank
from ..records.choose import Records
from ..records.keys import Key, key_of
from ..records.records import MEASURED, Record, Rejected, now, rounded, shortened
from ..run.workers import Crew, WorkerError
from .bench import Trial
from .timers import TRIAL_TIMEOUT_S, Model, Timer, can_measure, compiler_handler, measuring

LOG = logging.getLogger("convloom")
FIRST_LOOK = 3
"""Candidates of each problem that are tried before any problem gets all of its own."""
COMPILE_TIMEOUT_S = 300.0
GRACE_S = 5.0
"""How far a trial that runs when the budget ends may exceed it."""


@dataclass(frozen=True)
class Options:
    """budget_s: wall-clock limit, None for none. candidates: of each problem, at most. retune: also
    what has a record. workers: compiling processes (default: one per core)."""

    budget_s: float | None = None
    candidates: int = 12
    retune: bool = False
    workers: int | None = None


@dataclass(frozen=True)
class Work:
    """A problem to tune and how many steps are it."""

    op: Op
    problem: Problem
    target: Target
    key: Key
    uses: int = 1

    @property
    def weight(self) -> float:
        """Modelled microseconds that it takes of its networks."""
        default = self.op.default(self.problem, self.target)
        return self.uses * rank.modelled_us(self.op, self.problem, self.target, default)


def problems_of(plan: Plan) -> list[tuple[Problem, Target]]:
    return [(step.problem, plan.target) for step in plan.steps if isinstance(step, KernelStep)]


def works_for(problems: Iterable[tuple[Problem, Target]]) -> list[Work]:
    """The distinct ones of problems, the heaviest first."""
    groups: dict[Key, list[tuple[Problem, Target]]] = {}
    for problem, target in problems:
        groups.setdefault(key_of(problem, target), []).append((problem, target))
    works = [
        Work(registry.get(group[0][0].op), *group[0], key, len(group))
        for key, group in groups.items()
    ]
    return sorted(works, key=lambda work: (-work.weight, work.key.digest))


@dataclass(frozen=True)
class Outcome:
    """What tuning made of one problem.

    status: "tuned", "started" (interrupted), "kept" (there was a record), "failed" (no candidate is
    right), "waiting" (not reached). default_us: of the default configuration where it was tried.
    """

    work: Work
    status: str
    record: Record | None
    default_us: float | None


@dataclass
class _State:
    """One problem while it is tuned."""

    work: Work
    selected: list[Config] = field(default_factory=list)
    rejected: dict[Config, Rejected] = field(default_factory=dict)
    futures: dict[Config, list[Future[Resources]]] = field(default_factory=dict)
    reports: dict[Config, list[Resources]] = field(default_factory=dict)
    times: dict[Config, Trial] = field(default_factory=dict)
    kept: Record | None = None
    previous: Record | None = None
    complete: bool = False
    looks: int = 0

    @property
    def default(self) -> Config:
        return self.selected[0]

    def best(self, margin: float) -> Config | None:
        """The fastest; another than the default only if it is faster by the margin."""

        def handicapped(config: Config) -> float:
            return self.times[config].time_us * (1.0 if config == self.default else 1.0 + margin)

        return min(self.times, key=handicapped, default=None)

    def outcome(self, record: Record | None) -> Outcome:
        if self.kept is not None:
            return Outcome(self.work, "kept", self.kept, None)
        timed = self.times.get(self.default) if self.selected else None
        default_us = timed.time_us if timed else None
        if self.complete:
            status = "tuned" if self.times else "failed"
        else:
            status = "started" if self.times or self.looks else "waiting"
        return Outcome(self.work, status, record if self.times else None, default_us)


class _OutOfTimeError(Exception):
    """The budget is spent."""


class Tuner:
    """One run over a list of problems. `outcomes` is right at any time, also after an interrupt."""

    def __init__(
        self,
        records: Records,
        timer: Timer,
        options: Options | None = None,
        watch: Callable[[str, int, int], None] = lambda trying, done, total: None,
    ) -> None:
        """watch: is told what is being tried, and how many candidates are decided of how many."""
        self._records, self._timer = records, timer
        self._options = options or Options()
        self._watch = watch
        self._states: list[_State] = []
        self._deadline = math.inf
        self.out_of_time = False
        self.unsaved: str | None = None

    def run(self, works: Sequence[Work]) -> list[Outcome]:
        """Tunes the problems, in order; what they became.

        Raises: TargetUnavailableError where there is no device to measure on, KernelError where it
        is lost on the way. Records written until then stay.
        """
        if self._options.budget_s is not None:
            self._deadline = time.monotonic() + self._options.budget_s
        self._states = [_State(work) for work in works]
        open_states = [state for state in self._states if not self._keeps(state)]
        if not open_states:
            return self.outcomes
        crew = None
        if any(state.work.target.is_gpu for state in open_states):
            workers = self._options.workers or os.cpu_count() or 1
            crew = Crew(compiler_handler, workers, COMPILE_TIMEOUT_S)
        try:
            self._timer.open()
            for state in open_states:
                self._select(state)
            if crew is not None:
                self._compile(crew, open_states)
            for look in (0, 1):
                for state in open_states:
                    self._try(state, look)
        except _OutOfTimeError:
            self.out_of_time = True
        finally:
            if crew is not None:
                crew.close()
            self._timer.close()
        return self.outcomes

    @property
    def outcomes(self) -> list[Outcome]:
        found = self._records.found
        return [each.outcome(found.get(each.work.key) or each.previous) for each in self._states]

    # What to try.

    def _keeps(self, state: _State) -> bool:
        """Whether the problem has a record already that this run would not better."""
        record = self._records.exact(state.work.key)
        if record is None or rank.illegal_reason(
            state.work.op, state.work.problem, record.config, state.work.target
        ):
            return False
        measures = self._timer.status == MEASURED
        settled = record.complete and not self._options.retune
        # A model never replaces what a device has shown.
        if record.is_measured > measures or (settled and record.is_measured == measures):
            state.kept = record
        return state.kept is not None

    def _select(self, state: _State) -> None:
        """Fills in the candidates: the default, then the best by the model."""
        self._check_time()
        work = state.work
        op, problem, target = work.op, work.problem, work.target
        default = op.default(problem, target)
        legal, rejected = rank.screened(op, problem, target)
        for config, (stage, reason) in rejected.items():
            if config != default:
                self._reject(state, config, stage, reason)
        ranked = rank.rank(op, problem, target, legal)
        hints = self._records.hints(op, problem, target, work.key)
        most = self._options.candidates
        best = rank.varied(op, problem, target, ranked, most)
        state.selected = list(dict.fromkeys([default, *hints, *best]))[:most]
        state.previous = self._records.own.get(work.key)
        self._resume(state)

    def _resume(self, state: _State) -> None:
        """Takes over what an interrupted run on the same device has found out."""
        record = state.previous
        timer = self._timer
        if record is None or self._options.retune or (
            record.status, record.device, record.driver
        ) != (timer.status, timer.device, timer.driver):
            return
        state.times[record.config] = Trial(None, record.time_us, record.spread_us, record.warm_us)
        for each in record.rejected:
            if each.stage == "slower" and each.time_us is not None:
                state.times[each.config] = Trial(None, each.time_us, 0.0)
            elif each.config in state.selected:
                state.rejected[each.config] = each
        self._records.found[state.work.key] = record

    def _open(self, state: _State) -> list[Config]:
        """The candidates that nothing is known of yet."""
        return [c for c in state.selected if c not in state.times and c not in state.rejected]

    # Compilation.

    def _compile(self, crew: Crew, states: Sequence[_State]) -> None:
        """Sets everything going, what the first look needs before the rest."""
        for look in (slice(FIRST_LOOK), slice(FIRST_LOOK, None)):
            for state in states:
                for config in state.selected[look]:
                    if config in self._open(state):
                        self._submit(crew, state, config)

    def _submit(self, crew: Crew, state: _State, config: Config) -> None:
        self._check_time()
        work = state.work
        launches = work.op.launches(work.problem, config, work.target)
        try:
            requests = rank.requests(work.op, work.problem, launches, work.target)
            state.futures[config] = [_report(crew, request) for request in requests]
        except KernelError as error:
            self._reject(state, config, "compile", str(error))

    def _compiled(self, state: _State, config: Config) -> bool:
        """Waits for the candidate's reports; False where it fell out."""
        reports = []
        for future in state.futures.get(config, ()):
            try:
                left = self._time_left()
                reports.append(future.result(None if left == math.inf else left))
            except FutureTimeout as error:
                raise _OutOfTimeError from error
            except ConvloomError as error:
                self._reject(state, config, "compile", str(error))
                return False
        state.reports[config] = reports
        work = state.work
        launches = work.op.launches(work.problem, config, work.target) if reports else ()
        refused = rank.refused(work.target, launches, reports)
        # What runs without records is worth knowing, even where it spills.
        if refused is None or (config == state.default and refused[0] == "spills"):
            return True
        self._reject(state, config, *refused)
        return False

    # Trials.

    def _try(self, state: _State, look: int) -> None:
        """One look at a problem: its first candidates, or all the others in the model's order."""
        state.looks += 1
        waiting = self._open(state)
        looked = waiting if look else waiting[:FIRST_LOOK]
        candidates = [config for config in looked if self._compiled(state, config)]
        work = state.work
        if look:
            ranked = rank.rank(work.op, work.problem, work.target, candidates, state.reports)
            candidates = [each.config for each in ranked]
        for config in candidates:
            self._trial(state, config)
            self._save(state)
        if look:
            state.complete = True
            self._save(state)
            if not state.times:
                reasons = {each.reason for each in state.rejected.values()}
                LOG.warning("no configuration of %s is right: %s", work.key, sorted(reasons)[:3])

    def _trial(self, state: _State, config: Config) -> None:
        self._check_time()
        total = sum(len(each.selected) for each in self._states)
        left = sum(len(self._open(each)) for each in self._states)
        self._watch(f"{state.work.key}: {config}", total - left, total)
        limit = min(TRIAL_TIMEOUT_S, self._time_left() + GRACE_S)
        try:
            reports = state.reports.get(config, [])
            trial = self._timer.trial(state.work.problem, config, reports, limit)
        except WorkerError as error:
            if error.kind == "timeout" and limit < TRIAL_TIMEOUT_S:
                raise _OutOfTimeError from error
            self._reject(state, config, "fault", str(error))
            return
        if trial.wrong is not None:
            self._reject(state, config, "wrong", trial.wrong)
        else:
            state.times[config] = trial

    def _reject(self, state: _State, config: Config, stage: str, reason: str) -> None:
        state.rejected[config] = Rejected(config, stage, shortened(reason))

    def _save(self, state: _State) -> None:
        """Keeps the best so far: in memory, and on disk where that can be written."""
        best = state.best(self._timer.margin)
        if best is None:
            return
        trial = state.times[best]
        slower = [
            Rejected(config, "slower", f"takes {other.time_us / trial.time_us:.2f} times as long",
                     rounded(other.time_us))
            for config, other in state.times.items() if config != best
        ]  # fmt: skip
        record = Record(
            key=state.work.key,
            config=best,
            status=self._timer.status,
            time_us=rounded(trial.time_us),
            spread_us=round(trial.spread_us, 3),
            warm_us=None if trial.warm_us is None else rounded(trial.warm_us),
            device=self._timer.device,
            driver=self._timer.driver,
            date=now(),
            complete=state.complete,
            rejected=(*slower, *state.rejected.values()),
        )
        before = state.previous
        if not state.complete and before is not None and before.complete and before.beats(record):
            return  # what an earlier run finished stays until this one has
        self._records.found[state.work.key] = record
        try:
            self._records.own.put(record)
        except ArtifactError as error:
            if self.unsaved is None:
                LOG.warning("%s", error)
            self.unsaved = str(error)

    # Time.

    def _time_left(self) -> float:
        return max(0.0, self._deadline - time.monotonic())

    def _check_time(self) -> None:
        if not self._time_left():
            raise _OutOfTimeError


def search(records: Records, target: Target, works: Sequence[Work]) -> None:
    """Tunes what has no record: on this machine's device, or by the model and the compiler where
    the target is another GPU."""
    timer = measuring(target) if can_measure(target) else Model(target)
    Tuner(records, timer).run(works)


def _report(crew: Crew, request: CompileRequest) -> Future[Resources]:
    """The report of a request, from disk where it is known."""
    resources = offline.known_resources(request)
    if resources is None:
        return crew.submit(request)
    future: Future[Resources] = Future()
    future.set_result(resources)
    return future
