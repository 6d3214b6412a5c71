"""The declaration of what a convolution may finish in its own kernel.

Those of convloom are in `passes/fusions/pooled_convs.py`; extensions import this file, which asks
for no table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ...kernels.fused.conv_tile import StagedConv
from ...kernels.tile.conv_geometry import Conv2d
from ..graph.ir import Graph, Node
from .estimate import Fused
from .pattern import Call, Match, Rule, Var

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
