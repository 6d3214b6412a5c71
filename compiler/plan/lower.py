"""Graph -> Plan: every value gets a place, every node becomes a step or a view.

A value lies where its reader wants it: the inputs of a concatenation are written straight into
their slice of its buffer, movement ops that memory allows become views, the values the module
returns are written into the output buffers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from ... import settings
from ...errors import KernelError, UnsupportedOpError
from ...kernels import registry
from ...kernels.contract import programmatic_launch
from ...kernels.contract.op import Config, Launch, Op, Problem, Ref
from ...kernels.contract.spec import Operand, TensorSpec
from ...kernels.contract.targets import Target
from ...kernels.hopper import core
from ...kernels.movement import movement, rearrangement
from ...kernels.movement.rearrangement import Rearrange
from ...settings import BRANCHES, PROGRAMMATIC
from ..fusion import overrides
from ..fusion.overrides import CONCAT_LABEL, CONCAT_RULE
from ..graph.interface import Port
from ..graph.ir import CONSTANT, INPUT, OUTPUT, TORCH, Graph, Node, Value
from ..graph.ledger import Ledger
from ..graph.memory import ALIGNMENT, Buffer, BufferSlice, on_cpu
from ..graph.torch_call import TorchCall
from ..graph.verify import verify, verify_memory
from ..records.choose import Chooser, heuristic
from . import branches
from .arena import place
from .plan import KernelStep, Plan, Step, TorchStep

VIEW_RULE = "reshape, slice, permute => view"
VECTOR = 8
"""Slices must start at multiples of this many elements: 128-bit stores of halves need it."""


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


@dataclass
class _Lowering:
    """The state of one lowering."""

    graph: Graph
    options: Options
    ledger: Ledger
    places: dict[Value, BufferSlice] = field(default_factory=dict)
    buffers: dict[str, Buffer] = field(default_factory=dict)
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    destinations: dict[Value, tuple[Value, int]] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    kernels: dict[str, str] = field(default_factory=dict)
    views: int = 0

    @property
    def has_branches(self) -> bool:
        return BRANCHES in self.options.launch and self.options.target.is_gpu


@on_cpu
def lower(graph: Graph, captured: Graph, options: Options, ledger: Ledger) -> Plan:
    """The plan of an optimised graph.

    captured: the graph before any pass, for the account of what was saved.

    Raises: UnsupportedOpError where an op needs a constant and gets a computed tensor; GraphError
    for a graph that breaks a law, whose kernels would read memory that is not theirs;
    TargetUnavailableError where a core is asked for that no kernel for the target can use.
    """
    core.check_asked(options.target)
    verify(graph)
    verify_memory(graph)
    state = _Lowering(graph, options, ledger)
    inputs = tuple(
        Port(
            node.name, _outside(graph, node),
            _own_buffer(state, Value(node.name), f"input{at}", "input"),
        )
        for at, node in enumerate(graph.graph_inputs())
    )  # fmt: skip
    if options.elide_concats:
        _plan_concats(state)
    _plan_outputs(state)
    for node in graph.nodes():
        if node.op not in (INPUT, CONSTANT, OUTPUT):
            _lower_node(state, node)
    outputs = tuple(
        Port(f"output{at}", graph.spec(value), _output_place(state, value))
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
    reachable = captured.nodes_reachable_from_inputs()
    nodes = (node for node in captured.compute_nodes() if node.name in reachable)
    specs = (spec for node in nodes for spec in node.outputs)
    return sum(
        spec.numel * (dtype if dtype and spec.dtype.is_floating_point else spec.dtype).itemsize
        for spec in specs
    )


def _outside(graph: Graph, node: Node) -> TensorSpec:
    """What a call gives for an input."""
    is_image = graph.output_tree is not None and node.name in graph.output_tree.images
    return replace(node.spec, dtype=torch.uint8) if is_image else node.spec


def _own_buffer(state: _Lowering, value: Value, name: str, kind: str) -> BufferSlice:
    spec = state.graph.spec(value)
    size_bytes = _rounded(spec.size_bytes, spec.batch)
    state.buffers[name] = Buffer(name, kind, spec.dtype, size_bytes, spec.batch)
    state.places[value] = BufferSlice(name, Operand.dense(spec))
    return state.places[value]


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


MOVEMENTS = (
    rearrangement.Reshape, Rearrange, movement.FlattenPixels, movement.Permute, movement.Slice,
    movement.Relayout, movement.Concat,
)  # fmt: skip


def is_movement(node: Node) -> bool:
    """Whether the op computes nothing and may become a view."""
    return not node.epilogue and isinstance(node.attributes, MOVEMENTS)


def _plan_outputs(state: _Lowering) -> None:
    """Values that the module returns once, computed by a kernel, are written where they leave."""
    for at, value in enumerate(state.graph.outputs()):
        node = state.graph.node(value.node)
        own = node.op not in (INPUT, CONSTANT) and value not in state.destinations
        if own and len(state.graph.uses(value)) == 1:
            _own_buffer(state, value, f"output{at}", "output")


def _output_place(state: _Lowering, value: Value) -> BufferSlice:
    """Where the runtime finds an output: its own buffer, or wherever the value lies."""
    if state.graph.is_constant(value):
        return _constant_place(state, value, state.graph.spec(value).dtype)
    return state.places[value]


def _place(state: _Lowering, value: Value) -> BufferSlice:
    """The place a computed value will be written to."""
    if value in state.places:
        return state.places[value]
    if value not in state.destinations:
        return _own_buffer(state, value, str(value).removeprefix("%"), "arena")
    concat, start = state.destinations[value]
    dim = state.graph.node(concat.node).attributes.expect(movement.Concat).dim
    size = state.graph.spec(value).shape[dim]
    place = state.places[value] = _part(_place(state, concat), dim, start, size)
    return place


def _part(whole: BufferSlice, dim: int, start: int, size: int) -> BufferSlice:
    """A slice of a place, which memory allows."""
    part = movement.slice_operand(whole.operand, dim, start, size)
    assert part is not None
    return BufferSlice(whole.buffer, part)


# Nodes.


def _lower_node(state: _Lowering, node: Node) -> None:
    if node.op == TORCH:
        _lower_torch(state, node)
        return
    if _becomes_view(state, node):
        return
    graph = state.graph
    own = graph.own_inputs(node)
    places = {
        "input": tuple(_read(state, value, node, slot) for slot, value in enumerate(own)),
        "operand": _read_all(state, graph.operands(node), node),
        "prologue": _read_all(state, graph.prologue_operands(node), node),
        "output": _written(state, node),
    }
    if isinstance(node.attributes, movement.Concat) and _finish_concat(state, node):
        return
    operands = {kind: tuple(place.operand for place in group) for kind, group in places.items()}
    chooses = node.op == "linear" and _chooses(graph, own[0])
    problem = Problem(
        node.op, node.attributes, operands["input"], operands["output"], node.epilogue,
        operands["operand"], node.prologue, operands["prologue"],
        precision="ieee" if chooses else state.options.precision,
    )  # fmt: skip
    _add_step(state, node, node.name, problem, places)


def _chooses(graph: Graph, factor: Value) -> bool:
    """Whether a product's factor is made of booleans: the rows of a table that it chooses must not
    be rounded to tf32."""
    node = graph.node(factor.node)
    if not node.is_compute:
        return graph.spec(factor).dtype is torch.bool
    inputs = graph.own_inputs(node)
    (first, *_) = node.definition.infer(node.attributes, tuple(map(graph.spec, inputs)))
    return first.dtype is torch.bool or (is_movement(node) and _chooses(graph, inputs[0]))


def _add_step(
    state: _Lowering,
    node: Node,
    name: str,
    problem: Problem,
    places: Mapping[str, tuple[BufferSlice, ...]],
) -> None:
    """Adds a step for a node; places: of the problem's tensors, by kind."""
    definition, target = registry.get(problem.op), state.options.target
    choice = state.options.choose(definition, problem, target)
    tile = choice.config
    reason = definition.legal(problem, tile, target)
    if reason is not None:
        raise KernelError(f"{name}: configuration {tile} ({choice.source}) is not legal: {reason}")
    launches = _launches(state, definition, problem, tile, node.name)
    buffers = {
        Ref(kind, index): place.buffer
        for kind in problem.groups
        for index, place in enumerate(places.get(kind, ()))
    }
    buffers |= _scratch(state, node, launches)
    state.steps.append(KernelStep(
        name, problem.op, problem, tile, launches, buffers, node.module_path, node.origins,
        choice.source,
    ))  # fmt: skip
    state.kernels[node.name] = name


