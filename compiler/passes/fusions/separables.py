"""Fuses depthwise convolutions with the 1x1 convolutions behind them (`separable`).

One 1x1 behind it makes MobileNet's separable convolution. Two make the inverted residual of
MobileNet v2, cut after the *next* block's expansion: depthwise, projection, residual, expansion.
The projection's result is then written only where somebody else reads it.
"""

from __future__ import annotations

from ....kernels.fused.chains.separable import Separable
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion import refusals
from ...fusion.declaration import Form, Fusion, links
from ...fusion.pattern import Call, Constant, Match, Var
from ...graph.ir import Graph, Node, Value
from .pool_fusions import is_1x1


def _is_depthwise(graph: Graph, node: Node) -> bool:
    groups = node.attributes.expect(Conv2d).groups
    return groups > 1 and graph.spec(graph.own_inputs(node)[1]).shape[1] == 1


def _one_filter(graph: Graph, found: Match) -> str | None:
    depthwise = found.nodes["depthwise"]
    filters, channels = depthwise.spec.shape[1], graph.spec(found.values["x"]).shape[1]
    if filters != channels:
        return f"{depthwise.name} makes {filters // channels} results per channel, not one"
    return None


def _attributes(graph: Graph, found: Match) -> Separable:
    depthwise, project, *expand = found.those("depthwise", "project", "expand")
    return Separable(
        depthwise=depthwise.attributes.expect(Conv2d),
        after_depthwise=depthwise.epilogue,
        after_project=project.epilogue,
        has_expand=bool(expand),
        after_expand=expand[0].epilogue if expand else (),
        keep=_keeps(graph, found),
    )


def _keeps(graph: Graph, found: Match) -> bool:
    """Whether the projection's result is written: where there is no expansion that alone reads
    it."""
    project, *expand = found.those("project", "expand")
    readers = {reader for reader, _ in graph.uses(Value(project.name))}
    return not expand or readers != {expand[0].name}


def _results(graph: Graph, found: Match) -> dict[str, int]:
    names = [node.name for node in found.those("project", "expand")]
    kept = names if _keeps(graph, found) else names[1:]
    return {name: at for at, name in enumerate(kept)}


DEPTHWISE = Call("conv2d", Var("x"), Constant("w1"), name="depthwise", where=_is_depthwise)
PROJECTION = "conv2d", DEPTHWISE, Constant("w2")
KEPT = Call(*PROJECTION, name="project", kept=True, where=is_1x1)
FUSIONS = (
    Fusion(
        op="separable",
        forms=(
            Form(
                "separable-chain",
                "conv1x1(y = conv1x1(depthwise(x))) => separable(x) giving y if read, and the "
                "expansion",
                Call("conv2d", KEPT, Constant("w3"), name="expand", where=is_1x1),
            ),
            Form(
                "separable",
                "conv1x1(depthwise(x)) => separable(x)",
                Call(*PROJECTION, name="project", where=is_1x1),
            ),
        ),
        attributes=_attributes,
        inputs=links("depthwise", "project", "expand"),
        refusals=(_one_filter, refusals.plain("project", "expand")),
        results=_results,
        holds=("conv2d",),
    ),
)
