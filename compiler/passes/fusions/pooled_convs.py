"""Lets a convolution finish what follows it: 2x2 pooling (`conv_pool`), the average over the whole
image (`conv_mean`), pixel shuffle (`conv_rearrange`).

What follows is applied before anything is written: a quarter of the pixels leaves the kernel, or
one per image, or every pixel at once where it belongs.
"""

from __future__ import annotations

from typing import Any

from ....kernels.contract.op import Attributes
from ....kernels.fused import conv_mean, conv_pool, conv_rearrange
from ....kernels.fused.conv_mean import ConvMean
from ....kernels.fused.conv_pool import ConvPool
from ....kernels.fused.conv_rearrange import ConvRearrange
from ....kernels.movement.rearrangement import Rearrange
from ....kernels.normalisation.reduce import Reduce
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion.conv_then import ConvThen
from ...graph.ir import Graph, Node
from .pool_fusions import averages_all


def _mean(conv: Conv2d, before: Any, stages: Any, average: Attributes) -> ConvMean:
    keepdim = average.keepdim if isinstance(average, Reduce) else True
    return ConvMean(conv, before, stages, keepdim)


def _is_pixel_shuffle(graph: Graph, node: Node) -> bool:
    assert isinstance(node.attributes, Rearrange)
    return len(node.spec.shape) == 4 and node.attributes.dims == (0, 1, 4, 2, 5, 3)


POOL = ConvThen(
    "conv_pool", "conv-pool", ("max_pool2d", "avg_pool2d"), ConvPool, conv_pool.unsupported
)
MEAN = ConvThen(
    "conv_mean",
    "conv-mean",
    ("adaptive_avg_pool2d", "mean", "avg_pool2d"),
    _mean,
    conv_mean.unsupported,
    averages_all,
)
SUB_PIXEL = ConvThen(
    "conv_rearrange",
    "sub-pixel",
    ("rearrange",),
    ConvRearrange,
    conv_rearrange.unsupported,
    _is_pixel_shuffle,
    takes_epilogue=False,
)
RULES = tuple(rule for fusion in (POOL, MEAN, SUB_PIXEL) for rule in fusion.rules())
