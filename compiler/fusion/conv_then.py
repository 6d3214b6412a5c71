"""The declaration of what a convolution may finish in its own kernel.

Those of convloom are in `passes/fusions/pooled_convs.py`; extensions import this file, which asks
for no table.
"""

from __future__ import annotations

from collections.abc import Callable

from ...kernels.contract.op import Op
from ...kernels.fused.conv_tile import StagedConv
from ...kernels.tile.conv_geometry import Conv2d
from ..graph.ir import Graph, Node
from .declaration import Form, Fusion, variables
from .pattern import Call, Match, Var

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
    inputs = variables("x", "w", stages=("conv",))
    return Fusion(op.name, tuple(forms), made, inputs, (reason,), holds=holds)
