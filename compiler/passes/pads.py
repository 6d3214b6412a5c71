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
from ..fusion.pattern import Build, Call, Guard, Match, Rule, Var
from ..graph.ir import Graph, Node

LABEL = "pad-into-conv"


def _pad_of(found: Match) -> Pad:
    return found.nodes["pad"].attributes.expect(Pad)


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


def _with_zeros(graph: Graph, found: Match) -> Fused:
    """The convolution with the pad's widths on top of its own."""
    attributes = _conv_of(found)
    both = zip(attributes.padding, _widths(_pad_of(found)), strict=True)
    padding: Any = tuple(own + width for own, width in both)
    conv, inputs = found.nodes["conv"], (found.values["x"], found.values["w"])
    return Fused.at(graph, conv, conv.op, replace(attributes, padding=padding), inputs)


def _with_border(graph: Graph, found: Match) -> Fused:
    conv, pad, inputs = _conv_of(found), _pad_of(found), (found.values["x"], found.values["w"])
    if isinstance(conv, Conv3d):
        volume = replace(conv, padding=_widths(pad), border=pad.mode)
        return Fused.at(graph, found.root, "conv3d", volume, inputs)
    image = BorderConv2d(conv.stride, _widths(pad), conv.dilation, conv.groups, pad.mode)
    return Fused.at(graph, found.root, "border_conv2d", image, inputs)


def _rules(
    label: str, border: str, where: Any, guard: Guard, build: Build, **ops: str
) -> tuple[Rule, ...]:
    """For each convolution, the fused op by its name."""
    return tuple(
        Rule(
            f"{name}(pad(x, {border}), w) => {op}(x, w, padding{', border' * (border != '0')})",
            Call(name, Call("pad", Var("x"), name="pad", where=where), Var("w"), name="conv",
                 where=_is_plain),
            build=build,
            guard=guard,
            label=label,
        )
        for name, op in ops.items()
    )  # fmt: skip


ZERO_RULES = _rules(
    LABEL, "0", _is_constant, _zeros_guard, _with_zeros, conv2d="conv2d", conv3d="conv3d"
)
BORDER_RULES = _rules(
    "border-into-conv", "border", _is_border, _border_guard, _with_border,
    conv2d="border_conv2d", conv3d="conv3d",
)  # fmt: skip
RULES = (*ZERO_RULES, *BORDER_RULES)
