"""Concatenations that repeat each other (DenseNet) become nested ones, which cost nothing.

    u = concat(a, b),  v = concat(a, b, c)   =>   v = concat(u, c)

Every layer of a dense block joins all the results before it. Nested, each of them is the beginning
of the next one's buffer, so that no value is copied from one joining to the next.
"""

from __future__ import annotations

from ...kernels.movement.movement import Concat
from ..graph.ir import Graph, Node, Value
from ..graph.ledger import Ledger

RULE = "concat(a, b), concat(a, b, c) => u = concat(a, b), concat(u, c)"
Joined = dict[tuple[Value, ...], Node]
"""By what they join, the first of several that join the same."""


def nest_concatenations(graph: Graph, ledger: Ledger) -> Graph:
    """Writes every concatenation that contains another one in terms of it, the longest first.

    After it no concatenation's inputs, as a run, are all of another's along the same dimension.
    """
    all_joined: list[tuple[Node, Concat, tuple[Value, ...]]] = []
    beginning: dict[tuple[Concat, Value], Joined] = {}
    for node in graph.nodes():
        if isinstance(node.attributes, Concat) and not node.epilogue:
            values = graph.inputs(node.name)
            all_joined.append((node, node.attributes, values))
            if len(values) > 1:
                beginning.setdefault((node.attributes, values[0]), {}).setdefault(values, node)
    for node, dim, values in all_joined:
        longest: tuple[Value, ...] = ()
        for at, value in enumerate(values):
            # Mostly the one before this one is the longest part of it.
            for run in reversed(beginning.get((dim, value), ())):
                inside = len(longest) < len(run) < len(values)
                if inside and values[at : at + len(run)] == run:
                    longest, start = run, at
        if longest:
            part = beginning[dim, longest[0]][longest]
            stop = start + len(longest)
            graph.set_inputs(node.name, (*values[:start], Value(part.name), *values[stop:]))
            ledger.accept(RULE, [part, node], node.name)
    return graph
