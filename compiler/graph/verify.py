"""The laws of a graph: checked around every pass in tests and under CONVLOOM_CHECK, and always of a
node that a rule has made and of the whole graph before it is lowered."""

from __future__ import annotations

import torch

from ...errors import GraphError, InvalidInputError
from ...kernels.contract.epilogue import makes_boolean, operand_count, read_before
from ...kernels.contract.spec import FLOAT_DTYPES, Layout, TensorSpec
from .ir import CONSTANT, INPUT, OUTPUT, Graph, Node


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
        if tensor.is_floating_point() != node.spec.dtype.is_floating_point:
            raise GraphError(f"{node.name}: constant {node.spec}, its tensor is {tensor.dtype}")
    if node.is_compute:
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
    for stages in (node.epilogue, node.prologue):
        if read_before(stages, 0):
            raise GraphError(f"{node.name}: a stage reads what there was before the first")
    if node.prologue and not definition.takes_prologue:
        raise GraphError(f"{node.name}: {node.op} takes no prologue")
    specs = tuple(graph.spec(value) for value in graph.own_inputs(node))
    try:
        inferred = definition.infer(node.attributes, specs)
    except InvalidInputError as error:
        raise GraphError(f"{node.name}: {error}") from error
    if not _agree(node, inferred):
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


def _agree(node: Node, inferred: tuple[TensorSpec, ...]) -> bool:
    """Whether a node's results are what its op infers. Kernels that take an epilogue, or write any
    layout, round one result once, to the float dtype that the node says, or make booleans of it
    where their last stage does; layouts are the passes' to choose."""
    said = [spec.with_(layout=Layout.DENSE) for spec in node.outputs]
    expected = [spec.with_(layout=Layout.DENSE) for spec in inferred]
    if len(said) != len(expected) or (said == expected and not node.epilogue):
        return said == expected
    kinds = (*FLOAT_DTYPES, torch.bool)
    floats = node.spec.dtype in FLOAT_DTYPES and inferred[0].dtype in kinds
    if makes_boolean(node.epilogue, inferred[0].dtype):
        floats = node.spec.dtype is torch.bool and inferred[0].dtype in kinds
    rounded = expected[0].with_(dtype=node.spec.dtype)
    rounds = node.definition.takes_epilogue or node.definition.writes_any
    return floats and rounds and said == [rounded, *expected[1:]]


def verify_memory(graph: Graph) -> None:
    """Raises GraphError where a kernel would take a tensor for one that lies otherwise in memory,
    or multiply two types; to be asked once passes have chosen layouts and types."""
    for node in graph.nodes():
        if node.op == CONSTANT and node.spec.layout is not Layout.DENSE:
            raise GraphError(f"{node.name}: constant {node.spec}, expected a dense one")
        if not node.is_compute:
            continue
        definition = node.definition
        specs = tuple(graph.spec(value) for value in graph.own_inputs(node))
        # A constant is read as it lies; what its op makes of a value lies as its other inputs do.
        laid = zip(graph.own_inputs(node), specs, strict=True)
        inferred = definition.infer(node.attributes, tuple(
            spec.with_(layout=node.spec.layout)
            if graph.is_constant(value) and spec.rank == node.spec.rank else spec
            for value, spec in laid
        ))  # fmt: skip
        # Vectors may be more exact than matrices; the stem rounds the image as its weights are.
        kind = node.spec.dtype if node.op == "stem" else specs[0].dtype
        multiplied = {*definition.packs(node.attributes), *definition.factors}
        for slot, spec in enumerate(specs):
            apart = spec.rank > 1 and spec.dtype in FLOAT_DTYPES and spec.dtype is not kind
            if slot in multiplied and apart:
                raise GraphError(
                    f"{node.name}: {node.op} takes {spec} as input {slot}, expected {kind}"
                )
        for value, spec in zip(graph.own_inputs(node), specs, strict=True):
            wanted = Layout.NHWC if definition.images else Layout.DENSE
            if definition.images and spec.rank != 4:
                wanted = node.spec.layout if node.spec.rank == spec.rank else spec.layout
            free = definition.follows or node.op == "relayout" or graph.is_constant(value)
            if not free and spec.layout is not wanted:
                raise GraphError(
                    f"{node.name}: {node.op} reads {value} {spec}, expected {wanted.value}"
                )
        for spec, expected in zip(node.outputs, inferred, strict=True):
            if spec.layout is not expected.layout and not definition.writes_any:
                raise GraphError(f"{node.name}: {node.op} gives {expected}, the node says {spec}")
