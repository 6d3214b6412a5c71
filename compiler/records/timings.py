"""What records say of the kernels that the choice of a partition compares (`partition.py`).

A record wins over the cost model: where the one fused kernel and each of the kernels that it would
replace have been timed, the times decide. What was asked for and has no record is kept, so that
`tuning="search"` and `convloom tune` can time the alternatives too.
"""

from __future__ import annotations

from ...kernels import registry
from ...kernels.contract.op import Problem
from ...kernels.contract.targets import Target
from ..graph.ir import Timed
from . import rank
from .choose import Records
from .keys import Key, key_of


class Timings:
    """Looks problems up, and keeps what it did not find."""

    def __init__(self, records: Records, target: Target) -> None:
        self.records, self.target = records, target
        self._missing: dict[Key, Problem] = {}
        self._told: set[Key] = set()

    def __call__(self, problem: Problem) -> Timed | None:
        """The time of the problem in its best known configuration, or None."""
        key = key_of(problem, self.target)
        record = self.records.exact(key)
        op = registry.get(problem.op)
        if record is None or rank.misfit(op, problem, record.config, self.target) is not None:
            if key not in self._told:
                self._missing[key] = problem
            return None
        return Timed(record.time_us, record.status)

    def new(self) -> list[tuple[Problem, Target]]:
        """What has been missing since the last call, each once in the life of this object."""
        found = [(problem, self.target) for problem in self._missing.values()]
        self._told |= self._missing.keys()
        self._missing.clear()
        return found
