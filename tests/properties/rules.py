"""Properties of rules: what holds for each of them, by its example and its near misses alone.

Each rule is tried on its own example, as the graph is when the pass that owns the rule begins.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import convloom
import pytest
from convloom.compiler.fusion import partition
from convloom.compiler.fusion.pattern import Rule, apply_rules, match
from convloom.compiler.graph import text
from convloom.compiler.graph.ir import OUTPUT, Graph, NoAttributes, Node, Value
from convloom.compiler.graph.ledger import Event, Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import PASSES, Pass

from . import nets
from .example import Example, Make, NearMiss
from .nets import Made


@dataclass(frozen=True, eq=False)
class Subject:
    """A rule and where it fires and refuses. keeps_count: it replaces a node by a cheaper one,
    where all others make nodes disappear."""

    rule: Rule
    example: Example
    keeps_count: bool = False


@dataclass
class Recorder:
    """Stands in for what applies rules and notes which ones a pass tries."""

    rules: list[Rule] = field(default_factory=list)

    def __call__(
        self, graph: Graph, rules: tuple[Rule, ...], ledger: Ledger, *others: Any
    ) -> Graph:
        self.rules += rules
        return graph


@cache
def owners() -> dict[int, Pass]:
    """The pass that applies each rule."""
    empty = Graph()
    empty.insert(Node(OUTPUT, OUTPUT, NoAttributes(), ()))
    found = {}
    for step in PASSES:
        module = importlib.import_module(step.run.__module__)
        recorder = Recorder()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(partition, "choose", recorder)
            if "apply_rules" in vars(module):
                patch.setattr(module, "apply_rules", recorder)
            step.run(empty.copy(), Ledger())
        found |= {id(rule): step for rule in recorder.rules}
    return found


def before(rule: Rule, made: Made) -> Graph:
    """The graph of a module as it is when the rule's pass begins."""
    graph = nets.captured(*made)
    for step in PASSES[: PASSES.index(owners()[id(rule)])]:
        graph = step.run(graph, Ledger())
    verify(graph)
    return graph


@cache
def made_of(make: Make) -> Made:
    """A module and its inputs; nobody changes them."""
    return make()


@cache
def example_of(subject: Subject) -> tuple[Made, Graph]:
    """The rule's example and its graph; copy the graph before changing it."""
    made = made_of(subject.example.make)
    return made, before(subject.rule, made)


def applied(graph: Graph, *rules: Rule) -> tuple[Graph, list[Event], list[Event]]:
    """A rewritten copy of the graph, with the accepted and the refused events."""
    ledger = Ledger()
    after = apply_rules(graph.copy(), rules, ledger)
    verify(after)
    events = ledger.events
    return after, [e for e in events if e.accepted], [e for e in events if not e.accepted]


def fires_on_its_example(subject: Subject) -> None:
    _, graph = example_of(subject)
    after, accepted, _ = applied(graph, subject.rule)
    assert accepted and all(event.rule == subject.rule.name for event in accepted)
    change = len(graph.compute_nodes()) - len(after.compute_nodes())
    assert change == 0 if subject.keeps_count else change > 0
    assert all(event.into in after for event in accepted)


def fires_in_its_pass(subject: Subject) -> None:
    """No rule of higher priority takes the example away."""
    _, graph = example_of(subject)
    ledger = Ledger()
    owners()[id(subject.rule)].run(graph.copy(), ledger)
    assert subject.rule.name in {event.rule for event in ledger.events if event.accepted}


def keeps_the_meaning(subject: Subject) -> None:
    (_, inputs), graph = example_of(subject)
    nets.assert_same_meaning(graph, applied(graph, subject.rule)[0], inputs)


def is_idempotent(subject: Subject) -> None:
    _, graph = example_of(subject)
    once = applied(graph, subject.rule)[0]
    twice, accepted, _ = applied(once, subject.rule)
    assert not accepted and text.to_text(twice) == text.to_text(once)


