"""Every rule of the compiler, tested by being in a table.

Each rule is tried on its own example, as the graph is when the pass that owns the rule begins.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import convloom
import convloom.compiler
import pytest
import torch
from convloom.compiler.capture.capture import capture
from convloom.compiler.fusion import partition, rules
from convloom.compiler.fusion.pattern import Rule, always, apply_rules, match
from convloom.compiler.fusion.rules import HEAVY, POINTWISE
from convloom.compiler.graph import text
from convloom.compiler.graph.ir import INPUT, OUTPUT, Graph, NoAttributes, Node, Value
from convloom.compiler.graph.ledger import Event, Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import (
    PASSES,
    Pass,
    fuse_epilogues,
    pool_order,
    recognise,
    recognise_pools,
    sink_prologues,
)
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.scalars import BY_NAME
from convloom.kernels.movement.pointwise import Pointwise
from convloom.kernels.tile.conv_geometry import Conv2d
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from . import nets
from .nets import Made
from .rules import EXAMPLES, Example, NearMiss, example_for


def every_rule() -> dict[str, Rule]:
    """All rules of all tables of the compiler, whichever file they stand in."""
    found: dict[int, Rule] = {}
    for info in pkgutil.walk_packages(convloom.compiler.__path__, "convloom.compiler."):
        for table in vars(importlib.import_module(info.name)).values():
            if isinstance(table, tuple) and table and all(isinstance(r, Rule) for r in table):
                found |= {id(rule): rule for rule in table}
    counts: dict[str, int] = {}
    names = {}
    for rule in found.values():
        counts[rule.name] = counts.get(rule.name, 0) + 1
        suffix = f" ({counts[rule.name]})" if counts[rule.name] > 1 else ""
        names[rule.name + suffix] = rule
    return names


RULES = every_rule()
NAMES = {id(rule): name for name, rule in RULES.items()}
NEAR_MISSES = [
    pytest.param(RULES[name], at, id=f"{name}: {miss.reason}")
    for name, example in EXAMPLES.items()
    if name in RULES
    for at, miss in enumerate(example.near_misses)
]
by_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
RELAYS = {
    rule.name
    for rule in (
        *rules.FLATTEN_RULES, *pool_order.RULES, recognise_pools.DROP_INDICES, recognise.SQUARE
    )
}  # fmt: skip
"""Rules that replace a node by a cheaper one, where all others make nodes disappear."""


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


def example_by(rule: Rule) -> Example:
    return example_for(NAMES[id(rule)])


@cache
def example_of(rule: Rule) -> tuple[Made, Graph]:
    """The rule's example and its graph; copy the graph before changing it."""
    made = example_by(rule).make()
    return made, before(rule, made)


def applied(graph: Graph, *rules: Rule) -> tuple[Graph, list[Event], list[Event]]:
    """A rewritten copy of the graph, with the accepted and the refused events."""
    ledger = Ledger()
    after = apply_rules(graph.copy(), rules, ledger)
    verify(after)
    events = ledger.events
    return after, [e for e in events if e.accepted], [e for e in events if not e.accepted]


def test_every_rule_belongs_to_a_pass() -> None:
    assert len(RULES) > 10
    assert {id(rule) for rule in RULES.values()} == owners().keys()


@by_rule
def test_every_rule_has_an_example(rule: Rule) -> None:
    assert example_by(rule).make is not None


def test_every_example_is_that_of_a_rule() -> None:
    assert EXAMPLES.keys() == RULES.keys()


def test_a_rule_without_an_example_says_where_to_add_one() -> None:
    with pytest.raises(LookupError) as caught:
        example_for("f(x) => g(x)")
    assert caught.value.args == (
        'rule "f(x) => g(x)" has no example: add "f(x) => g(x)": Example(...) to EXAMPLES in the '
        "file of tests/rules that is named as the rule's file in compiler",
    )


@by_rule
def test_fires_on_its_example(rule: Rule) -> None:
    _, graph = example_of(rule)
    after, accepted, _ = applied(graph, rule)
    assert accepted and all(event.rule == rule.name for event in accepted)
    change = len(graph.compute_nodes()) - len(after.compute_nodes())
    assert change == 0 if rule.name in RELAYS else change > 0
    assert all(event.into in after for event in accepted)


