"""nn.Module -> Graph, through torch.export.

The exported program is functional ATen (`run_decompositions({})`): parameters by name, shapes in
`meta["val"]`, module paths in `nn_module_stack`. Each ATen call is turned into ops of the registry
by the capture function that the op's file declares. Neither the module nor its buffers are changed.

With a dynamic batch every shape is recorded at the largest batch; dimension 0 is the only one that
may vary, as a multiple of the batch. Where it leaves that dimension for a while: `moved_batch.py`.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

import networkx as nx
import torch
from torch.export import Dim, ShapesCollection
from torch.export.graph_signature import OutputKind
from torch.utils import _pytree as pytree

from ..errors import CaptureError, InvalidInputError, UnsupportedOpError
from ..kernels import registry
from ..kernels.epilogue import Epilogue
from ..kernels.op import Attributes
from ..kernels.spec import FLOAT_DTYPES, TensorSpec
from . import moved_batch
from .example_inputs import (
    check_example,
    check_module,
    check_range,
    place_of,
    stand_in,
    two_samples,
)
from .features import observed
from .interface import Structure
from .ir import CONSTANT, INPUT, OUTPUT, TORCH, Graph, NoAttributes, Node, Value

TRAINING_OPS = ("native_dropout", "bernoulli", "rand_like", "randn_like", "rand", "randn", "rrelu")


@dataclass(frozen=True)
class TorchCall(Attributes):
    """An ATen call kept as it is: `arguments` with `Slot`s where its tensors go.

    reason: why convloom has no kernel for it.
    """

    target: Any = None
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()
    reason: str = ""

    def __str__(self) -> str:
        return str(self.target)


@dataclass(frozen=True)
class Slot:
    """The place of input `index` in the arguments of a `TorchCall`."""

    index: int


class _Refused(Exception):
    """A capture function declined; carries the reason."""


@dataclass
class _State:
    """What one capture run accumulates."""

    graph: Graph
    values: dict[str, Any] = field(default_factory=dict)
    symbol: Any = None
    largest: int = 1


class _Builder:
    """What an op's capture function sees of the graph."""

    def __init__(self, state: _State, name: str, path: str) -> None:
        self._state, self._name, self._path = state, name, path

    def apply(
        self,
        op: str,
        inputs: Sequence[Value],
        attributes: Attributes | None = None,
        epilogue: Epilogue = (),
    ) -> Value:
        graph = self._state.graph
        # What only prepares a constant (a bias reshaped per channel) leaves the name to the op.
        prepares = bool(inputs) and all(map(graph.is_constant, inputs))
        taken = prepares or self._name in graph
        name = graph.fresh_name(self._name) if taken else self._name
        value = graph.add(op, inputs, attributes, epilogue=epilogue, name=name)
        graph.update(value.node, module_path=self._path, origins=(value.node,))
        return value

    def spec(self, value: Value) -> TensorSpec:
        return self._state.graph.spec(value)

    def output(self, value: Value, index: int) -> Value:
        return Value(value.node, index)

    def maker(self, value: Value) -> tuple[str, Attributes, tuple[Value, ...]] | None:
        graph = self._state.graph
        node = graph.node(value.node)
        return (node.op, node.attributes, graph.own_inputs(node)) if node.is_compute else None

    def constant(self, value: Value) -> torch.Tensor | None:
        graph = self._state.graph
        is_known = isinstance(value, Value) and graph.is_constant(value)
        return graph.constant(value) if is_known else None

    def add_constant(self, tensor: torch.Tensor, dtype: torch.dtype) -> Value:
        return self._state.graph.add_constant(tensor, f"{self._name}_constant", dtype)

    def refuse(self, reason: str) -> NoReturn:
        raise _Refused(reason)


