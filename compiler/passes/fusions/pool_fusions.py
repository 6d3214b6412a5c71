"""Fuses pooling with what stands beside it: a window's maximum or average with the 1x1 convolution
that reads it (`pool_conv`), the average over the whole image with the two of a
squeeze-and-excitation block (`squeeze_excite`), max pooling with the local response normalisation
before or after it (`lrn_pool`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....kernels.fused.lrn_pool import LrnPool
from ....kernels.fused.pool_conv import PoolConv
from ....kernels.fused.squeeze_excite import SqueezeExcite
from ....kernels.normalisation.lrn import LocalResponseNorm
from ....kernels.normalisation.reduce import Reduce
from ....kernels.pooling.pool_window import AdaptivePool2d, AvgPool2d, MaxPool2d
from ...fusion import refusals
from ...fusion.declaration import Form, Fusion, variables
from ...fusion.pattern import Call, Constant, Match, Var
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
    window = attributes.expect(AvgPool2d)
    plain = not any(window.padding) and window.divisor_override is None
    return plain and window.kernel == x.shape[2:]


# Pooling -> 1x1 convolution.


def _pool_conv(graph: Graph, found: Match) -> PoolConv:
    pool, conv = found.nodes["pool"], found.root
    window: Any = pool.attributes  # One of POOLS.
    return PoolConv(window, pool.epilogue, conv.prologue, pool.name in found.kept)


POOLS = ("max_pool2d", "avg_pool2d")


# Global average -> 1x1 convolution -> 1x1 convolution.


def _one_per_channel(graph: Graph, found: Match) -> str | None:
    if found.root.spec.shape[1] != graph.spec(found.values["x"]).shape[1]:
        return f"{found.root.name} does not give one number per channel of the image it scales"
    return None


def _is_one_pixel(graph: Graph, node: Node) -> bool:
    return is_1x1(graph, node) and graph.spec(graph.own_inputs(node)[0]).shape[2:] == (1, 1)


# Local response normalisation and max pooling.


def _lrn_pool(graph: Graph, found: Match) -> LrnPool:
    root, inner = found.root.attributes, found.nodes["inner"].attributes
    lrn_first = isinstance(inner, LocalResponseNorm)
    lrn, pool = (inner, root) if lrn_first else (root, inner)
    return LrnPool(lrn.expect(LocalResponseNorm), pool.expect(MaxPool2d), lrn_first)


LRN_AND_POOL = ("max_pool2d", "local_response_norm")
AVERAGE = Call(AVERAGES, Var("x"), name="average", where=averages_all)
FLAT = Call(("reshape", "flatten_pixels"), AVERAGE, name="flat")


def _pool_form(label: str, giving: str, where: Callable[[Graph, Node], bool] | None) -> Form:
    pool = Call(POOLS, Var("x"), name="pool", kept=where is not None, where=where)
    equation = f"conv1x1({'t = ' * (where is not None)}pool(x), w) => pool_conv(x, w){giving}"
    return Form(label, equation, Call("conv2d", pool, Constant("w"), where=is_1x1))


def _gate(
    layer: str, source: Call | Var, where: Callable[[Graph, Node], bool] | None = None
) -> Call:
    """Two layers behind what they read; where: what makes the first one of these."""
    squeeze = Call(layer, source, Constant("w1"), name="squeeze", where=where)
    return Call(layer, squeeze, Constant("w2"), where=is_1x1 if layer == "conv2d" else None)


FUSIONS = (
    Fusion(
        op="pool_conv",
        forms=(
            _pool_form("pool-conv", "", None),
            _pool_form(
                "pool-conv-kept", " giving t as well",
                lambda graph, node: len(graph.uses(Value(node.name))) > 1,
            ),
        ),
        attributes=_pool_conv,
        inputs=variables("x", "w", stages=("pool", "root")),
        refusals=(refusals.plain("root", prologue=True),),
        results=lambda graph, found: {found.root.name: 0, **dict.fromkeys(found.kept, 1)},
    ),
    Fusion(
        op="squeeze_excite",
        forms=(
            Form(
                "squeeze-excite",
                "conv1x1(conv1x1(mean(x), v), w) => squeeze_excite(x, v, w)",
                _gate("conv2d", AVERAGE, is_1x1),
            ),
            Form(
                "squeeze-excite",
                "linear(linear(mean(x), v), w) => squeeze_excite(x, v, w)",
                _gate("linear", AVERAGE),
            ),
            Form(
                "squeeze-excite",
                "linear(linear(flatten(mean(x)), v), w) => squeeze_excite(x, v, w)",
                _gate("linear", FLAT),
            ),
            Form(
                "excite",
                "conv1x1(conv1x1(s, v), w) => squeeze_excite(s, v, w), s of one pixel",
                _gate("conv2d", Var("x"), _is_one_pixel),
            ),
        ),
        attributes=lambda graph, found: SqueezeExcite(found.nodes["squeeze"].epilogue),
        inputs=variables("x", "w1", "w2", stages=("squeeze",)),
        refusals=(refusals.ending("average"), refusals.plain("squeeze", "root"), _one_per_channel),
    ),
    Fusion(
        op="lrn_pool",
        forms=tuple(
            Form("lrn-pool", f"{outer}({inner}(x)) => lrn_pool(x)",
                 Call(outer, Call(inner, Var("x"), name="inner")))
            for outer, inner in (LRN_AND_POOL, LRN_AND_POOL[::-1])
        ),
        attributes=_lrn_pool,
        inputs=variables("x"),
        refusals=(refusals.ending("inner"),),
    ),
)  # fmt: skip
