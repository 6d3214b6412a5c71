"""Fuses pooling with what stands beside it: a window's maximum or average with the 1x1 convolution
that reads it (`pool_conv`), the average over the whole image with the two of a
squeeze-and-excitation block (`squeeze_excite`), max pooling with the local response normalisation
before or after it (`lrn_pool`).
"""

from __future__ import annotations

from ....kernels.fused.lrn_pool import LrnPool
from ....kernels.fused.pool_conv import PoolConv
from ....kernels.fused.squeeze_excite import SqueezeExcite
from ....kernels.normalisation.lrn import LocalResponseNorm
from ....kernels.normalisation.reduce import Reduce
from ....kernels.pooling.pool_window import AdaptivePool2d, AvgPool2d, MaxPool2d
from ...fusion import refusals
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Constant, Match, Rule, Var
from ...graph.ir import Graph, Node, Value

AVERAGES = ("adaptive_avg_pool2d", "mean", "avg_pool2d")


def is_1x1(graph: Graph, node: Node) -> bool:
    """Whether a convolution's filter has one tap."""
    return graph.spec(graph.own_inputs(node)[1]).shape[2:] == (1, 1)


def averages_all(graph: Graph, node: Node) -> bool:
    """Whether one of AVERAGES averages whole images."""
    attributes, x = node.attributes, graph.spec(graph.own_inputs(node)[0])
    if isinstance(attributes, Reduce):
        return x.rank == 4 and attributes.dims == (2, 3)
    if isinstance(attributes, AdaptivePool2d):
        return attributes.size == (1, 1)
    assert isinstance(attributes, AvgPool2d)
    plain = not any(attributes.padding) and attributes.divisor_override is None
    return plain and attributes.kernel == x.shape[2:]


# Pooling -> 1x1 convolution.


def _is_shared(graph: Graph, node: Node) -> bool:
    return len(graph.uses(Value(node.name))) > 1


def _pool_guard(graph: Graph, found: Match) -> str | None:
    return refusals.not_plain_1x1(found.root, prologue=True)


def _build_pool_conv(graph: Graph, found: Match) -> Fused:
    pool, conv = found.nodes["pool"], found.root
    assert isinstance(pool.attributes, (MaxPool2d, AvgPool2d))
    keep = pool.name in found.kept
    attributes = PoolConv(pool.attributes, pool.epilogue, conv.prologue, keep)
    inputs = (
        found.values["x"],
        found.values["w"],
        *graph.operands(pool),
        *graph.prologue_operands(conv),
    )
    return Fused.at(graph, conv, "pool_conv", attributes, inputs, {pool.name: 1} if keep else {})


POOLS = ("max_pool2d", "avg_pool2d")


# Global average -> 1x1 convolution -> 1x1 convolution.


def _layers(found: Match) -> tuple[Node, Node]:
    return found.nodes["squeeze"], found.root


def _squeeze_guard(graph: Graph, found: Match) -> str | None:
    average = found.nodes.get("average")
    if average is not None and average.epilogue:
        return refusals.has_epilogue(average)
    for node in _layers(found):
        if node.op == "conv2d" and (reason := refusals.not_plain_1x1(node)) is not None:
            return reason
        if node.prologue:
            return refusals.has_prologue(node)
    channels = graph.spec(found.values["x"]).shape[1]
    if found.root.spec.shape[1] != channels:
        return f"{found.root.name} does not give one number per channel of the image it scales"
    return None


def _build_squeeze_excite(graph: Graph, found: Match) -> Fused:
    squeeze, excite = _layers(found)
    inputs = (
        found.values["x"], found.values["w1"], found.values["w2"], *graph.operands(squeeze)
    )  # fmt: skip
    attributes = SqueezeExcite(squeeze.epilogue)
    return Fused.at(graph, excite, "squeeze_excite", attributes, inputs)


def _is_one_pixel(graph: Graph, node: Node) -> bool:
    return is_1x1(graph, node) and graph.spec(graph.own_inputs(node)[0]).shape[2:] == (1, 1)


# Local response normalisation and max pooling.


def _lrn_guard(graph: Graph, found: Match) -> str | None:
    inner = found.nodes["inner"]
    return refusals.has_epilogue(inner) if inner.epilogue else None


def _build_lrn_pool(graph: Graph, found: Match) -> Fused:
    root, inner = found.root, found.nodes["inner"]
    lrn_first = isinstance(inner.attributes, LocalResponseNorm)
    lrn, pool = (inner, root) if lrn_first else (root, inner)
    assert isinstance(lrn.attributes, LocalResponseNorm)
    assert isinstance(pool.attributes, MaxPool2d)
    attributes = LrnPool(lrn.attributes, pool.attributes, lrn_first)
    return Fused.at(graph, root, "lrn_pool", attributes, (found.values["x"],))


LRN_AND_POOL = ("max_pool2d", "local_response_norm")
AVERAGE = Call(AVERAGES, Var("x"), name="average", where=averages_all)
RULES = (
    *(
        Rule(
            f"conv1x1({pool}, w) => pool_conv(x, w){giving}",
            Call(
                "conv2d",
                Call(POOLS, Var("x"), name="pool", kept=where is not None, where=where),
                Constant("w"),
                where=is_1x1,
            ),
            build=_build_pool_conv,
            guard=_pool_guard,
            label=label,
        )
        for label, pool, giving, where in (
            ("pool-conv", "pool(x)", "", None),
            ("pool-conv-kept", "t = pool(x)", " giving t as well", _is_shared),
        )
    ),
    *(
        Rule(
            name,
            Call(
                layer,
                Call(layer, source, Constant("w1"), name="squeeze", where=inner),
                Constant("w2"),
                where=is_1x1 if layer == "conv2d" else None,
            ),
            build=_build_squeeze_excite,
            guard=_squeeze_guard,
            label=label,
        )
        for name, layer, source, inner, label in (
            (
                "conv1x1(conv1x1(mean(x), v), w) => squeeze_excite(x, v, w)",
                "conv2d", AVERAGE, is_1x1, "squeeze-excite",
            ),
            (
                "linear(linear(mean(x), v), w) => squeeze_excite(x, v, w)",
                "linear", AVERAGE, None, "squeeze-excite",
            ),
            (
                "linear(linear(flatten(mean(x)), v), w) => squeeze_excite(x, v, w)",
                "linear", Call(("reshape", "flatten_pixels"), AVERAGE), None, "squeeze-excite",
            ),
            (
                "conv1x1(conv1x1(s, v), w) => squeeze_excite(s, v, w), s of one pixel",
                "conv2d", Var("x"), _is_one_pixel, "excite",
            ),
        )
    ),
    *(
        Rule(
            f"{outer}({inner}(x)) => lrn_pool(x)",
            Call(outer, Call(inner, Var("x"), name="inner")),
            build=_build_lrn_pool,
            guard=_lrn_guard,
            label="lrn-pool",
        )
        for outer, inner in (LRN_AND_POOL, LRN_AND_POOL[::-1])
    ),
)  # fmt: skip
