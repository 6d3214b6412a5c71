"""nn.Module -> Graph, through torch.export.

The exported program is functional ATen (`run_decompositions`): parameters by name, shapes in
`meta["val"]`, module paths in `nn_module_stack`. Each ATen call is turned into ops of the registry
by the capture function that the op's file declares. Neither the module nor its buffers are changed.

With a dynamic batch every shape is recorded at the largest batch; dimension 0 is the only one that
may vary, as a multiple of the batch. Where it leaves that dimension for a while: `moved_batch.py`.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from ...errors import CaptureError, InvalidInputError, UnsupportedOpError
from ...kernels import registry
from ...kernels.contract.epilogue import Epilogue
from ...kernels.contract.op import Arguments, Attributes
from ...kernels.contract.spec import FLOAT_DTYPES, TensorSpec
from ...kernels.movement import movement_ops, rearrange
from ...kernels.movement.pointwise import Pointwise
from ..graph.interface import Structure, with_constants
from ..graph.ir import CONSTANT, INPUT, OUTPUT, TORCH, Graph, NoAttributes, Node, Value
from ..graph.torch_call import BatchNumber, Slot, TorchCall, in_words
from . import byte_images, example_inputs, moved_batch, refusals
from .batch_numbers import SYMBOLIC, Batch, follows_from_values
from .export import export, path_of, source_of
from .features import observed
from .refusals import Refused, called, line_in_words, module_in_words, results_of

MOVES = frozenset(op.name for op in (*movement_ops.OPS, *rearrange.OPS))
"""Ops that move elements, of whatever dtype."""


@dataclass
class _State:
    """What one capture run accumulates, and what an op's capture function sees of it: a `Builder`.

    computed: the nodes that depend on an input; added: those of the call that is captured, and
    name, path: its own and its module's.
    """

    graph: Graph
    batch: Batch | None = None
    values: dict[str, Any] = field(default_factory=dict)
    computed: set[str] = field(default_factory=set)
    added: list[str] = field(default_factory=list)
    name: str = ""
    path: str = ""

    def note(self, name: str, inputs: Sequence[Value] = ()) -> None:
        """Tells of a node that has been added."""
        self.added.append(name)
        if any(value.node in self.computed for value in inputs):
            self.computed.add(name)

    def apply(
        self,
        op: str,
        inputs: Sequence[Value],
        attributes: Attributes | None = None,
        epilogue: Epilogue = (),
    ) -> Value:
        # What only prepares a constant (a bias reshaped per channel) leaves the name to the op.
        prepares = bool(inputs) and all(map(self.graph.is_constant, inputs))
        taken = prepares or self.name in self.graph
        name = self.graph.fresh_name(self.name) if taken else self.name
        value = self.graph.add(op, inputs, attributes, epilogue=epilogue, name=name)
        self.graph.update(value.node, module_path=self.path, origins=(value.node,))
        self.note(value.node, inputs)
        return value

    def spec(self, value: Value) -> TensorSpec:
        return self.graph.spec(value)

    def output(self, value: Value, index: int) -> Value:
        return Value(value.node, index)

    def maker(self, value: Value) -> tuple[str, Attributes, tuple[Value, ...]] | None:
        node = self.graph.node(value.node)
        return (node.op, node.attributes, self.graph.own_inputs(node)) if node.is_compute else None

    def constant(self, value: Value) -> torch.Tensor | None:
        is_known = isinstance(value, Value) and self.graph.is_constant(value)
        return self.graph.constant(value) if is_known else None

    def is_computed(self, value: Value) -> bool:
        return value.node in self.computed

    def add_constant(self, tensor: torch.Tensor, dtype: torch.dtype) -> Value:
        value = self.graph.add_constant(tensor, f"{self.name}_constant", dtype)
        self.note(value.node)
        return value

    def refuse(self, reason: str) -> NoReturn:
        raise Refused(reason)


def capture(
    model: torch.nn.Module | ExportedProgram | str | Path,
    example: Any,
    dynamic_batch: tuple[int, int] | None = None,
    outputs: Sequence[str] | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> Graph:
    """The dataflow graph of a module, or of what torch.export made of it, for inputs like `example`
    and `keywords`.

    dynamic_batch: (lo, hi); every input's dimension 0 is then the batch. outputs: the module paths
    whose activations the graph returns, by name, instead of the module's result (`features.py`).
    Calls without a kernel become "torch" nodes: some are parts of composite ops that a pass
    recognises later, the rest is reported by `refuse_unsupported`.

    Raises: InvalidInputError for arguments that are no tensors of floats or images of bytes, a
    batch range that makes no sense or unknown outputs; CaptureError when torch.export fails or the
    module would still train.
    """
    module, example, keywords = example_inputs.opened(model, example, keywords)
    example_inputs.check_module(module)
    arguments: Any = example_inputs.arguments_of(module, example, keywords)
    leaves = example_inputs.check_example(arguments, dynamic_batch is not None)
    place = example_inputs.place_of(module, leaves)
    highest = None
    if dynamic_batch is None:
        stand_in = partial(example_inputs.stand_in, place=place)
    else:
        highest = example_inputs.check_range(dynamic_batch, leaves)[1]
        stand_in = partial(example_inputs.two_samples, place=place)
    arguments = pytree.tree_map_only(torch.Tensor, stand_in, arguments)
    with observed(module, outputs):
        positional, named = arguments
        program, decisions = export(module, positional, named, highest)
    images = byte_images.as_floats(program)
    graph = Graph(name=type(module).__name__)
    state = _State(graph)
    if dynamic_batch is not None:
        state.batch = _batch(program, dynamic_batch)
        refusals.refuse_branches(module, decisions, state.batch)
    _add_sources(state, program, leaves)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            state.values[node.name] = node.target
        elif node.op == "call_function":
            _add_call(state, node)
    _add_output(state, program, pytree.tree_structure(with_constants(arguments)))
    graph.output_tree = replace(
        graph.output_tree, names=example_inputs.names_of(module), images=images
    )
    graph.remove_unread_constants()
    return graph


def _batch(program: Any, bounds: tuple[int, int]) -> Batch:
    for node in program.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    return Batch(size.node.expr, *bounds)
    raise CaptureError("torch.export fixed the batch: the module's code depends on its value")


def _number(state: _State, value: Any) -> Any:
    """A size at the largest batch."""
    if not isinstance(value, torch.SymInt):
        return value
    if state.batch is None or follows_from_values(value, state.batch):
        raise Refused("how large its result is depends on the values of a tensor")
    return BatchNumber(value.node.expr, state.batch.symbol).at(state.batch.highest)


def _batch_of(state: _State, shape: Sequence[Any]) -> int | None:
    """The largest batch if dimension 0 is a multiple of it; raises where the batch is elsewhere."""
    symbolic = [at for at, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if not symbolic:
        return None
    assert state.batch is not None
    multiple = shape[0].node.expr / state.batch.symbol if symbolic == [0] else None
    if multiple is None or not multiple.is_Integer:
        raise Refused(f"the batch N must stay in dimension 0, got shape {in_words(tuple(shape))}")
    return state.batch.highest


def _spec_of(state: _State, value: torch.Tensor) -> TensorSpec:
    shape = tuple(_number(state, size) for size in value.shape)
    return TensorSpec(shape, value.dtype, batch=_batch_of(state, value.shape))


def _add_sources(state: _State, program: Any, leaves: list[torch.Tensor]) -> None:
    """Inputs, and one constant per distinct tensor: shared weights stay shared."""
    signature, graph = program.graph_signature, state.graph
    constants = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    tensors = {**program.constants, **program.state_dict}
    known: dict[tuple[Any, ...], Value] = {}
    count = 0
    for node in program.graph.nodes:
        if node.op != "placeholder":
            continue
        if node.name in constants:
            path = constants[node.name]
            tensor = tensors[path].detach()
            if tensor.is_meta:
                raise CaptureError(f"'{path}' has no data (device meta): initialise the module")
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.numel())
            if tensor.numel() == 0 or key not in known:
                # Plans are alike everywhere. The module's own memory, if it is the CPU's.
                graph.tensors[node.name] = tensor.cpu()
                spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
                made = Node(node.name, CONSTANT, NoAttributes(), (spec,), module_path=path)
                known[key] = graph.insert(made)
            state.values[node.name] = known[key]
        elif isinstance(node.meta.get("val"), torch.Tensor):
            spec = _spec_of(state, node.meta["val"])
            made = Node(node.name, INPUT, NoAttributes(), (spec,))
            state.values[node.name] = graph.insert(made)
            state.computed.add(node.name)
            count += 1
    if count != len(leaves):
        raise CaptureError(
            f"torch.export sees {count} tensor inputs, the example has {len(leaves)}"
        )


def _add_call(state: _State, node: Any) -> None:
    value = node.meta.get("val")
    if isinstance(value, (int, float, bool, *SYMBOLIC)):
        state.values[node.name] = _literal(state, value)
        return
    if value is None and not node.users:
        return  # An assertion of torch.export.
    if node.target is operator.getitem:
        _add_getitem(state, node)
        return
    state.name, state.path = node.name, path_of(node)
    if _is_empty(value):
        # Whatever it is computed from: nothing has to run for a result without elements.
        empty = torch.empty(tuple(value.shape), dtype=value.dtype)
        state.values[node.name] = state.add_constant(empty, value.dtype)
        return
    refusals.refuse_unbounded(node, state.batch)
    a = _arguments(state, node)
    state.added.clear()
    try:
        result = _captured(state, node, _sized(state, node, a))
    except (Refused, InvalidInputError) as refusal:
        # Whatever the capture function had built before it declined goes again.
        state.graph.remove(reversed(state.added))
        state.computed.difference_update(state.added)
        result = _add_torch_call(state, node, a, str(refusal))
    state.values[node.name] = result


def _is_empty(value: Any) -> bool:
    """Whether it is a tensor of floats without elements, for every batch."""
    if not isinstance(value, torch.Tensor) or value.dtype not in FLOAT_DTYPES:
        return False
    # Symbolic sizes are not compared: torch would decide by them.
    return all(isinstance(size, int) for size in value.shape) and 0 in value.shape


def _arguments(state: _State, node: Any) -> Arguments:
    args, keywords = pytree.tree_map(lambda x: _lookup(state, x), (node.args, node.kwargs))
    return Arguments(node.target._schema, args, keywords)


def _captured(state: _State, node: Any, a: Arguments) -> Any:
    """What the call becomes in the graph. Raises: Refused, InvalidInputError."""
    target = str(node.target)
    op = registry.CAPTURES.get(target)
    function = partial(refusals.read_whole, op.aten[target]) if op is not None else None
    places = [_place_of(state, tensor) for tensor in results_of(node.meta["val"])]
    moved = moved_batch.concerns(state, target, a, places)
    refusals.refuse_numbers(a, moved_batch.NUMBERS.get(target, ()) if moved else ())
    if moved:
        assert state.batch is not None
        result = moved_batch.call(state, target, function, a, places, state.batch.highest)
    elif op is None or function is None:
        raise Refused(refusals.why_unknown(target))
    else:
        refusals.refuse_unbatched(state, op, target, a)
        result = function(state, a)
    _check_booleans(state)
    _check_result(state, node, result)
    _check_constants(state)
    return result


def _literal(state: _State, value: Any) -> Any:
    """A number of the program, or one that depends on the batch."""
    if not isinstance(value, SYMBOLIC) or follows_from_values(value, state.batch):
        return value
    assert state.batch is not None
    return state.batch.number(value)


def _sized(state: _State, node: Any, a: Arguments) -> Arguments:
    """The arguments of a call, with numbers in its shape at the largest batch."""
    target = str(node.target)
    parts = target == moved_batch.SLICE and isinstance(a.first, moved_batch.Moved)
    return a if state.batch is None or parts else state.batch.sized(target, a)


def _place_of(state: _State, tensor: torch.Tensor | None) -> moved_batch.Place | None:
    """Where a result has its batch; None where it has none, or several."""
    shape = () if tensor is None else tensor.shape
    symbolic = [at for at, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if len(symbolic) != 1:
        return None
    return moved_batch.Place(tuple(_number(state, size) for size in shape), symbolic[0])


def _add_getitem(state: _State, node: Any) -> None:
    source, index = node.args
    result = state.values[source.name]
    picked = result[index] if isinstance(result, (list, tuple)) else None
    if picked is None:
        reason = f"its result {index} is not computed by convloom"
        picked = _add_torch_call(state, source, _arguments(state, source), reason)[index]
    state.values[node.name] = picked


def _lookup(state: _State, argument: Any) -> Any:
    if isinstance(argument, torch.fx.Node):
        return state.values[argument.name]
    return _number(state, argument)


def _check_result(state: _State, node: Any, result: Any) -> None:
    """The op's shape rule must agree with torch's own."""
    wanted = node.meta["val"]
    many = isinstance(result, (list, tuple))
    for value, tensor in zip(result, wanted, strict=False) if many else [(result, wanted)]:
        if not isinstance(value, Value):
            continue
        got, truth = state.graph.spec(value), _spec_of(state, tensor)
        # Constants of other types may be indices.
        maker = state.graph.node(value.node)
        moves = maker.is_compute and maker.definition.integers
        others = (torch.int64, torch.int32, torch.bool) if moves else ()
        known = (*FLOAT_DTYPES, *others)
        if got.dtype not in known and not state.graph.is_constant(value):
            raise Refused(f"dtype {got.dtype} is not supported; compute with floats (.float())")
        if got.dtype is not truth.dtype and not {got.dtype, truth.dtype} <= set(FLOAT_DTYPES):
            raise Refused(f"dtype {truth.dtype} is not supported here; convert with .float() first")
        if (got.shape, got.batch) != (truth.shape, truth.batch) and got.shape == truth.shape:
            raise Refused(f"its result {got} does not depend on the batch as torch's {truth} does")
        if (got.shape, got.dtype) != (truth.shape, truth.dtype):
            raise CaptureError(f"{node.name} ({node.target}): inferred {got}, torch says {truth}")


def _check_constants(state: _State) -> None:
    """Weights are packed when the plan is made: they must follow from parameters alone."""
    for node in filter(lambda node: node.is_compute, map(state.graph.node, state.added)):
        for slot in node.definition.packs(node.attributes):
            value = state.graph.inputs(node.name)[slot]
            if value.node in state.computed:
                raise Refused(f"input {slot} of {node.op} is computed; it must be a constant")
            if state.graph.spec(value).batch is not None:
                raise Refused(f"input {slot} of {node.op} depends on the batch")


def _check_booleans(state: _State) -> None:
    """What computes with numbers takes booleans for them only where each is one of the result's."""
    for node in filter(lambda node: node.is_compute, map(state.graph.node, state.added)):
        specs = [state.graph.spec(value) for value in state.graph.own_inputs(node)]
        takes = isinstance(node.attributes, Pointwise) or node.op in MOVES
        if not takes and any(spec.dtype is torch.bool for spec in specs):
            raise Refused(f"{node.op} of booleans; convert them to numbers first, with .float()")


