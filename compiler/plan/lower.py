"""Graph -> Plan: every value gets a place, every node becomes a step or a view.

A value lies where its reader wants it: the inputs of a concatenation are written straight into
their slice of its buffer, movement ops that memory allows become views, the values the module
returns are written into the output buffers.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import torch

from ... import settings
from ...errors import KernelError, UnsupportedOpError
from ...kernels.contract import programmatic_launch
from ...kernels.contract.op import Config, Launch, Op, Problem, Ref
from ...kernels.contract.spec import Operand, TensorSpec
from ...kernels.contract.targets import Target
from ...kernels.movement import movement, rearrangement
from ...kernels.movement.rearrangement import Rearrange
from ...settings import BRANCHES, PROGRAMMATIC
from ..fusion import overrides
from ..fusion.overrides import CONCAT_LABEL, CONCAT_RULE
from ..graph.interface import Port
from ..graph.ir import CONSTANT, INPUT, OUTPUT, TORCH, Graph, Node, Value
from ..graph.ledger import Ledger
from ..graph.memory import ALIGNMENT, Buffer, Place
from ..graph.torch_call import TorchCall
from ..graph.verify import verify
from ..records.choose import Chooser, heuristic
from . import branches
from .arena import place
from .packing import constant_place, packed_place
from .plan import KernelStep, Plan, Step, TorchStep

VIEW_RULE = "reshape, slice, permute => view"
VECTOR = 8
"""Slices must start at multiples of this many elements: 128-bit stores of halves need it."""


@dataclass
class _Lowering:
    """The state of one lowering."""

    graph: Graph
    target: Target
    precision: str
    ledger: Ledger
    elide: bool
    choose: Chooser
    launch: frozenset[str]
    places: dict[Value, Place] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    destinations: dict[Value, tuple[Value, int]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    views: int = 0


@dataclass(frozen=True)
class Options:
    """How to lower: target, fp32 precision, the dtype activations were cast to (None: as captured),
    whether concatenations may be written in place, who chooses configurations, and how kernels
    follow each other (`settings.LAUNCH_OPTIONS`)."""

    target: Target
    precision: str = "ieee"
    dtype: torch.dtype | None = None
    elide_concats: bool = True
    choose: Chooser = heuristic
    launch: frozenset[str] = field(default_factory=lambda: settings.read().launch)


def lower(graph: Graph, captured: Graph, options: Options, ledger: Ledger) -> Plan:
    """The plan of an optimised graph.

    captured: the graph before any pass, for the account of what was saved.

    Raises: UnsupportedOpError where an op needs a constant and gets a computed tensor; GraphError
    for a graph that breaks a law, whose kernels would read memory that is not theirs.
    """
    verify(graph)
    state = _Lowering(
        graph, options.target, options.precision, ledger, options.elide_concats, options.choose,
        options.launch,
    )  # fmt: skip
    for position, node in enumerate(graph.graph_inputs()):
        name = f"input{position}"
        state.buffers[name] = _buffer(name, "input", node.spec)
        state.places[Value(node.name)] = Place(name, Operand.dense(node.spec))
    inputs = tuple(
        Port(node.name, node.spec, state.places[Value(node.name)]) for node in graph.graph_inputs()
    )
    if state.elide:
        _plan_concats(state)
    _plan_outputs(state)
    for node in graph.nodes():
        if node.op not in (INPUT, CONSTANT, OUTPUT):
            _lower_node(state, node)
    outputs = tuple(
        Port(f"output{at}", graph.spec(value), _output_place(state, value, at))
        for at, value in enumerate(graph.outputs())
    )
    arena_bytes, streams = _place_in_arena(state)
    ledger.close(captured, graph, state.kernels)
    batches = [node.spec.batch for node in graph.graph_inputs() if node.spec.batch is not None]
    return Plan(
        target=options.target,
        steps=tuple(state.steps),
        buffers=state.buffers,
        constants=state.constants,
        inputs=inputs,
        outputs=outputs,
        structure=graph.output_tree,
        arena_bytes=arena_bytes,
        activation_bytes=activation_bytes(captured, options.dtype),
        batch=(1, batches[0]) if batches else None,
        convs=sum(node.op == "conv2d" for node in captured.nodes()),
        views=state.views,
        precision=options.precision,
        in_place=options.elide_concats,
        streams=streams,
    )


def activation_bytes(captured: Graph, dtype: torch.dtype | None = None) -> int:
    """Bytes of the outputs of all ops of the captured graph, in `dtype` where one is given.

    What follows from parameters alone (a bias that capture reshapes) is no activation.
    """
    fed = captured.fed()
    specs = (
        spec for node in captured.compute_nodes() if node.name in fed for spec in node.outputs
    )
    return sum(
        spec.numel * (dtype if dtype and spec.dtype.is_floating_point else spec.dtype).itemsize
        for spec in specs
    )


def _buffer(name: str, kind: str, spec: TensorSpec) -> Buffer:
    return Buffer(name, kind, spec.dtype, _rounded(spec.size_bytes, spec.batch), spec.batch)


def _rounded(size_bytes: int, batch: int | None) -> int:
    """Rounded up so that every batch, not only the largest, keeps buffers aligned."""
    if batch is None:
        return -(-size_bytes // ALIGNMENT) * ALIGNMENT
    return -(-(size_bytes // batch) // ALIGNMENT) * ALIGNMENT * batch


# Where values go.


def _plan_concats(state: _Lowering) -> None:
    """Decides which values are written straight into their slice of a concatenation."""
    graph = state.graph
    # Later concatenations first: a nested one then finds its own destination already decided.
    for node in reversed(graph.nodes()):
        if not isinstance(node.attributes, movement.Concat):
            continue
        start, dim = 0, node.attributes.dim
        values = graph.inputs(node.name)
        times = Counter(values)
        for value in values:
            size = graph.spec(value).shape[dim]
            reason = _why_not_in_place(state, node, value, start, dim)
            if reason is None and times[value] > 1:
                reason = f"{value} is joined twice"
            source = graph.node(value.node)
            reason = reason or overrides.of(graph.goal, CONCAT_LABEL, [source, node]).refusal
            if reason is None:
                state.destinations[value] = (Value(node.name), start)
                saved = 2 * graph.spec(value).size_bytes
                state.ledger.accept(CONCAT_RULE, [source, node], node.name, saved)
            else:
                state.ledger.refuse(CONCAT_RULE, [source, node], reason)
            start += size


def _why_not_in_place(
    state: _Lowering, concat: Node, value: Value, start: int, dim: int
) -> str | None:
    graph = state.graph
    source = graph.node(value.node)
    nested = isinstance(source.attributes, movement.Concat)
    if not source.is_compute or (is_movement(source) and not nested):
        return f"{value} is not computed by a kernel"
    if value in state.destinations:
        return f"{value} already lies in another concatenation"
    if graph.spec(value).dtype is not concat.spec.dtype:
        return f"{value} has another dtype"
    whole = Operand.dense(concat.spec)
    part = movement.slice_operand(whole, dim, start, graph.spec(value).shape[dim])
    if part is None:
        return f"dimension {dim} is not the innermost in memory"
    if part.pitch % VECTOR or part.offset % VECTOR:
        return f"its slice starts at {part.offset} of {part.pitch}, not a multiple of {VECTOR}"
    return None


def is_movement(node: Node) -> bool:
    """Whether the op computes nothing and may become a view."""
    return not node.epilogue and isinstance(
        node.attributes,
        (
            rearrangement.Reshape,
            movement.FlattenPixels,
            movement.Permute,
            Rearrange,
            movement.Slice,
            movement.Relayout,
            movement.Concat,
        ),
    )


def _plan_outputs(state: _Lowering) -> None:
    """Values that the module returns once, computed by a kernel, are written where they leave."""
    for at, value in enumerate(state.graph.outputs()):
        node = state.graph.node(value.node)
        readers = state.graph.uses(value)
        own = node.op not in (INPUT, CONSTANT) and value not in state.destinations
        if own and len(readers) == 1:
            name = f"output{at}"
            state.buffers[name] = _buffer(name, "output", state.graph.spec(value))
            state.places[value] = Place(name, Operand.dense(state.graph.spec(value)))


def _output_place(state: _Lowering, value: Value, at: int) -> Place:
    """Where the runtime finds output `at`: its own buffer, or wherever the value lies."""
    if state.graph.is_constant(value):
        return constant_place(state, value, state.graph.spec(value).dtype)
    return state.places[value]


def _place(state: _Lowering, value: Value) -> Place:
    """The place a computed value will be written to."""
    if value in state.places:
        return state.places[value]
    spec = state.graph.spec(value)
    if value in state.destinations:
        concat, start = state.destinations[value]
        whole = _place(state, concat)
        attributes = state.graph.node(concat.node).attributes
        assert isinstance(attributes, movement.Concat)
        dim = attributes.dim
        part = movement.slice_operand(whole.operand, dim, start, spec.shape[dim])
        assert part is not None, value
        place = Place(whole.buffer, part)
    else:
        name = str(value).removeprefix("%")
        state.buffers[name] = _buffer(name, "arena", spec)
        place = Place(name, Operand.dense(spec))
    state.places[value] = place
    return place


# Nodes.


def _lower_node(state: _Lowering, node: Node) -> None:
    if node.op == TORCH:
        _lower_torch(state, node)
        return
    if _becomes_view(state, node):
        return
    inputs = tuple(
        _read(state, value, node, slot)
        for slot, value in enumerate(state.graph.own_inputs(node))
    )
    operands = tuple(_read(state, value, node, None) for value in state.graph.operands(node))
    before = tuple(
        _read(state, value, node, None) for value in state.graph.prologue_operands(node)
    )
    outputs = tuple(
        _place(state, Value(node.name, index)) for index in range(len(node.outputs))
    )
    if isinstance(node.attributes, movement.Concat) and _finish_concat(state, node):
        return
    problem = Problem(
        op=node.op,
        attributes=node.attributes,
        inputs=tuple(place.operand for place in inputs),
        outputs=tuple(place.operand for place in outputs),
        epilogue=node.epilogue,
        operands=tuple(place.operand for place in operands),
        prologue=node.prologue,
        prologue_operands=tuple(place.operand for place in before),
        precision=state.precision,
    )
    buffers: dict[Ref, str] = {}
    groups = {"input": inputs, "output": outputs, "operand": operands, "prologue": before}
    for kind, places in groups.items():
        buffers |= {Ref(kind, index): place.buffer for index, place in enumerate(places)}
    _add_step(state, node, problem, buffers)


def _add_step(
    state: _Lowering, node: Node, problem: Problem, buffers: dict[Ref, str]
) -> None:
    definition = node.definition
    choice = state.choose(definition, problem, state.target)
    tile = choice.config
    reason = definition.legal(problem, tile, state.target)
    if reason is not None:
        raise KernelError(
            f"{node.name}: configuration {tile} ({choice.source}) is not legal: {reason}"
        )
    launches = _launches(state, definition, problem, tile, node.name)
    buffers = buffers | _scratch(state, node, launches)
    step = KernelStep(
        node.name,
        node.op,
        problem,
        tile,
        launches,
        buffers,
        node.module_path,
        node.origins,
        choice.source,
    )
    state.steps.append(step)
    state.kernels[node.name] = node.name


def _launches(
    state: _Lowering, op: Op, problem: Problem, tile: Config, name: str
) -> tuple[Launch, ...]:
    """The op's launches, in the way that the options ask for.

    Raises: KernelError where a tensor is too large to be indexed.
    """
    launches = op.launches(problem, tile, state.target)
    for reason in filter(None, (launch.too_large for launch in launches)):
        specs = ", ".join(str(each.spec) for each in (*problem.inputs, *problem.outputs))
        raise KernelError(f"{name}: {op.name} of {specs} has {reason}; make the batch smaller")
    if PROGRAMMATIC not in state.launch:
        return launches
    return tuple(programmatic_launch.programmatic(launch, state.target) for launch in launches)


def _scratch(state: _Lowering, node: Node, launches: tuple[Launch, ...]) -> dict[Ref, str]:
    """Buffers for what a step's programs exchange. All steps in one stream share what each leaves
    zeroed."""
    buffers: dict[Ref, str] = {}
    for launch in launches:
        for index, wanted in enumerate(launch.scratch):
            shared = wanted.zeroed and not _branches(state)
            name = "zeroed" if shared else f"{node.name}.scratch{index}"
            size_bytes = _rounded(wanted.elements * wanted.dtype.itemsize, None)
            if name in state.buffers:
                size_bytes = max(size_bytes, state.buffers[name].size_bytes)
            kind = "zeroed" if wanted.zeroed else "arena"
            state.buffers[name] = Buffer(name, kind, wanted.dtype, size_bytes)
            buffers[Ref("scratch", index)] = name
    return buffers


def _finish_concat(state: _Lowering, node: Node) -> bool:
    """Handles a concatenation some of whose inputs are in place; copies the others."""
    values = state.graph.inputs(node.name)
    here = [state.destinations.get(v, (None,))[0] == Value(node.name) for v in values]
    if not any(here):
        return False
    whole = _place(state, Value(node.name))
    attributes = node.attributes
    assert isinstance(attributes, movement.Concat)
    start = 0
    for value, done in zip(values, here, strict=True):
        size = state.graph.spec(value).shape[attributes.dim]
        if not done:
            part = movement.slice_operand(whole.operand, attributes.dim, start, size)
            assert part is not None
            _copy(state, node, value, Place(whole.buffer, part))
        start += size
    if all(here):
        state.kernels[node.name] = "in place"
        state.views += 1
    return True


def _copy(state: _Lowering, node: Node, value: Value, destination: Place) -> None:
    """A step that copies one value into a slice."""
    source = _read(state, value, node, None)
    spec = destination.operand.spec
    attributes = movement.Relayout(spec.layout, spec.dtype)
    problem = Problem("relayout", attributes, (source.operand,), (destination.operand,))
    from ...kernels import registry

    op = registry.get("relayout")
    choice = state.choose(op, problem, state.target)
    buffers = {Ref("input", 0): source.buffer, Ref("output", 0): destination.buffer}
    step = KernelStep(
        f"{node.name}.{value.node}",
        "relayout",
        problem,
        choice.config,
        _launches(state, op, problem, choice.config, node.name),
        buffers,
        node.module_path,
        node.origins,
        choice.source,
    )
    state.steps.append(step)
    state.kernels[node.name] = step.name


def _becomes_view(state: _Lowering, node: Node) -> bool:
    """Gives the node's value a place inside its input's buffer where memory allows it."""
    value = Value(node.name)
    if not is_movement(node) or value in state.places or value in state.destinations:
        return False
    if isinstance(node.attributes, movement.Concat):
        return False
    source_value = state.graph.inputs(node.name)[0]
    if state.graph.is_constant(source_value):
        return False
    source = state.places[source_value]
    view = movement.view_of(node.attributes, source.operand, node.spec)
    if view is None:
        return False
    state.places[value] = Place(source.buffer, view)
    state.views += 1
    state.ledger.accept(VIEW_RULE, [node], node.name, 2 * node.spec.size_bytes)
    return True


def _lower_torch(state: _Lowering, node: Node) -> None:
    inputs = tuple(_read(state, value, node, None) for value in state.graph.inputs(node.name))
    outputs = tuple(
        _place(state, Value(node.name, index)) for index in range(len(node.outputs))
    )
    assert isinstance(node.attributes, TorchCall)
    step = TorchStep(node.name, node.attributes, inputs, outputs, node.module_path, node.origins)
    state.steps.append(step)
    state.kernels[node.name] = "torch"


# Constants.


def _read(state: _Lowering, value: Value, node: Node, slot: int | None) -> Place:
    """The place of an input; constants are packed as their reader wants them."""
    packs = node.definition.packs(node.attributes) if node.is_compute else {}
    if slot is not None and slot in packs:
        if not state.graph.is_constant(value):
            raise UnsupportedOpError(
                f"'{node.module_path}': {node.op} needs a constant as input {slot}, got the "
                f"computed tensor {value} {state.graph.spec(value)}"
            )
        return packed_place(state, value, node, slot)
    if state.graph.is_constant(value):
        # Vectors of stages (bias, scale) stay fp32: they are few and read once.
        as_is = node.op == TORCH or slot in node.definition.factors
        dtype = state.graph.spec(value).dtype if as_is else torch.float32
        return constant_place(state, value, dtype)
    return state.places[value]


# Memory.


def _place_in_arena(state: _Lowering) -> tuple[int, tuple[int, ...]]:
    """Assigns arena offsets; the arenas' size at the largest batch, and the steps' streams."""
    outputs = enumerate(state.graph.outputs())
    kept = [_output_place(state, value, at).buffer for at, value in outputs]
    used = [[touch.buffer for touch in branches.touches(step)] for step in state.steps]
    streams = branches.streams(state.steps) if _branches(state) else ()
    together = branches.keep_apart(state.steps, streams, kept) if streams else None
    return place(state.buffers, used, kept, together), streams


def _branches(state: _Lowering) -> bool:
    return BRANCHES in state.launch and state.target.is_gpu
