"""Fuses what ends a classifier into one kernel (`head`): the average over the image, narrow linear
layers one after the other, the softmax.

Chains grow at their end: `linear(head(x))` and `softmax(head(x))` are heads again.
"""

from __future__ import annotations

from dataclasses import replace

from ....kernels.fused.head import MOST_LINKS, Head
from ....kernels.normalisation.softmax import Softmax
from ...fusion import refusals
from ...fusion.declaration import Form, Fusion, links
from ...fusion.pattern import Call, Constant, Match
from ...graph.ir import Graph, Node
from .pool_fusions import AVERAGE, FLAT

LAYERS = ("linear", "head")
NORMALISERS = ("softmax", "log_softmax")
CHAIN = ("inner", "middle", "last")


def as_head(node: Node) -> Head:
    """A layer or a head as a head without an epilogue."""
    if not isinstance(node.attributes, Head):
        return Head((node.epilogue,))
    *links, last = node.attributes.links
    return replace(node.attributes, links=(*links, (*last, *node.epilogue)))


def _one_row_per_sample(graph: Graph, found: Match) -> str | None:
    for node in found.those(*CHAIN, "root"):
        if node.op == "linear" and node.spec.rank != 2:
            return f"{node.name} is applied to rank {node.spec.rank}, not to one row per sample"
    for flat in found.those("flat"):
        if flat.spec.rank != 2:
            return f"{flat.name} does not flatten an image to one row per sample"
    return None


def _ends_a_head(graph: Graph, found: Match) -> str | None:
    for inner in found.those("inner"):
        if not isinstance(inner.attributes, Head):
            continue
        if inner.attributes.softmax:
            return f"{inner.name} ends in {inner.attributes.softmax}, which has to come last"
        if len(inner.attributes.links) == MOST_LINKS and "last" in found.nodes:
            return f"{inner.name} already has {MOST_LINKS} linear layers, the most of one kernel"
    return None


def _over_classes(graph: Graph, found: Match) -> str | None:
    softmax = found.root.attributes
    if isinstance(softmax, Softmax) and softmax.dim != 1:
        return f"{found.root.name} does not normalise over the classes, dimension 1"
    return None


def _attributes(graph: Graph, found: Match) -> Head:
    """The matched layers as one head; the first may be one already."""
    if "average" in found.nodes:
        return Head((found.root.epilogue,), average=True)
    first, *others = found.those(*CHAIN)
    head = as_head(first)
    return replace(
        head,
        links=(*head.links, *(node.epilogue for node in others)),
        softmax=found.root.op if found.root.op in NORMALISERS else head.softmax,
    )


INNER = Call(LAYERS, name="inner")
TWO = Call("linear", INNER, Constant("w"), name="last")
THREE = Call(
    "linear",
    Call("linear", Call("linear", name="inner"), Constant("v"), name="middle"),
    Constant("w"),
    name="last",
)
FUSIONS = (
    Fusion(
        op="head",
        forms=(
            Form("linear-chain", "linear(linear(linear(x, u), v), w) => head(x, u, v, w)", THREE),
            Form("linear-chain", "linear(linear(x, v), w) => head(x, v, w)", TWO),
            Form("head", "linear(flatten(mean(x)), w) => head(x, w)",
                 Call("linear", FLAT, Constant("w"), name="last")),
            Form("head", "linear(mean(x), w) => head(x, w)",
                 Call("linear", AVERAGE, Constant("w"), name="last")),
            # Longest first: a softmax that has taken the last layer leaves the others behind.
            Form("head",
                 "softmax(linear(linear(linear(x, u), v), w)) => head(x, u, v, w, softmax)",
                 Call(NORMALISERS, THREE)),
            Form("head", "softmax(linear(linear(x, v), w)) => head(x, v, w, softmax)",
                 Call(NORMALISERS, TWO)),
            Form("head", "softmax(linear(x, w)) => head(x, w, softmax)", Call(NORMALISERS, INNER)),
        ),
        attributes=_attributes,
        inputs=links(*CHAIN),
        refusals=(
            refusals.plain("average", "flat", *CHAIN, "root"), refusals.ending("average"),
            _one_row_per_sample, _ends_a_head, _over_classes,
        ),
        holds=("linear",),
    ),
)  # fmt: skip
