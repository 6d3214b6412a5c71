"""A fusion of heavy ops as one record: from it come its rules, and with them its labels, what
refuses it, the node that stands there in the end, and the tests that all rules have in common.

A new one is a `Fusion` in a file of `passes/fusions/`, beside the op in `kernels/fused/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from ...kernels.contract.op import Attributes
from ..graph.ir import Graph, Value
from .estimate import Fused
from .pattern import Call, Guard, Match, Rule


class Form(NamedTuple):
    """One way the parts of a fusion stand in a graph: the short name by which users force and
    forbid it, the equation of its rule, and the pattern."""

    label: str
    equation: str
    pattern: Call


Inputs = Callable[[Graph, Match], Sequence[Value]]


@dataclass(frozen=True)
class Fusion:
    """Several ops that `op` computes in their place.

    forms: the earlier is preferred where savings are equal. attributes: of the fused op. inputs:
    its own inputs. refusals: what the kernel cannot express; the first one with a reason speaks.
    results: by the name of a consumed node, which of the outputs stands for it. holds: the ops of
    roots whose own stages are among the attributes; those of any other root follow the fused op, as
    its epilogue. finish: the node with what else it needs.
    """

    op: str
    forms: tuple[Form, ...]
    attributes: Callable[[Graph, Match], Attributes]
    inputs: Inputs
    refusals: tuple[Guard, ...] = ()
    results: Callable[[Graph, Match], Mapping[str, int]] = lambda graph, found: {found.root.name: 0}
    holds: tuple[str, ...] = ()
    finish: Callable[[Graph, Match, Fused], Fused] = lambda graph, found, fused: fused

    @cached_property
    def rules(self) -> tuple[Rule, ...]:
        """One for each form."""
        return tuple(
            Rule(equation, pattern, guard=self.refusal, label=label, build=self.build)
            for label, equation, pattern in self.forms
        )

    def refusal(self, graph: Graph, found: Match) -> str | None:
        """The first reason against a match, or None."""
        reasons = (refusal(graph, found) for refusal in self.refusals)
        return next((reason for reason in reasons if reason is not None), None)

    def build(self, graph: Graph, found: Match) -> Fused:
        """The node that is to stand for a match."""
        root = found.root
        follows = root.op not in self.holds
        made = self.attributes(graph, found), tuple(self.inputs(graph, found))
        after = (root.epilogue, graph.operands(root)) if follows else ()
        fused = Fused(self.op, *made, self.results(graph, found), *after)
        return self.finish(graph, found, fused)


def variables(*names: str, stages: Sequence[str] = ()) -> Inputs:
    """What these variables of the pattern stand for, then what the stages of these nodes read; what
    follows the root is no input."""

    def inputs(graph: Graph, found: Match) -> list[Value]:
        values = [found.values[name] for name in names]
        for node in found.those(*stages):
            values += graph.prologue_operands(node)
            values += graph.operands(node) if node is not found.root else ()
        return values

    return inputs


def links(*names: str) -> Inputs:
    """x, then for each of the nodes that are there what it multiplies by and what its stages read:
    the inputs of a chain (`kernels/fused/links.py`). x is the pattern's, or the first node's."""

    def inputs(graph: Graph, found: Match) -> list[Value]:
        nodes = found.those(*names)
        values = [found.values.get("x") or graph.own_inputs(nodes[0])[0]]
        for node in nodes:
            values += (*graph.own_inputs(node)[1:], *graph.operands(node))
        return values

    return inputs
