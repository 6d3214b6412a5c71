"""`graph.json`: optimised graphs as data, and the plans that are made from them again.

A graph comes back as the same nodes in the same order with the same tensors, so that lowering it
gives the plan that lowering the original would have given. Only ops of the registry and their own
attribute classes are read, by tables that exist before the file is opened; a call that was kept as
a torch op has no such table and cannot be saved.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch

from ... import extensions
from ...errors import ArtifactError, ConvloomError
from ...kernels import registry
from ...kernels.contract.epilogue import Epilogue, Stage, read_before
from ...kernels.contract.op import Attributes, Config, Op, Problem
from ...kernels.contract.scalars import BY_NAME
from ...kernels.contract.spec import TensorSpec
from ...kernels.contract.targets import REFERENCE, Target
from ...settings import BRANCHES, PROGRAMMATIC
from ..graph import ir
from ..graph.ir import CONSTANT, INPUT, OUTPUT, TORCH, CompileTarget, Graph, Node, Value
from ..graph.ledger import Ledger
from ..graph.typed import Reader
from ..graph.verify import verify
from ..plan.lower import Options, lower
from ..plan.plan import Plan
from ..records.choose import Choice, Chooser, heuristic
from .check import LARGEST_EXTENT, spec_problem
from .program import Literal, Nest, Program, nest_of
from .tensors import Pool, Stored, logical

WORDS = (
    "", "constant", "reflect", "replicate", "circular", "softmax", "log_softmax", "nearest",
    "nearest-exact", "linear", "corners", "cubic", "antialiased-linear", "antialiased-cubic",
    "bilinear", "bicubic", "zeros", "border", "reflection",
)
"""Every text that an attribute may be: kernels and references choose by them."""
POSITIVE = ("dilation", "groups", "image", "k", "kernel", "size", "split", "step", "stride")
"""Attributes that are no counts of nothing, which geometry does not ask about."""
MOST_NODES = 20_000
LARGEST_BLOCK = 4096
"""Of a configuration that a file names, unless the default is larger: a tile takes memory."""


@dataclass(frozen=True)
class NodeRecord:
    """A node and the values it reads, by slot."""

    name: str
    op: str
    attributes: Attributes
    outputs: tuple[TensorSpec, ...]
    epilogue: Epilogue
    prologue: Epilogue
    module_path: str
    origins: tuple[str, ...]
    rules: tuple[str, ...]
    inputs: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class GraphRecord:
    """A graph; nodes in the order of their insertion. From `batch` to `results`: what the programs
    that are made of it have under these names; summary: of their counts, those of the graph as it
    was captured."""

    name: str
    batch: tuple[int, int] | None
    precision: str
    in_place: bool
    arguments: Nest
    result: Nest
    results: tuple[tuple[str, Literal], ...]
    names: tuple[str, ...]
    summary: tuple[tuple[str, int], ...]
    dtype: torch.dtype | None
    force: tuple[str, ...]
    forbid: tuple[str, ...]
    nodes: tuple[NodeRecord, ...]
    constants: tuple[tuple[str, Stored], ...]


# Writing.


CAPTURED = "activation_bytes", "convs"
"""Counts of the graph as it was captured, which its plan cannot be asked for."""


def record_of(graph: Graph, plan: Plan, pool: Pool) -> GraphRecord:
    """The graph behind a plan as data; its tensors go to the pool.

    Raises: ArtifactError for calls of torch ops.
    """
    fallbacks = [str(node.attributes) for node in graph.nodes() if node.op == TORCH]
    if fallbacks:
        raise ArtifactError(
            f"cannot save {graph.name}: {', '.join(fallbacks)} would run as torch ops, and a file "
            "holds no code but that of convloom's own kernels"
        )
    goal = graph.goal or CompileTarget(REFERENCE)
    nodes = [graph.node(name) for name in graph.net]
    # Passes leave behind constants that nobody reads any more.
    nodes = [node for node in nodes if node.op != CONSTANT or graph.net.out_degree(node.name)]
    constants = tuple(
        (node.name, pool.find_or_add(_as_read(graph, node)))
        for node in nodes
        if node.op == CONSTANT
    )
    records = tuple(
        NodeRecord(
            **{item.name: getattr(node, item.name) for item in fields(node)},
            inputs=tuple((value.node, value.index) for value in graph.inputs(node.name)),
        )
        for node in nodes
    )
    return GraphRecord(
        name=graph.name,
        **outside_of(plan),
        summary=tuple((name, plan.summary()[name]) for name in CAPTURED),
        dtype=goal.dtype,
        force=goal.force,
        forbid=goal.forbid,
        nodes=records,
        constants=constants,
    )


def outside_of(plan: Plan) -> dict[str, Any]:
    """The fields that a graph's record and its programs have alike."""
    structure = plan.structure
    return {
        "batch": plan.batch, "precision": plan.precision, "in_place": plan.in_place,
        "arguments": nest_of(structure.arguments), "result": nest_of(structure.result),
        "results": structure.results, "names": structure.names,
    }  # fmt: skip