def capture(
    module: torch.nn.Module,
    example: Sequence[Any],
    dynamic_batch: tuple[int, int] | None = None,
    outputs: Sequence[str] | None = None,
) -> Graph:
    """The module's dataflow graph for inputs like `example`.

    dynamic_batch: (lo, hi); every input's dimension 0 is then the batch. outputs: the module paths
    whose activations the graph returns, by name, instead of the module's result (`features.py`).
    Calls without a kernel become "torch" nodes: some are parts of composite ops that a pass
    recognises later, the rest is reported by `refuse_unsupported`.

    Raises: InvalidInputError for arguments that are not float tensors, a batch range that makes no
    sense or unknown outputs; CaptureError when torch.export fails or the module would still train.
    """
    arguments = tuple(example)
    leaves = check_example(arguments)
    check_module(module)
    place = place_of(module, leaves)
    batch = None
    if dynamic_batch is None:
        arguments = pytree.tree_map(partial(stand_in, place=place), arguments)
    else:
        check_range(dynamic_batch, leaves)
        arguments = pytree.tree_map(partial(two_samples, place=place), arguments)
        batch = Dim("batch", min=1, max=max(dynamic_batch[1], 2))
    with observed(module, outputs):
        program = _export(module, arguments, batch)
    _refuse_training(module, program)
    graph = Graph(name=type(module).__name__)
    state = _State(graph)
    if dynamic_batch is not None:
        _find_symbol(state, program, dynamic_batch[1])
    _add_sources(state, program, leaves)
    for node in program.graph.nodes:
        if node.op == "call_function":
            _add_call(state, node)
    _add_output(state, program)
    _remove_unused_constants(graph)
    return graph


