"""Every rule of the compiler, tested by being in a table.

Each rule is tried on its own example, as the graph is when the pass that owns the rule begins.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import convloom
import convloom.compiler
import pytest
import torch
from convloom.compiler.capture.capture import capture
from convloom.compiler.fusion import rules
from convloom.compiler.fusion.pattern import Rule, always, apply_rules, match
from convloom.compiler.fusion.rules import HEAVY, POINTWISE
from convloom.compiler.graph import text
from convloom.compiler.graph.ir import INPUT, OUTPUT, Graph, Value
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import (
    fuse_epilogues,
    pool_order,
    recognise,
    recognise_pools,
    sink_prologues,
)
from convloom.compiler.passes.fusions import fuse, small_nets
from convloom.kernels import registry
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.scalars import BY_NAME
from convloom.kernels.movement.pointwise import Pointwise
from convloom.kernels.tile.conv_geometry import Conv2d
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from . import nets
from .properties import rules as rules_of
from .properties.rules import Subject
from .properties.scalars import becomes_a_stage, finish, image, start
from .rules import EXAMPLES, example_for


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
RELAYS = {
    rule.name
    for rule in (
        *rules.FLATTEN_RULES, *pool_order.RULES, recognise_pools.DROP_INDICES, recognise.SQUARE
    )
}  # fmt: skip
"""Rules that replace a node by a cheaper one, where all others make nodes disappear."""


def subject_of(name: str) -> Subject:
    """A rule with its example."""
    return Subject(RULES[name], example_for(name), RULES[name].name in RELAYS)


SUBJECTS = {name: subject_of(name) for name in RULES.keys() & EXAMPLES.keys()}
NEAR_MISSES = [
    pytest.param(SUBJECTS[name], miss, id=f"{name}: {miss.reason}")
    for name, example in EXAMPLES.items()
    if name in RULES
    for miss in example.near_misses
]
by_rule = pytest.mark.parametrize(
    "subject", [pytest.param(SUBJECTS[name], id=name) for name in RULES if name in SUBJECTS]
)
near_misses = pytest.mark.parametrize(("subject", "miss"), NEAR_MISSES)
interpreter = pytest.mark.interpreter


def test_every_rule_belongs_to_a_pass() -> None:
    assert len(RULES) > 10
    assert {id(rule) for rule in RULES.values()} == rules_of.owners().keys()


def test_every_fused_op_is_that_of_a_fusion() -> None:
    """Those at the boundary are made once layouts are chosen, by a pass of their own."""
    room = "convloom.kernels.fused."
    ops = {op.name for op in registry.OPS if registry.module_of(op.launches).startswith(room)}
    assert ops - {"stem", "stem_input"} <= {each.op for each in (*fuse.FUSIONS, small_nets.FUSION)}
    assert {"conv_chain", "small_net", "lrn_pool"} <= ops


@pytest.mark.parametrize("name", RULES)
def test_every_rule_has_an_example(name: str) -> None:
    assert example_for(name).make is not None


def test_every_example_is_that_of_a_rule() -> None:
    assert EXAMPLES.keys() == RULES.keys()


def test_a_rule_without_an_example_says_where_to_add_one() -> None:
    with pytest.raises(LookupError) as caught:
        example_for("f(x) => g(x)")
    assert caught.value.args == (
        'rule "f(x) => g(x)" has no example: add "f(x) => g(x)": Example(...) to EXAMPLES in the '
        "file of tests/rules that is named as the rule's file in compiler",
    )


test_fires_on_its_example = by_rule(rules_of.fires_on_its_example)
test_fires_in_its_pass = by_rule(rules_of.fires_in_its_pass)
test_keeps_the_meaning = by_rule(rules_of.keeps_the_meaning)
test_is_idempotent = by_rule(rules_of.is_idempotent)
test_origins_are_kept = by_rule(rules_of.origins_are_kept)
test_kernels_agree_with_and_without = interpreter(by_rule(rules_of.kernels_agree_with_and_without))
test_does_not_fire_when_an_inner_tensor_is_returned = by_rule(
    rules_of.does_not_fire_when_an_inner_tensor_is_returned
)
test_does_not_fire_when_an_inner_tensor_has_another_reader = by_rule(
    rules_of.does_not_fire_when_an_inner_tensor_has_another_reader
)
test_near_misses_are_refused_for_the_stated_reason = near_misses(
    rules_of.near_misses_are_refused_for_the_stated_reason
)
test_near_misses_still_compute_the_right_thing = interpreter(
    near_misses(rules_of.near_misses_still_compute_the_right_thing)
)


def test_refusals_are_recorded_once() -> None:
    rule = next(iter(rules.PROLOGUE_RULES))
    graph = rules_of.before(rule, example_for(rule.name).near_misses[0].make())
    ledger = Ledger()
    for _ in range(3):
        apply_rules(graph, (rule,), ledger)
    assert len(ledger.events) == 1 and not ledger.events[0].accepted
    assert always(graph, match(graph, graph.nodes()[-2], rule.pattern)) is None


# Chains, built as graphs: no capture, so that many can be tried.


@pytest.mark.parametrize("name", POINTWISE)
@pytest.mark.parametrize("op", HEAVY)
def test_every_scalar_becomes_a_stage(op: str, name: str) -> None:
    becomes_a_stage(BY_NAME[name], op)


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
