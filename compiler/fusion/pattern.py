"""Patterns written as the expressions they match, and the rules made of them.

    Call("relu", Call(HEAVY, name="anchor"))

matches relu of a convolution or linear layer. That inner nodes have a single reader is the
matcher's duty: a match whose inner result is read elsewhere, or returned, is a refusal with that
reason.

A `Rule` is one fusion: an equation as its name, a pattern, a guard that returns a reason when it
refuses, and a rewrite; `tests/rules` has its examples. A rule that puts one node
in the place of several heavy ones gives a `build` instead of a rewrite: whether the new kernel fits
the machine and pays is then asked for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import networkx as nx
import torch

from ...errors import GraphError
from ...kernels.contract.op import Attributes
from ...kernels.movement.rearrangement import Reshape
from ..graph.ir import TORCH, Graph, Node, Value
from ..graph.ledger import Ledger
from ..graph.verify import verify_node
from . import estimate, overrides
from .estimate import Fused


@dataclass(frozen=True)
class Var:
    """Matches any value; the same name twice must be the same value."""

    name: str


@dataclass(frozen=True)
class Constant:
    """Matches a constant value."""

    name: str


@dataclass(frozen=True, init=False)
class Call:
    """Matches an application of one of `ops` (aten overloads for torch calls).

    arguments: patterns of the op's own inputs, or None for any. first: what the first of them must
    match, whatever and however many the others are. commutes: a two-argument call also
    matches with its arguments swapped. plain: the node must carry no epilogue or prologue.
    kept: the rewrite still provides the node's result, so that others may read it. operand: what
    one of the tensors that the node's epilogue reads must match. where: what else makes the node
    one of this kind; unlike a guard, a failing `where` is no refusal.
    """

    ops: tuple[str, ...]
    arguments: tuple[Any, ...] | None
    first: Any
    name: str
    commutes: bool
    plain: bool
    kept: bool
    operand: Any
    where: Callable[[Graph, Node], bool] | None

    def __init__(
        self,
        ops: str | tuple[str, ...],
        *arguments: Any,
        first: Any = None,
        name: str = "",
        commutes: bool = False,
        plain: bool = False,
        kept: bool = False,
        operand: Any = None,
        where: Callable[[Graph, Node], bool] | None = None,
    ) -> None:
        vars(self).update(
            ops=(ops,) if isinstance(ops, str) else ops,
            arguments=arguments or None,
            first=first, name=name, commutes=commutes, plain=plain, kept=kept, operand=operand,
            where=where,
        )  # fmt: skip


@dataclass
class Match:
    """What the names of a pattern stand for: nodes for calls, values for variables.

    inner: nodes the rewrite consumes besides the root, readers first; kept: those among them whose
    results it still provides; operands: where the pattern matched an epilogue's operand, as the
    reading node and the operand's position.
    """

    root: Node
    nodes: dict[str, Node] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    inner: list[Node] = field(default_factory=list)
    kept: frozenset[str] = frozenset()
    operands: frozenset[tuple[str, int]] = frozenset()

    @property
    def consumed(self) -> list[Node]:
        """Inner nodes and the root, sources first."""
        return [*reversed(self.inner), self.root]

    def those(self, *names: str) -> list[Node]:
        """The nodes that the match has of these names; "root" always names the root."""
        nodes = {"root": self.root, **self.nodes}
        return [nodes[name] for name in names if name in nodes]


def match(graph: Graph, root: Node, pattern: Call) -> Match | None:
    """The first way the pattern fits with `root` as its outermost call."""
    for found in _match_call(graph, root, pattern, Match(root)):
        return found
    return None


def external_use(graph: Graph, found: Match) -> str | None:
    """Why some inner node of a match cannot be consumed, or None.

    The match itself may read an inner result only where its pattern says so: not once more through
    a variable, nor as the operand of a stage (y + y, or conv2d(y) + y where y is consumed).
    """
    consumed = {node.name for node in found.consumed}
    outside = {value.node for value in found.values.values()}
    for node in found.consumed:
        outside |= {value.node for value in graph.prologue_operands(node)}
        for position, value in enumerate(graph.operands(node)):
            if (node.name, position) not in found.operands:
                outside.add(value.node)
    for node in found.inner:
        if node.name in outside:
            return f"{node.name} is read more than once; a fused kernel reads it once"
        if node.name in found.kept:
            continue
        for index in range(len(node.outputs)):
            for reader, _ in graph.uses(Value(node.name, index)):
                if reader not in consumed:
                    who = "the caller" if graph.node(reader).op == "output" else reader
                    return read_by_others(node, who, found.root)
    return None


def read_by_others(node: Node, who: str, reader: Node) -> str:
    """The refusal where `who` reads the result of a node besides the `reader` it is fused with."""
    return (
        f"{node.name} is also read by {who}, so its result must be stored; it would be fused if "
        f"only {reader.name} read it"
    )


def _op_name(node: Node) -> str:
    return str(node.attributes) if node.op == TORCH else node.op


def _match_call(graph: Graph, node: Node, pattern: Call, found: Match) -> Iterator[Match]:
    if _op_name(node) not in pattern.ops:
        return
    if pattern.plain and (node.epilogue or node.prologue):
        return
    if pattern.where is not None and not pattern.where(graph, node):
        return
    nodes = {**found.nodes, pattern.name: node} if pattern.name else found.nodes
    seen = node is found.root or node in found.inner
    inner = found.inner if seen else [*found.inner, node]
    kept = found.kept | {node.name} if pattern.kept else found.kept
    begun = Match(found.root, nodes, found.values, inner, kept, found.operands)
    for partial in _match_operand(graph, node, pattern, begun):
        yield from _match_arguments(graph, node, pattern, partial)


def _match_operand(graph: Graph, node: Node, pattern: Call, found: Match) -> Iterator[Match]:
    if pattern.operand is None:
        yield found
        return
    for position, value in enumerate(graph.operands(node)):
        for partial in _match_value(graph, value, pattern.operand, found):
            yield replace(partial, operands=partial.operands | {(node.name, position)})


def _match_arguments(graph: Graph, node: Node, pattern: Call, found: Match) -> Iterator[Match]:
    if pattern.first is not None:
        yield from _match_value(graph, graph.inputs(node.name)[0], pattern.first, found)
        return
    if pattern.arguments is None:
        yield found
        return
    inputs = graph.inputs(node.name) if node.op == TORCH else graph.own_inputs(node)
    if len(inputs) != len(pattern.arguments):
        return
    yield from _match_all(graph, inputs, pattern.arguments, found)
    if pattern.commutes:
        yield from _match_all(graph, inputs[::-1], pattern.arguments, found)


def _match_all(
    graph: Graph, inputs: tuple[Value, ...], patterns: tuple[Any, ...], found: Match
) -> Iterator[Match]:
    if not patterns:
        yield found
        return
    for partial in _match_value(graph, inputs[0], patterns[0], found):
        yield from _match_all(graph, inputs[1:], patterns[1:], partial)


def _match_value(graph: Graph, value: Value, pattern: Any, found: Match) -> Iterator[Match]:
    if isinstance(pattern, Call):
        if value.index == 0:
            yield from _match_call(graph, graph.node(value.node), pattern, found)
        return
    if isinstance(pattern, Constant) and not graph.is_constant(value):
        return
    bound = found.values.get(pattern.name)
    if bound is None:
        values = {**found.values, pattern.name: value}
        yield replace(found, values=values)
    elif bound == value:
        yield found


Guard = Callable[[Graph, Match], str | None]
Rewrite = Callable[[Graph, Match], Value]
Build = Callable[[Graph, Match], Fused]


def always(graph: Graph, found: Match) -> str | None:
    """The guard that never refuses."""
    return None


@dataclass(frozen=True)
class Rule:
    """One declarative fusion.

    name: the equation; rewrite: builds the replacement and returns the value that stands for the
    root's first output; guard: what the kernels cannot express; label: the short name by which
    users force or forbid the rule, empty where it fuses nothing; build: instead of a rewrite, the
    node that is to stand for the whole match.
    """

    name: str
    pattern: Call
    rewrite: Rewrite | None = None
    guard: Guard = always
    label: str = field(kw_only=True, default="")
    build: Build | None = field(kw_only=True, default=None)

    def apply(self, graph: Graph, found: Match) -> Value:
        """Rewrites the match; returns the value that stands for the root's first output."""
        if self.build is not None:
            return replace_by(graph, found, self.build(graph, found), self.name)
        assert self.rewrite is not None, self.name
        return self.rewrite(graph, found)

    def refusal(self, graph: Graph, found: Match) -> str | None:
        """Why the match cannot be rewritten (whether it pays is another question), or None."""
        if (reason := external_use(graph, found) or self.guard(graph, found)) is not None:
            return reason
        if self.build is None:
            return None
        fused = self.build(graph, found)
        if (reason := _cycle(graph, found, fused)) is not None:
            return reason
        return estimate.illegal_reason(graph, fused)