def _export(module: torch.nn.Module, arguments: tuple[Any, ...], batch: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # By tensor, not by argument: `forward(self, *images)` has one argument, a tuple.
            shapes: Any = ShapesCollection()  # type: ignore[no-untyped-call]
            for leaf in pytree.tree_leaves(arguments) if batch is not None else ():
                shapes[leaf] = {0: batch}
            program = torch.export.export(module, arguments, dynamic_shapes=shapes)
            return program.run_decompositions({})
    except Exception as error:
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        reason = " ".join(lines[:3]) or repr(error)
        hint = " (with a dynamic batch)" if batch is not None else ""
        raise CaptureError(
            f"torch.export could not capture {type(module).__name__}{hint}: {reason}"
        ) from error


def _path_of(node: Any) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return str(list(stack.values())[-1][0]) if stack else ""


def _refuse_training(module: torch.nn.Module, program: Any) -> None:
    offenders = []
    for node in program.graph.nodes:
        if node.op != "call_function" or not hasattr(node.target, "_schema"):
            continue
        short = node.target._schema.name.rpartition("::")[2]
        if short in TRAINING_OPS or short == "_native_batch_norm_legit_functional":
            offenders.append(f"{_path_of(node) or 'the module'} ({node.target})")
    if offenders or program.graph_signature.buffers_to_mutate:
        listed = "; ".join(offenders) or ", ".join(
            program.graph_signature.buffers_to_mutate.values()
        )
        raise CaptureError(
            f"{type(module).__name__} would still train: batch statistics, active dropout or "
            f"updated buffers at {listed}. Call .eval() on the module first"
        )


def _find_symbol(state: _State, program: Any, largest: int) -> None:
    state.largest = largest
    for node in program.graph.nodes:
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            for size in node.meta["val"].shape:
                if isinstance(size, torch.SymInt):
                    state.symbol = size.node.expr
                    return
    raise CaptureError("torch.export fixed the batch: the module's code depends on its value")


def _number(state: _State, value: Any) -> Any:
    """A size at the largest batch."""
    if not isinstance(value, torch.SymInt):
        return value
    size = value.node.expr
    if state.symbol is not None:
        size = size.subs(state.symbol, state.largest)
    if not size.is_Integer:
        raise CaptureError(f"the shape depends on the values of a tensor: a size is {value}")
    return int(size)


def _batch_of(state: _State, shape: Sequence[Any]) -> int | None:
    """The largest batch if dimension 0 is a multiple of it; raises where the batch is elsewhere."""
    symbolic = [at for at, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if not symbolic:
        return None
    multiple = shape[0].node.expr / state.symbol if symbolic == [0] else None
    if multiple is None or not multiple.is_Integer:
        raise _Refused(f"the batch must stay in dimension 0, got shape {tuple(shape)}")
    return state.largest


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
                # A copy: the module may go on training. On the CPU: plans are alike everywhere.
                graph.tensors[node.name] = tensor.to("cpu", copy=True)
                spec = TensorSpec(tuple(tensor.shape), tensor.dtype)
                made = Node(node.name, CONSTANT, NoAttributes(), (spec,), module_path=path)
                known[key] = graph.insert(made)
            state.values[node.name] = known[key]
        elif isinstance(node.meta.get("val"), torch.Tensor):
            spec = _spec_of(state, node.meta["val"])
            made = Node(node.name, INPUT, NoAttributes(), (spec,))
            state.values[node.name] = graph.insert(made)
            count += 1
    if count != len(leaves):
        raise CaptureError(
            f"torch.export sees {count} tensor inputs, the example has {len(leaves)}"
        )


def _add_call(state: _State, node: Any) -> None:
    value = node.meta.get("val")
    if isinstance(value, (int, float, bool, torch.SymInt)):
        state.values[node.name] = _number(state, value)
        return
    if value is None and not node.users:
        return  # An assertion of torch.export.
    if node.target is operator.getitem:
        _add_getitem(state, node)
        return
    path, target = _path_of(node), str(node.target)
    arguments = pytree.tree_map(lambda x: _lookup(state, x), (node.args, node.kwargs))
    function = registry.CAPTURES.get(target)
    before = set(state.graph.net)
    try:
        places = [_place_of(state, tensor) for tensor in _tensors(value)]
        builder = _Builder(state, node.name, path)
        if moved_batch.concerns(pytree.tree_leaves(arguments), places):
            args, keywords = arguments
            result = moved_batch.call(
                builder, target, function, args, keywords, places, state.largest
            )
        elif function is None:
            raise _Refused(_why_unknown(target))
        else:
            result = function(builder, *arguments[0], **arguments[1])
        _check_result(state, node, result)
        _check_constants(state.graph, [name for name in state.graph.net if name not in before])
    except (_Refused, InvalidInputError) as refusal:
        # Whatever the capture function had built before it declined goes again.
        made = [name for name in state.graph.net if name not in before]
        state.graph.remove(reversed(made))
        result = _add_torch_call(state, node, path, arguments, str(refusal))
    state.values[node.name] = result


def _tensors(value: Any) -> Sequence[torch.Tensor]:
    return value if isinstance(value, (list, tuple)) else [value]


def _place_of(state: _State, tensor: torch.Tensor | None) -> moved_batch.Place | None:
    """Where a result has its batch; None where it has none, or several."""
    shape = () if tensor is None else tensor.shape
    symbolic = [at for at, size in enumerate(shape) if isinstance(size, torch.SymInt)]
    if len(symbolic) != 1:
        return None
    return moved_batch.Place(tuple(_number(state, size) for size in shape), symbolic[0])


def _why_unknown(target: str) -> str:
    if target.startswith("aten.fft_"):
        return (
            "no kernel for Fourier transforms; of a fixed size they are products with constant "
            "matrices of cosines and sines, which torch.nn.functional.linear computes"
        )
    return "no kernel for this op"


def _add_getitem(state: _State, node: Any) -> None:
    source, index = node.args
    result = state.values[source.name]
    picked = result[index] if isinstance(result, (list, tuple)) else None
    if picked is None:
        arguments = pytree.tree_map(lambda x: _lookup(state, x), (source.args, source.kwargs))
        reason = f"its result {index} is not computed by convloom"
        picked = _add_torch_call(state, source, _path_of(source), arguments, reason)[index]
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
        whole = got.dtype is torch.int64 and maker.is_compute and maker.definition.integers
        if got.dtype not in FLOAT_DTYPES and not whole and not state.graph.is_constant(value):
            raise _Refused(f"dtype {got.dtype} is not supported")
        if (got.shape, got.dtype) != (truth.shape, truth.dtype):
            raise CaptureError(f"{node.name} ({node.target}): inferred {got}, torch says {truth}")


def _check_constants(graph: Graph, made: Sequence[str]) -> None:
    """Weights are packed when the plan is made: they must follow from parameters alone."""
    for node in filter(lambda node: node.is_compute, map(graph.node, made)):
        for slot in node.definition.packs(node.attributes):
            value = graph.inputs(node.name)[slot]
            behind = {value.node, *nx.ancestors(graph.net, value.node)}
            if any(graph.node(name).op == INPUT for name in behind):
                raise _Refused(f"input {slot} of {node.op} is computed; it must be a constant")


def _add_torch_call(state: _State, node: Any, path: str, arguments: Any, reason: str) -> Any:
    """Keeps the call as a torch op; its results are one value each."""
    inputs: list[Value] = []

    def slot(leaf: Any) -> Any:
        if not isinstance(leaf, Value):
            return leaf
        inputs.append(leaf)
        return Slot(len(inputs) - 1)

    args, kwargs = pytree.tree_map(slot, arguments)
    many = isinstance(node.meta["val"], (list, tuple))
    try:
        if any(isinstance(leaf, moved_batch.Moved) for leaf in pytree.tree_leaves((args, kwargs))):
            raise _Refused(reason)
        specs = tuple(_spec_of(state, x) for x in _tensors(node.meta["val"]))
    except _Refused as refusal:
        where = f"'{path}'" if path else "the top module"
        raise UnsupportedOpError(
            f"{where}: {node.target}: with a dynamic batch, {refusal}"
        ) from None
    name = node.name if node.name not in state.graph else state.graph.fresh_name(node.name)
    attributes = TorchCall(node.target, args, tuple(kwargs.items()), reason)
    made = Node(name, TORCH, attributes, specs, module_path=path, origins=(name,))
    state.graph.insert(made, inputs)
    values = [Value(name, index) for index in range(len(specs))]
    return values if many else values[0]


def _add_output(state: _State, program: Any) -> None:
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
                f"but is in dimension {value.at} of {value.shape}"
            )
        if isinstance(value, Value):
            results.append(("tensor", len(outputs)))
            outputs.append(value)
        else:
            results.append(("literal", value))
    if not outputs:
        raise CaptureError("the module returns no tensor")
    state.graph.insert(Node(OUTPUT, OUTPUT, NoAttributes(), ()), outputs)
    trees = program.call_spec
    state.graph.output_tree = Structure(trees.in_spec, trees.out_spec, tuple(results))


def _remove_unused_constants(graph: Graph) -> None:
    unused = [
        node.name
        for node in graph.nodes()
        if node.op == CONSTANT and not graph.net.out_degree(node.name)
    ]
    graph.remove(unused)


def refuse_unsupported(graph: Graph) -> None:
    """Raises UnsupportedOpError listing every torch call that is left in the graph."""
    listed = []
    for node in graph.nodes():
        if isinstance(node.attributes, TorchCall):
            where = f"'{node.module_path}'" if node.module_path else "the top module"
            specs = ", ".join(str(graph.spec(value)) for value in graph.inputs(node.name))
            listed.append(f"{where}: {node.attributes}({specs}): {node.attributes.reason}")
    if not listed:
        return
    supported = ", ".join(sorted(op.name for op in registry.OPS))
    nodes = "\n  ".join(listed)
    raise UnsupportedOpError(
        f"{graph.name} has {len(listed)} unsupported node(s):\n  {nodes}\n"
        f"supported ops: {supported}. Pass fallback='torch' to run these nodes as torch ops"
    )
