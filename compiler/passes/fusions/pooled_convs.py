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
from ...fusion.conv_then import conv_then
from ...graph.ir import Graph, Node
from .pool_fusions import AVERAGES, POOLS, averages_all


def _mean(conv: Conv2d, before: Any, stages: Any, average: Attributes) -> ConvMean:
    keepdim = average.keepdim if isinstance(average, Reduce) else True
    return ConvMean(conv, before, stages, keepdim)


def _is_pixel_shuffle(graph: Graph, node: Node) -> bool:
    dims = node.attributes.expect(Rearrange).dims
    return len(node.spec.shape) == 4 and dims == (0, 1, 4, 2, 5, 3)


FUSIONS = (
    conv_then(conv_pool.OP, "conv-pool", POOLS, ConvPool),
    conv_then(conv_mean.OP, "conv-mean", AVERAGES, _mean, averages_all),
    conv_then(
        conv_rearrange.OP, "sub-pixel", ("rearrange",), ConvRearrange, _is_pixel_shuffle
    ),
)  # fmt: skip
