"""Folds pads into the convolutions that read them.

A border of zeros is the convolution's own padding: that costs nothing, so it is not compared with
anything. Other borders (reflect, replicate, circular) are found by the loads of the convolution,
which is then a kernel of its own (`conv_nd.py`): whether that pays is decided with all the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...kernels.convolution.conv_window import BorderConv2d, Conv3d
from ...kernels.movement.pad import Pad
from ...kernels.tile.conv_geometry import Conv2d
from ..fusion.estimate import Fused
from ..fusion.pattern import Call, Match, Rule, Var
from ..graph.ir import Graph, Node

LABEL = "pad-into-conv"


def _pad_of(found: Match) -> Pad:
    attributes = found.nodes["pad"].attributes
    assert isinstance(attributes, Pad)
    return attributes


def _conv_of(found: Match) -> Conv2d | Conv3d:
    attributes = found.nodes["conv"].attributes
    assert isinstance(attributes, (Conv2d, Conv3d))
    return attributes


def _is_plain(graph: Graph, node: Node) -> bool:
    return not node.prologue and getattr(node.attributes, "border", "constant") == "constant"


def _is_constant(graph: Graph, node: Node) -> bool:
    return isinstance(node.attributes, Pad) and node.attributes.mode == "constant"


def _is_border(graph: Graph, node: Node) -> bool:
    return not _is_constant(graph, node)


def _geometry_reason(found: Match) -> str | None:
    pad, attributes = found.nodes["pad"], _pad_of(found)
    if any((*attributes.before[:2], *attributes.after[:2])):
        return f"{pad.name} pads more than the image, which no convolution does: {attributes}"
    if min((*attributes.before, *attributes.after)) < 0:
        return f"{pad.name} crops, which no convolution does: {attributes}"
    if pad.epilogue:
        return f"{pad.name} has stages of its own: {', '.join(map(str, pad.epilogue))}"
    return None


def _zeros_guard(graph: Graph, found: Match) -> str | None:
    if (value := _pad_of(found).value) != 0:
        return f"{found.nodes['pad'].name} pads with {value:g}; a convolution pads with zeros"
    return _geometry_reason(found)


def _border_guard(graph: Graph, found: Match) -> str | None:
    conv, attributes = found.nodes["conv"], _conv_of(found)
    if any(attributes.padding):
        return f"{conv.name} pads once more, with zeros, around another border: {attributes}"
    if graph.spec(found.values["w"]).shape[1] == 1 < attributes.groups:
        return f"{conv.name} is depthwise, and its kernel pads with zeros only"
    return _geometry_reason(found)


def _widths(pad: Pad) -> tuple[int, ...]:
    """Before and after of every dimension of the image, as convolutions have them."""
    sides = zip(pad.before[2:], pad.after[2:], strict=True)
    return tuple(width for pair in sides for width in pair)


def _fused(graph: Graph, found: Match, op: str, attributes: Any) -> Fused:
    conv = found.nodes["conv"]
    return Fused(
        op,
        attributes,
        (found.values["x"], found.values["w"]),
        {conv.name: 0},
        conv.epilogue,
        graph.operands(conv),
    )


def _with_zeros(graph: Graph, found: Match) -> Fused:
    """The convolution with the pad's widths on top of its own."""
    attributes = _conv_of(found)
    both = zip(attributes.padding, _widths(_pad_of(found)), strict=True)
    padding: Any = tuple(own + width for own, width in both)
    return _fused(graph, found, found.nodes["conv"].op, replace(attributes, padding=padding))


def _with_border(graph: Graph, found: Match) -> Fused:
    conv, pad = _conv_of(found), _pad_of(found)
    if isinstance(conv, Conv3d):
        volume = replace(conv, padding=_widths(pad), border=pad.mode)
        return _fused(graph, found, "conv3d", volume)
    image = BorderConv2d(conv.stride, _widths(pad), conv.dilation, conv.groups, pad.mode)
    return _fused(graph, found, "border_conv2d", image)


def _convolution(op: str, where: Any) -> Call:
    pad = Call("pad", Var("x"), name="pad", where=where)
    return Call(op, pad, Var("w"), name="conv", where=_is_plain)


ZERO_RULES = (
    Rule(
        name="conv2d(pad(x, 0), w) => conv2d(x, w, padding)",
        label=LABEL,
        pattern=_convolution("conv2d", _is_constant),
        build=_with_zeros,
        guard=_zeros_guard,
    ),
    Rule(
        name="conv3d(pad(x, 0), w) => conv3d(x, w, padding)",
        label=LABEL,
        pattern=_convolution("conv3d", _is_constant),
        build=_with_zeros,
        guard=_zeros_guard,
    ),
)
BORDER_RULES = (
    Rule(
        name="conv2d(pad(x, border), w) => border_conv2d(x, w, padding, border)",
        label="border-into-conv",
        pattern=_convolution("conv2d", _is_border),
        build=_with_border,
        guard=_border_guard,
    ),
    Rule(
        name="conv3d(pad(x, border), w) => conv3d(x, w, padding, border)",
        label="border-into-conv",
        pattern=_convolution("conv3d", _is_border),
        build=_with_border,
        guard=_border_guard,
    ),
)
RULES = (*ZERO_RULES, *BORDER_RULES)