def _launches(
    state: _Lowering, op: Op, problem: Problem, tile: Config, name: str
) -> tuple[Launch, ...]:
    """The op's launches, in the way that the options ask for.

    Raises: KernelError where a tensor is too large to be indexed.
    """
    target = state.options.target
    launches = op.launches(problem, tile, target)
    for reason in filter(None, (launch.too_large for launch in launches)):
        specs = ", ".join(str(each.spec) for each in (*problem.inputs, *problem.outputs))
        raise KernelError(f"{name}: {op.name} of {specs} has {reason}; make the batch smaller")
    if PROGRAMMATIC not in state.options.launch:
        return launches
    return tuple(programmatic_launch.programmatic(launch, target) for launch in launches)


def _scratch(state: _Lowering, node: Node, launches: tuple[Launch, ...]) -> dict[Ref, str]:
    """Buffers for what a step's programs exchange. All steps in one stream share what each leaves
    zeroed."""
    buffers: dict[Ref, str] = {}
    for launch in launches:
        for index, scratch in enumerate(launch.scratch):
            shared = scratch.zeroed and not state.has_branches
            name = "zeroed" if shared else f"{node.name}.scratch{index}"
            size_bytes = _rounded(scratch.elements * scratch.dtype.itemsize, None)
            if name in state.buffers:
                size_bytes = max(size_bytes, state.buffers[name].size_bytes)
            kind = "zeroed" if scratch.zeroed else "arena"
            state.buffers[name] = Buffer(name, kind, scratch.dtype, size_bytes)
            buffers[Ref("scratch", index)] = name
    return buffers


