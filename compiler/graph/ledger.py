"""Why each captured node ended in the kernel it did: the account of every accepted and refused
rewrite.

Passes write `accept` and `refuse` while they run; lowering closes the ledger with the kernels, so
that every captured node has a fate; the executable hands it the plan. What that saved in bytes,
kernels and modelled time is worked out when somebody asks (`account`, `to_json`, `to_text`), from
the graphs and the plan alone: nothing depends on what was cached.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ...errors import GraphError, InvalidInputError, near_names
from .ir import CONSTANT, Graph, Node

if TYPE_CHECKING:
    from ..explain.account import Account, Record
    from ..plan.plan import Plan


@dataclass(frozen=True)
class Event:
    """One rewrite that happened, or one that was refused.

    nodes: captured nodes concerned; into: the node that stands for them afterwards; bytes_saved: of
    intermediate tensors no longer written and read, at the largest batch; label: the rule's short
    name; time_us_before, time_us_after: modelled, apart and together, where they were compared.
    """

    rule: str
    nodes: tuple[str, ...]
    accepted: bool
    reason: str = ""
    into: str = ""
    bytes_saved: int = 0
    label: str = ""
    kernels_saved: int = 0
    time_us_before: float | None = None
    time_us_after: float | None = None


@dataclass(frozen=True)
class Fate:
    """What became of one captured node.

    kernel: the step that computes it, "torch", or why none does: "view", "in place", "removed",
    "constant".
    """

    node: str
    op: str
    module_path: str
    kernel: str
    rules: tuple[str, ...]
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Closing:
    """What the ledger is closed with: the graph as captured, as lowered, and what runs its nodes.

    The graphs are without tensors.
    """

    captured: Graph
    final: Graph
    kernels: Mapping[str, str]


@dataclass
class Ledger:
    """Events in order; once the plan is made, each captured node's fate and the whole account.

    measured: microseconds of steps, on `measured_on`. read: the account, where the ledger was read
    back rather than written by passes.
    """

    events: list[Event] = field(default_factory=list)
    closing: Closing | None = None
    plan: Plan | None = None
    measured: Mapping[str, float] = field(default_factory=dict)
    measured_on: str = ""
    read: Account | None = None
    _refused: set[Event] = field(default_factory=set, init=False, repr=False, compare=False)

    def accept(
        self, rule: str, nodes: Iterable[Node], into: str, bytes_saved: int = 0, **figures: Any
    ) -> None:
        """Records a rewrite that the graph has just been through; `figures` are further fields of
        `Event`."""
        self.events.append(Event(rule, _origins(nodes), True, "", into, bytes_saved, **figures))

    def refuse(self, rule: str, nodes: Iterable[Node], reason: str, **figures: Any) -> None:
        """Records a match that was declined, once; `figures` are further fields of `Event`."""
        event = Event(rule, _origins(nodes), False, reason, **figures)
        if event not in self._refused:
            self._refused.add(event)
            self.events.append(event)

    def copy(self) -> Ledger:
        """The same events, to go on with apart."""
        ledger = replace(self, events=list(self.events))
        ledger._refused = set(self._refused)
        return ledger

    def close(self, captured: Graph, final: Graph, kernels: Mapping[str, str]) -> None:
        """Takes what decides the fates. `kernels` maps final nodes to what runs them ("view" where
        it does not)."""
        self.closing = Closing(
            replace(captured, tensors={}, output_tree=None),
            replace(final, tensors={}, output_tree=None),
            dict(kernels),
        )
        self.__dict__.pop("fates", None)

    @cached_property
    def fates(self) -> tuple[Fate, ...]:
        """One per captured node, in the order of the captured graph; none before `close`."""
        if self.read is not None:
            fallbacks = {place.name for place in self.read.places if place.what == "torch"}
            return tuple(_fate_of(record, fallbacks) for record in self.read.nodes)
        if self.closing is None:
            return ()
        captured, kernels = self.closing.captured, self.closing.kernels
        holder = {origin: node for node in self.closing.final.nodes() for origin in node.origins}
        rules, refused = self.by_node()
        return tuple(
            Fate(
                node=node.name,
                op=op_name(node),
                module_path=node.module_path,
                kernel=_kernel_of(holder.get(node.name), kernels),
                rules=tuple(dict.fromkeys(event.rule for event in rules.get(node.name, ()))),
                refused=tuple(
                    dict.fromkeys(f"{e.rule}: {e.reason}" for e in refused.get(node.name, ()))
                ),
            )
            for node in captured.compute_nodes()
        )

    def by_node(self) -> tuple[dict[str, list[Event]], dict[str, list[Event]]]:
        """The accepted and the refused events of each captured node, in order."""
        accepted: dict[str, list[Event]] = {}
        refused: dict[str, list[Event]] = {}
        for event in self.events:
            side = accepted if event.accepted else refused
            for name in event.nodes:
                side.setdefault(name, []).append(event)
        return accepted, refused

    @property
    def bytes_saved(self) -> int:
        """Bytes of intermediate tensors that accepted rewrites say they saved."""
        return sum(event.bytes_saved for event in self.events)

    def with_measured(self, times_us: Mapping[str, float], where: str) -> Ledger:
        """The ledger with measured microseconds of steps (`Executable.profile`), and where.

        Raises: InvalidInputError for a step that the plan does not have.
        """
        known = [step.name for step in self.plan.steps] if self.plan else []
        known += [place.name for place in self.read.kernels] if self.read else []
        for name in times_us:
            if name not in known:
                raise InvalidInputError(
                    f"measured times: the plan has no step {name!r}; {near_names(name, known)}"
                )
        return replace(self, measured=dict(times_us), measured_on=where)

    def account(self) -> Account:
        """What became of every node, what that saved, and the graph of kernels.

        Raises: GraphError before the plan is made.
        """
        if not self.measured:
            return self._account
        return self._account.with_measured(self.measured, self.measured_on)

    @cached_property
    def _account(self) -> Account:
        if self.read is not None:
            return self.read
        if self.closing is None or self.plan is None:
            raise GraphError("the ledger has no plan yet; ask the ledger of an executable")
        from ..explain.attribution import make_account

        return make_account(self, self.closing, self.plan)

    def to_json(self) -> dict[str, Any]:
        """The account as plain data; `account.py` documents its fields."""
        return self.account().to_json()

    @staticmethod
    def from_json(data: Any, source: str = "ledger") -> Ledger:
        """The ledger that `to_json` wrote.

        Raises: ArtifactError for another schema or version, or missing or wrong fields.
        """
        from ..explain.account import from_json

        account = from_json(data, source)
        return Ledger(list(account.events), read=account)

    def to_text(self) -> str:
        """The account grouped by module, with rules, refusals and totals."""
        from ..explain.account_text import to_text

        return to_text(self.account())


def op_name(node: Node) -> str:
    """The op of a node; of a torch call, its overload."""
    return node.op if node.is_compute else str(node.attributes)


def _kernel_of(holder: Node | None, kernels: Mapping[str, str]) -> str:
    if holder is None:
        return "removed"
    return "constant" if holder.op == CONSTANT else kernels.get(holder.name, "view")


def _fate_of(record: Record, fallbacks: Collection[str]) -> Fate:
    kernel = "torch" if record.kernel in fallbacks else record.kernel
    refused = tuple(f"{refusal.rule}: {refusal.reason}" for refusal in record.refused)
    return Fate(record.node, record.op, record.module_path, kernel, record.rules, refused)


def _origins(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(origin for node in nodes for origin in node.origins))
