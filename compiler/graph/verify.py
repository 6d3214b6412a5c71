"""The laws of a graph: checked around every pass in tests and under CONVLOOM_CHECK, and always of a
node that a rule has made and of the whole graph before it is lowered."""

from __future__ import annotations

import torch

from ...errors import GraphError, InvalidInputError
from ...kernels.contract.epilogue import operand_count
from ...kernels.contract.spec import TensorSpec
from .ir import CONSTANT, INPUT, OUTPUT, TORCH, Graph, Node


def verify(graph: Graph) -> None:
    """Raises GraphError naming the first node that breaks a law."""
    nodes = graph.nodes()
    outputs = [name for name in graph.net if graph.node(name).op == OUTPUT]
    if outputs != [OUTPUT]:
        raise GraphError(f"expected one output node named {OUTPUT!r}, got {outputs}")
    for name in graph.net:
        verify_node(graph, graph.node(name))
    unused = set(graph.tensors) - {node.name for node in nodes if node.op == CONSTANT}
    if unused:
        raise GraphError(f"tensors of constants that are not in the graph: {sorted(unused)}")


def verify_node(graph: Graph, node: Node) -> None:
    """Raises GraphError where one node breaks a law."""
    slots = graph.slots(node.name)
    if slots != list(range(len(slots))):
        raise GraphError(f"{node.name}: input slots {slots} are not 0..n-1")
    for value in graph.inputs(node.name):
        if value.index >= len(graph.node(value.node).outputs):
            raise GraphError(f"{node.name}: reads {value}, which does not exist")
    if node.op in (INPUT, CONSTANT) and slots:
        raise GraphError(f"{node.name}: an {node.op} node has inputs")
    if node.op == CONSTANT:
        tensor = graph.tensors.get(node.name)
        if tensor is None or tuple(tensor.shape) != node.spec.shape:
            raise GraphError(f"{node.name}: constant {node.spec} without a tensor of its shape")
    if node.op in (INPUT, CONSTANT, OUTPUT, TORCH):
        return
    _verify_compute(graph, node)


def _verify_compute(graph: Graph, node: Node) -> None:
    definition = node.definition
    if not isinstance(node.attributes, definition.attributes):
        raise GraphError(f"{node.name}: attributes {node.attributes!r} are not those of {node.op}")
    total = len(graph.inputs(node.name))
    if operand_count(node.epilogue) + operand_count(node.prologue) > total:
        raise GraphError(f"{node.name}: its stages read more tensors than it has inputs")
    if node.epilogue and not definition.takes_epilogue:
        raise GraphError(f"{node.name}: {node.op} takes no epilogue")
    if node.prologue and not definition.takes_prologue:
        raise GraphError(f"{node.name}: {node.op} takes no prologue")
    specs = tuple(graph.spec(value) for value in graph.own_inputs(node))
    try:
        inferred = definition.infer(node.attributes, specs)
    except InvalidInputError as error:
        raise GraphError(f"{node.name}: {error}") from error
    if [_logical(spec) for spec in inferred] != [_logical(spec) for spec in node.outputs]:
        raise GraphError(
            f"{node.name}: {node.op} of {', '.join(map(str, specs))} gives "
            f"{', '.join(map(str, inferred))}, the node says {', '.join(map(str, node.outputs))}"
        )
    for value in graph.operands(node):
        operand = graph.spec(value)
        try:
            joined = torch.broadcast_shapes(  # type: ignore[no-untyped-call]
                operand.shape, node.spec.shape
            )
        except RuntimeError:
            joined = None
        if joined != node.spec.shape:
            raise GraphError(
                f"{node.name}: epilogue operand {operand} does not broadcast to {node.spec}"
            )


def _logical(spec: TensorSpec) -> tuple[object, ...]:
    return spec.shape, spec.batch
