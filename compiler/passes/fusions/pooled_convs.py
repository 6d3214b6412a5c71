"""Lets a convolution pool its own result: 2x2 pooling (`conv_pool`), or the average over the whole
image (`conv_mean`), as VGG's stages and most classifiers end.

What is pooled is never written: a quarter of the pixels, or one per image, leaves the kernel.
"""

from __future__ import annotations

from ....kernels.fused import conv_mean, conv_pool
from ....kernels.fused.conv_mean import ConvMean
from ....kernels.fused.conv_pool import ConvPool
from ....kernels.normalisation.reduce import Reduce
from ....kernels.pooling.pool_window import AvgPool2d, MaxPool2d
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Match, Rule, Var
from ...graph.ir import Graph, Node, Value
from .pool_fusions import averages_all


def _inputs(graph: Graph, conv: Node) -> tuple[Value, ...]:
    """x, w, what the stages before the convolution read, what those after it read."""
    return (*graph.own_inputs(conv), *graph.prologue_operands(conv), *graph.operands(conv))


def _pool_attributes(found: Match) -> ConvPool:
    conv, pool = found.nodes["conv"], found.root.attributes
    assert isinstance(conv.attributes, Conv2d) and isinstance(pool, (MaxPool2d, AvgPool2d))
    return ConvPool(conv.attributes, conv.prologue, conv.epilogue, pool)


def _pool_guard(graph: Graph, found: Match) -> str | None:
    return conv_pool.unsupported(_pool_attributes(found), found.nodes["conv"].spec.shape[2:])


def _build_pool(graph: Graph, found: Match) -> Fused:
    return _fused(graph, found, "conv_pool", _pool_attributes(found))


def _mean_attributes(found: Match) -> ConvMean:
    conv, root = found.nodes["conv"], found.root.attributes
    assert isinstance(conv.attributes, Conv2d)
    keepdim = root.keepdim if isinstance(root, Reduce) else True
    return ConvMean(conv.attributes, conv.prologue, conv.epilogue, keepdim)


def _mean_guard(graph: Graph, found: Match) -> str | None:
    return conv_mean.unsupported(_mean_attributes(found), found.nodes["conv"].spec.shape[2:])


def _build_mean(graph: Graph, found: Match) -> Fused:
    return _fused(graph, found, "conv_mean", _mean_attributes(found))


def _fused(graph: Graph, found: Match, op: str, attributes: ConvPool | ConvMean) -> Fused:
    root = found.root
    return Fused(
        op,
        attributes,
        _inputs(graph, found.nodes["conv"]),
        results={root.name: 0},
        epilogue=root.epilogue,
        operands=graph.operands(root),
    )


CONV = Call("conv2d", Var("x"), Var("w"), name="conv")
RULES = (
    Rule(
        "max_pool2d(conv2d(x, w)) => conv_pool(x, w)",
        Call("max_pool2d", CONV),
        build=_build_pool,
        guard=_pool_guard,
        label="conv-pool",
    ),
    Rule(
        "avg_pool2d(conv2d(x, w)) => conv_pool(x, w)",
        Call("avg_pool2d", CONV),
        build=_build_pool,
        guard=_pool_guard,
        label="conv-pool",
    ),
    Rule(
        "adaptive_avg_pool2d(conv2d(x, w)) => conv_mean(x, w)",
        Call("adaptive_avg_pool2d", CONV, where=averages_all),
        build=_build_mean,
        guard=_mean_guard,
        label="conv-mean",
    ),
    Rule(
        "mean(conv2d(x, w)) => conv_mean(x, w)",
        Call("mean", CONV, where=averages_all),
        build=_build_mean,
        guard=_mean_guard,
        label="conv-mean",
    ),
    Rule(
        "avg_pool2d(conv2d(x, w)) => conv_mean(x, w)",
        Call("avg_pool2d", CONV, where=averages_all),
        build=_build_mean,
        guard=_mean_guard,
        label="conv-mean",
    ),
)