@by_rule
def test_fires_in_its_pass(rule: Rule) -> None:
    """No rule of higher priority takes the example away."""
    _, graph = example_of(rule)
    ledger = Ledger()
    owners()[id(rule)].run(graph.copy(), ledger)
    assert rule.name in {event.rule for event in ledger.events if event.accepted}


@by_rule
def test_keeps_the_meaning(rule: Rule) -> None:
    (_, inputs), graph = example_of(rule)
    nets.assert_same_meaning(graph, applied(graph, rule)[0], inputs)


@by_rule
def test_is_idempotent(rule: Rule) -> None:
    _, graph = example_of(rule)
    once = applied(graph, rule)[0]
    twice, accepted, _ = applied(once, rule)
    assert not accepted and text.to_text(twice) == text.to_text(once)


@by_rule
def test_origins_are_kept(rule: Rule) -> None:
    """What stands there afterwards knows every captured node it stands for."""
    _, graph = example_of(rule)
    after, accepted, _ = applied(graph, rule)
    kept = {origin for node in after.nodes() for origin in node.origins}
    assert {origin for event in accepted for origin in event.nodes} <= kept


@pytest.mark.interpreter
@by_rule
def test_kernels_agree_with_and_without(rule: Rule) -> None:
    (module, inputs), _ = example_of(rule)
    last = PASSES.index(owners()[id(rule)])
    names = tuple(step.name for step in PASSES[: last + 1])
    with nets.exporting_once():
        with_rule = convloom.compile(module, inputs, target="interpreter", passes=names)
        without = convloom.compile(module, inputs, target="interpreter", passes="none")
    assert any(e.rule == rule.name and e.accepted for e in with_rule.ledger.events)
    assert len(with_rule.kernels) <= len(without.kernels)
    truth = nets.Truth(module, inputs)
    truth.check(with_rule(*inputs))
    truth.check(without(*inputs))


@by_rule
def test_does_not_fire_when_an_inner_tensor_is_returned(rule: Rule) -> None:
    _, graph = example_of(rule)
    for name in inner_nodes(rule, graph):
        shared = graph.copy()
        shared.set_inputs(OUTPUT, (*shared.outputs(), Value(name)))
        after, accepted, refused = applied(shared, rule)
        assert not accepted and text.to_text(after) == text.to_text(shared)
        assert any(f"{name} is also read by the caller" in event.reason for event in refused)


@by_rule
def test_does_not_fire_when_an_inner_tensor_has_another_reader(rule: Rule) -> None:
    _, graph = example_of(rule)
    for name in inner_nodes(rule, graph):
        shared = graph.copy()
        other = shared.add("neg", (Value(name),), name="other")
        shared.set_inputs(OUTPUT, (*shared.outputs(), other))
        after, accepted, refused = applied(shared, rule)
        assert not accepted and text.to_text(after) == text.to_text(shared)
        assert any(f"{name} is also read by other" in event.reason for event in refused)


def inner_nodes(rule: Rule, graph: Graph) -> list[str]:
    """The nodes whose results the first accepted match makes disappear."""
    for node in graph.nodes():
        found = match(graph, node, rule.pattern)
        if found is not None and rule.refusal(graph, found) is None:
            return [inner.name for inner in found.inner if inner.name not in found.kept]
    raise AssertionError("the rule matches nothing")


@pytest.mark.parametrize(("rule", "at"), NEAR_MISSES)
def test_near_misses_are_refused_for_the_stated_reason(rule: Rule, at: int) -> None:
    miss = example_by(rule).near_misses[at]
    graph = before(rule, made_of(miss))
    after, accepted, refused = applied(graph, rule)
    assert not accepted and text.to_text(after) == text.to_text(graph)
    assert any(miss.reason in event.reason for event in refused), refused


@pytest.mark.interpreter
@pytest.mark.parametrize(("rule", "at"), NEAR_MISSES)
def test_near_misses_still_compute_the_right_thing(rule: Rule, at: int) -> None:
    module, inputs = made_of(example_by(rule).near_misses[at])
    with nets.exporting_once():
        exe = convloom.compile(module, inputs, target="interpreter")
    nets.check(exe(*inputs), module, inputs)


@cache
def made_of(miss: NearMiss) -> Made:
    return miss.make()