def _cycle(graph: Graph, found: Match, fused: Fused) -> str | None:
    """A fused node may not read what is computed from one of its own results."""
    names = {node.name for node in found.consumed}
    for kept in found.kept:
        # What the kept result is made of does not follow from it: mostly that is all there is.
        before = _read_for(graph, found, kept)
        for value in (*fused.inputs, *fused.operands):
            if value.node in before or not graph.net.pred[value.node]:
                continue
            if value.node in nx.descendants(graph.net, kept) - names:
                return f"{value}, which the fused kernel would read, is computed from its result"
    return None


def _read_for(graph: Graph, found: Match, kept: str) -> set[str]:
    """The nodes that a consumed one, and those it is computed from inside the match, read."""
    names = {kept}
    for node in reversed(found.consumed):
        if node.name in names:
            names.update(graph.net.pred[node.name])
    return names


def bytes_saved(found: Match) -> int:
    """Of the inner tensors: no longer written and read; a kept one is still written."""
    return sum(
        inner.spec.size_bytes * (1 if inner.name in found.kept else 2) for inner in found.inner
    )


def apply_rules(
    graph: Graph, rules: tuple[Rule, ...], ledger: Ledger, guard: Guard = always
) -> Graph:
    """Rewrites until no rule fires; earlier rules win; sources are tried before their readers.
    guard: of all these rules, beside their own."""
    index = by_root(rules)
    changed = True
    while changed:
        changed = False
        for node in graph.nodes():
            name: str | None = node.name
            while name is not None and name in graph:
                name = _try_rules(graph, graph.node(name), index, ledger, guard)
                changed = changed or name is not None
    return graph


