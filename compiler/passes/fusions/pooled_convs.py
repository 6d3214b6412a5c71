"""Lets a convolution pool its own result: 2x2 pooling (`conv_pool`), or the average over the whole
image (`conv_mean`), as VGG's stages and most classifiers end.

What is pooled is never written: a quarter of the pixels, or one per image, leaves the kernel.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ....kernels.fused import conv_mean, conv_pool
from ....kernels.fused.conv_mean import ConvMean
from ....kernels.fused.conv_pool import ConvPool
from ....kernels.normalisation.reduce import Reduce
from ....kernels.pooling.pool_window import AvgPool2d, MaxPool2d
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Match, NearMiss, Rule, Var
from ...fusion.rules import example
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


IMAGE = (2, 16, 8, 6)


def _pooled(**changes: Any) -> Any:
    """relu(conv2d(x)) and a pooling of it."""
    groups = changes.get("groups", 1)
    layers = {
        "conv": nn.Conv2d(IMAGE[1], 24, 3, padding=1, groups=groups),
        "pool": changes.get("pool", nn.MaxPool2d(2)),
    }

    def run(m: Any, x: Tensor) -> Tensor:
        result: Tensor = m["pool"](m["conv"](x).relu())
        return result

    return example(run, changes.get("image", IMAGE), **layers)


class _Mean(nn.Module):
    """The average over the pixels, without keeping their dimensions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


CONV = Call("conv2d", Var("x"), Var("w"), name="conv")
POOL_NEAR_MISSES = (
    NearMiss(lambda: _pooled(pool=nn.MaxPool2d(3, 2)), "window is 3x3"),
    NearMiss(lambda: _pooled(pool=nn.MaxPool2d(2, 2, dilation=2)), "dilation is 2x2"),
    NearMiss(lambda: _pooled(pool=nn.MaxPool2d(2, 1)), "stride is 1x1"),
    NearMiss(lambda: _pooled(pool=nn.MaxPool2d(2, 2, 1)), "padding is 1x1"),
    NearMiss(lambda: _pooled(groups=2), "the convolution has 2 groups"),
)
AVERAGE_NEAR_MISSES = (
    NearMiss(
        lambda: _pooled(pool=nn.AvgPool2d(2, ceil_mode=True), image=(2, 16, 9, 6)), "overhang"
    ),
)
MEAN_NEAR_MISSES = (
    NearMiss(lambda: _pooled(pool=nn.AdaptiveAvgPool2d(1), groups=2), "has 2 groups"),
    NearMiss(lambda: _pooled(pool=nn.AdaptiveAvgPool2d(1), image=(1, 16, 17, 16)), "17x16 pixels"),
)
RULES = (
    Rule(
        "max_pool2d(conv2d(x, w)) => conv_pool(x, w)",
        Call("max_pool2d", CONV),
        build=_build_pool,
        guard=_pool_guard,
        example=_pooled,
        near_misses=POOL_NEAR_MISSES,
        label="conv-pool",
    ),
    Rule(
        "avg_pool2d(conv2d(x, w)) => conv_pool(x, w)",
        Call("avg_pool2d", CONV),
        build=_build_pool,
        guard=_pool_guard,
        example=lambda: _pooled(pool=nn.AvgPool2d(2)),
        near_misses=AVERAGE_NEAR_MISSES,
        label="conv-pool",
    ),
    Rule(
        "adaptive_avg_pool2d(conv2d(x, w)) => conv_mean(x, w)",
        Call("adaptive_avg_pool2d", CONV, where=averages_all),
        build=_build_mean,
        guard=_mean_guard,
        example=lambda: _pooled(pool=nn.AdaptiveAvgPool2d(1)),
        near_misses=MEAN_NEAR_MISSES,
        label="conv-mean",
    ),
    Rule(
        "mean(conv2d(x, w)) => conv_mean(x, w)",
        Call("mean", CONV, where=averages_all),
        build=_build_mean,
        guard=_mean_guard,
        example=lambda: _pooled(pool=_Mean()),
        label="conv-mean",
    ),
    Rule(
        "avg_pool2d(conv2d(x, w)) => conv_mean(x, w)",
        Call("avg_pool2d", CONV, where=averages_all),
        build=_build_mean,
        guard=_mean_guard,
        example=lambda: _pooled(pool=nn.AvgPool2d(IMAGE[2:])),
        label="conv-mean",
    ),
)
