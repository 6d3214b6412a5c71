"""Every rewrite that passes accepted or refused, and why.

Passes write `accept` and `refuse` while they run; lowering closes the ledger with the kernels, so
that every captured node has a fate. `explain/report.py` makes the report of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

from .ir import Graph, Node


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
class Snapshot:
    """What the ledger is closed with: the graph as captured, as lowered, and what runs its nodes.

    The graphs are without tensors.
    """

    captured: Graph
    final: Graph
    kernels: Mapping[str, str]


@dataclass
class Ledger:
    """Events in order, and what decides the fates of nodes once they are lowered."""

    events: list[Event] = field(default_factory=list)
    snapshot: Snapshot | None = None
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

    def copy(self) -> Self:
        """The same events, to go on with apart."""
        ledger = replace(self, events=list(self.events))
        ledger._refused = set(self._refused)
        return ledger

    def close(self, captured: Graph, final: Graph, kernels: Mapping[str, str]) -> None:
        """Takes what decides the fates. `kernels` maps final nodes to what runs them ("view" where
        it does not)."""
        self.snapshot = Snapshot(
            replace(captured, tensors={}, output_tree=None),
            replace(final, tensors={}, output_tree=None),
            dict(kernels),
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


def op_name(node: Node) -> str:
    """The op of a node; of a torch call, its overload."""
    return node.op if node.is_compute else str(node.attributes)


def _origins(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(origin for node in nodes for origin in node.origins))
