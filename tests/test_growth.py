"""What grows with the network grows no faster than it: counted in calls, not timed (times are in
benchmarks/growth.py)."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from convloom.compiler.explain.report import Report
from convloom.compiler.fusion import estimate, pattern
from convloom.compiler.graph.ir import (
    INPUT,
    OUTPUT,
    CompileTarget,
    Graph,
    NoAttributes,
    Node,
    Value,
)
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import run_passes
from convloom.compiler.passes.concats import nest_concatenations
from convloom.compiler.plan import arena
from convloom.compiler.plan.arena import Lifetime
from convloom.compiler.plan.lower import Options, lower
from convloom.kernels.contract import targets
from convloom.kernels.contract.spec import Layout, Operand, TensorSpec
from convloom.kernels.movement.movement import Concat
from convloom.kernels.tile.conv_geometry import Conv2d
from hypothesis import given
from hypothesis import strategies as st

from . import nets


def start() -> tuple[Graph, Value]:
    """A graph of one image, for a GPU."""
    graph = Graph(goal=CompileTarget(targets.parse("cuda:sm_90"), torch.float16))
    spec = TensorSpec((1, 8, 6, 5), torch.float32, Layout.NHWC)
    return graph, graph.insert(Node("x", INPUT, NoAttributes(), (spec,), origins=("x",)))


def apply(graph: Graph, op: str, *inputs: Value, attributes: Any = None) -> Value:
    value = graph.add(op, inputs, attributes)
    graph.update(value.node, origins=(value.node,), module_path=value.node)
    return value


def conv(graph: Graph, x: Value) -> Value:
    weight = graph.add_constant(torch.randn(8, graph.spec(x).shape[1], 1, 1), "w", torch.float32)
    return apply(graph, "conv2d", x, weight, attributes=Conv2d())


def finish(graph: Graph, *values: Value) -> Graph:
    graph.insert(Node(OUTPUT, OUTPUT, NoAttributes(), ()), values)
    return graph


def join(graph: Graph, *values: Value) -> Value:
    return apply(graph, "concat", *values, attributes=Concat(1))


def branches(count: int) -> Graph:
    """Different functions of an image, joined."""
    graph, x = start()
    scales = [graph.add_constant(torch.randn(8, 1, 1), "s", torch.float32) for _ in range(count)]
    return finish(graph, join(graph, *(apply(graph, "mul", x, scale) for scale in scales)))


def siblings(count: int) -> Graph:
    graph, x = start()
    return finish(graph, *(conv(graph, x) for _ in range(count)))


def residual_chain(count: int) -> Graph:
    graph, x = start()
    for _ in range(count):
        inner = apply(graph, "relu", conv(graph, x))
        x = apply(graph, "relu", apply(graph, "add", conv(graph, inner), x))
    return finish(graph, x)


def pointwise_chain(count: int) -> Graph:
    graph, x = start()
    x = conv(graph, x)
    for _ in range(count):
        scale = graph.add_constant(torch.randn(8, 1, 1), "s", torch.float32)
        x = apply(graph, "mul", x, scale)
    return finish(graph, x)


class Counter:
    """Counts calls of functions that stand for the work of a step."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.calls = patch, 0

    def watch(self, holder: Any, name: str, weigh: Callable[..., int] = lambda *_: 1) -> None:
        original = getattr(holder, name)

        def counting(*args: Any, **options: Any) -> Any:
            self.calls += weigh(*args)
            return original(*args, **options)

        self.patch.setattr(holder, name, counting)


def compiled(graph: Graph) -> Ledger:
    """The graph through passes and lowering; `explain` can be asked of the ledger."""
    ledger = Report()
    assert graph.goal is not None
    options = Options(graph.goal.target, dtype=graph.goal.dtype)
    ledger.plan = lower(run_passes(graph, ledger), graph, options, ledger)
    return ledger


def watch_extents(counter: Counter) -> None:
    """Operands whose size is asked for."""
    original = Operand.extent.fget  # type: ignore[attr-defined]

    def extent(operand: Operand) -> int:
        counter.calls += 1
        return int(original(operand))

    counter.patch.setattr(Operand, "extent", property(extent))


def watch_inputs(counter: Counter) -> None:
    """Edges that are read."""
    original = Graph.inputs

    def inputs(graph: Graph, name: str) -> tuple[Value, ...]:
        values = original(graph, name)
        counter.calls += len(values)
        return values

    counter.patch.setattr(Graph, "inputs", inputs)


WORK: dict[str, tuple[Callable[[int], Graph], Callable[[Counter], None]]] = {
    "problems of siblings": (siblings, lambda c: c.watch(estimate, "problem_of")),
    "operands of a concatenation": (branches, watch_extents),
    "inputs of a concatenation": (branches, watch_inputs),
    "inputs of a long epilogue": (pointwise_chain, watch_inputs),
    "descendants of a kept result": (
        residual_chain,
        lambda c: c.watch(nx, "descendants", lambda net, name: len(net)),
    ),
}


