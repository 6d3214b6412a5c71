"""Adds up parallel convolutions of one tensor: a sum of linear maps is one linear map.

    conv(x, w3x3) + conv(x, w1x1) + batch_norm(x) => conv(x, w)

Networks are trained in this form and deployed in the other (ACNet, Ding et al. 2019; RepVGG, Ding
et al. 2021; MobileOne, Vasu et al. 2023). The filters are added up in fp64, each at its place in
the largest; a normalisation is the 1x1 filter that multiplies each channel by its scale. What else
is added stays a sum. Of finite images nothing changes but the rounding; an infinite pixel, which
branches may make Inf − Inf of, is multiplied once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ...kernels.contract.epilogue import Stage
from ...kernels.contract.op import Problem
from ...kernels.contract.spec import TensorSpec
from ...kernels.movement.pointwise import Pointwise
from ...kernels.tile.conv_geometry import Conv2d
from ..fusion import estimate, partition
from ..fusion.partition import Proposal
from ..graph.ir import Graph, Node, Value
from ..graph.ledger import Ledger
from .fold_batch_norm import scale_and_shift

LABEL = "parallel-convs"
RULE = "conv(x, w1) + conv(x, w2) + batch_norm(x) => conv(x, w1 + w2 + scale)"


def merge_parallel_convolutions(graph: Graph, ledger: Ledger) -> Graph:
    """Makes one convolution of the convolutions and normalisations of one tensor that are added up,
    where that saves time on the goal's machine."""
    return partition.choose(graph, (), ledger, (propose_parallel,))


@dataclass(frozen=True)
class _Span:
    """Where the taps of a filter lie along one dimension, counted from the output pixel's place in
    the input: `first`, `first + step`, ... `last`; the step of a single tap is 0."""

    first: int
    last: int
    step: int

    @property
    def taps(self) -> int:
        return (self.last - self.first) // max(1, self.step) + 1

    def holds(self, other: _Span) -> bool:
        """Whether every tap of the other is one of these."""
        inside = self.first <= other.first and other.last <= self.last
        on_taps = (other.first - self.first) % max(1, self.step) == 0
        return inside and on_taps and other.step in (0, self.step)


@dataclass(frozen=True)
class _Branch:
    """One addend: a convolution, or a normalisation as a 1x1 convolution of its own input."""

    node: Node
    x: Value
    rows: _Span
    columns: _Span


def propose_parallel(graph: Graph, ledger: Ledger) -> list[Proposal]:
    """For every sum and tensor, the branches whose taps are among those of the largest filter.

    Refused where a branch is more than a constant convolution and its bias, where groups or strides
    differ, and where taps do: pixels that no branch reads, an Inf among them, would be multiplied
    by zero.
    """
    sums: dict[tuple[str, Value], list[_Branch]] = {}
    for node in graph.nodes():
        if node.op in ("conv2d", "batch_norm") and (total := _sum_of(graph, node)) is not None:
            sums.setdefault((total, graph.own_inputs(node)[0]), []).append(_branch(graph, node))
    proposals = []
    for branches in sums.values():
        convs = [branch for branch in branches if branch.node.op == "conv2d"]
        if not convs or len(branches) < 2:
            continue
        largest = max(convs, key=lambda branch: branch.rows.taps * branch.columns.taps)
        merged = [largest]
        for branch in branches:
            reason = _why_not(graph, branch, largest)
            if reason is not None:
                ledger.refuse(RULE, [branch.node], reason)
            elif branch is not largest:
                merged.append(branch)
        if len(merged) > 1 and _why_not(graph, largest, largest) is None:
            proposals.append(_propose(graph, merged))
    return proposals


def _reader(graph: Graph, node: Node) -> Node | None:
    """The addition that alone reads a node's result, of the same shape."""
    uses = graph.uses(Value(node.name))
    if len(uses) != 1:
        return None
    reader = graph.node(uses[0][0])
    is_sum = _is_addition(reader) and reader.spec.shape == node.spec.shape
    return reader if is_sum else None


def _is_addition(node: Node) -> bool:
    return node.op == "add" and node.attributes == Pointwise() and not node.epilogue


def _sum_of(graph: Graph, node: Node) -> str | None:
    """The name of the last addition of the sum that a node's result is an addend of."""
    total = None
    while (reader := _reader(graph, node)) is not None:
        total, node = reader.name, reader
    return total


def _branch(graph: Graph, node: Node) -> _Branch:
    x, *others = graph.own_inputs(node)
    if node.op == "batch_norm":
        return _Branch(node, x, _Span(0, 0, 0), _Span(0, 0, 0))
    r, s = graph.spec(others[0]).shape[2:]
    conv = node.attributes.expect(Conv2d)
    (top, _, left, _), (dh, dw) = conv.padding, conv.dilation
    return _Branch(node, x, _span(r, top, dh), _span(s, left, dw))


def _span(taps: int, before: int, step: int) -> _Span:
    return _Span(-before, (taps - 1) * step - before, step if taps > 1 else 0)


