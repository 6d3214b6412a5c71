"""Concatenations that repeat each other (DenseNet) become nested ones, which cost nothing.

    u = concat(a, b),  v = concat(a, b, c)   =>   v = concat(u, c)

Every layer of a dense block joins all the results before it. Nested, each of them is the beginning
of the next one's buffer, so that no value is copied from one joining to the next.
"""

from __future__ import annotations

from ...kernels.movement import Concat
from ..ir import Graph, Node, Value
from ..ledger import Ledger

RULE = "concat(a, b), concat(a, b, c) => u = concat(a, b), concat(u, c)"


def nest_concatenations(graph: Graph, ledger: Ledger) -> Graph:
    """Writes every concatenation that contains another one in terms of it, the longest first.

    After it no concatenation's inputs, as a run, are all of another's along the same dimension.
    """
    joined: dict[tuple[int, tuple[Value, ...]], Value] = {}
    for node in graph.nodes():
        attributes = node.attributes
        if not isinstance(attributes, Concat) or node.epilogue:
            continue
        values = graph.inputs(node.name)
        joined.setdefault((attributes.dim, values), Value(node.name))
    for node in graph.nodes():
        attributes = node.attributes
        if isinstance(attributes, Concat) and not node.epilogue:
            _nest(graph, node, attributes.dim, joined, ledger)
    return graph


def _nest(
    graph: Graph,
    node: Node,
    dim: int,
    joined: dict[tuple[int, tuple[Value, ...]], Value],
    ledger: Ledger,
) -> None:
    """Replaces the longest runs of inputs that are joined elsewhere, first come first."""
    values = graph.inputs(node.name)
    for length in range(len(values) - 1, 1, -1):
        for start in range(len(values) - length + 1):
            part = joined.get((dim, values[start : start + length]))
            if part is None or part.node not in graph:
                continue
            graph.set_inputs(node.name, (*values[:start], part, *values[start + length :]))
            ledger.accept(RULE, [graph.node(part.node), node], node.name)
            return
