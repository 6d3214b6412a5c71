"""Fuses the sum of two convolutions into one kernel (`conv_sum`): a residual branch's last
convolution and the 1x1 convolution that projects its shortcut.

After the epilogues are fused such a sum is a convolution that adds the other's result in its
epilogue. Which of the two does the adding depends on how the sum was written; either may be the
shortcut. Nothing may change a result before the sum but constants per channel: the second product
enters the accumulator before the epilogue begins, and the constants of both are added up once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ....kernels.contract import epilogue as ep
from ....kernels.contract.epilogue import Epilogue, Stage
from ....kernels.fused.conv_sum import ConvSum
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion import refusals
from ...fusion.declaration import Form, Fusion, variables
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Match, Var
from ...graph.ir import Graph, Node, Value


@dataclass(frozen=True)
class Joined:
    """The epilogue of the sum: its stages, what they read, and constants to be added to the first
    operand."""

    stages: Epilogue
    operands: tuple[Value, ...]
    added: tuple[Value, ...] = ()


def adds_only_constants(graph: Graph, node: Node) -> bool:
    """Whether a node's epilogue is at most a bias, so that it may as well be added later."""
    slots = _with_operands(graph, node)
    return all(_is_constant_add(graph, stage, values) for stage, values in slots)


def adder_of(graph: Graph, found: Match) -> tuple[Node, Node, int]:
    """The convolution that adds, the one that is added, and its position among the operands."""
    ((name, position),) = found.operands
    adder = graph.node(name)
    return adder, graph.node(graph.operands(adder)[position].node), position


def join(graph: Graph, found: Match) -> Joined:
    """What is left to do after both products have been added."""
    adder, added, position = adder_of(graph, found)
    slots = _with_operands(graph, adder)
    at = _index_of(adder, position)
    early = [*slots[:at], *_with_operands(graph, added)]
    literals = [stage for stage, values in early if not values]
    biases = [value for _, values in early for value in values]
    # The sum has the shape of the largest.
    biases.sort(key=lambda value: -graph.spec(value).numel)
    late = slots[at + 1 :]
    stages = (*([Stage("add")] if biases else []), *literals, *(stage for stage, _ in late))
    operands = (*biases[:1], *(value for _, values in late for value in values))
    return Joined(stages, operands, tuple(biases[1:]))


def sum_reason(graph: Graph, found: Match) -> str | None:
    """Why the two convolutions cannot share an accumulator, or None."""
    adder, added, position = adder_of(graph, found)
    for node in (adder, added):
        if node.attributes.expect(Conv2d).groups != 1:
            return f"{node.name} is grouped; only convolutions with groups=1 share a sum"
        if node.prologue:
            return refusals.has_prologue(node)
    if adder.spec != added.spec:
        return f"{adder.name} is {adder.spec}, but {added.name} is {added.spec}: the sum broadcasts"
    slots, at = _with_operands(graph, adder), _index_of(adder, position)
    stage = slots[at][0]
    if stage.name != "add" or stage.channels is not None:
        return f"{adder.name} does not simply add {added.name}, but applies {stage}"
    if ep.read_before(adder.epilogue, at + 1):
        return f"{adder.name} reads again what it was before it added {added.name}"
    for stage, values in slots[:at]:
        if not _is_constant_add(graph, stage, values):
            return f"{adder.name} applies {stage} before it adds {added.name}; only constants may"
    early = (*slots[:at], *_with_operands(graph, added))
    for value in (value for _, values in early for value in values):
        spec = graph.spec(value)
        if spec.numel > 1 and (spec.rank != 3 or spec.shape[1:] != (1, 1)):
            return f"{value} {spec}, added before the sum, is not one number per channel"
    return None


def _with_operands(graph: Graph, node: Node) -> list[tuple[Stage, tuple[Value, ...]]]:
    return list(zip(node.epilogue, graph.stage_operands(node), strict=True))


def _index_of(node: Node, position: int) -> int:
    """The index of the stage that reads operand `position`."""
    readers = [at for at, stage in enumerate(node.epilogue) for _ in range(stage.operands)]
    return readers[position]


def _is_constant_add(graph: Graph, stage: Stage, values: tuple[Value, ...]) -> bool:
    plain = stage.name == "add" and stage.channels is None and stage.back is None
    return plain and all(map(graph.is_constant, values))


def _attributes(graph: Graph, found: Match) -> ConvSum:
    conv, shortcut = (node.attributes.expect(Conv2d) for node in found.those("conv", "shortcut"))
    return ConvSum(conv, shortcut)


def _finish(graph: Graph, found: Match, fused: Fused) -> Fused:
    joined = join(graph, found)
    sums = {len(fused.inputs): joined.added} if joined.added else {}
    return replace(fused, epilogue=joined.stages, operands=joined.operands, sums=sums)


SHORTCUT = Call("conv2d", Var("s"), Var("v"), name="shortcut", where=adds_only_constants)
FUSIONS = (
    Fusion(
        op="conv_sum",
        forms=(
            Form(
                "shortcut",
                "conv2d(x, w) + conv2d(s, v) => conv_sum(x, w, s, v)",
                Call("conv2d", Var("x"), Var("w"), name="conv", operand=SHORTCUT),
            ),
        ),
        attributes=_attributes,
        inputs=variables("x", "w", "s", "v"),
        refusals=(sum_reason,),
        finish=_finish,
    ),
)