def _why_not(graph: Graph, branch: _Branch, largest: _Branch) -> str | None:
    """Why a branch cannot be added to the filter of the largest one, or None."""
    node, conv = branch.node, largest.node.attributes.expect(Conv2d)
    if node.op == "batch_norm":
        if node.epilogue or scale_and_shift(graph, node) is None:
            return f"{node.name} does more than scale and shift each channel by constants"
        if conv.stride != (1, 1):
            return f"{node.name} keeps every pixel, {largest.node.name} has stride {conv.stride}"
    else:
        if not _is_linear(graph, node):
            return f"{node.name} does more than convolve with constants and add one per channel"
        for name in ("groups", "stride"):
            mine, theirs = getattr(node.attributes, name), getattr(conv, name)
            if mine != theirs:
                return f"{node.name} has {name} {mine}, {largest.node.name} has {theirs}"
    if not largest.rows.holds(branch.rows) or not largest.columns.holds(branch.columns):
        return f"{node.name} reads pixels that {largest.node.name} does not read"
    return None


def _is_linear(graph: Graph, node: Node) -> bool:
    """Whether a convolution has a constant weight, and at most a bias per channel behind it."""
    if node.prologue or node.epilogue not in ((), (Stage("add"),)):
        return False
    constants = (graph.own_inputs(node)[1], *graph.operands(node))
    biases = (graph.spec(value) for value in graph.operands(node))
    return all(map(graph.is_constant, constants)) and all(
        spec.rank >= 3 and spec.numel == spec.shape[-3] == node.spec.shape[1] for spec in biases
    )


def _propose(graph: Graph, branches: Sequence[_Branch]) -> Proposal:
    nodes = tuple(branch.node for branch in branches)
    make = partial(_make, [node.name for node in nodes])
    return Proposal(RULE, LABEL, nodes, make, partial(_together, graph, branches))


def _together(graph: Graph, branches: Sequence[_Branch]) -> Problem:
    """The largest convolution, with a bias."""
    x, weight = (graph.spec(value) for value in graph.own_inputs(branches[0].node))
    bias = TensorSpec((weight.shape[0], 1, 1), x.dtype)
    largest, stages = branches[0].node, (Stage("add"),)
    return estimate.problem(graph, "conv2d", largest.attributes, stages, (x, weight), (bias,))


def _make(names: Sequence[str], graph: Graph, ledger: Ledger) -> bool:
    """Adds the other branches to the first, the largest, and writes their sum anew: what the
    additions in between have computed is computed no more."""
    branches = [_branch(graph, graph.node(name)) for name in names]
    weight, bias = _weight_and_bias(graph, branches)
    merged = [branch.node for branch in branches]
    largest = merged[0]
    total = _sum_of(graph, largest)
    assert total is not None
    additions, addends = _addends(graph, graph.node(total))
    dtype = graph.spec(graph.own_inputs(largest)[1]).dtype
    inputs = (
        branches[0].x,
        graph.add_constant(weight, "parallel_weight", dtype),
        graph.add_constant(bias.reshape(-1, 1, 1), "parallel_bias", dtype),
    )
    nodes = (*merged, *additions)
    conv = graph.add(
        "conv2d", inputs, largest.attributes, epilogue=(Stage("add"),), like=nodes, rule=RULE
    )
    value = conv
    for addend in addends:
        if addend.node not in names:
            value = graph.add("add", (value, addend), Pointwise(), like=additions)
    graph.redirect(Value(total), value)
    graph.remove(node.name for node in reversed(nodes))
    saved = (len(merged) - 1) * (graph.spec(branches[0].x).size_bytes + 3 * largest.spec.size_bytes)
    ledger.accept(RULE, nodes, conv.node, saved)
    return True


def _addends(graph: Graph, total: Node) -> tuple[list[Node], list[Value]]:
    """The additions that make up a sum, the last first, and what they add."""
    additions, addends = [total], []
    for value in graph.own_inputs(total):
        node = graph.node(value.node)
        inner = _is_addition(node) and _reader(graph, node) is not None
        more, values = _addends(graph, node) if inner else ([], [value])
        additions += more
        addends += values
    return additions, addends


def _weight_and_bias(
    graph: Graph, branches: Sequence[_Branch]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, C/G, R, S) and (K,) of the first branch with the others, in fp64."""
    largest = branches[0]
    weight = torch.zeros(graph.spec(graph.own_inputs(largest.node)[1]).shape, dtype=torch.float64)
    bias = torch.zeros(weight.shape[0], dtype=torch.float64)
    for branch in branches:
        top = (branch.rows.first - largest.rows.first) // max(1, largest.rows.step)
        left = (branch.columns.first - largest.columns.first) // max(1, largest.columns.step)
        if branch.node.op == "batch_norm":
            both = scale_and_shift(graph, branch.node)
            assert both is not None
            channels = torch.arange(weight.shape[0])
            weight[channels, channels % weight.shape[1], top, left] += both[0]
            bias += both[1]
            continue
        part = graph.constant(graph.own_inputs(branch.node)[1]).double()
        weight[:, :, top : top + part.shape[2], left : left + part.shape[3]] += part
        for value in graph.operands(branch.node):
            bias += graph.constant(value).double().reshape(-1)
    return weight, bias