def test_refusals_are_recorded_once() -> None:
    rule = next(iter(rules.PROLOGUE_RULES))
    graph = before(rule, example_by(rule).near_misses[0].make())
    ledger = Ledger()
    for _ in range(3):
        apply_rules(graph, (rule,), ledger)
    assert len(ledger.events) == 1 and not ledger.events[0].accepted
    assert always(graph, match(graph, graph.nodes()[-2], rule.pattern)) is None


# Chains, built as graphs: no capture, so that many can be tried.


def image(graph: Graph, name: str, shape: tuple[int, ...]) -> Value:
    return nets.add_input(graph, name, shape)


def start(op: str) -> tuple[Graph, Value]:
    """A graph with one product of the inputs `x` and the constants `w` and `b`, or with an image
    of as many channels."""
    graph = Graph()
    generator = torch.Generator().manual_seed(3)
    if op in ("conv2d", INPUT):
        channels = 3 if op == "conv2d" else 4
        x, attributes = image(graph, "x", (2, channels, 5, 4)), Conv2d(padding=(1, 1, 1, 1))
        w, b = (4, 3, 3, 3), (4, 1, 1)
    else:
        x, attributes = image(graph, "x", (2, 3)), None
        w, b = (4, 3), (4,)
    weight = graph.add_constant(torch.randn(w, generator=generator), "w", torch.float32)
    graph.add_constant(torch.randn(b, generator=generator), "b", torch.float32)
    return graph, x if op == INPUT else graph.add(op, (x, weight), attributes)


def finish(graph: Graph, *values: Value) -> Graph:
    graph.insert(Node(OUTPUT, OUTPUT, NoAttributes(), ()), values)
    verify(graph)
    return graph


def safely(graph: Graph, value: Value) -> Value:
    """Into the range in which every scalar is defined and no step is steep."""
    squashed = graph.add("sigmoid", (value,))
    return graph.add("add", (squashed,), Pointwise(literal=0.6))


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("op", HEAVY)
def test_every_scalar_becomes_a_stage(op: str, name: str) -> None:
    """f(y), f(y, r), f(r, y), f(y, literal) and f(literal, y) of a product y are one node."""
    scalar = BY_NAME[name]
    forms = {
        1: ["unary"], 2: ["tensor", "reversed", "literal", "left"], 3: ["where"],
    }[scalar.operands]  # fmt: skip
    for form in forms:
        graph, y = start(op)
        shape = graph.spec(y).shape
        y = safely(graph, y)
        parameters = scalar.examples[-1]
        if form in ("tensor", "reversed"):
            pair = (y, image(graph, "r", shape))
            pair = pair if form == "tensor" else pair[::-1]
            y = graph.add(name, pair, Pointwise(parameters))
        elif form == "where":
            y = graph.add(name, (image(graph, "c", shape), y, image(graph, "r", shape)))
        else:
            literal = None if form == "unary" else 1.5
            y = graph.add(name, (y,), Pointwise(parameters, literal, reverse=form == "left"))
        if scalar.boolean:  # Products store no booleans.
            y = graph.add("choose", (y,), Pointwise((2.0, -0.5)))
        finish(graph, y)
        after = fuse_epilogues(graph.copy(), Ledger())
        verify(after)
        assert len(after.compute_nodes()) == 1
        inputs = [value.abs() + 0.5 for value in nets.inputs_for(graph)]
        nets.assert_same_meaning(graph, after, inputs)


@dataclass(frozen=True)
class Link:
    """One pointwise step of a random chain."""

    name: str
    other: str
    reverse: bool
    keep: bool


links = st.builds(
    Link,
    st.sampled_from(("relu", "tanh", "sigmoid", "add", "sub", "mul", "maximum", "minimum")),
    st.sampled_from(("input", "literal", "constant", "earlier", "itself", "sample")),
    st.booleans(),
    st.integers(0, 5).map(lambda value: value == 0),
)