def _as_read(graph: Graph, node: Node) -> torch.Tensor:
    """A constant as exactly as its readers see it: folded weights are fp64 until they are packed
    in the dtype of the computation."""
    tensor = graph.tensors[node.name].detach()
    for reader, slot in graph.uses(Value(node.name)):
        target = graph.node(reader)
        if not target.is_compute or slot not in target.definition.packs(target.attributes):
            return tensor
    return tensor.to(node.spec.dtype)


def extensions_of(graph: Graph) -> set[tuple[str, str]]:
    """Name and version of every extension whose ops and pointwise functions a graph has."""
    found: set[tuple[str, str]] = set()
    waiting: list[Any] = list(graph.nodes())
    while waiting:
        value = waiting.pop()
        if isinstance(value, tuple):
            waiting += value
        elif isinstance(value, (Node, Stage, Attributes)):
            waiting += [getattr(value, item.name) for item in fields(value)]
            name = {Node: "op", Stage: "name"}.get(type(value))
            owner = registry.OWNERS.get(getattr(value, name)) if name is not None else None
            if owner is not None:
                found.add((owner.name, owner.version))
    return found


# Reading.


@cache
def _words() -> tuple[str, ...]:
    """The texts that attributes may be, those of extensions included."""
    return *WORDS, *(word for extension in extensions.loaded() for word in extension.words)


@cache
def _attribute_classes() -> dict[str, type]:
    """Every attribute class of the registry, by name, those inside others included."""
    found: dict[str, type] = {}
    waiting: list[Any] = [ir.NoAttributes, *(op.attributes for op in registry.OPS)]
    while waiting:
        kind = waiting.pop()
        if not (isinstance(kind, type) and is_dataclass(kind)):
            waiting.extend(typing.get_args(kind))
            continue
        if issubclass(kind, Attributes) and kind.__name__ not in found:
            found[kind.__name__] = kind
            waiting.extend(typing.get_type_hints(kind).values())
    return found


class _GraphReader(Reader):
    """Reads attributes as the class they name, and checks what only kernels would trip over."""

    def _read_tuple(self, parts: tuple[Any, ...], data: Any, where: str) -> tuple[Any, ...]:
        value = super()._read_tuple(parts, data, where)
        if parts[:1] == (Stage,) and read_before(value, 0):
            self.refuse(where, "stages that read values of their own chain", list(map(str, value)))
        return value

    def read_dataclass(self, kind: type, data: Any, where: str) -> Any:
        if not issubclass(kind, Attributes):
            value = super().read_dataclass(kind, data, where)
            return self._checked_stage(value, where) if kind is Stage else value
        if not isinstance(data, dict) or sorted(data) != ["has", "is"]:
            self.refuse(where, "attributes with their class", data)
        named = _attribute_classes().get(str(data["is"]))
        if named is None or not issubclass(named, kind):
            self.refuse(where, f"a class of {kind.__name__}", data["is"])
        value = super().read_dataclass(named, data["has"], f"{where}.{named.__name__}")
        for item in fields(value):
            own = getattr(value, item.name)
            self._check_plain(own, f"{where}.{item.name}")
            numbers = own if isinstance(own, tuple) else (own,)
            if item.name in POSITIVE and any(type(n) is int and n < 1 for n in numbers):
                self.refuse(f"{where}.{item.name}", "numbers of 1 or more", own)
        return value

    def _check_plain(self, value: Any, where: str) -> None:
        if isinstance(value, str) and value not in _words():
            self.refuse(where, f"one of {', '.join(map(repr, _words()))}", value)
        if isinstance(value, int) and not -LARGEST_EXTENT < value < LARGEST_EXTENT:
            self.refuse(where, f"a number below {LARGEST_EXTENT}", value)
        for item in value if isinstance(value, tuple) else ():
            self._check_plain(item, where)

    def _checked_stage(self, stage: Stage, where: str) -> Stage:
        if stage.name not in registry.BY_NAME and stage.name not in BY_NAME:
            self.refuse(where, "a pointwise function", stage.name)
        count = len(BY_NAME[stage.name].parameters)
        if len(stage.parameters) != count:
            self.refuse(f"{where}.parameters", f"{count} numbers", stage.parameters)
        if stage.channels is not None and not 0 <= stage.channels[0] < stage.channels[1]:
            self.refuse(where, "a range of channels", stage.channels)
        if stage.back is not None and (stage.back < 0 or stage.literal is not None):
            self.refuse(f"{where}.back", "how many stages ago", stage.back)
        return stage