def _finish_concat(state: _Lowering, node: Node) -> bool:
    """Handles a concatenation some of whose inputs are in place; copies the others."""
    values = state.graph.inputs(node.name)
    here = [state.destinations.get(v, (None,))[0] == Value(node.name) for v in values]
    if not any(here):
        return False
    whole = _place(state, Value(node.name))
    dim, start = node.attributes.expect(movement.Concat).dim, 0
    for value, done in zip(values, here, strict=True):
        size = state.graph.spec(value).shape[dim]
        if not done:
            source, copy = _read(state, value, node, None), _part(whole, dim, start, size)
            attributes = movement.Relayout(copy.operand.spec.layout, copy.operand.spec.dtype)
            problem = Problem("relayout", attributes, (source.operand,), (copy.operand,))
            places = {"input": (source,), "output": (copy,)}
            _add_step(state, node, f"{node.name}.{value.node}", problem, places)
        start += size
    if all(here):
        state.kernels[node.name] = "in place"
        state.views += 1
    return True


def _becomes_view(state: _Lowering, node: Node) -> bool:
    """Gives the node's value a place inside its input's buffer where memory allows it."""
    value, joins = Value(node.name), isinstance(node.attributes, movement.Concat)
    if not is_movement(node) or joins or value in state.places or value in state.destinations:
        return False
    source_value = state.graph.inputs(node.name)[0]
    if state.graph.is_constant(source_value):
        return False
    source = state.places[source_value]
    view = movement.view_of(node.attributes, source.operand, node.spec)
    if view is None:
        return False
    state.places[value] = BufferSlice(source.buffer, view)
    state.views += 1
    state.ledger.accept(VIEW_RULE, [node], node.name, 2 * node.spec.size_bytes)
    return True