def by_root(rules: tuple[Rule, ...]) -> dict[str, list[Rule]]:
    """The rules, in order, by the op of the node they could match."""
    index: dict[str, list[Rule]] = {}
    for rule in rules:
        for op in rule.pattern.ops:
            index.setdefault(op, []).append(rule)
    return index


def matches(graph: Graph, node: Node, index: dict[str, list[Rule]]) -> Iterator[tuple[Rule, Match]]:
    """The rules that fit with a node as their outermost call, in order, and how."""
    for rule in index.get(_op_name(node), []):
        if (found := match(graph, node, rule.pattern)) is not None:
            yield rule, found


def _try_rules(
    graph: Graph, node: Node, index: dict[str, list[Rule]], ledger: Ledger, guard: Guard
) -> str | None:
    """Applies the first rule that fits; returns the node that now stands there, or None."""
    for rule, found in matches(graph, node, index):
        override = overrides.of(graph.goal, rule.label, found.consumed)
        reason = override.refusal or rule.refusal(graph, found) or guard(graph, found)
        if reason is not None:
            ledger.refuse(rule.name, found.consumed, reason)
            continue
        saved, consumed = bytes_saved(found), found.consumed
        value = rule.apply(graph, found)
        _verify(rule, graph, value)
        ledger.accept(rule.name, consumed, value.node, saved)
        return value.node
    return None


