"""What a node, or the node that would stand for several, costs on the goal's machine.

Fusions are decided before layouts and dtypes are chosen, so the kernels are modelled as they will
be: images NHWC, everything in the goal's dtype, every tensor dense in a buffer of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..kernels import machine, registry, targets
from ..kernels.op import Problem
from ..kernels.spec import Layout, Operand, TensorSpec
from ..kernels.targets import Target
from .ir import Graph, Node, Value

if TYPE_CHECKING:
    from .pattern import Fused

ASSUMED = "cuda:sm_90"
"""The machine that fusions are made for where the target is no GPU."""


def target_of(graph: Graph) -> Target:
    """The GPU that kernels are modelled on."""
    goal = graph.goal
    return goal.target if goal and goal.target.is_gpu else targets.parse(ASSUMED)


def dtype_of(graph: Graph, spec: TensorSpec) -> torch.dtype:
    """The dtype a tensor of the captured graph is computed in."""
    goal = graph.goal
    return (goal.dtype if goal else None) or spec.dtype


def problem_of(graph: Graph, node: Node) -> Problem:
    """A node as its kernel will see it."""
    return _problem(
        graph,
        node.op,
        node,
        graph.own_inputs(node),
        graph.operands(node),
        graph.prologue_operands(node),
    )


def fused_problem(graph: Graph, fused: Fused) -> Problem:
    """A node that is not there yet, as its kernel would see it."""
    return _problem(graph, fused.op, fused, fused.inputs, fused.operands, ())


def _problem(
    graph: Graph,
    op: str,
    made: Node | Fused,
    inputs: tuple[Value, ...],
    operands: tuple[Value, ...],
    before: tuple[Value, ...],
) -> Problem:
    specs = tuple(_as_computed(graph, graph.spec(value)) for value in inputs)
    inferred = registry.get(op).infer(made.attributes, specs)
    outputs = tuple(_as_computed(graph, spec) for spec in inferred)
    return Problem(
        op,
        made.attributes,
        tuple(map(Operand.dense, specs)),
        tuple(map(Operand.dense, outputs)),
        made.epilogue,
        tuple(Operand.dense(_as_computed(graph, graph.spec(value))) for value in operands),
        getattr(made, "prologue", ()),
        tuple(Operand.dense(_as_computed(graph, graph.spec(value))) for value in before),
    )


def _as_computed(graph: Graph, spec: TensorSpec) -> TensorSpec:
    layout = Layout.NHWC if spec.rank == 4 else Layout.DENSE
    return spec.with_(dtype=dtype_of(graph, spec), layout=layout)


def misfit(graph: Graph, fused: Fused) -> str | None:
    """Why the fused kernel's default configuration cannot run on the machine, or None."""
    problem, target = fused_problem(graph, fused), target_of(graph)
    op = registry.get(fused.op)
    return op.legal(problem, op.default(problem, target), target)


def time_us(graph: Graph, node: Node) -> float:
    """Modelled time of a node's kernels; views cost nothing."""
    if not node.is_compute:
        return 0.0
    return machine.modelled_time_us(node.definition, problem_of(graph, node), target_of(graph))


def fused_time_us(graph: Graph, fused: Fused) -> float:
    """Modelled time of a node that is not there yet."""
    return machine.modelled_time_us(
        registry.get(fused.op), fused_problem(graph, fused), target_of(graph)
    )