def chained(op: str, chain: list[Link]) -> Graph:
    """The product followed by the links; kept values are returned beside the last."""
    graph, y = start(op)
    earlier, returned = [y], []
    shape = graph.spec(y).shape
    for at, link in enumerate(chain):
        if BY_NAME[link.name].operands == 1:
            y = graph.add(link.name, (y,))
        elif link.other == "literal":
            y = graph.add(link.name, (y,), Pointwise(literal=0.5, reverse=link.reverse))
        else:
            other = {
                "input": lambda: image(graph, f"r{at}", shape),  # noqa: B023
                "constant": lambda: Value("b_2"),
                "earlier": lambda: earlier[at // 2],  # noqa: B023
                "itself": lambda: y,  # noqa: B023
                "sample": lambda: image(graph, f"s{at}", (2, *[1] * (len(shape) - 1))),  # noqa: B023
            }[link.other]()
            y = graph.add(link.name, (other, y) if link.reverse else (y, other))
        earlier.append(y)
        if link.keep:
            returned.append(y)
    return finish(graph, y, *returned)


def prologued(chain: list[Link], attributes: Conv2d) -> Graph:
    """The same chain of an image, before a 1x1 convolution instead of after a product."""
    graph = chained(INPUT, chain)
    weight = graph.add_constant(torch.ones(2, 4, 1, 1), "v", torch.float32)
    last, *rest = graph.outputs()
    y = graph.add("conv2d", (last, weight), attributes)
    graph.set_inputs(OUTPUT, (y, *rest))
    return graph


@given(chain=st.lists(links, min_size=1, max_size=7), op=st.sampled_from(HEAVY))
def test_random_chains_keep_their_meaning(chain: list[Link], op: str) -> None:
    check_fused(chained(op, chain))


@given(
    chain=st.lists(links, min_size=1, max_size=5),
    attributes=st.sampled_from((Conv2d(), Conv2d(padding=(1, 1, 0, 1), stride=(2, 1)))),
)
def test_random_chains_before_a_convolution_keep_their_meaning(
    chain: list[Link], attributes: Conv2d
) -> None:
    check_fused(prologued(chain, attributes))


def check_fused(graph: Graph) -> None:
    fused = graph.copy()
    for step in (fuse_epilogues, sink_prologues, fuse_epilogues):
        fused = step(fused, Ledger())
        verify(fused)
    nets.assert_same_meaning(graph, fused, nets.inputs_for(graph))
    settled: Any = [text.to_text(run(fused.copy())) for run in (identical, again)]
    assert settled[0] == settled[1]


identical: Callable[[Graph], Graph] = lambda graph: graph  # noqa: E731


def again(graph: Graph) -> Graph:
    return sink_prologues(fuse_epilogues(graph, Ledger()), Ledger())


def test_a_chain_without_other_readers_becomes_one_kernel() -> None:
    module, inputs = nets.make(
        lambda m, x, r: torch.tanh(2.0 - torch.relu(m.conv(x) * 0.5 + r)).mul(r).clamp(-1, 1),
        nets.IMAGE,
        (2, 8, 7, 5),
        conv=nn.Conv2d(6, 8, 3, padding=1),
    )
    fused = fuse_epilogues(capture(module, inputs), Ledger())
    (conv,) = (node for node in fused.compute_nodes() if node.op == "conv2d")
    assert [str(stage) for stage in conv.epilogue] == [
        "add", "mul(0.5)", "add", "relu", "rsub(2)", "tanh", "mul", "clamp(-1, 1)",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["relu", "sub", "reversed"])
def test_stages_of_the_root_follow_its_own(name: str) -> None:
    """Here the chain behind the root was fused into it before it reached the product."""
    graph, y = start("conv2d")
    r = image(graph, "r", (2, 4, 5, 4))
    pair = (r, y) if name == "reversed" else (y,) if name == "relu" else (y, r)
    stages = (Stage("sub", literal=0.25), Stage("square"))
    root = graph.add(name if name == "relu" else "sub", pair, Pointwise(), epilogue=stages)
    finish(graph, root)
    after = fuse_epilogues(graph.copy(), Ledger())
    assert len(after.compute_nodes()) == 1
    nets.assert_same_meaning(graph, after, nets.inputs_for(graph))


def test_a_prologue_is_not_replaced_by_a_second_one() -> None:
    module, inputs = nets.make(
        lambda m, x: m.conv(torch.relu(torch.sigmoid(x) - 0.5)), nets.IMAGE, conv=nn.Conv2d(6, 8, 1)
    )
    graph = nets.captured(module, inputs)
    after, ledger = graph.copy(), Ledger()
    sink_prologues(after, ledger)  # The chain is no single node: nothing was fused before.
    (conv,) = (node for node in after.compute_nodes() if node.op == "conv2d")
    assert [str(stage) for stage in conv.prologue] == ["relu"]
    assert any("already has a prologue" in event.reason for event in ledger.events)
    nets.assert_same_meaning(graph, after, inputs)
