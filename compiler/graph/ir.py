"""The dataflow graph: what is computed, from what, and which module asked for it.

A `Graph` wraps a networkx `MultiDiGraph`. A node is one application of an op of the kernel
registry, or one of four kinds that compute nothing: "input", "constant", "output" and, under
fallback="torch", "torch". An edge carries which output of its source feeds which input slot of its
target. The `epilogue` of a node is applied to its first output; the tensors that the epilogue reads
are the last input slots, in stage order.

Laws (`verify`): edges fill slots 0..n-1 of every node; specs are what the op infers; no cycles;
every constant has its tensor; there is exactly one output node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from typing import Any, NamedTuple

import networkx as nx
import torch

from ...errors import GraphError
from ...kernels import registry
from ...kernels.contract.epilogue import Epilogue, operand_count
from ...kernels.contract.op import Attributes, Op, Problem
from ...kernels.contract.spec import TensorSpec
from ...kernels.contract.targets import Target

INPUT, CONSTANT, OUTPUT, TORCH = "input", "constant", "output", "torch"
SPECIAL = (INPUT, CONSTANT, OUTPUT, TORCH)


@dataclass(frozen=True)
class Value:
    """One output of one node."""

    node: str
    index: int = 0

    def __str__(self) -> str:
        return f"%{self.node}" if self.index == 0 else f"%{self.node}.{self.index}"


@dataclass(frozen=True)
class Node:
    """One op application.

    module_path: the submodule that asked for it (`layer1.0.conv2`); origins: names of the captured
    nodes it stands for, itself included; rules: the rewrites that made it.
    """

    name: str
    op: str
    attributes: Attributes
    outputs: tuple[TensorSpec, ...]
    epilogue: Epilogue = ()
    prologue: Epilogue = ()
    module_path: str = ""
    origins: tuple[str, ...] = ()
    rules: tuple[str, ...] = ()

    @property
    def spec(self) -> TensorSpec:
        """The first output's spec."""
        return self.outputs[0]

    @property
    def is_compute(self) -> bool:
        return self.op not in SPECIAL

    @property
    def definition(self) -> Op:
        """The op of the registry."""
        return registry.get(self.op)


@dataclass(frozen=True)
class NoAttributes(Attributes):
    """For nodes that compute nothing."""


@dataclass(frozen=True)
class CompileTarget:
    """The machine the graph will run on and the dtype it will compute in (None: as captured).

    force, forbid: fusions the user insists on or declines (`overrides.py`). precision: of fp32
    products. timing_lookup: the time of a problem by tuning records, None where nothing is
    looked up.
    """

    target: Target
    dtype: torch.dtype | None = None
    force: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()
    precision: str = "ieee"
    timing_lookup: Callable[[Problem], Timing | None] | None = None


