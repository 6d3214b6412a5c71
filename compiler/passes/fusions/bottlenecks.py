"""Fuses the 1x1 convolutions of residual bottlenecks with their neighbours (`conv_chain`).

The graph is cut after the reduction of the *next* block: 3x3, expansion, residual, activation and
the next reduction are one kernel, and nothing is computed twice. Where the channels are too many
for the 3x3 to keep all of them in one tile, the expansion and the next reduction still are one.
Where a stage begins, the 1x1 convolution of the shortcut takes the place of the residual; either
it or the expansion may be the one that does the adding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from ....kernels.fused.chains.conv_chain import ConvChain
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion import estimate, refusals
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Match, Rule, Var
from ...graph.ir import Graph, Node, Value
from .pool_fusions import is_1x1
from .shortcuts import Joined, adder_of, adds_only_constants, join, sum_reason

LARGEST = 256
LARGEST_WITH_FRONT = 128
"""Channels of t and z that fit one tile, with and without a convolution in front."""


def _is_larger(graph: Graph, node: Node) -> bool:
    return not is_1x1(graph, node)


def _is_plain(graph: Graph, node: Node) -> bool:
    """Whether it multiplies every pixel: beside a shortcut only such a one can be the expansion."""
    return is_1x1(graph, node) and node.attributes == Conv2d()


def _shape_reason(graph: Graph, found: Match) -> str | None:
    """What the kernel cannot express."""
    for name in ("expand", "reduce"):
        node = found.nodes.get(name)
        if node is not None and (reason := refusals.not_plain_1x1(node)) is not None:
            return reason
    for name, reason_of in (
        ("front", _front_reason), ("shortcut", _shortcut_reason), ("reduce", _reduce_reason)
    ):  # fmt: skip
        if name in found.nodes and (reason := reason_of(graph, found, found.nodes[name])):
            return reason
    return None


def _front_reason(graph: Graph, found: Match, front: Node) -> str | None:
    assert isinstance(front.attributes, Conv2d)
    if front.attributes.groups != 1:
        groups = front.attributes.groups
        return (
            f"{front.name} is grouped: with all its channels in one tile it would be a dense "
            f"product, {groups} times the work"
        )
    if front.prologue:
        return refusals.has_prologue(front)
    channels = graph.spec(graph.own_inputs(front)[1]).shape[1]
    return f"{front.name} reads {channels} channels, not at least 16" if channels < 16 else None


def _shortcut_reason(graph: Graph, found: Match, shortcut: Node) -> str | None:
    assert isinstance(shortcut.attributes, Conv2d)
    if any(shortcut.attributes.padding):
        return f"the shortcut {shortcut.name} is padded; the kernel reads it without a border"
    return sum_reason(graph, found)


def _reduce_reason(graph: Graph, found: Match, reduce: Node) -> str | None:
    for value in graph.operands(reduce):
        if not graph.is_constant(value):
            return f"{reduce.name} adds the computed tensor {value}; the kernel adds only constants"
    return None


def _guard(graph: Graph, found: Match) -> str | None:
    if (reason := _shape_reason(graph, found)) is not None:
        return reason
    if estimate.dtype_of(graph, found.root.spec) is torch.float32:
        return "float32 needs too many registers; float16 and bfloat16 are fused"
    limit = LARGEST_WITH_FRONT if "front" in found.nodes else LARGEST
    narrow = [found.nodes["reduce"].spec.shape[1]] if "reduce" in found.nodes else []
    middle = graph.spec(graph.own_inputs(found.nodes["expand"])[0]).shape[1]
    if max(middle, *narrow, 0) > limit:
        return f"{max(middle, *narrow, 0)} channels do not fit one tile (at most {limit})"
    return None


def _build(graph: Graph, found: Match) -> Fused:
    """The chain's attributes and inputs, in the order of its slots."""
    front, expand, reduce, shortcut = (
        found.nodes.get(name) for name in ("front", "expand", "reduce", "shortcut")
    )
    assert expand is not None
    wide, joined = expand, Joined(expand.epilogue, graph.operands(expand))
    if shortcut is not None:
        wide, joined = adder_of(graph, found)[0], join(graph, found)
    inputs: list[Value] = [graph.own_inputs(front or expand)[0]]
    if front is not None:
        inputs += [graph.own_inputs(front)[1], *graph.operands(front)]
    inputs.append(graph.own_inputs(expand)[1])
    if shortcut is not None:
        inputs += graph.own_inputs(shortcut)
    sums = {len(inputs): joined.added} if joined.added else {}
    inputs += joined.operands
    if reduce is not None:
        inputs += [graph.own_inputs(reduce)[1], *graph.operands(reduce)]
    attributes = ConvChain(
        front=_geometry(front),
        after_front=front.epilogue if front is not None else (),
        after_expand=joined.stages,
        has_reduce=reduce is not None,
        after_reduce=reduce.epilogue if reduce is not None else (),
        shortcut=_geometry(shortcut),
    )
    results = {wide.name: 0} | ({reduce.name: 1} if reduce is not None else {})
    return Fused("conv_chain", attributes, tuple(inputs), results, sums=sums)


