"""Fuses what ends a classifier into one kernel (`head`): the average over the image, narrow linear
layers one after the other, the softmax.

Chains grow at their end: `linear(head(x))` and `softmax(head(x))` are heads again.
"""

from __future__ import annotations

from dataclasses import replace

from ....kernels.fused.head import MOST_LINKS, Head
from ....kernels.normalisation.softmax import Softmax
from ...fusion import refusals
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Constant, Match, Rule
from ...graph.ir import Graph, Node, Value
from .pool_fusions import AVERAGE

LAYERS = ("linear", "head")


def as_head(graph: Graph, node: Node) -> tuple[Head, tuple[Value, ...]]:
    """The node's attributes and inputs as those of a head that has no epilogue."""
    if isinstance(node.attributes, Head):
        *links, last = node.attributes.links
        chain = (*links, (*last, *node.epilogue))
        attributes = Head(chain, node.attributes.average, node.attributes.softmax)
    else:
        attributes = Head((node.epilogue,))
    return attributes, (*graph.own_inputs(node), *graph.operands(node))


def _guard(graph: Graph, found: Match) -> str | None:
    for name, node in {**found.nodes, "root": found.root}.items():
        if node.prologue:
            return refusals.has_prologue(node)
        if name == "average" and node.epilogue:
            return refusals.has_epilogue(node)
        if node.op == "linear" and node.spec.rank != 2:
            return f"{node.name} is applied to rank {node.spec.rank}, not to one row per sample"
    flat = found.nodes.get("flat")
    if flat is not None and flat.spec.rank != 2:
        return f"{flat.name} does not flatten an image to one row per sample"
    inner = found.nodes.get("inner")
    if inner is not None and isinstance(inner.attributes, Head):
        if inner.attributes.softmax:
            return f"{inner.name} ends in {inner.attributes.softmax}, which has to come last"
        if len(inner.attributes.links) == MOST_LINKS and "last" in found.nodes:
            return f"{inner.name} already has {MOST_LINKS} linear layers, the most of one kernel"
    softmax = found.root.attributes
    if isinstance(softmax, Softmax) and softmax.dim != 1:
        return f"{found.root.name} does not normalise over the classes, dimension 1"
    return None


def _chain_of(graph: Graph, found: Match) -> tuple[Head, tuple[Value, ...]]:
    """Attributes and inputs of the matched layers as one head; the first may be one already."""
    attributes, inputs = as_head(graph, found.nodes["inner"])
    for name in ("middle", "last"):
        if name in found.nodes:
            node = found.nodes[name]
            attributes = replace(attributes, links=(*attributes.links, node.epilogue))
            inputs = (*inputs, graph.own_inputs(node)[1], *graph.operands(node))
    return attributes, inputs


def _build_chain(graph: Graph, found: Match) -> Fused:
    attributes, inputs = _chain_of(graph, found)
    return Fused("head", attributes, inputs, {found.root.name: 0})


def _build_average(graph: Graph, found: Match) -> Fused:
    root = found.root
    inputs = (found.values["x"], found.values["w"], *graph.operands(root))
    return Fused("head", Head((root.epilogue,), average=True), inputs, {root.name: 0})


def _build_softmax(graph: Graph, found: Match) -> Fused:
    attributes, inputs = _chain_of(graph, found)
    attributes = replace(attributes, softmax=found.root.op)
    return Fused.at(graph, found.root, "head", attributes, inputs)


INNER = Call(LAYERS, name="inner")
TWO = Call("linear", INNER, Constant("w"), name="last")
THREE = Call(
    "linear",
    Call("linear", Call("linear", name="inner"), Constant("v"), name="middle"),
    Constant("w"),
    name="last",
)
NORMALISERS = ("softmax", "log_softmax")


FLAT = Call(("reshape", "flatten_pixels"), AVERAGE, name="flat")
RULES = tuple(
    Rule(name, pattern, build=build, guard=_guard, label=label)
    for name, pattern, label, build in (
        ("linear(linear(linear(x, u), v), w) => head(x, u, v, w)", THREE, "linear-chain",
         _build_chain),
        ("linear(linear(x, v), w) => head(x, v, w)", TWO, "linear-chain", _build_chain),
        ("linear(flatten(mean(x)), w) => head(x, w)", Call("linear", FLAT, Constant("w")), "head",
         _build_average),
        ("linear(mean(x), w) => head(x, w)", Call("linear", AVERAGE, Constant("w")), "head",
         _build_average),
        # Longest first: a softmax that has taken the last layer leaves the others behind.
        ("softmax(linear(linear(linear(x, u), v), w)) => head(x, u, v, w, softmax)",
         Call(NORMALISERS, THREE), "head", _build_softmax),
        ("softmax(linear(linear(x, v), w)) => head(x, v, w, softmax)", Call(NORMALISERS, TWO),
         "head", _build_softmax),
        ("softmax(linear(x, w)) => head(x, w, softmax)", Call(NORMALISERS, INNER), "head",
         _build_softmax),
    )
)  # fmt: skip
