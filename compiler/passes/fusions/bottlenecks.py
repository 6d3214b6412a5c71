"""Fuses the 1x1 convolutions of residual bottlenecks with their neighbours (`conv_chain`).

The graph is cut after the reduction of the *next* block: 3x3, expansion, residual, activation and
the next reduction are one kernel, and nothing is computed twice. Where the channels are too many
for the 3x3 to keep all of them in one tile, the expansion and the next reduction still are one.
Where a stage begins, the 1x1 convolution of the shortcut takes the place of the residual; either
it or the expansion may be the one that does the adding.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from ....kernels.fused import links
from ....kernels.fused.chains.conv_chain import ConvChain
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion import estimate, refusals
from ...fusion.declaration import Form, Fusion
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Match, Var
from ...graph.ir import Graph, Node, Value
from .pool_fusions import is_1x1
from .shortcuts import Joined, adder_of, adds_only_constants, join, sum_reason

LARGEST = 256
LARGEST_WITH_FRONT = 128
"""Channels of t and z that fit one tile, with and without a convolution in front."""


def _is_plain(graph: Graph, node: Node) -> bool:
    """Whether it multiplies every pixel: beside a shortcut only such a one can be the expansion."""
    return is_1x1(graph, node) and node.attributes == Conv2d()


def _front_reason(graph: Graph, found: Match) -> str | None:
    for front in found.those("front"):
        if (groups := front.attributes.expect(Conv2d).groups) != 1:
            return (
                f"{front.name} is grouped: with all its channels in one tile it would be a dense "
                f"product, {groups} times the work"
            )
        if front.prologue:
            return refusals.has_prologue(front)
        channels = graph.spec(graph.own_inputs(front)[1]).shape[1]
        if channels < 16:
            return f"{front.name} reads {channels} channels, not at least 16"
    return None


def _shortcut_reason(graph: Graph, found: Match) -> str | None:
    for shortcut in found.those("shortcut"):
        if any(shortcut.attributes.expect(Conv2d).padding):
            return f"the shortcut {shortcut.name} is padded; the kernel reads it without a border"
        return sum_reason(graph, found)
    return None


def _reduce_reason(graph: Graph, found: Match) -> str | None:
    for reduce in found.those("reduce"):
        for value in graph.operands(reduce):
            if not graph.is_constant(value):
                adds = f"{reduce.name} adds the computed tensor {value}"
                return f"{adds}; the kernel adds only constants"
    return None


def _size_reason(graph: Graph, found: Match) -> str | None:
    if estimate.dtype_of(graph, found.root.spec) is torch.float32:
        return "float32 needs too many registers; float16 and bfloat16 are fused"
    limit = LARGEST_WITH_FRONT if "front" in found.nodes else LARGEST
    narrow = [node.spec.shape[1] for node in found.those("reduce")]
    middle = graph.spec(graph.own_inputs(found.nodes["expand"])[0]).shape[1]
    if (most := max(middle, *narrow, 0)) > limit:
        return f"{most} channels do not fit one tile (at most {limit})"
    return None


def _joined(graph: Graph, found: Match) -> Joined:
    """What follows the expansion, beside a shortcut the sum."""
    expand = found.nodes["expand"]
    if "shortcut" in found.nodes:
        return join(graph, found)
    return Joined(expand.epilogue, graph.operands(expand))


def _attributes(graph: Graph, found: Match) -> ConvChain:
    front, shortcut, reduce = (found.nodes.get(name) for name in ("front", "shortcut", "reduce"))
    return ConvChain(
        front=front.attributes.expect(Conv2d) if front else None,
        after_front=front.epilogue if front else (),
        after_expand=_joined(graph, found).stages,
        has_reduce=reduce is not None,
        after_reduce=reduce.epilogue if reduce else (),
        shortcut=shortcut.attributes.expect(Conv2d) if shortcut else None,
    )


def _inputs(graph: Graph, found: Match) -> list[Value]:
    (first, *_) = nodes = found.those("front", "expand", "reduce")
    values = [graph.own_inputs(first)[0]]
    for node in nodes:
        values.append(graph.own_inputs(node)[1])
        if node is not found.nodes["expand"]:
            values += graph.operands(node)
            continue
        for shortcut in found.those("shortcut"):
            values += graph.own_inputs(shortcut)
        values += _joined(graph, found).operands
    return values


def _results(graph: Graph, found: Match) -> dict[str, int]:
    wide = adder_of(graph, found)[0] if "shortcut" in found.nodes else found.nodes["expand"]
    return {wide.name: 0, **{node.name: 1 for node in found.those("reduce")}}


def _finish(graph: Graph, found: Match, fused: Fused) -> Fused:
    """With the other constants of the sum added to the first that the expansion's stages read."""
    added = _joined(graph, found).added
    chain = fused.attributes.expect(ConvChain).links
    at = links.slots(chain).operands["expand"].start
    return replace(fused, sums={at: added} if added else {})


Shortcut = Literal["first", "second"] | None
FRONT = Call(
    "conv2d", Var("x"), Var("w1"), name="front",
    where=lambda graph, node: not is_1x1(graph, node),
)  # fmt: skip
SHORTCUTS: tuple[Shortcut, ...] = (None, "second", "first")


def _pattern(front: bool, reduce: bool, shortcut: Shortcut) -> Call:
    """shortcut: which term of the sum it is, as the epilogues tell them apart: the first is the one
    that adds; None for a chain that adds what somebody else computed, or nothing."""

    def is_added(graph: Graph, node: Node) -> bool:
        fits = is_1x1 if shortcut == "second" else _is_plain
        return fits(graph, node) and adds_only_constants(graph, node)

    product = ("conv2d", FRONT if front else Var("t"), Var("w2"))
    beside = ("conv2d", Var("s"), Var("ws"))
    if shortcut is None:
        wide = Call(*product, name="expand", kept=reduce, where=is_1x1)
    elif shortcut == "second":
        added = Call(*beside, name="shortcut", where=is_added)
        wide = Call(*product, name="expand", kept=reduce, where=_is_plain, operand=added)
    else:
        added = Call(*product, name="expand", where=is_added)
        wide = Call(*beside, name="shortcut", kept=reduce, where=is_1x1, operand=added)
    if not reduce:
        return wide
    return Call("conv2d", wide, Var("w3"), name="reduce", where=is_1x1)


def _form(front: bool, reduce: bool, shortcut: Shortcut) -> Form:
    x, inner = ("x", "conv(x)") if front else ("t", "t")
    terms = {None: "conv1x1({0})", "second": "conv1x1({0}) + conv1x1(s)",
             "first": "conv1x1(s) + conv1x1({0})"}  # fmt: skip
    product = terms[shortcut].format(inner)
    fused = f"conv_chain({x}{', s' if shortcut else ''})"
    equation = f"{product} => {fused}"
    if reduce:
        equation = f"conv1x1(y = {product}) => {fused} giving y and the reduction"
    label = ("rotated-bottleneck" if front else "expand-reduce") if reduce else "conv-1x1"
    return Form(label, equation, _pattern(front, reduce, shortcut))


FUSIONS = (
    Fusion(
        op="conv_chain",
        forms=tuple(
            _form(front, reduce, shortcut)
            for front, reduce in ((True, True), (False, True), (True, False))
            for shortcut in SHORTCUTS
        ),
        attributes=_attributes,
        inputs=_inputs,
        refusals=(
            refusals.plain("expand", "reduce"), _front_reason, _shortcut_reason, _reduce_reason,
            _size_reason,
        ),
        results=_results,
        holds=("conv2d",),
        finish=_finish,
    ),
)  # fmt: skip
