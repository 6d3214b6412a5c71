"""Concatenations that repeat each other (DenseNet) become nested ones, which cost nothing.

    u = concat(a, b),  v = concat(a, b, c)   =>   v = concat(u, c)

Every layer of a dense block joins all the results before it. Nested, each of them is the beginning
of the next one's buffer, so that no value is copied from one joining to the next.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from ...kernels.movement.movement import Concat
from ..graph.ir import Graph, Node, Value
from ..graph.ledger import Ledger

RULE = "concat(a, b), concat(a, b, c) => u = concat(a, b), concat(u, c)"


def nest_concatenations(graph: Graph, ledger: Ledger) -> Graph:
    """Writes every concatenation that contains another one in terms of it, the longest first.

    After it no concatenation's inputs, as a run, are all of another's along the same dimension.
    """
    joined: dict[int, dict[tuple[Value, ...], list[Node]]] = {}
    for node in graph.nodes():
        if isinstance(node.attributes, Concat) and not node.epilogue:
            same = joined.setdefault(node.attributes.dim, {})
            same.setdefault(graph.inputs(node.name), []).append(node)
    for same in joined.values():
        runs = _Runs()
        for values, nodes in same.items():
            runs.add(values, nodes[0])
        runs.link()
        for values, nodes in same.items():
            for node in nodes:
                _nest(graph, node, values, runs, ledger)
    return graph


def _nest(graph: Graph, node: Node, values: tuple[Value, ...], runs: _Runs, ledger: Ledger) -> None:
    """Replaces the longest run of inputs that is joined elsewhere, the first of equal ones."""
    found = runs.longest(values)
    if found is None:
        return
    part, start, stop = found
    graph.set_inputs(node.name, (*values[:start], Value(part.name), *values[stop:]))
    ledger.accept(RULE, [part, node], node.name)


@dataclass
class _State:
    """What a walk through some inputs has read last: a beginning of a concatenation, as long as
    possible. fallback: the next shorter one; ends: the longest concatenation read to its end."""

    depth: int = 0
    following: dict[Value, _State] = field(default_factory=dict)
    fallback: _State | None = None
    node: Node | None = None
    ends: _State | None = None


class _Runs:
    """The inputs of concatenations, so that all that one of them contains are found in one walk
    (Aho & Corasick, "Efficient string matching", 1975)."""

    def __init__(self) -> None:
        self._start = _State()

    def add(self, values: tuple[Value, ...], node: Node) -> None:
        """Adds a concatenation of the values."""
        state = self._start
        for value in values:
            state = state.following.setdefault(value, _State(state.depth + 1))
        state.node = node

    def link(self) -> None:
        """Finds the fallbacks, once all are added."""
        waiting = deque([self._start])
        while waiting:
            state = waiting.popleft()
            for value, child in state.following.items():
                shorter = state.fallback
                while shorter is not None and value not in shorter.following:
                    shorter = shorter.fallback
                child.fallback = shorter.following[value] if shorter else self._start
                child.ends = child if child.node and child.depth > 1 else child.fallback.ends
                waiting.append(child)

    def longest(self, values: tuple[Value, ...]) -> tuple[Node, int, int] | None:
        """The longest concatenation, of those that were added, that is a part of the values, which
        were added too, and where it starts and stops; of equally long ones the first."""
        best, stop, state = None, 0, self._start
        for at, value in enumerate(values, 1):
            state = state.following[value]
            last = at == len(values)
            ends = state.fallback.ends if last and state.fallback else state.ends
            if ends is not None and (best is None or ends.depth > best.depth):
                best, stop = ends, at
        if best is None or best.node is None:
            return None
        return best.node, stop - best.depth, stop
