"""What a node, or the node that would stand for several, costs on the goal's machine.

Fusions are decided before layouts and dtypes are chosen, so the kernels are modelled as they will
be: images NHWC, everything in the goal's dtype, every tensor dense in a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from ..kernels import machine, registry, targets
from ..kernels.epilogue import Epilogue
from ..kernels.op import Attributes, Problem
from ..kernels.spec import Layout, Operand, TensorSpec
from ..kernels.targets import Target
from .ir import Graph, Node, Value

if TYPE_CHECKING:
    from .pattern import Fused

ASSUMED = "cuda:sm_90"
"""The machine that fusions are made for where the target is no GPU."""


class Application(Protocol):
    """What a node and a node to be have in common."""

    @property
    def op(self) -> str: ...
    @property
    def attributes(self) -> Attributes: ...
    @property
    def epilogue(self) -> Epilogue: ...


def target_of(graph: Graph) -> Target:
    """The GPU that kernels are modelled on."""
    goal = graph.goal
    return goal.target if goal and goal.target.is_gpu else targets.parse(ASSUMED)


def dtype_of(graph: Graph, spec: TensorSpec) -> torch.dtype:
    """The dtype a tensor of the captured graph is computed in."""
    goal = graph.goal
    wanted = goal.dtype if goal and spec.dtype.is_floating_point else None
    return wanted or spec.dtype


def problem_of(graph: Graph, node: Node) -> Problem:
    """A node as its kernel will see it."""
    own, operands = graph.own_inputs(node), graph.operands(node)
    before = graph.prologue_operands(node)
    made = problem(graph, node, _specs(graph, own), _specs(graph, operands))
    placed = (Operand.dense(_as_computed(graph, spec)) for spec in _specs(graph, before))
    return replace(made, prologue=node.prologue, prologue_operands=tuple(placed))


def fused_problem(graph: Graph, fused: Fused) -> Problem:
    """A node that is not there yet, as its kernel would see it."""
    return problem(graph, fused, _specs(graph, fused.inputs), _specs(graph, fused.operands))


def _specs(graph: Graph, values: Sequence[Value]) -> tuple[TensorSpec, ...]:
    return tuple(graph.spec(value) for value in values)


def problem(
    graph: Graph, made: Application, inputs: Sequence[TensorSpec], operands: Sequence[TensorSpec]
) -> Problem:
    """An application of an op to tensors of the given specs, as its kernel would see it."""
    specs = tuple(_as_computed(graph, spec) for spec in inputs)
    inferred = registry.get(made.op).infer(made.attributes, specs)
    outputs = (_as_computed(graph, spec) for spec in inferred)
    others = (_as_computed(graph, spec) for spec in operands)
    return Problem(
        made.op,
        made.attributes,
        tuple(map(Operand.dense, specs)),
        tuple(map(Operand.dense, outputs)),
        made.epilogue,
        tuple(map(Operand.dense, others)),
    )


def _as_computed(graph: Graph, spec: TensorSpec) -> TensorSpec:
    layout = Layout.NHWC if spec.rank == 4 else spec.layout
    return spec.with_(dtype=dtype_of(graph, spec), layout=layout)


def misfit(graph: Graph, fused: Fused) -> str | None:
    """Why the fused kernel's default configuration cannot run on the machine, or None."""
    asked, target = fused_problem(graph, fused), target_of(graph)
    op = registry.get(fused.op)
    return op.legal(asked, op.default(asked, target), target)


def time_us(graph: Graph, node: Node) -> float:
    """Modelled time of a node's kernels; views cost nothing."""
    if not node.is_compute:
        return 0.0
    return problem_time_us(graph, problem_of(graph, node))


def fused_time_us(graph: Graph, fused: Fused) -> float:
    """Modelled time of a node that is not there yet."""
    return problem_time_us(graph, fused_problem(graph, fused))


def problem_time_us(graph: Graph, asked: Problem) -> float:
    """Modelled time of a problem's kernels."""
    return machine.modelled_time_us(registry.get(asked.op), asked, target_of(graph))
