"""Convolutions and linear layers of one tensor, merged in any order and number."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.api import lowered
from convloom.compiler.fusion import partition
from convloom.compiler.graph.ir import (
    INPUT,
    OUTPUT,
    CompileTarget,
    Graph,
    NoAttributes,
    Node,
    Timing,
)
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import PASSES, choose_partition, run_passes
from convloom.compiler.passes.fusions import siblings
from convloom.kernels.contract import targets
from convloom.kernels.contract.op import Problem
from convloom.kernels.tile.conv_geometry import Conv2d
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from . import nets

ENDS: tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], ...] = (
    lambda y, scale: y,
    lambda y, scale: torch.relu(y),
    lambda y, scale: torch.sigmoid(y * scale),
    lambda y, scale: 1.5 - torch.relu(y),
    lambda y, scale: F.gelu(y),
    lambda y, scale: torch.relu(y) * scale,
    lambda y, scale: y * scale,
)


def random_net(seed: int, count: int) -> nets.Made:
    """`count` siblings with random widths, biases and ends; of convolutions, some go on into a
    concatenation that one of them begins or ends, as in Inception."""
    draw = random.Random(seed)
    flat = draw.random() < 0.3
    size = draw.choice([1, 1, 3])
    layers: dict[str, nn.Module] = {}
    ends = []
    for at in range(count):
        width, bias = draw.choice([8, 8, 16]), draw.random() < 0.6
        layers[f"m{at}"] = (
            nn.Linear(6, width, bias=bias)
            if flat
            else nn.Conv2d(6, width, size, padding=size // 2, bias=bias)
        )
        ends.append(draw.choice(ENDS))
    joined = [] if flat or draw.random() < 0.3 else draw.sample(range(count), min(count, 3))
    where = draw.choice([0, -1])
    for at in joined:
        width = layers[f"m{at}"].out_channels
        layers[f"tail{at}"] = nn.Conv2d(width, 8, 3, padding=1)
    alone = joined[where] if joined else None

    def function(m: Any, x: torch.Tensor) -> Any:
        results = [
            end(getattr(m, f"m{at}")(x), getattr(m, f"scale{at}")) for at, end in enumerate(ends)
        ]
        parts = [
            results[at] if at == alone else getattr(m, f"tail{at}")(results[at]) for at in joined
        ]
        rest = [y for at, y in enumerate(results) if at not in joined]
        return (*rest, torch.cat(parts, 1).relu()) if parts else tuple(rest)

    module, inputs = nets.make(function, (3, 6) if flat else (2, 6, 4, 3), seed=seed, **layers)
    for at in range(count):
        layer = layers[f"m{at}"]
        width = layer.out_features if flat else layer.out_channels
        scale = nets.inputs_of((width,) if flat else (width, 1, 1), seed=seed + at)[0]
        module.register_buffer(f"scale{at}", scale)
    return module, inputs


def before_partition(graph: Graph) -> Graph:
    """The graph as the partition gets it."""
    for step in itertools.takewhile(lambda step: step.run is not choose_partition, PASSES):
        graph = step.run(graph, Ledger())
    return graph


def mergeable(graph: Graph) -> list[str]:
    """The nodes that read the image as siblings do, merged ones among them."""
    heavy = [node for node in graph.nodes() if node.op in ("conv2d", "linear")]
    return [n.name for n in heavy if graph.node(graph.inputs(n.name)[0].node).op == INPUT]


@given(seed=st.integers(0, 10**6), count=st.integers(2, 6))
def test_any_merges_in_any_order_keep_the_meaning(seed: int, count: int) -> None:
    module, inputs = random_net(seed, count)
    draw = random.Random(seed)
    captured = nets.captured(module, inputs)
    graph = before_partition(captured.copy())
    first = mergeable(graph)
    while len(names := mergeable(graph)) > 1:
        draw.shuffle(names)
        assert siblings._make(names[: draw.randint(2, len(names))], graph, Ledger())
        verify(graph)
        nets.assert_same_meaning(captured, graph, inputs)
    assert len(first) == count and len(names) == 1
    nets.forget(module)


def heads_of(plan: Any) -> int:
    """Kernels that compute siblings: those that read six channels."""
    heavy = [step for step in plan.steps if step.op in ("conv2d", "linear")]
    return sum(step.problem.inputs[0].shape[1] == 6 for step in heavy)


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", range(7))
def test_forced_siblings_are_one_kernel_that_computes_what_eager_does(seed: int) -> None:
    module, inputs = random_net(seed, 2 + seed % 5)
    with nets.exporting_once():
        exe = convloom.compile(module, inputs, target="interpreter", force=["siblings"])
        plan = lowered(module, inputs, target="cuda:sm_90", force=["siblings"])[1]
    assert heads_of(exe.plan) == heads_of(plan) == 1
    nets.check(exe(*inputs), module, inputs)
    nets.forget(module)


@pytest.mark.interpreter
@pytest.mark.parametrize("seed", range(10, 14))
def test_of_half_forbidden_siblings_the_other_half_is_merged(seed: int) -> None:
    module, inputs = random_net(seed, 6)
    odd = [f"siblings@m{at}" for at in (1, 3, 5)]
    exe = convloom.compile(module, inputs, target="interpreter", forbid=odd)
    assert heads_of(exe.plan) == 4
    reasons = {event.reason for event in exe.ledger.events if not event.accepted}
    assert {f"forbidden by forbid={entry!r}" for entry in odd} <= reasons
    nets.check(exe(*inputs), module, inputs)


@given(seed=st.integers(0, 10**6), count=st.integers(2, 6))
def test_whatever_times_are_measured_the_meaning_is_kept(seed: int, count: int) -> None:
    """Times that favour some of the siblings first, and others later."""
    module, inputs = random_net(seed, count)

    def known(problem: Problem) -> Timing:
        width = problem.output.shape[1] + len(problem.epilogue)
        return Timing(random.Random(f"{seed} {problem.op} {width}").uniform(1, 9), "measured")

    captured = nets.captured(module, inputs)
    for force in ((), ("siblings",)):
        captured.goal = CompileTarget(targets.parse("cuda:sm_90"), force=force, timing_lookup=known)
        graph = run_passes(captured, Ledger())
        verify(graph)
        nets.assert_same_meaning(captured, graph, inputs)
    nets.forget(module)


def test_times_that_favour_two_of_three_first() -> None:
    """As they are with records of a merged pair only: the third joins the pair in a second round,
    and each keeps its own activation."""

    def function(m: Any, x: torch.Tensor) -> Any:
        return torch.relu(m.a(x)), m.b(x), torch.sigmoid(m.c(x))

    module, inputs = nets.make(function, nets.IMAGE, **{name: nn.Conv2d(6, 8, 1) for name in "abc"})
    asked: list[int] = []

    def known(problem: Problem) -> Timing:
        width = problem.output.shape[1]
        asked.append(width)
        three_at_once = width == 24 and asked.count(24) <= 1
        return Timing(99.0 if three_at_once else 10.0, "measured")

    captured = nets.captured(module, inputs)
    captured.goal = CompileTarget(targets.parse("cuda:sm_90"), timing_lookup=known)
    graph = run_passes(captured, Ledger())
    (wide,) = (node for node in graph.nodes() if node.op == "conv2d")
    ranges = {stage.name: stage.channels for stage in wide.epilogue}
    assert {stop - start for start, stop in filter(None, ranges.values())} == {8}
    nets.assert_same_meaning(captured, graph, inputs)


def graph_of_many(count: int, ends: int = 1) -> Graph:
    """`count` 1x1 convolutions of one image, with as many different ends as asked for."""
    graph = Graph(goal=CompileTarget(targets.parse("cuda:sm_90"), torch.float16))
    x = nets.add_input(graph, "x", (1, 8, 6, 5))
    values = []
    for at in range(count):
        weight = graph.add_constant(torch.randn(8, 8, 1, 1), "weight", torch.float32)
        y = graph.add("conv2d", (x, weight), Conv2d())
        stage = siblings.Stage("mul", literal=float(2 + at % ends))
        graph.update(y.node, epilogue=(stage,), module_path=f"m{at}")
        values.append(y)
    graph.insert(Node(OUTPUT, OUTPUT, NoAttributes(), ()), values)
    return graph


@pytest.mark.parametrize("ends", [1, 3])
def test_the_work_grows_with_the_number_of_siblings_no_faster(
    ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Members looked at over all proposals, as calls: not the square of their number."""
    members: dict[int, int] = {}
    propose = siblings._propose

    def counting(graph: Graph, nodes: Any) -> Any:
        members[count] += len(nodes)
        return propose(graph, nodes)

    monkeypatch.setattr(siblings, "_propose", counting)
    for count in (30, 90):
        members[count] = 0
        graph = graph_of_many(count, ends)
        partition.choose(graph, (), Ledger(), (siblings.propose_siblings,))
        (wide,) = (node for node in graph.nodes() if node.op == "conv2d")
        assert len(wide.epilogue) == ends, "equal ends lie side by side"
    assert members == {30: 30, 90: 90}


def test_siblings_with_too_many_ends_are_several_kernels() -> None:
    graph, ledger = graph_of_many(70, ends=70), Ledger()
    before = graph.copy()
    partition.choose(graph, (), ledger, (siblings.propose_siblings,))
    wide = [node for node in graph.nodes() if node.op == "conv2d"]
    assert sorted(len(node.epilogue) for node in wide) == [6, 32, 32]
    reasons = {event.reason for event in ledger.events if not event.accepted}
    assert any("the merged one has 33 stages, more than 32" in reason for reason in reasons)
    nets.assert_same_meaning(before, graph, nets.inputs_for(before))
