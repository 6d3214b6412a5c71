"""Pointwise work that reads one tensor twice as one chain: x·sigmoid(x) written out, x·g·n + b + x.

A stage of a chain may read what its value was some stages ago. Where all readers of an op's result
are functions that lead to one function in the end, they become the epilogue of an `identity`, which
the fusion of epilogues moves into the op.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...kernels.contract.epilogue import Epilogue, Stage
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
    names = [node.name for node in graph.nodes()]
    order = {name: at for at, name in enumerate(names)}
    pending = names[::-1]
    while pending:
        source = Value(pending.pop())
        region = _region(graph, source, order) if source.node in graph else []
        if not region:
            continue
        stages, operands = _chain(graph, source, region)
        what = "two values at a time" if len(stages) < len(region) else ""
        if len(stages) > MOST_STAGES:
            what = f"more than {MOST_STAGES} stages"
        reason = what and f"a chain of the functions of {source.node} has {what}"
        if reason := overrides.of(graph.goal, LABEL, region).refusal or reason:
            ledger.refuse(RULE, region, reason)
            continue
        last = region[-1]
        made = graph.add(
            "identity", (source, *operands), Pointwise(), epilogue=stages, like=region[::-1],
            rule=RULE,
        )  # fmt: skip
        # What a chain makes of booleans is boolean where its last function's result is.
        graph.update(made.node, outputs=(graph.spec(made).with_(dtype=last.spec.dtype),))
        graph.redirect(Value(last.name), made)
        graph.remove(node.name for node in reversed(region))
        order[made.node] = order.get(last.name, len(order))
        pending.append(made.node)
        ledger.accept(RULE, region, made.node, 2 * sum(n.spec.size_bytes for n in region[:-1]))
    return graph


def _chain(graph: Graph, source: Value, region: Sequence[Node]) -> tuple[Epilogue, list[Value]]:
    """The functions as stages, and what these read besides: as many as read what the one before
    them has made, perhaps beside what the value was some stages ago."""
    stages: list[Stage] = []
    operands: list[Value] = []
    value, made = source, {source: 0}
    for node in region:
        own = list(graph.own_inputs(node))
        if value not in own:
            break
        (stage,) = stages_of(node, own.index(value))
        own.remove(value)
        earlier = [made[other] for other in own if other in made]
        if earlier:
            stage = replace(stage, back=len(stages) - earlier[0])
        else:
            operands += own
        stages.append(stage)
        value = Value(node.name)
        made[value] = len(stages)
    return tuple(stages), operands


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
