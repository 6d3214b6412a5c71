"""Lets a convolution finish what follows it: 2x2 pooling (`conv_pool`), the average over the whole
image (`conv_mean`), pixel shuffle (`conv_rearrange`).

What follows is applied before anything is written: a quarter of the pixels leaves the kernel, or
one per image, or every pixel at once where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ....kernels.contract.op import Attributes, Op
from ....kernels.fused import conv_mean, conv_pool, conv_rearrange
from ....kernels.fused.conv_mean import ConvMean
from ....kernels.fused.conv_pool import ConvPool
from ....kernels.fused.conv_rearrange import ConvRearrange
from ....kernels.fused.conv_tile import StagedConv
from ....kernels.movement.rearrangement import Rearrange
from ....kernels.normalisation.reduce import Reduce
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion.declaration import Form, Fusion
from ...fusion.pattern import Call, Match, Var
from ...graph.ir import Graph, Node, Value
from .pool_fusions import AVERAGES, POOLS, averages_all

CONV = Call("conv2d", Var("x"), Var("w"), name="conv")


def conv_then(
    op: Op,
    label: str,
    followers: tuple[str, ...],
    attributes: Callable[..., StagedConv],
    where: Callable[[Graph, Node], bool] | None = None,
) -> Fusion:
    """A convolution and one of the ops that may follow it.

    attributes: of the fused op, the convolution's parts being given first, then the follower's
    attributes; where: what else makes a follower one of these. Where the fused op takes no
    epilogue, the follower's own stages join those of the convolution, which only stages without a
    tensor of their own can.
    """
    holds = () if op.takes_epilogue else followers

    def made(graph: Graph, found: Match) -> StagedConv:
        conv, root = found.nodes["conv"], found.root
        stages = (*conv.epilogue, *(root.epilogue if holds else ()))
        return attributes(conv.attributes.expect(Conv2d), conv.prologue, stages, root.attributes)

    def reason(graph: Graph, found: Match) -> str | None:
        if holds and graph.operands(found.root):
            return f"{found.root.name} reads a tensor behind the convolution"
        return made(graph, found).unsupported(found.nodes["conv"].spec.shape[2:])

    forms = (
        Form(label, f"{name}(conv2d(x, w)) => {op.name}(x, w)", Call(name, CONV, where=where))
        for name in followers
    )
    return Fusion(op.name, tuple(forms), made, _inputs, (reason,), holds=holds)


def _inputs(graph: Graph, found: Match) -> tuple[Value, ...]:
    """x, w, what the stages before the convolution read, what those after it read."""
    conv = found.nodes["conv"]
    return (*graph.own_inputs(conv), *graph.prologue_operands(conv), *graph.operands(conv))


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
