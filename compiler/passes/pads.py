"""Folds pads into the convolutions that read them.

A border of zeros is the convolution's own padding: that costs nothing, so it is not compared with
anything. Other borders (reflect, replicate, circular) are found by the loads of the convolution,
which is then a kernel of its own (`conv_nd.py`): whether that pays is decided with all the others.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ...kernels.convolution.conv_nd import BorderConv2d, Conv3d
from ...kernels.movement.pad import Pad
from ...kernels.tile.conv_geometry import Conv2d
from ..fusion.declaration import Form, Fusion, variables
from ..fusion.pattern import Call, Match, Var
from ..graph.ir import Graph, Node


def _pad_of(found: Match) -> Pad:
    return found.nodes["pad"].attributes.expect(Pad)


def _conv_of(found: Match) -> Conv2d | Conv3d:
    attributes = found.nodes["conv"].attributes
    assert isinstance(attributes, (Conv2d, Conv3d))
    return attributes


def _is_plain(graph: Graph, node: Node) -> bool:
    return not node.prologue and getattr(node.attributes, "border", "constant") == "constant"


def _geometry_reason(graph: Graph, found: Match) -> str | None:
    pad, attributes = found.nodes["pad"], _pad_of(found)
    if any((*attributes.before[:2], *attributes.after[:2])):
        return f"{pad.name} pads more than the image, which no convolution does: {attributes}"
    if min((*attributes.before, *attributes.after)) < 0:
        return f"{pad.name} crops, which no convolution does: {attributes}"
    if pad.epilogue:
        return f"{pad.name} has stages of its own: {', '.join(map(str, pad.epilogue))}"
    return None


def _pads_zeros(graph: Graph, found: Match) -> str | None:
    if (value := _pad_of(found).value) != 0:
        return f"{found.nodes['pad'].name} pads with {value:g}; a convolution pads with zeros"
    return None


def _conv_allows_border(graph: Graph, found: Match) -> str | None:
    conv, attributes = found.nodes["conv"], _conv_of(found)
    if any(attributes.padding):
        return f"{conv.name} pads once more, with zeros, around another border: {attributes}"
    if graph.spec(found.values["w"]).shape[1] == 1 < attributes.groups:
        return f"{conv.name} is depthwise, and its kernel pads with zeros only"
    return None


def _widths(pad: Pad) -> tuple[int, ...]:
    """Before and after of every dimension of the image, as convolutions have them."""
    sides = zip(pad.before[2:], pad.after[2:], strict=True)
    return tuple(width for pair in sides for width in pair)


def _with_zeros(graph: Graph, found: Match) -> Conv2d | Conv3d:
    """The convolution with the pad's widths on top of its own."""
    attributes = _conv_of(found)
    both = zip(attributes.padding, _widths(_pad_of(found)), strict=True)
    padding: Any = tuple(own + width for own, width in both)
    return replace(attributes, padding=padding)


def _with_border(graph: Graph, found: Match) -> Conv3d | BorderConv2d:
    conv, pad = _conv_of(found), _pad_of(found)
    if isinstance(conv, Conv3d):
        return replace(conv, padding=_widths(pad), border=pad.mode)
    return BorderConv2d(conv.stride, _widths(pad), conv.dilation, conv.groups, pad.mode)


def _padded(conv: str, border: str, op: str) -> Fusion:
    """A convolution of an image with a border, which becomes `op`."""
    zeros = border == "0"

    def is_of_this_kind(graph: Graph, node: Node) -> bool:
        return (node.attributes.expect(Pad).mode == "constant") == zeros

    pad = Call("pad", Var("x"), name="pad", where=is_of_this_kind)
    form = Form(
        "pad-into-conv" if zeros else "border-into-conv",
        f"{conv}(pad(x, {border}), w) => {op}(x, w, padding{'' if zeros else ', border'})",
        Call(conv, pad, Var("w"), name="conv", where=_is_plain),
    )
    return Fusion(
        op,
        (form,),
        _with_zeros if zeros else _with_border,
        variables("x", "w"),
        (_pads_zeros if zeros else _conv_allows_border, _geometry_reason),
    )


ZEROS = (_padded("conv2d", "0", "conv2d"), _padded("conv3d", "0", "conv3d"))
ZERO_RULES = tuple(rule for fusion in ZEROS for rule in fusion.rules)
FUSIONS = (
    *ZEROS, _padded("conv2d", "border", "border_conv2d"), _padded("conv3d", "border", "conv3d")
)  # fmt: skip
