"""Reasons that several rules give, in the same words: what is in the way, and what to change."""

from __future__ import annotations

from ...kernels.tile.conv_geometry import Conv2d
from ..graph.ir import Graph, Node
from .pattern import Guard, Match


def plain(*names: str, prologue: bool = False) -> Guard:
    """Refuses a node of these names that has a prologue (without which the kernel must do, unless
    `prologue`), and a 1x1 convolution that is more than a product of pixels with channels."""

    def refusal(graph: Graph, found: Match) -> str | None:
        for node in found.those(*names):
            if node.op == "conv2d" and node.attributes != Conv2d():
                return (
                    f"{node.name} is not dense with stride 1 and no padding, but {node.attributes}"
                )
            if node.prologue and not prologue:
                return has_prologue(node)
        return None

    return refusal


def ending(*names: str) -> Guard:
    """Refuses a node of these names that has an epilogue, for which the kernel has no place."""

    def refusal(graph: Graph, found: Match) -> str | None:
        for node in found.those(*names):
            if node.epilogue:
                return has_epilogue(node)
        return None

    return refusal


def has_prologue(node: Node) -> str:
    """Where the fused kernel has no place for what is applied to a node's input."""
    stages = ", ".join(map(str, node.prologue))
    return f"{node.name} has a prologue ({stages}), which this kernel lacks; forbid 'prologue'"


def has_epilogue(node: Node) -> str:
    """Where the fused kernel has no place for what follows an inner node."""
    stages = ", ".join(map(str, node.epilogue))
    return f"{node.name} has an epilogue ({stages}), which this kernel cannot apply there"
