"""Why each captured node ended in the kernel it did: the account of every accepted and refused
rewrite.

Passes write `accept` and `refuse` while they run; `compile` closes the account with the kernels, so
that every captured node has a fate. It is kept with the executable and printed by `explain`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from .ir import Graph, Node


@dataclass(frozen=True)
class Event:
    """One rewrite that happened, or one that a guard refused.

    nodes: captured nodes concerned; into: the node that stands for them afterwards; bytes_saved: of
    intermediate tensors no longer written and read, at the largest batch.
    """

    rule: str
    nodes: tuple[str, ...]
    accepted: bool
    reason: str = ""
    into: str = ""
    bytes_saved: int = 0


@dataclass(frozen=True)
class Fate:
    """What became of one captured node."""

    node: str
    op: str
    module_path: str
    kernel: str
    rules: tuple[str, ...]
    refused: tuple[str, ...]


@dataclass
class Ledger:
    """Events in order, and each captured node's fate once the plan is made."""

    events: list[Event] = field(default_factory=list)
    fates: list[Fate] = field(default_factory=list)

    def accept(self, rule: str, nodes: Iterable[Node], into: str, bytes_saved: int = 0) -> None:
        """Records a rewrite."""
        self.events.append(Event(rule, _origins(nodes), True, "", into, bytes_saved))

    def refuse(self, rule: str, nodes: Iterable[Node], reason: str) -> None:
        """Records a match that a guard declined, once."""
        event = Event(rule, _origins(nodes), False, reason)
        if event not in self.events:
            self.events.append(event)

    def close(self, captured: Graph, final: Graph, kernels: dict[str, str]) -> None:
        """Fills in the fates. `kernels` maps final nodes to what runs them ("view" for none)."""
        holder = {origin: node for node in final.nodes() for origin in node.origins}
        refused: dict[str, list[str]] = {}
        for event in self.events:
            if not event.accepted:
                for name in event.nodes:
                    refused.setdefault(name, []).append(f"{event.rule}: {event.reason}")
        for node in captured.compute_nodes():
            held = holder.get(node.name)
            self.fates.append(
                Fate(
                    node=node.name,
                    op=node.op if node.is_compute else str(node.attributes),
                    module_path=node.module_path,
                    kernel=kernels.get(held.name, "view") if held else "removed",
                    rules=self._rules_of(node.name),
                    refused=tuple(dict.fromkeys(refused.get(node.name, ()))),
                )
            )

    def _rules_of(self, name: str) -> tuple[str, ...]:
        rules = [event.rule for event in self.events if event.accepted and name in event.nodes]
        return tuple(dict.fromkeys(rules))

    @property
    def bytes_saved(self) -> int:
        return sum(event.bytes_saved for event in self.events)

    def to_json(self) -> dict[str, Any]:
        """Plain data: events and fates."""
        return {
            "events": [asdict(event) for event in self.events],
            "fates": [asdict(fate) for fate in self.fates],
        }

    def to_text(self) -> str:
        """Fates grouped by module, with rules and refusals."""
        lines, previous = [], None
        for fate in self.fates:
            if fate.module_path != previous:
                lines.append(fate.module_path or "(top module)")
                previous = fate.module_path
            lines.append(f"  {fate.op:<22} -> {fate.kernel}")
            lines += [f"      by       {rule}" for rule in fate.rules]
            lines += [f"      refused  {reason}" for reason in fate.refused]
        return "\n".join(lines) + "\n"


def _origins(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(origin for node in nodes for origin in node.origins))