def _verify(rule: Rule, graph: Graph, value: Value) -> None:
    """A rule that changes what a node computes must leave it the shapes that its readers know."""
    try:
        verify_node(graph, graph.node(value.node))
    except GraphError as error:
        raise GraphError(f"rule {rule.name!r} made a wrong node: {error}") from error


def replace_by(graph: Graph, found: Match, fused: Fused, rule: str) -> Value:
    """Puts the fused node in the place of the match."""
    values = [*fused.inputs, *fused.operands]
    for position, others in fused.sums.items():
        values[position] = _sum_of(graph, (values[position], *others))
    # A node that another one adds stands beside the match: its module comes last.
    beside = {graph.operands(graph.node(name))[at].node for name, at in found.operands}
    made = graph.add(
        fused.op,
        values,
        fused.attributes,
        epilogue=fused.epilogue,
        like=sorted(found.consumed, key=lambda node: node.name in beside),
        rule=rule,
    )
    for name, index in fused.results.items():
        graph.redirect(Value(name), Value(made.node, index))
    graph.remove(node.name for node in reversed(found.consumed))
    return Value(made.node, fused.results[found.root.name])


def _sum_of(graph: Graph, values: tuple[Value, ...]) -> Value:
    """The sum of constants as one constant, added up in fp64."""
    total = sum(graph.constant(value).double() for value in values)
    assert isinstance(total, torch.Tensor)
    spec = graph.spec(values[0])
    return graph.add_constant(total, values[0].node, spec.dtype, spec.batch)


def absorb(
    graph: Graph, found: Match, keeper: str, inputs: tuple[Value, ...], **changes: Any
) -> Value:
    """Turns `keeper`, one of the consumed nodes, into the node that stands for all of them.

    It keeps its name and place; its inputs become `inputs` and its fields change as given.
    """
    origins = tuple(dict.fromkeys(o for node in found.consumed for o in node.origins))
    graph.update(keeper, origins=origins, **changes)
    graph.set_inputs(keeper, inputs)
    kept = Value(keeper)
    root = Value(found.root.name)
    if root != kept:
        graph.redirect(root, kept)
    graph.remove(node.name for node in reversed(found.consumed) if node.name != keeper)
    return kept


def becomes(
    op: str,
    name: str,
    pattern: Call,
    made: Callable[[Graph, Match], Attributes | str],
    inputs: Callable[[Graph, Match], Sequence[Value]] = lambda graph, found: [found.values["x"]],
    label: str = "",
) -> Rule:
    """The rule that puts one application of `op` in the place of a match.

    made: its attributes, or why there are none; inputs: what it reads, by default the pattern's x.
    A result of another shape than the root's is reshaped to that.
    """

    def guard(graph: Graph, found: Match) -> str | None:
        reason = made(graph, found)
        return reason if isinstance(reason, str) else None

    def rewrite(graph: Graph, found: Match) -> Value:
        attributes, root = made(graph, found), found.root
        assert not isinstance(attributes, str), name
        like = found.consumed[::-1]
        value = graph.add(op, inputs(graph, found), attributes, like=like)
        if graph.spec(value).shape != root.spec.shape:
            value = graph.add("reshape", (value,), Reshape(root.spec.shape), like=like)
        graph.redirect(Value(root.name), value)
        graph.remove(node.name for node in like)
        return value

    return Rule(name, pattern, rewrite, guard, label=label)
