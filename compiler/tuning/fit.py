"""Configurations that the compiler's report refuses give way to the next best.

An op's `crowded` tells by rules of thumb what may not fit; only the compiler knows. A plan is
compiled, and where a kernel keeps registers on the stack, needs more than the target has or lacks a
barrier, its problem gets the next configuration by the model, until all of them fit. The plan says
so (`chosen_by`), and a file of it keeps the configuration.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TypeVar

from ...errors import KernelError, UnsafeKernelError
from ...kernels.contract.op import Config, Op, Problem
from ...kernels.contract.targets import Target
from ...kernels.devices import offline
from ...kernels.hopper import core
from ..plan.plan import KernelStep, Plan
from ..records import rank
from ..records.choose import HEURISTIC, Choice, Chooser
from ..run.runtime import compile_requests
from .self_check import SelfCheck

LOG = logging.getLogger("convloom")
CANDIDATES = 16
"""Configurations of one problem that are compiled at most, sizes of tiles as different as can be:
where all of these spill, so do others."""

Lowered = TypeVar("Lowered", bound=tuple[Plan, object])


@dataclass(frozen=True)
class Refusal:
    """Why a compiled configuration was passed over. spill_bytes: of all its kernels, per thread; 0
    where it does not fit at all."""

    reason: str
    spill_bytes: int


@dataclass
class Fitting:
    """A chooser that knows what was refused. settled: problems for which nothing fits; check: of
    what must prove itself on this machine; distrusted: problems of which something did not."""

    choose: Chooser
    check: SelfCheck
    refused: dict[Problem, dict[Config, Refusal]] = field(default_factory=dict)
    settled: dict[Problem, Choice] = field(default_factory=dict)
    distrusted: set[Problem] = field(default_factory=set)

    def __call__(self, op: Op, problem: Problem, target: Target) -> Choice:
        if problem in self.settled:
            return self.settled[problem]
        choice = self.choose(op, problem, target)
        refused = self.refused.get(problem, {})
        if choice.config not in refused:
            return choice
        reason = refused[choice.config].reason
        if choice.source != HEURISTIC and len(refused) == 1:
            LOG.warning("%s is not used: %s", choice.source, reason)
        for config in candidates(op, problem, target):
            trusted = problem not in self.distrusted or not core.is_untried(config)
            if config not in refused and trusted:
                return Choice(config, f"next by the model; {choice.source} refused: {reason}")
        return self._settle(op, problem)

    def _settle(self, op: Op, problem: Problem) -> Choice:
        """The configuration that spills least.

        Raises: KernelError where none fits the target.
        """
        refused = self.refused[problem]
        running = {config: each for config, each in refused.items() if each.spill_bytes}
        if not running:
            reasons = "; ".join(sorted({each.reason for each in refused.values()})[:3])
            raise KernelError(f"no configuration of {op.name} for {problem.output.spec}: {reasons}")
        config = min(running, key=lambda each: running[each].spill_bytes)
        reason = running[config].reason
        LOG.warning(
            "%s of %s: every configuration tried spills (%d); the least is taken: %s",
            op.name, problem.output.spec, len(refused), reason,
        )  # fmt: skip
        self.settled[problem] = Choice(config, f"least spilling of {len(refused)}: {reason}")
        return self.settled[problem]

    def learn(self, plan: Plan) -> bool:
        """Compiles the plan's kernels; whether one of them was refused that was not before."""
        requests = compile_requests(plan, plan.target)
        with suppress(KernelError):  # It is raised again where its step is known.
            offline.compile_all(requests)
        remaining, learnt = iter(requests), False
        for step in plan.steps:
            if not isinstance(step, KernelStep):
                continue
            reports: list[offline.Resources] = []
            try:
                reports += [offline.resources(next(remaining)) for _ in step.launches]
            except KernelError as error:
                if not (core.is_untried(step.config) or isinstance(error, UnsafeKernelError)):
                    raise
                refusal: tuple[str, str] | None = ("compile", str(error))
            else:
                refusal = rank.refused(plan.target, step.launches, reports)
            if refusal is None and (reason := self.check.failure(step.problem, step.config)):
                refusal = "self-check", reason
                self.distrusted.add(step.problem)
            if refusal is None or step.problem in self.settled:
                continue
            stage, reason = refusal
            spilled = sum(each.spill_bytes for each in reports) if stage == "spills" else 0
            self.refused.setdefault(step.problem, {})[step.config] = Refusal(reason, spilled)
            learnt = True
        return learnt


def candidates(op: Op, problem: Problem, target: Target) -> list[Config]:
    """What may stand in for a refused default, the best by the model first."""
    legal, _ = rank.screened(op, problem, target)
    ranked = rank.rank(op, problem, target, legal)
    return rank.varied(op, problem, target, ranked, CANDIDATES)


def fitted(lower: Callable[[Chooser], Lowered], choose: Chooser, check: SelfCheck) -> Lowered:
    """What `lower` makes of a chooser like `choose` whose every configuration fits, and has proved
    itself where it must.

    Raises: KernelError where a problem has none that fits.
    """
    fitting = Fitting(choose, check)
    try:
        while True:
            lowered = lower(fitting)
            if not fitting.learn(lowered[0]):
                return lowered
    finally:
        check.close()
