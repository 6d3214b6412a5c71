"""What no GPU has run is tried on a device before anything relies on it there: the Hopper core, and
clusters.

Only the emulator has run them: a wrong order of barriers would hang a GPU. Where they are asked for
and this machine has the GPU, every configuration is tried on a small batch of its own problem,
against the op's reference, in a process of its own that is ended when it hangs. What failed gives
way to a tried one (`fit.py`). Verdicts are kept in the cache folder, by kernel, device and driver.
(Files bring no compiler: `artifact/twins.py` checks theirs.)
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ... import settings
from ...errors import KernelError, TargetUnavailableError
from ...kernels import registry
from ...kernels.contract.op import Config, Problem
from ...kernels.contract.spec import Operand
from ...kernels.contract.targets import Target
from ...kernels.devices.entries import read_entry, write_entry
from ...kernels.hopper import core
from ..records import rank
from ..records.choose import local_device
from ..run.workers import WorkerError
from .timers import TRIAL_TIMEOUT_S, Measured, measuring

LOG = logging.getLogger("convloom")
FOLDER = "checks"
ROUNDS = 2
"""Tiles that each program takes at least, where the batch has so many."""


@dataclass
class SelfCheck:
    """The checks of one compilation; the process for them is started at the first.

    connect: what runs a configuration on this machine's GPU.
    """

    target: Target
    connect: Callable[[Target], Measured] = measuring
    _timer: Measured | None = None
    _verdicts: dict[tuple[Problem, Config], str | None] = field(default_factory=dict)

    def failure(self, problem: Problem, config: Config) -> str | None:
        """Why a configuration must not be used on this machine, or None: also where it is not
        untried, or there is no GPU for it. Warns of what it finds wrong."""
        if not core.is_untried(config) or local_device(self.target) is None:
            return None
        if (problem, config) not in self._verdicts:
            self._verdicts[problem, config] = reason = self._found(problem, config)
            if reason is not None:
                LOG.warning(
                    "the untried kernel of %s of %s (%s) is not used: %s",
                    problem.op, problem.output.spec, config, reason,
                )  # fmt: skip
        return self._verdicts[problem, config]

    def close(self) -> None:
        if self._timer is not None:
            self._timer.close()

    def _found(self, problem: Problem, config: Config) -> str | None:
        """The verdict on disk, or that of a run."""
        try:
            if (timer := self._timer) is None:
                timer = self.connect(self.target)
                timer.open()
                self._timer = timer
            small = smaller(problem, config, self.target)
            op = registry.get(problem.op)
            launches = op.launches(small, config, self.target)
            named = (rank.requests(op, small, launches, self.target), timer.device, timer.driver)
            key = hashlib.sha256(repr(named).encode()).hexdigest()
            path = settings.read().cache_dir / FOLDER / f"{key}.json"
            known: Any = read_entry(path)
            if known is None:
                try:
                    known = {"wrong": timer.trial(small, config, (), TRIAL_TIMEOUT_S).wrong}
                except WorkerError as error:
                    known = {"wrong": f"{error.kind}: {error}"}
                write_entry(path, known)
        except (KernelError, TargetUnavailableError) as error:
            return f"its self-check could not be run: {error}"
        wrong = known.get("wrong")
        return None if wrong is None else f"its self-check on {timer.device} failed: {wrong}"


def smaller(problem: Problem, config: Config, target: Target) -> Problem:
    """The problem at the least batch at which every program takes several tiles."""
    (launch,) = registry.get(problem.op).launches(problem, config, target)
    batch = problem.output.spec.batch
    if batch is None or launch.most_programs is None:
        return problem
    wanted = ROUNDS * launch.most_programs + 1
    enough = next((n for n in range(1, batch) if launch.tiles_at(n) >= wanted), batch)

    def at(operand: Operand) -> Operand:
        spec = operand.spec
        if spec.batch is None:
            return operand
        return replace(operand, spec=spec.with_(shape=spec.at(enough), batch=enough))

    groups = ("inputs", "outputs", "operands", "prologue_operands")
    changes: dict[str, Any] = {name: tuple(map(at, getattr(problem, name))) for name in groups}
    return replace(problem, **changes)
