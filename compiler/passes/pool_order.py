"""Averages after a projection instead of before it, where that lets the projection join others.

Average pooling and a 1x1 convolution are linear and act on different dimensions, so they commute.
In an Inception module the pooling branch's projection then reads the module's input like the other
1x1 convolutions and is merged with them, and the pooling works on fewer channels.
"""

from __future__ import annotations

from ...kernels.pooling.pool_window import AvgPool2d
from ...kernels.tile.conv_geometry import Conv2d
from ..fusion.pattern import Call, Match, Rule, Var, apply_rules
from ..graph.ir import Graph, Node, Value
from ..graph.ledger import Ledger


def _is_projection(graph: Graph, node: Node) -> bool:
    weight = graph.spec(graph.own_inputs(node)[1])
    return node.attributes == Conv2d() and weight.shape[2:] == (1, 1) and not node.prologue


def _guard(graph: Graph, found: Match) -> str | None:
    conv, pool = found.nodes["conv"], found.nodes["pool"]
    if pool.attributes.expect(AvgPool2d).stride != (1, 1):
        return f"{conv.name} would have to project the pixels that {pool.name} drops"
    narrow, wide = conv.spec.shape[1], pool.spec.shape[1]
    if narrow > wide:
        return f"{conv.name} makes {narrow} channels of {wide}: {pool.name} would average more"
    x = found.values["x"]
    others = [graph.node(name) for name, slot in graph.uses(x) if slot == 0]
    if not any(other.op == "conv2d" and _is_projection(graph, other) for other in others):
        return f"no other 1x1 convolution reads {x}, with which {conv.name} could then be merged"
    return None


def _project_first(graph: Graph, found: Match) -> Value:
    """avg_pool2d(conv2d(x)) with the convolution's epilogue after the pooling."""
    conv, pool = found.nodes["conv"], found.nodes["pool"]
    weight = graph.own_inputs(conv)[1]
    operands = graph.operands(conv)
    projected = graph.add("conv2d", (found.values["x"], weight), conv.attributes, like=[conv])
    averaged = graph.add(
        pool.op, (projected, *operands), pool.attributes, epilogue=conv.epilogue, like=[pool]
    )
    graph.redirect(Value(conv.name), averaged)
    graph.remove([conv.name, pool.name])
    return averaged


RULES = (
    Rule(
        "conv1x1(avg_pool2d(x)) => avg_pool2d(conv1x1(x))",
        Call(
            "conv2d",
            Call("avg_pool2d", Var("x"), name="pool", plain=True),
            Var("w"),
            name="conv",
            where=_is_projection,
        ),
        _project_first,
        _guard,
        label="project-first",
    ),
)


def project_before_averaging(graph: Graph, ledger: Ledger) -> Graph:
    """Moves average pooling behind the 1x1 convolution that alone reads it."""
    return apply_rules(graph, RULES, ledger)