def _add_torch_call(state: _State, node: Any, a: Arguments, reason: str) -> Any:
    """Keeps the call as a torch op; its results are one value each."""
    inputs: list[Value] = []

    def slot(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        inputs.append(leaf)
        return Slot(len(inputs) - 1)

    leaves, path = pytree.tree_leaves(a.given), path_of(node)
    a = a.mapped(lambda _, value: pytree.tree_map(slot, value))
    many = isinstance(node.meta["val"], (list, tuple))
    try:
        if any(isinstance(leaf, moved_batch.Moved) for leaf in leaves):
            raise Refused(reason)
        specs = tuple(_spec_of(state, x) for x in results_of(node.meta["val"]))
    except Refused as refusal:
        also = "" if str(refusal) == reason else f"; torch cannot run it either: {refusal}"
        raise UnsupportedOpError(f"{called(node)}: with a dynamic batch, {reason}{also}") from None
    if not any(value.node in state.computed for value in inputs):
        # Of a call on constants the result at the largest batch is kept.
        a = _sized(state, node, a)
    depends = any(isinstance(leaf, BatchNumber) for leaf in pytree.tree_leaves(a.given))
    rows = _rows(state, inputs) if depends else (0, 0)
    name = node.name if node.name not in state.graph else state.graph.fresh_name(node.name)
    attributes = TorchCall(
        node.target, a.args, tuple(a.keywords.items()), reason, source_of(node), rows
    )
    made = Node(name, TORCH, attributes, specs, module_path=path, origins=(name,))
    state.graph.insert(made, inputs)
    state.note(name, inputs)
    values = [Value(name, index) for index in range(len(specs))]
    return values if many else values[0]


def _rows(state: _State, inputs: list[Value]) -> tuple[int, int]:
    """The input of a torch call that tells the batch, and how many of its rows a sample is; an
    input of the graph where the call has none of its own."""
    batched = (node.name for node in state.graph.graph_inputs() if node.spec.batch is not None)
    given = [value for value in inputs if value.node in state.computed]
    for value in (*given, Value(next(batched))):
        spec = state.graph.spec(value)
        if spec.batch is not None:
            if value not in inputs:
                inputs.append(value)
            return inputs.index(value), spec.shape[0] // spec.batch
    raise AssertionError("a batch without an input that has it")


def _add_output(state: _State, program: Any, arguments: pytree.TreeSpec) -> None:
    output = next(node for node in program.graph.nodes if node.op == "output")
    outputs: list[Value] = []
    results: list[tuple[str, Any]] = []
    specs = program.graph_signature.output_specs
    for leaf, spec in zip(output.args[0], specs, strict=True):
        if spec.kind is not OutputKind.USER_OUTPUT:
            continue  # What the module would write into its inputs: they are left as they are.
        value = _lookup(state, leaf)
        if isinstance(value, moved_batch.Moved):
            raise UnsupportedOpError(
                f"output {len(results)}: with a dynamic batch, the batch must be in dimension 0, "
                f"but {value.where}. Move it there before it is returned, or compile for one batch "
                "(without dynamic_batch)"
            )
        if isinstance(value, (BatchNumber, *SYMBOLIC)):
            raise UnsupportedOpError(
                f"output {len(results)} is the number {in_words(value)} (N is the batch), which an "
                "executable does not compute: return tensors only, and take it from their shapes"
            )
        if isinstance(value, Value):
            results.append(("tensor", len(outputs)))
            outputs.append(value)
        else:
            results.append(("literal", value))
    if not outputs:
        raise CaptureError("the module returns no tensor")
    state.graph.insert(Node(OUTPUT, OUTPUT, NoAttributes(), ()), outputs)
    result = program.call_spec.out_spec
    state.graph.output_tree = Structure(arguments, result, tuple(results))


def refuse_unsupported(graph: Graph) -> None:
    """Raises UnsupportedOpError listing every torch call that is left in the graph."""
    listed = []
    for node in graph.nodes():
        if isinstance(node.attributes, TorchCall):
            call = node.attributes
            specs = ", ".join(str(graph.spec(value)) for value in graph.inputs(node.name))
            line = line_in_words(call.source)
            where = module_in_words(node.module_path)
            listed.append(f"{where}: {call}({specs}){line}: {call.reason}")
    if not listed:
        return
    nodes = "\n  ".join(listed)
    count, them = (f"{len(listed)} ops", "them") if listed[1:] else ("1 op", "it")
    raise UnsupportedOpError(
        f"{graph.name} has {count} without a kernel:\n  {nodes}\n"
        f"To run {them} by torch, between the kernels, pass fallback='torch' (--fallback torch)"
    )