@pytest.mark.untraced
@pytest.mark.parametrize("what", WORK)
def test_the_work_of_compiling_and_explaining_grows_as_the_network(what: str) -> None:
    build, watch = WORK[what]
    # Of long epilogues, more than one kernel takes.
    sizes = (192, 576) if build is pointwise_chain else (32, 96)
    calls = []
    for count in sizes:
        with pytest.MonkeyPatch.context() as patch:
            counter = Counter(patch)
            graph = build(count)
            watch(counter)
            compiled(graph).to_text()
            calls.append(counter.calls)
    assert calls[1] <= 3.6 * max(calls[0], 1), calls


# Concatenations.


def longest_by_trying(
    values: tuple[Value, ...], others: dict[tuple[Value, ...], Value]
) -> tuple[Value, ...]:
    for length in range(len(values) - 1, 1, -1):
        for start_at in range(len(values) - length + 1):
            stop = start_at + length
            if (part := others.get(values[start_at:stop])) is not None:
                return (*values[:start_at], part, *values[stop:])
    return values


@given(joined=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), max_size=7))
def test_the_longest_concatenations_are_nested(joined: list[list[int]]) -> None:
    graph, x = start()
    parts = [apply(graph, name, x) for name in ("relu", "tanh", "sigmoid")]
    whole = [join(graph, *(parts[at] for at in run)) for run in joined]
    finish(graph, *whole, *parts)
    before = graph.copy()
    others: dict[tuple[Value, ...], Value] = {}
    for value in whole:
        others.setdefault(before.inputs(value.node), value)
    nest_concatenations(graph, Ledger())
    verify(graph)
    for value in whole:
        wanted = longest_by_trying(before.inputs(value.node), others)
        assert graph.inputs(value.node) == wanted
    nets.assert_same_meaning(before, graph, nets.inputs_for(before))


def test_a_long_concatenation_is_read_once() -> None:
    calls = []
    for count in (64, 192):
        with pytest.MonkeyPatch.context() as patch:
            counter = Counter(patch)
            graph = branches(count)
            counter.watch(Value, "__hash__")
            nest_concatenations(graph, Ledger())
            calls.append(counter.calls)
    assert calls[1] <= 3.6 * calls[0], calls


# Epilogues.


def test_a_chain_longer_than_a_kernel_takes_is_several() -> None:
    graph = pointwise_chain(150)
    ledger = Report()
    after = run_passes(graph, ledger, ("fuse_epilogues",))
    stages = [len(node.epilogue) for node in after.compute_nodes() if node.op != "relayout"]
    assert stages == [64, 64, 20], "150 stages, two of them the ops that the chains belong to"
    reasons = {event.reason for event in ledger.events if not event.accepted}
    assert any("has more than 64 stages" in reason for reason in reasons)


# Cycles.


def test_what_follows_from_a_kept_result_is_not_read_by_its_kernel() -> None:
    """And what it is made of may be, without a search."""
    graph, x = start()
    kept = conv(graph, x)
    later = apply(graph, "sigmoid", kept)
    root = apply(graph, "add", kept, later)
    finish(graph, root)
    found = pattern.Match(
        graph.node(root.node), inner=[graph.node(kept.node)], kept=frozenset([kept.node])
    )
    results = {root.node: 0}
    bad = pattern.Fused("add", graph.node(root.node).attributes, (x, later), results=results)
    good = pattern.Fused("add", graph.node(root.node).attributes, (x, x), results=results)
    reason = str(pattern._cycle(graph, found, bad))
    assert f"{later}, which the fused kernel would read, is computed" in reason
    assert pattern._cycle(graph, found, good) is None


# The arena.


def by_looking_at_all(lifetimes: dict[str, Lifetime]) -> dict[str, int]:
    """The lowest place of each buffer, the largest first, held against all others."""
    offsets: dict[str, int] = {}
    for name in sorted(lifetimes, key=lambda n: (-lifetimes[n].size, lifetimes[n].first, n)):
        mine = lifetimes[name]
        taken = sorted(
            (offsets[other], offsets[other] + lifetimes[other].size)
            for other in offsets
            if lifetimes[other].first <= mine.last and mine.first <= lifetimes[other].last
        )
        place = 0
        for begin, end in taken:
            if begin < place + mine.size and place < end:
                place = end
        offsets[name] = place
    return offsets


@given(seed=st.integers(0, 10**6), count=st.integers(0, 25))
def test_buffers_lie_where_those_alive_with_them_leave_room(seed: int, count: int) -> None:
    draw = random.Random(seed)
    lifetimes = {}
    for at in range(count):
        first = draw.randint(0, 12)
        lifetimes[f"b{at}"] = Lifetime(128 * draw.randint(0, 4), first, first + draw.randint(0, 6))
    offsets, _ = arena.allocate(lifetimes)
    assert offsets == by_looking_at_all(lifetimes)
    together = arena.allocate(
        lifetimes,
        lambda a, b: (
            lifetimes[a].first <= lifetimes[b].last and lifetimes[b].first <= lifetimes[a].last
        ),
    )
    assert together[0] == offsets
