"""What a node, or the node that would stand for several, costs on the goal's machine.

Fusions are decided before layouts and dtypes are chosen, so the kernels are modelled as they will
be: images NHWC, everything in the goal's dtype, every tensor dense in a buffer of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from ... import settings
from ...kernels import registry
from ...kernels.contract import cost_model, targets
from ...kernels.contract.epilogue import Epilogue
from ...kernels.contract.op import Attributes, Problem
from ...kernels.contract.spec import Layout, Operand, TensorSpec
from ...kernels.contract.targets import Target
from ..graph.ir import Graph, Node, Value

ASSUMED = "cuda:sm_90"
"""The machine that fusions are made for where the target is not a GPU."""
MODELLED = "modelled"
REMEMBERED = 1 << 14


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
    specs = _specs(graph, own), _specs(graph, operands)
    made = problem(graph, node.op, node.attributes, node.epilogue, *specs)
    placed = (Operand.dense(_as_computed(graph, spec)) for spec in _specs(graph, before))
    return replace(made, prologue=node.prologue, prologue_operands=tuple(placed))


def fused_problem(graph: Graph, fused: Fused) -> Problem:
    """A node that is not there yet, as its kernel would see it."""
    specs = _specs(graph, fused.inputs), _specs(graph, fused.operands)
    return problem(graph, fused.op, fused.attributes, fused.epilogue, *specs)


def _specs(graph: Graph, values: Sequence[Value]) -> tuple[TensorSpec, ...]:
    return tuple(graph.spec(value) for value in values)


def problem(
    graph: Graph, op: str, attributes: Attributes, epilogue: Epilogue,
    inputs: Sequence[TensorSpec], operands: Sequence[TensorSpec], chosen: bool = False,
) -> Problem:  # fmt: skip
    """An application of an op to tensors of the given specs, as its kernel would see it. chosen:
    layouts and dtypes are chosen already."""

    def dense(specs: Sequence[TensorSpec]) -> tuple[Operand, ...]:
        computed = specs if chosen else [_as_computed(graph, spec) for spec in specs]
        return tuple(map(Operand.dense, computed))

    own = dense(inputs)
    outputs = registry.get(op).infer(attributes, tuple(operand.spec for operand in own))
    precision = graph.goal.precision if graph.goal else "ieee"
    return Problem(
        op, attributes, own, dense(outputs), epilogue, dense(operands), precision=precision
    )


def _as_computed(graph: Graph, spec: TensorSpec) -> TensorSpec:
    layout = Layout.NHWC if spec.rank == 4 else spec.layout
    return spec.with_(dtype=dtype_of(graph, spec), layout=layout)


def illegal_reason(graph: Graph, fused: Fused) -> str | None:
    """Why the fused kernel's default configuration cannot run on the machine, or None."""
    asked, target = fused_problem(graph, fused), target_of(graph)
    op = registry.get(fused.op)
    tile = op.default(asked, target)
    return op.legal(asked, tile, target) or op.crowded(asked, tile, target)


def times_us(graph: Graph, alternatives: Sequence[Sequence[Problem]]) -> tuple[str, list[float]]:
    """The time of each alternative, a list of kernels, and how they are known: all by records where
    there are records of all of them, else all "modelled"."""
    lookup = graph.goal.timing_lookup if graph.goal else None
    if lookup is not None:
        # All are asked for, also after a miss: what is not known can be timed later.
        found = [[lookup(problem) for problem in each] for each in alternatives]
        statuses = {timed.status if timed else None for each in found for timed in each}
        if len(statuses) == 1 and None not in statuses:
            totals = [sum(timed.time_us for timed in each if timed) for each in found]
            return str(statuses.pop()), totals
    totals = [sum(problem_time_us(graph, problem) for problem in each) for each in alternatives]
    return MODELLED, totals


def problem_time_us(graph: Graph, asked: Problem) -> float:
    """Modelled time of a problem's kernels."""
    return _modelled_us(asked, target_of(graph), settings.core(), settings.launch())


@lru_cache(REMEMBERED)
def _modelled_us(asked: Problem, target: Target, core: str, launch: frozenset[str]) -> float:
    """Networks repeat their layers, and every alternative is asked for again in every round."""
    return cost_model.problem_us(registry.get(asked.op), asked, target)


@dataclass(frozen=True)
class Fused:
    """The one node that is to stand for a match.

    inputs: the op's own inputs; operands: the tensors its epilogue reads; results: which of its
    outputs stands for each consumed node whose result is still needed; sums: by position among
    inputs and operands, constants that are to be added to the constant there.
    """

    op: str
    attributes: Attributes
    inputs: tuple[Value, ...]
    results: Mapping[str, int]
    epilogue: Epilogue = ()
    operands: tuple[Value, ...] = ()
    sums: Mapping[int, tuple[Value, ...]] = field(default_factory=dict)