def _geometry(node: Node | None) -> Conv2d | None:
    if node is None:
        return None
    assert isinstance(node.attributes, Conv2d)
    return node.attributes


Shortcut = Literal["first", "second"] | None
SHORTCUTS: tuple[Shortcut, ...] = (None, "second", "first")


@dataclass(frozen=True)
class Links:
    """Which links a chain has besides its expansion.

    shortcut: which term of the sum it is, as the epilogues tell them apart: the first is the one
    that adds; None for a chain that adds what somebody else computed, or nothing.
    """

    front: bool
    reduce: bool
    shortcut: Shortcut = None


def _pattern(links: Links) -> Call:
    before = FRONT if links.front else Var("t")
    product = ("conv2d", before, Var("w2"))
    beside = ("conv2d", Var("s"), Var("ws"))
    kept = links.reduce
    if links.shortcut is None:
        wide = Call(*product, name="expand", kept=kept, where=is_1x1)
    elif links.shortcut == "second":
        added = Call(*beside, name="shortcut", where=_is_added_1x1)
        wide = Call(*product, name="expand", kept=kept, where=_is_plain, operand=added)
    else:
        added = Call(*product, name="expand", where=_is_added_plain)
        wide = Call(*beside, name="shortcut", kept=kept, where=is_1x1, operand=added)
    if not links.reduce:
        return wide
    return Call("conv2d", wide, Var("w3"), name="reduce", where=is_1x1)


def _is_added_1x1(graph: Graph, node: Node) -> bool:
    return is_1x1(graph, node) and adds_only_constants(graph, node)


def _is_added_plain(graph: Graph, node: Node) -> bool:
    return _is_plain(graph, node) and adds_only_constants(graph, node)


FRONT = Call("conv2d", Var("x"), Var("w1"), name="front", where=_is_larger)


def _rule(front: bool, reduce: bool, shortcut: Shortcut) -> Rule:
    x, inner = ("x", "conv(x)") if front else ("t", "t")
    terms = {None: "conv1x1({0})", "second": "conv1x1({0}) + conv1x1(s)",
             "first": "conv1x1(s) + conv1x1({0})"}  # fmt: skip
    product = terms[shortcut].format(inner)
    fused = f"conv_chain({x}{', s' if shortcut else ''})"
    name = f"{product} => {fused}"
    if reduce:
        name = f"conv1x1(y = {product}) => {fused} giving y and the reduction"
    label = ("rotated-bottleneck" if front else "expand-reduce") if reduce else "conv-1x1"
    pattern = _pattern(Links(front, reduce, shortcut))
    return Rule(name, pattern, guard=_guard, label=label, build=_build)


RULES = tuple(
    _rule(front, reduce, shortcut)
    for front, reduce in ((True, True), (False, True), (True, False))
    for shortcut in SHORTCUTS
)
