"""Fuses depthwise convolutions with the 1x1 convolutions behind them (`separable`).

One 1x1 behind it makes MobileNet's separable convolution. Two make the inverted residual of
MobileNet v2, cut after the *next* block's expansion: depthwise, projection, residual, expansion.
The projection's result is then written only where somebody else reads it.
"""

from __future__ import annotations

from ....kernels.fused.chains.separable import Separable
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion import refusals
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Constant, Match, Rule, Var
from ...graph.ir import Graph, Node, Value
from .pool_fusions import is_1x1


def _is_depthwise(graph: Graph, node: Node) -> bool:
    assert isinstance(node.attributes, Conv2d)
    return node.attributes.groups > 1 and graph.spec(graph.own_inputs(node)[1]).shape[1] == 1


def _guard(graph: Graph, found: Match) -> str | None:
    """What the kernel cannot express."""
    depthwise = found.nodes["depthwise"]
    filters, channels = depthwise.spec.shape[1], graph.spec(found.values["x"]).shape[1]
    if filters != channels:
        return f"{depthwise.name} makes {filters // channels} results per channel, not one"
    for name in ("project", "expand"):
        node = found.nodes.get(name)
        if node is not None and (reason := refusals.not_plain_1x1(node)) is not None:
            return reason
    return None


def _build(graph: Graph, found: Match) -> Fused:
    """The attributes and inputs of the fused node, in the order of its slots."""
    links = [found.nodes[n] for n in ("depthwise", "project", "expand") if n in found.nodes]
    depthwise, project = links[:2]
    assert isinstance(depthwise.attributes, Conv2d)
    inputs: list[Value] = [found.values["x"]]
    for node in links:
        inputs += [graph.own_inputs(node)[1], *graph.operands(node)]
    expand = links[2] if len(links) == 3 else None
    readers = {reader for reader, _ in graph.uses(Value(project.name))}
    keep = expand is None or readers != {expand.name}
    attributes = Separable(
        depthwise=depthwise.attributes,
        after_depthwise=depthwise.epilogue,
        after_project=project.epilogue,
        has_expand=expand is not None,
        after_expand=expand.epilogue if expand is not None else (),
        keep=keep,
    )
    results = {project.name: 0} if keep else {}
    if expand is not None:
        results[expand.name] = len(results)
    return Fused("separable", attributes, tuple(inputs), results)


DEPTHWISE = Call("conv2d", Var("x"), Constant("w1"), name="depthwise", where=_is_depthwise)
RULES = (
    Rule(
        "conv1x1(y = conv1x1(depthwise(x))) => separable(x) giving y if read, and the expansion",
        Call(
            "conv2d",
            Call("conv2d", DEPTHWISE, Constant("w2"), name="project", kept=True, where=is_1x1),
            Constant("w3"),
            name="expand",
            where=is_1x1,
        ),
        guard=_guard,
        label="separable-chain",
        build=_build,
    ),
    Rule(
        "conv1x1(depthwise(x)) => separable(x)",
        Call("conv2d", DEPTHWISE, Constant("w2"), name="project", where=is_1x1),
        guard=_guard,
        label="separable",
        build=_build,
    ),
)