@dataclass
class Graph:
    """A dataflow graph and the tensors of its constants.

    `output_tree` rebuilds the module's own output structure from the list of output tensors; `goal`
    is what the graph is compiled for, which guards of machine-dependent fusions ask about.
    """

    net: nx.MultiDiGraph = field(default_factory=nx.MultiDiGraph)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    output_tree: Any = None
    goal: CompileTarget | None = None
    name: str = "graph"
    counter: int = 0

    # Looking.

    def __contains__(self, name: str) -> bool:
        return name in self.net

    def node(self, name: str) -> Node:
        """The node of that name."""
        found: Node = self.net.nodes[name]["node"]
        return found

    def nodes(self) -> list[Node]:
        """All nodes in an order where sources come first; ties keep the order of insertion."""
        # As nx.lexicographical_topological_sort, on the dictionaries behind the views of networkx:
        # every pass asks several times.
        nodes, readers = self.net._node, self.net._succ
        position = {name: at for at, name in enumerate(nodes)}
        waiting = {name: len(sources) for name, sources in self.net._pred.items()}
        ready = [at for name, at in position.items() if not waiting[name]]
        names, order = list(nodes), []
        while ready:
            name = names[heappop(ready)]
            order.append(nodes[name]["node"])
            for reader in readers[name]:
                waiting[reader] -= 1
                if not waiting[reader]:
                    heappush(ready, position[reader])
        if len(order) < len(nodes):
            raise GraphError(f"the graph has a cycle: {nx.find_cycle(self.net)}")
        return order

    def inputs(self, name: str) -> tuple[Value, ...]:
        """The values that feed a node, by slot."""
        slots = {
            slot: Value(source, data["index"])
            for source, edges in self.net._pred[name].items()
            for slot, data in edges.items()
        }
        return tuple(slots[slot] for slot in sorted(slots))

    def slots(self, name: str) -> list[int]:
        """The slots of a node that are fed, in order; a slot that is fed twice is there twice."""
        return sorted(slot for edges in self.net._pred[name].values() for slot in edges)

    def uses(self, value: Value) -> list[tuple[str, int]]:
        """(node, slot) pairs that read the value; the output node counts as a reader."""
        return [
            (target, slot)
            for target, edges in self.net._succ[value.node].items()
            for slot, data in edges.items()
            if data["index"] == value.index
        ]

    def spec(self, value: Value) -> TensorSpec:
        """The spec of a value."""
        return self.node(value.node).outputs[value.index]

    def is_constant(self, value: Value) -> bool:
        return self.node(value.node).op == CONSTANT

    def constant(self, value: Value) -> torch.Tensor:
        """The tensor behind a constant value."""
        return self.tensors[value.node]

    def graph_inputs(self) -> list[Node]:
        """The input nodes, in the order of the module's arguments."""
        return [self.node(name) for name in self.net.nodes if self.node(name).op == INPUT]

    def outputs(self) -> tuple[Value, ...]:
        """The values the executable returns."""
        return self.inputs(OUTPUT)

    def compute_nodes(self) -> list[Node]:
        """Nodes that become kernels (or views), sources first."""
        return [node for node in self.nodes() if node.op not in (INPUT, CONSTANT, OUTPUT)]

    def nodes_reachable_from_inputs(self) -> set[str]:
        """The names of the nodes that depend on an input; the others follow from constants."""
        inputs = (node.name for node in self.graph_inputs())
        return set().union(*(nx.descendants(self.net, name) for name in inputs))

    # Changing.

    def copy(self) -> Graph:
        """A graph that can be changed without changing this one; tensors are shared."""
        return replace(self, net=self.net.copy(), tensors=dict(self.tensors))

    def fresh_name(self, stem: str) -> str:
        """A name no node has."""
        self.counter += 1
        while (name := f"{stem}_{self.counter}") in self.net:
            self.counter += 1
        return name

    def insert(self, node: Node, inputs: Sequence[Value] = ()) -> Value:
        """Adds a node and its incoming edges; returns its first output."""
        if node.name in self.net:
            raise GraphError(f"there is already a node named {node.name}")
        self.net.add_node(node.name, node=node)
        for slot, value in enumerate(inputs):
            self.net.add_edge(value.node, node.name, key=slot, index=value.index)
        return Value(node.name)

    def add(
        self,
        op: str,
        inputs: Sequence[Value],
        attributes: Attributes | None = None,
        *,
        epilogue: Epilogue = (),
        like: Iterable[Node] = (),
        rule: str = "",
        name: str | None = None,
    ) -> Value:
        """Adds an application of an op; specs are inferred.

        like: the nodes it replaces, whose module path and origins it inherits (the path of the
        first); rule: the rewrite that made it.
        """
        definition = registry.get(op)
        attributes = definition.attributes() if attributes is None else attributes
        own = len(inputs) - operand_count(epilogue)
        specs = tuple(self.spec(value) for value in inputs)
        outputs = definition.infer(attributes, specs[:own])
        replaced = list(like)
        origins = tuple(dict.fromkeys(origin for node in replaced for origin in node.origins))
        rules = tuple(dict.fromkeys(r for node in replaced for r in node.rules))
        name = name or self.fresh_name(op)
        node = Node(
            name=name,
            op=op,
            attributes=attributes,
            outputs=outputs,
            epilogue=epilogue,
            module_path=replaced[0].module_path if replaced else "",
            origins=origins,
            rules=(*rules, rule) if rule else rules,
        )
        return self.insert(node, inputs)

    def add_constant(
        self, tensor: torch.Tensor, stem: str, dtype: torch.dtype, batch: int | None = None
    ) -> Value:
        """Adds a constant. `dtype` is the dtype its readers see; the tensor may be more precise.

        batch: its rows are the samples of the largest batch, of which others have the first.
        """
        name = self.fresh_name(stem)
        self.tensors[name] = tensor
        spec = TensorSpec(tuple(tensor.shape), dtype, batch=batch)
        node = Node(name, CONSTANT, NoAttributes(), (spec,), module_path=stem)
        return self.insert(node)

    def update(self, name: str, **changes: Any) -> None:
        """Replaces fields of a node."""
        self.net.nodes[name]["node"] = replace(self.node(name), **changes)

    def redirect(self, old: Value, new: Value) -> None:
        """Makes every reader of `old` read `new`."""
        for target, slot in self.uses(old):
            self.net.remove_edge(old.node, target, key=slot)
            self.net.add_edge(new.node, target, key=slot, index=new.index)

    def set_inputs(self, name: str, inputs: Sequence[Value]) -> None:
        """Replaces all incoming edges of a node."""
        self.net.remove_edges_from(list(self.net.in_edges(name, keys=True)))
        for slot, value in enumerate(inputs):
            self.net.add_edge(value.node, name, key=slot, index=value.index)

    def remove(self, names: Iterable[str]) -> None:
        """Removes nodes, and the tensors of constants among them."""
        for name in names:
            self.net.remove_node(name)
            self.tensors.pop(name, None)

    def remove_unread_constants(self) -> None:
        """Removes the constants that no node reads."""
        constants = [node.name for node in self.nodes() if node.op == CONSTANT]
        self.remove(name for name in constants if not self.net.out_degree(name))

    def own_inputs(self, node: Node) -> tuple[Value, ...]:
        """The inputs of the op itself, without those of its epilogue and prologue."""
        values = self.inputs(node.name)
        extra = operand_count(node.epilogue) + operand_count(node.prologue)
        return values[: len(values) - extra]

    def operands(self, node: Node) -> tuple[Value, ...]:
        """The tensors the node's epilogue reads."""
        values = self.inputs(node.name)
        stop = len(values) - operand_count(node.prologue)
        return values[stop - operand_count(node.epilogue) : stop]

    def stage_operands(self, node: Node) -> list[tuple[Value, ...]]:
        """The tensors that each stage of the node's epilogue reads."""
        values = iter(self.operands(node))
        return [tuple(next(values) for _ in range(stage.operands)) for stage in node.epilogue]

    def prologue_operands(self, node: Node) -> tuple[Value, ...]:
        """The tensors the node's prologue reads."""
        values = self.inputs(node.name)
        return values[len(values) - operand_count(node.prologue) :]


class Timing(NamedTuple):
    """A time, and how it is known: "measured" on a device, or "modelled"."""

    time_us: float
    status: str
