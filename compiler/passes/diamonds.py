"""Pointwise work that reads one tensor twice as one chain: x·sigmoid(x) written out, x·g·n + b + x.

A stage of a chain may read what its value was some stages ago. Where all readers of an op's result
are functions that lead to one function in the end, they become the epilogue of an `identity`, which
the fusion of epilogues moves into the op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...kernels.contract.epilogue import Stage
from ...kernels.movement.pointwise import Pointwise
from ..fusion import overrides
from ..fusion.rules import ANCHORS, BINARY, MOST_STAGES, UNARY, stages_of
from ..graph.ir import Graph, Node, Value
from ..graph.ledger import Ledger

RULE = "f(g(x), x) => identity(x, epilogue=[g, f earlier])"
LABEL = "diamond"
POINTWISE = frozenset((*UNARY, *BINARY))


def fuse_diamonds(graph: Graph, ledger: Ledger) -> Graph:
    """Makes a chain of the functions of an op's result that nobody else reads."""
    graph = graph.copy()
    names = [node.name for node in graph.nodes()]
    order = {name: at for at, name in enumerate(names)}
    pending = names[::-1]
    while pending:
        source = Value(pending.pop())
        region = _region(graph, source, order) if source.node in graph else []
        if not region:
            continue
        if (reason := overrides.of(graph.goal, LABEL, region).refusal) is not None:
            ledger.refuse(RULE, region, reason)
            continue
        trial = _part(graph, region)
        for join in region:
            _close(trial, join)
        ((reader, _), *others) = trial.uses(source)
        chain = trial.node(reader)
        if others or len(chain.epilogue) > MOST_STAGES:
            what = "two values at a time" if others else f"more than {MOST_STAGES} stages"
            ledger.refuse(RULE, region, f"a chain of the functions of {source.node} has {what}")
            continue
        for join in region:
            _close(graph, join)
        ((reader, _),) = graph.uses(source)
        order[reader] = order.get(region[-1].name, len(order))
        pending.append(reader)
        inner = sum(each.spec.size_bytes for each in region[:-1])
        ledger.accept(RULE, region, reader, 2 * inner)
    return graph


def _region(graph: Graph, source: Value, order: Mapping[str, int]) -> list[Node]:
    """The functions between an op's result, which is read more than once, and the one that all of
    them lead to, of one shape and dtype, sources first; none where something else reads one.

    order: of the graph's nodes, sources first. Only the readers are looked at, not all nodes.
    """
    if graph.node(source.node).op not in ANCHORS or len(graph.uses(source)) < 2:
        return []
    spec = graph.spec(source)
    unread = {source.node: len(graph.uses(source))}
    end = len(order)  # Of what this pass has made since.
    waiting = {(order.get(reader, end), reader) for reader, _ in graph.uses(source)}
    region: list[Node] = []
    while waiting:
        waiting.remove(first := min(waiting))
        node = graph.node(first[1])
        if node.op not in POINTWISE or node.epilogue:
            return []
        if (node.spec.shape, node.spec.dtype) != (spec.shape, spec.dtype):
            return []
        for value in graph.inputs(node.name):
            if value.node in unread:
                unread[value.node] -= 1
        readers = graph.uses(Value(node.name))
        unread[node.name] = len(readers)
        region.append(node)
        if [name for name, count in unread.items() if count] == [node.name]:
            return region
        waiting |= {(order.get(reader, end), reader) for reader, _ in readers}
    return []


def _part(graph: Graph, nodes: Sequence[Node]) -> Graph:
    """A graph of these nodes and of what they read, to try rewrites on: a copy of the whole one for
    each of N diamonds would take N times as long."""
    part = Graph(name=graph.name)
    for node in nodes:
        for value in graph.inputs(node.name):
            part.net.add_node(value.node, node=graph.node(value.node))
    for node in nodes:
        part.net.add_node(node.name, node=node)
        for slot, value in enumerate(graph.inputs(node.name)):
            part.net.add_edge(value.node, node.name, key=slot, index=value.index)
    return part


def _close(graph: Graph, join: Node) -> None:
    """Makes one chain of a function and what leads to it from one of its tensors."""
    own = graph.own_inputs(join) if join.name in graph else ()
    if len(own) != 2:
        return
    for source, end in (own, own[::-1]):
        between = _between(graph, source, end)
        if between is not None:
            _fuse(graph, source, between, join)
            return


def _between(graph: Graph, source: Value, end: Value) -> list[Node] | None:
    """The functions, each read once, that lead from one value to another, or None."""
    if end == source:
        return []
    node = graph.node(end.node)
    if node.op not in POINTWISE or len(graph.uses(end)) > 1:
        return None
    for value in graph.own_inputs(node):
        if (nodes := _between(graph, source, value)) is not None:
            return [*nodes, node]
    return None


def _fuse(graph: Graph, source: Value, between: Sequence[Node], join: Node) -> None:
    stages: list[Stage] = []
    operands: list[Value] = []
    value = source
    for node in between:
        own = graph.own_inputs(node)
        stages += stages_of(node, own.index(value))
        operands += [*(other for other in own if other != value), *graph.operands(node)]
        value = Value(node.name)
    (last,) = stages_of(join, graph.own_inputs(join).index(value))
    stages.append(replace(last, back=len(stages)))
    consumed = [join, *reversed(between)]
    inputs = (source, *operands)
    made = graph.add(
        "identity", inputs, Pointwise(), epilogue=tuple(stages), like=consumed, rule=RULE
    )
    # What a chain makes of booleans is boolean where its last function's result is.
    graph.update(made.node, outputs=(graph.spec(made).with_(dtype=join.spec.dtype),))
    graph.redirect(Value(join.name), made)
    graph.remove(node.name for node in consumed)
