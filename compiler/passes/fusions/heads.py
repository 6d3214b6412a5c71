"""Fuses what ends a classifier into one kernel (`head`): the average over the image, narrow linear
layers one after the other, the softmax.

Chains grow at their end: `linear(head(x))` and `softmax(head(x))` are heads again.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.fused.head import MOST_LINKS, Head
from ....kernels.normalisation.softmax import Softmax
from ...fusion import refusals
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Constant, Match, NearMiss, Rule
from ...fusion.rules import example
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
    root = found.root
    attributes, inputs = _chain_of(graph, found)
    made = replace(attributes, softmax=root.op)
    return Fused("head", made, inputs, {root.name: 0}, root.epilogue, graph.operands(root))


class _Stack(nn.Module):
    """Linear layers with ReLU between them, and what comes after them."""

    def __init__(self, *widths: int, end: nn.Module | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.end = end or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        for position, layer in enumerate(self.layers):
            x = layer(torch.relu(x) if position else x)
        result: Tensor = self.end(x)
        return result


def _chain(*widths: int, end: nn.Module | None = None, shape: tuple[int, ...] = (5,)) -> Any:
    return example(lambda m, x: m["fc"](x), (*shape, widths[0]), fc=_Stack(*widths, end=end))


def _averaged(*, keepdim: bool, activation: Any = None) -> Any:
    def run(m: Any, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=keepdim)
        result: Tensor = m["fc"]((activation(s) if activation else s).flatten(1))
        return result

    return example(run, (3, 16, 5, 4), fc=nn.Linear(16, 10))


NARROW = (40, 24, 16, 10)
TOO_WIDE = (64, 1024, 1024)
INNER = Call(LAYERS, name="inner")
TWO = Call("linear", INNER, Constant("w"), name="last")
THREE = Call(
    "linear",
    Call("linear", Call("linear", name="inner"), Constant("v"), name="middle"),
    Constant("w"),
    name="last",
)
NORMALISERS = ("softmax", "log_softmax")


def _chain_rule(name: str, pattern: Call, near_misses: tuple[NearMiss, ...], links: int) -> Rule:
    return Rule(
        name,
        pattern,
        build=_build_chain,
        guard=_guard,
        example=lambda: _chain(*NARROW[: links + 1]),
        near_misses=near_misses,
        label="linear-chain",
    )


def _average_rule(name: str, source: Call, near_misses: tuple[NearMiss, ...], flat: bool) -> Rule:
    return Rule(
        name,
        Call("linear", source, Constant("w")),
        build=_build_average,
        guard=_guard,
        example=lambda: _averaged(keepdim=flat),
        near_misses=near_misses,
        label="head",
    )


def _softmax_rule(name: str, chain: Call, near_misses: tuple[NearMiss, ...], links: int) -> Rule:
    return Rule(
        name,
        Call(NORMALISERS, chain),
        build=_build_softmax,
        guard=_guard,
        example=lambda: _chain(*NARROW[: links + 1], end=nn.Softmax(1)),
        near_misses=near_misses,
        label="head",
    )


RULES = (
    _chain_rule(
        "linear(linear(linear(x, u), v), w) => head(x, u, v, w)",
        THREE,
        (NearMiss(lambda: _chain(64, 512, 512, 10), "more than"),),
        links=3,
    ),
    _chain_rule(
        "linear(linear(x, v), w) => head(x, v, w)",
        TWO,
        (
            NearMiss(lambda: _chain(*TOO_WIDE), "more than"),
            NearMiss(lambda: _chain(*NARROW[:3], shape=(2, 3)), "one row per sample"),
        ),
        links=2,
    ),
    _average_rule(
        "linear(flatten(mean(x)), w) => head(x, w)",
        Call(("reshape", "flatten_pixels"), AVERAGE, name="flat"),
        (NearMiss(lambda: _averaged(keepdim=True, activation=torch.tanh), "has an epilogue"),),
        flat=True,
    ),
    _average_rule("linear(mean(x), w) => head(x, w)", AVERAGE, (), flat=False),
    # Longest first: a softmax that has taken the last layer leaves the others behind.
    _softmax_rule(
        "softmax(linear(linear(linear(x, u), v), w)) => head(x, u, v, w, softmax)",
        THREE,
        (),
        links=3,
    ),
    _softmax_rule("softmax(linear(linear(x, v), w)) => head(x, v, w, softmax)", TWO, (), links=2),
    _softmax_rule(
        "softmax(linear(x, w)) => head(x, w, softmax)",
        INNER,
        (NearMiss(lambda: _chain(*NARROW[:2], end=nn.Softmax(0)), "over the classes"),),
        links=1,
    ),
)