def origins_are_kept(subject: Subject) -> None:
    """What stands there afterwards knows every captured node it stands for."""
    _, graph = example_of(subject)
    after, accepted, _ = applied(graph, subject.rule)
    kept = {origin for node in after.nodes() for origin in node.origins}
    assert {origin for event in accepted for origin in event.nodes} <= kept


def kernels_agree_with_and_without(subject: Subject) -> None:
    (module, inputs), _ = example_of(subject)
    last = PASSES.index(owners()[id(subject.rule)])
    names = tuple(step.name for step in PASSES[: last + 1])
    with nets.exporting_once():
        with_rule = convloom.compile(module, inputs, target="interpreter", passes=names)
        without = convloom.compile(module, inputs, target="interpreter", passes="none")
    assert any(e.rule == subject.rule.name and e.accepted for e in with_rule.ledger.events)
    assert len(with_rule.kernels) <= len(without.kernels)
    truth = nets.Truth(module, inputs)
    truth.check(with_rule(*inputs))
    truth.check(without(*inputs))


def does_not_fire_when_an_inner_tensor_is_returned(subject: Subject) -> None:
    _, graph = example_of(subject)
    for name in inner_nodes(subject.rule, graph):
        shared = graph.copy()
        shared.set_inputs(OUTPUT, (*shared.outputs(), Value(name)))
        after, accepted, refused = applied(shared, subject.rule)
        assert not accepted and text.to_text(after) == text.to_text(shared)
        assert any(f"{name} is also read by the caller" in event.reason for event in refused)


def does_not_fire_when_an_inner_tensor_has_another_reader(subject: Subject) -> None:
    _, graph = example_of(subject)
    for name in inner_nodes(subject.rule, graph):
        shared = graph.copy()
        other = shared.add("neg", (Value(name),), name="other")
        shared.set_inputs(OUTPUT, (*shared.outputs(), other))
        after, accepted, refused = applied(shared, subject.rule)
        assert not accepted and text.to_text(after) == text.to_text(shared)
        assert any(f"{name} is also read by other" in event.reason for event in refused)


def inner_nodes(rule: Rule, graph: Graph) -> list[str]:
    """The nodes whose results the first accepted match makes disappear."""
    for node in graph.nodes():
        found = match(graph, node, rule.pattern)
        if found is not None and rule.refusal(graph, found) is None:
            return [inner.name for inner in found.inner if inner.name not in found.kept]
    raise AssertionError("the rule matches nothing")


def near_misses_are_refused_for_the_stated_reason(subject: Subject, miss: NearMiss) -> None:
    graph = before(subject.rule, made_of(miss.make))
    after, accepted, refused = applied(graph, subject.rule)
    assert not accepted and text.to_text(after) == text.to_text(graph)
    assert any(miss.reason in event.reason for event in refused), refused


def near_misses_still_compute_the_right_thing(subject: Subject, miss: NearMiss) -> None:
    module, inputs = made_of(miss.make)
    with nets.exporting_once():
        exe = convloom.compile(module, inputs, target="interpreter")
    nets.check(exe(*inputs), module, inputs)


EVERY = (
    fires_on_its_example, fires_in_its_pass, keeps_the_meaning, is_idempotent, origins_are_kept,
    kernels_agree_with_and_without, does_not_fire_when_an_inner_tensor_is_returned,
    does_not_fire_when_an_inner_tensor_has_another_reader,
)  # fmt: skip
NEAR_MISSES = (
    near_misses_are_refused_for_the_stated_reason, near_misses_still_compute_the_right_thing,
)  # fmt: skip


def of(subject: Subject) -> list[tuple[str, Callable[..., None], tuple[Any, ...]]]:
    """All that holds of a rule: a name, the property, and its arguments."""
    found: list[tuple[str, Callable[..., None], tuple[Any, ...]]] = []
    found += [(check.__name__, check, (subject,)) for check in EVERY]
    for miss in subject.example.near_misses:
        found += [(f"{each.__name__}-{miss.reason}", each, (subject, miss)) for each in NEAR_MISSES]
    return found