def _lower_torch(state: _Lowering, node: Node) -> None:
    inputs = _read_all(state, state.graph.inputs(node.name), node)
    outputs = _written(state, node)
    call = node.attributes.expect(TorchCall)
    step = TorchStep(node.name, call, inputs, outputs, node.module_path, node.origins)
    state.steps.append(step)
    state.kernels[node.name] = "torch"


def _written(state: _Lowering, node: Node) -> tuple[BufferSlice, ...]:
    return tuple(_place(state, Value(node.name, at)) for at in range(len(node.outputs)))


# Constants.


def _read_all(state: _Lowering, values: Iterable[Value], node: Node) -> tuple[BufferSlice, ...]:
    """The places of values that are no inputs of the op itself."""
    return tuple(_read(state, value, node, None) for value in values)


def _read(state: _Lowering, value: Value, node: Node, slot: int | None) -> BufferSlice:
    """The place of an input; constants are packed as their reader wants them."""
    packs = node.definition.packs(node.attributes) if node.is_compute else {}
    if slot is not None and slot in packs:
        if not state.graph.is_constant(value):
            raise UnsupportedOpError(
                f"'{node.module_path}': {node.op} needs a constant as input {slot}, got the "
                f"computed tensor {value} {state.graph.spec(value)}"
            )
        return _packed_place(state, value, node, slot)
    if state.graph.is_constant(value):
        # Vectors of stages (bias, scale) stay fp32: they are few and read once.
        as_is = node.op == TORCH or slot in node.definition.factors
        dtype = state.graph.spec(value).dtype if as_is else torch.float32
        return _constant_place(state, value, dtype)
    return state.places[value]


def _constant_place(state: _Lowering, value: Value, dtype: torch.dtype) -> BufferSlice:
    """Where a constant lies, dense and in a dtype."""
    name = f"{value.node}.{str(dtype).removeprefix('torch.')}"
    if name not in state.buffers:
        tensor = state.graph.constant(value).detach()
        _add_constant(state, name, tensor.to(dtype).contiguous().reshape(-1), tensor)
    return BufferSlice(name, Operand.dense(state.graph.spec(value).with_(dtype=dtype)))


def _packed_place(state: _Lowering, value: Value, node: Node, slot: int) -> BufferSlice:
    """Where a constant lies as the op of a node packs it for one of its inputs."""
    spec = state.graph.spec(value)
    tensor = state.graph.constant(value).detach()
    pack = node.definition.packs(node.attributes)[slot]
    packed = pack(node.attributes, tensor.to(spec.dtype))
    # The order may depend on the attributes: nodes that share a weight may want it differently.
    base = name = f"{value.node}.{node.op}{slot}.{str(spec.dtype).removeprefix('torch.')}"
    copies = 1
    while name in state.constants and not torch.equal(state.constants[name], packed):
        copies += 1
        name = f"{base}.{copies}"
    if name not in state.buffers:
        _add_constant(state, name, packed, tensor)
    return BufferSlice(name, Operand.dense(spec))


def _add_constant(state: _Lowering, name: str, packed: torch.Tensor, tensor: torch.Tensor) -> None:
    """Adds what was made of a constant, in memory of its own."""
    packed = packed.clone() if packed.data_ptr() == tensor.data_ptr() else packed
    state.constants[name] = packed
    size_bytes = packed.numel() * packed.element_size()
    state.buffers[name] = Buffer(name, "constant", packed.dtype, size_bytes)


# Memory.


def _place_in_arena(state: _Lowering) -> tuple[int, tuple[int, ...]]:
    """Assigns arena offsets; the arenas' size at the largest batch, and the steps' streams."""
    kept = [_output_place(state, value).buffer for value in state.graph.outputs()]
    used = [[touch.buffer for touch in branches.touches(step)] for step in state.steps]
    streams = branches.streams(state.steps) if state.has_branches else ()
    together = branches.keep_apart(state.steps, streams, kept) if streams else None
    return place(state.buffers, used, kept, together), streams
