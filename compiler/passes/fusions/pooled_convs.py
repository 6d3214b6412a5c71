"""Lets a convolution finish what follows it: 2x2 pooling (`conv_pool`), the average over the whole
image (`conv_mean`), pixel shuffle (`conv_rearrange`).

What follows is applied before anything is written: a quarter of the pixels leaves the kernel, or
one per image, or every pixel at once where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ....kernels.contract.op import Attributes
from ....kernels.fused import conv_mean, conv_pool, conv_rearrange
from ....kernels.fused.conv_mean import ConvMean
from ....kernels.fused.conv_pool import ConvPool
from ....kernels.fused.conv_rearrange import ConvRearrange
from ....kernels.fused.conv_tile import StagedConv
from ....kernels.movement.rearrangement import Rearrange
from ....kernels.normalisation.reduce import Reduce
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Match, Rule, Var
from ...graph.ir import Graph, Node
from .pool_fusions import averages_all

CONV = Call("conv2d", Var("x"), Var("w"), name="conv")


@dataclass(frozen=True)
class ConvThen:
    """A convolution and what follows it, as one kernel: from this record come the rules.

    op: the fused op, whose `label` users force or forbid; followers: the ops that may follow;
    attributes: of the fused op, the convolution's parts being given first, then the follower's
    attributes; unsupported: why the kernel cannot do it, from the attributes and the height and
    width of the convolution's result; where: what else makes a follower one of these.
    takes_epilogue: whether the fused op applies the follower's own stages; else they join those of
    the convolution, which only stages without a tensor of their own can.
    """

    op: str
    label: str
    followers: tuple[str, ...]
    attributes: Callable[..., StagedConv]
    unsupported: Callable[[Any, tuple[int, ...]], str | None]
    where: Callable[[Graph, Node], bool] | None = None
    takes_epilogue: bool = True

    def rules(self) -> tuple[Rule, ...]:
        """One rule for each follower."""
        return tuple(
            Rule(
                f"{name}(conv2d(x, w)) => {self.op}(x, w)",
                Call(name, CONV, where=self.where),
                build=self._build,
                guard=self._guard,
                label=self.label,
            )
            for name in self.followers
        )

    def _attributes(self, found: Match) -> StagedConv:
        conv, root = found.nodes["conv"], found.root
        assert isinstance(conv.attributes, Conv2d)
        stages = conv.epilogue if self.takes_epilogue else (*conv.epilogue, *root.epilogue)
        return self.attributes(conv.attributes, conv.prologue, stages, root.attributes)

    def _guard(self, graph: Graph, found: Match) -> str | None:
        if not self.takes_epilogue and graph.operands(found.root):
            return f"{found.root.name} reads a tensor behind the convolution"
        return self.unsupported(self._attributes(found), found.nodes["conv"].spec.shape[2:])

    def _build(self, graph: Graph, found: Match) -> Fused:
        """Inputs: x, w, what the stages before the convolution read, what those after it read."""
        conv, root = found.nodes["conv"], found.root
        read = (*graph.prologue_operands(conv), *graph.operands(conv))
        return Fused(
            self.op,
            self._attributes(found),
            (*graph.own_inputs(conv), *read),
            results={root.name: 0},
            epilogue=root.epilogue if self.takes_epilogue else (),
            operands=graph.operands(root),
        )


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