def read_graph(
    data: Any,
    program: Program,
    tensors: Mapping[str, torch.Tensor],
    target: Target,
    source: Path | str,
) -> Graph:
    """The graph of one entry of graph.json, which `program` was made of, verified, to be lowered
    for `target`.

    Raises: ArtifactError.
    """
    where = f"graph.json of '{source}'"
    with _damaged(where):
        record: GraphRecord = _GraphReader(where).read(GraphRecord, data, "graph")
        counts = dict(program.summary)
        names = ("batch", "precision", "in_place", "arguments", "result", "results", "names")
        pairs = {name: (getattr(record, name), getattr(program, name)) for name in names}
        pairs["summary"] = [*record.summary], [(name, counts.get(name)) for name in CAPTURED]
        for name, (own, plans) in pairs.items():
            if own != plans:
                raise ArtifactError(
                    f"{where} is not that of its plan: {name}: expected {str(own)[:80]}, the plan "
                    f"says {str(plans)[:80]}"
                )
        graph = _build(record, tensors, target, where)
        graph.output_tree = program.interface.structure
        verify(graph)
    return graph


@contextmanager
def _damaged(where: str) -> Iterator[None]:
    """Turns whatever goes wrong into an ArtifactError: what infers shapes and lowers was written
    for graphs that capture made, here anything may come."""
    try:
        yield
    except ArtifactError:
        raise
    except Exception as error:
        raise ArtifactError(f"{where} is damaged: {type(error).__name__}: {error}") from error


def _build(
    record: GraphRecord, tensors: Mapping[str, torch.Tensor], target: Target, where: str
) -> Graph:
    def refuse(what: str) -> NoReturn:
        raise ArtifactError(f"{where} is damaged: {what}")

    count = len({node.name for node in record.nodes})
    if count != len(record.nodes) or count > MOST_NODES:
        refuse(f"{len(record.nodes)} nodes with equal names, or too many")
    goal = CompileTarget(target, record.dtype, record.force, record.forbid)
    graph = Graph(name=record.name, goal=goal)
    graph.counter = count
    for node in record.nodes:
        if node.op not in (INPUT, CONSTANT, OUTPUT) and node.op not in registry.BY_NAME:
            refuse(f"no op {node.op[:40]!r}")
        for spec in node.outputs:
            if problem := spec_problem(spec):
                refuse(f"'{node.name[:80]}' {problem}")
            if spec.dtype is torch.float64 and spec.rank:
                refuse(f"'{node.name[:80]}' is {spec}")
        graph.insert(Node(**{item.name: getattr(node, item.name) for item in fields(Node)}))
    for node in record.nodes:
        for slot, (source, index) in enumerate(node.inputs):
            if source not in graph or index < 0:
                refuse(f"'{node.name[:80]}' reads '{source[:80]}'")
            graph.net.add_edge(source, node.name, key=slot, index=index)
    for name, stored in record.constants:
        graph.tensors[name] = logical(stored, tensors, f"{where}: constant '{name[:80]}'")
    return graph


# Lowering again.


def lower_again(graph: Graph, program: Program, target: Target, source: Path | str) -> Plan:
    """The plan of a program's graph for a target; in the program's own configurations and ways of
    launching where the target is the program's.

    Raises: ArtifactError where the graph cannot be what the program was made of.
    """
    dtype = graph.goal.dtype if graph.goal else None
    options = Options(target, program.precision, dtype, program.in_place)
    if target.compiled_as == program.target:
        launch = {PROGRAMMATIC for image in program.images if image.programmatic}
        launch |= {BRANCHES} if program.streams else set()
        options = replace(options, choose=_recorded(program), launch=frozenset(launch))
    with _damaged(f"graph.json of '{source}'"):
        try:
            plan = lower(graph, graph, options, Ledger())
        except ConvloomError as error:
            problem = f"'{source}' cannot be planned for {target.name}: {error}"
            raise ArtifactError(problem) from error
    interface = program.interface
    counts: dict[str, Any] = {n: count for n, count in program.summary if n in CAPTURED}
    plan = replace(plan, structure=interface.structure, batch=program.batch, **counts)
    ports = (plan.inputs, plan.outputs), (program.inputs, program.outputs)
    for planned, stored in zip(*ports, strict=True):
        if [(p.name, p.spec) for p in planned] != [(p.name, p.spec) for p in stored]:
            raise ArtifactError(f"'{source}' is damaged: its graph is not that of its plan")
    return plan


def _recorded(program: Program) -> Chooser:
    """Gives each step the configuration it has in a program."""
    steps = iter(program.steps)

    def choose(op: Op, problem: Problem, target: Target) -> Choice:
        step, default = next(steps, None), heuristic(op, problem, target)
        if step is None or step.op != op.name:
            return default
        for name, size in step.tile.blocks:
            if not 0 <= size <= max(LARGEST_BLOCK, dict(default.config.blocks).get(name, 0)):
                raise ArtifactError(f"step {step.name[:80]}: {name} is {size:,}")
        tile = step.tile
        return Choice(Config(tile.blocks, tile.num_warps, tile.num_stages), step.chosen_by)

    return choose
