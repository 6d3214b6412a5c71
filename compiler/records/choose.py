"""Which configuration a step gets, and where it came from.

Looked up in this order: the record of exactly this key, shipped or this user's; a stale one, whose
configuration is only a hint that the model ranks against the default; the record of the nearest
shape of the same op; the op's own default.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ...errors import InvalidInputError, near_names
from ...kernels import registry
from ...kernels.contract import targets
from ...kernels.contract.op import Config, Op, Problem
from ...kernels.contract.targets import Target
from ...kernels.hopper import core
from ..graph.ir import Timing
from . import rank
from .keys import NEAR, Key, distance, key_of
from .records import Record
from .store import SHIPPED, Store, user_folder

LOG = logging.getLogger("convloom")
HEURISTIC = "heuristic"


@dataclass(frozen=True)
class Choice:
    """A configuration and where it came from, in words for the plan."""

    config: Config
    source: str = HEURISTIC


Chooser = Callable[[Op, Problem, Target], Choice]


def heuristic(op: Op, problem: Problem, target: Target) -> Choice:
    """The op's default: needs no records, and is the same in every process."""
    return _noted(Choice(op.default(problem, target)), op, problem, target)


def _noted(choice: Choice, op: Op, problem: Problem, target: Target) -> Choice:
    """The choice; where another core was asked for, its source also says which one it uses."""
    if not core.is_asked(target):
        return choice
    launches = op.launches(problem, choice.config, target)
    note = core.note(problem, choice.config, target, launches)
    return Choice(choice.config, f"{choice.source}; {note}") if note else choice


@dataclass
class Records:
    """The records that a compilation looks into.

    device: this machine's GPU, whose measurements come first. found: what was tuned just now, valid
    also where it could not be written.
    """

    shipped: Store
    own: Store
    device: str | None = None
    found: dict[Key, Record] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    @staticmethod
    def here(own: Path | None = None, device: str | None = None) -> Records:
        """The shipped records and this user's, or those of the folder `own`."""
        return Records(Store(SHIPPED), Store(own or user_folder()), device)

    def exact(self, key: Key) -> Record | None:
        """The record of exactly this key: measured before modelled, on this device before on
        others, and then the shipped one unless the user's is faster."""
        if key in self.found:
            return self.found[key]
        shipped, own = self.shipped.get(key), self.own.get(key)
        if shipped is None or own is None:
            return shipped or own
        return max((shipped, own), key=self._preference)

    def _preference(self, record: Record) -> tuple[bool, bool, float]:
        here = self.device in (None, record.device)
        return record.is_measured, here, -record.time_us

    def choose(self, op: Op, problem: Problem, target: Target) -> Choice:
        """The configuration by the records; the op's default where none fits."""
        if not target.is_gpu and target.name != "interpreter":
            return heuristic(op, problem, target)
        key = key_of(problem, target)
        record = self.exact(key)
        if record is not None:
            reason = rank.illegal_reason(op, problem, record.config, target)
            if reason is None:
                return _noted(Choice(record.config, f"record: {record}"), op, problem, target)
            self._tell(f"the tuning record of {key} is not used: {reason}")
        given = op, problem, target, key
        found = self._by_stale(*given) or self._by_nearest(*given)
        return _noted(found, op, problem, target) if found else heuristic(op, problem, target)

    def hints(self, op: Op, problem: Problem, target: Target, key: Key) -> list[Config]:
        """Configurations that records name for this problem, fresh or stale, and that fit it."""
        named = [each.config for each in self._of(key) if each.key.current == key.current]
        return [c for c in dict.fromkeys(named) if not rank.illegal_reason(op, problem, c, target)]

    def _of(self, key: Key) -> list[Record]:
        of = (key.architecture, key.op)
        return [*self.shipped.of(*of), *self.own.of(*of)]

    def _by_stale(self, op: Op, problem: Problem, target: Target, key: Key) -> Choice | None:
        """The model's choice among the default and what stale records of this problem name."""
        stale = [each for each in self._of(key) if each.key.stale and each.key.current == key]
        if not stale:
            return None
        self._tell(
            f"tuning records of {op.name} are stale ({stale[0].key.stale}); the configurations "
            "they name are only hints, ranked by the model. `convloom tune` measures again"
        )
        default = op.default(problem, target)
        usable = self.hints(op, problem, target, key)
        best = rank.rank(op, problem, target, dict.fromkeys([default, *usable]))[0].config
        if best == default:
            return Choice(default, f"{HEURISTIC} (a stale record ranks behind it)")
        return Choice(best, "stale record, ranked first by the model")

    def _by_nearest(self, op: Op, problem: Problem, target: Target, key: Key) -> Choice | None:
        """The configuration of the nearest shape that is legal here too."""
        near = [
            (distance(key, each.key), not each.is_measured, each.key.digest, each)
            for each in self._of(key)
            if each.key.triton == key.triton and each.key.source == key.source
        ]
        for far, _, _, record in sorted(near, key=lambda each: each[:3]):
            if far > NEAR:
                break
            if rank.illegal_reason(op, problem, record.config, target) is None:
                return Choice(record.config, f"nearest record, {record.key.inputs[0]}: {record}")
        return None

    def _tell(self, message: str) -> None:
        """Warns once."""
        if message not in self._told:
            self._told.add(message)
            LOG.warning(message)


class Timings:
    """What records say of the kernels that the choice of a partition compares (`partition.py`).

    A record wins over the cost model: where the one fused kernel and each of the kernels that it
    would replace have been timed, the times decide. What was asked for and has no record is kept,
    so that `tuning="search"` and `convloom tune` can time the alternatives too.
    """

    def __init__(self, records: Records, target: Target) -> None:
        self.records, self.target = records, target
        self._missing: dict[Key, Problem] = {}
        self._told: set[Key] = set()

    def __call__(self, problem: Problem) -> Timing | None:
        """The time of the problem in its best known configuration, or None."""
        key = key_of(problem, self.target)
        record = self.records.exact(key)
        op, target = registry.get(problem.op), self.target
        if record is None or rank.illegal_reason(op, problem, record.config, target) is not None:
            if key not in self._told:
                self._missing[key] = problem
            return None
        return Timing(record.time_us, record.status)

    def new(self) -> list[tuple[Problem, Target]]:
        """What has been missing since the last call, each once in the life of this object."""
        found = [(problem, self.target) for problem in self._missing.values()]
        self._told |= self._missing.keys()
        self._missing.clear()
        return found


def listed(records: Records, op: str | None = None) -> list[tuple[Record, str, str | None]]:
    """Every valid record, or those of one op, with whose it is and why it is stale, if it is: the
    shipped ones, then the user's.

    Raises: InvalidInputError for an unknown op.
    """
    if op is not None and op not in registry.BY_NAME:
        raise InvalidInputError(f"unknown op {op!r}; {near_names(op, registry.BY_NAME)}")
    return [
        (record, origin, record.key.stale)
        for origin, store in (("shipped", records.shipped), ("yours", records.own))
        for record in store.all()
        if op in (None, record.key.op)
    ]


def local_device(target: Target) -> str | None:
    """The name of this machine's GPU where it runs what is compiled for the target."""
    capability = targets.local_capability() if target.is_gpu else None
    if capability is None or capability < targets.GPU_TARGETS[0].capability:
        return None
    return torch.cuda.get_device_name() if targets.nearest(capability) is target else None
