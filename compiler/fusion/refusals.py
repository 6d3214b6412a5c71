"""Reasons that several rules give, in the same words: what is in the way, and what to change."""

from __future__ import annotations

from ...kernels.tile.conv_geometry import Conv2d
from ..graph.ir import Node


def not_plain_1x1(node: Node, *, prologue: bool = False) -> str | None:
    """Why a 1x1 convolution is not just a product of pixels with channels, or None; prologue:
    whether the kernel applies one."""
    if node.attributes != Conv2d():
        return f"{node.name} is not dense with stride 1 and no padding, but {node.attributes}"
    return has_prologue(node) if node.prologue and not prologue else None


def has_prologue(node: Node) -> str:
    """Where the fused kernel has no place for what is applied to a node's input."""
    stages = ", ".join(map(str, node.prologue))
    return f"{node.name} has a prologue ({stages}), which this kernel lacks; forbid 'prologue'"


def has_epilogue(node: Node) -> str:
    """Where the fused kernel has no place for what follows an inner node."""
    stages = ", ".join(map(str, node.epilogue))
    return f"{node.name} has an epilogue ({stages}), which this kernel cannot apply there"
