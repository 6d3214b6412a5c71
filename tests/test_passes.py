"""Passes: golden text of the graph before and after each, and what every pass promises.

`CONVLOOM_UPDATE_GOLDEN=1` rewrites the files under `golden/`; read the difference afterwards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import convloom
import networkx as nx
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.capture.capture import capture
from convloom.compiler.evaluation.evaluate import evaluate
from convloom.compiler.fusion.rules import HEAVY
from convloom.compiler.graph import text
from convloom.compiler.graph.ir import CONSTANT, INPUT, OUTPUT, Graph, Value
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import NAMES, PASSES, Pass, run_passes, select
from convloom.compiler.passes.layout import choose_dtype, choose_layout
from convloom.kernels.contract.spec import Layout

from . import nets
from .nets import IMAGE, Made, make
from .pass_nets import (
    averaged_branch,
    bottlenecks,
    classifier,
    composites,
    constants,
    conv,
    dead_nodes,
    dense_block,
    equal_nodes,
    identities,
    mixed_layouts,
    norm,
    normalised,
    normalised_image,
    parallel_branches,
    preactivation,
    residual_block,
    siblings,
    small_network,
    unfoldable,
    written_out,
    written_slices,
)

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("CONVLOOM_UPDATE_GOLDEN", "0") not in ("", "0")


CASES: dict[str, Callable[[], Made]] = {
    "recognise_composites": composites,
    "fold_constants": constants,
    "drop_identities": identities,
    "eliminate_common_subexpressions": equal_nodes,
    "eliminate_dead_nodes": dead_nodes,
    "fold_batch_norm": normalised,
    "merge_parallel_convolutions": parallel_branches,
    "simplify_slice_writes": written_slices,
    "lower_batch_norm": unfoldable,
    "fuse_diamonds": written_out,
    "fuse_epilogues": residual_block,
    "sink_prologues": preactivation,
    "choose_partition (siblings)": siblings,
    "project_before_averaging": averaged_branch,
    "nest_concatenations": dense_block,
    "choose_partition": bottlenecks,
    "flatten_in_memory_order": classifier,
    "fuse_small_nets": small_network,
    "choose_layout": mixed_layouts,
    "fuse_stem": normalised_image,
}
"""The pass, and where it has several cases which one it is."""
STEPS = {step.name: step for step in PASSES}
NETS = {make.__name__: make for make in CASES.values()}


@cache
def made(make_net: Callable[[], Made]) -> Made:
    return make_net()


def captured(make_net: Callable[[], Made]) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    module, inputs = made(make_net)
    return nets.captured(module, inputs), inputs


def before(step: Pass, make_net: Callable[[], Made]) -> Graph:
    """A graph of its own, as the earlier passes leave it."""
    graph = captured(make_net)[0]
    if make_net is dead_nodes:
        return graph  # Folding constants already clears away what it leaves behind.
    for earlier in PASSES[: PASSES.index(step)]:
        graph = earlier.run(graph, Ledger())
    return graph


def compare_with_golden(name: str, shown: str) -> None:
    path = GOLDEN / f"{name}.txt"
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(shown)
    assert path.exists(), f"no {path.name}: run once with CONVLOOM_UPDATE_GOLDEN=1"
    assert shown == path.read_text(), "CONVLOOM_UPDATE_GOLDEN=1 accepts the change"


def show(first: Graph, second: Graph, ledger: Ledger) -> str:
    """The graph before and after, and what the ledger says of it.

    Nodes are named by their op and counted, new ones after the old: the names of the capture follow
    torch's own spelling, which is not what these tests are about.
    """
    names: dict[str, str] = {}
    for graph in (first, second):
        for node in graph.nodes():
            if node.name not in names and node.op != OUTPUT:
                stem = SHORT.get(node.op, node.op)
                names[node.name] = f"{stem}_{sum(n.startswith(stem) for n in names.values()) + 1}"
    blocks = [
        f"# {title}\n" + "\n".join(lines_of(renamed(graph, names))) + "\n"
        for title, graph in (("before", first), ("after", second))
    ]
    spelled = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    events = []
    for event in ledger.events:
        known = [names[name] for name in event.nodes if name in names]
        reason = re.sub(rf"\b({spelled})\b", lambda found: names[found[1]], event.reason)
        end = f"-> {names.get(event.into, 'nothing')}" if event.accepted else f"refused: {reason}"
        events.append(f"{event.rule}: {', '.join(known)} {end}")
    return "\n".join([*blocks, "# ledger", *events]) + "\n"


SHORT = {INPUT: "x", CONSTANT: "c"}


def renamed(graph: Graph, names: dict[str, str]) -> Graph:
    """The same graph with other names of nodes."""
    net = nx.relabel_nodes(graph.net, names)
    for name in net:
        net.nodes[name]["node"] = replace(net.nodes[name]["node"], name=name)
    return Graph(net)


def lines_of(graph: Graph) -> list[str]:
    """One line per node; constants that nothing reads are left out, and those that a pass made
    belong to no module."""
    lines = []
    for node in graph.nodes():
        if node.op == CONSTANT:
            if not graph.net.out_degree(node.name):
                continue
            path = node.module_path if "." in node.module_path else ""
            node = replace(node, module_path=path)
        lines.append(text.node_text(graph, node))
    return lines


@pytest.mark.parametrize("name", CASES)
def test_golden_text(name: str) -> None:
    step = STEPS[name.split()[0]]
    graph, ledger = before(step, CASES[name]), Ledger()
    after = step.run(graph.copy(), ledger)
    stem = name.replace(" (", "_").rstrip(")")
    compare_with_golden(stem, show(graph, after, ledger))


def test_golden_text_of_choose_dtype() -> None:
    graph = before(STEPS["choose_layout"], mixed_layouts)
    after = choose_dtype(graph.copy(), torch.float16)
    compare_with_golden("choose_dtype", show(graph, after, Ledger()))


def test_every_pass_has_a_golden_file() -> None:
    assert {name.split()[0] for name in CASES} == set(NAMES)
    stems = {name.replace(" (", "_").rstrip(")") for name in CASES}
    assert {path.stem for path in GOLDEN.glob("*.txt")} == {*stems, "choose_dtype"}


# What every pass promises, on every network.


@pytest.mark.parametrize("net", NETS)
def test_every_pass_keeps_the_meaning_and_the_laws_and_is_idempotent(net: str) -> None:
    graph, inputs = captured(NETS[net])
    if net == "composites":
        # Its parts have no meaning of their own until they are recognised.
        graph = STEPS["recognise_composites"].run(graph, Ledger())
    verify(graph)
    for step in PASSES:
        after = step.run(graph.copy(), Ledger())
        verify(after)
        nets.assert_same_meaning(graph, after, inputs)
        again = step.run(after.copy(), Ledger())
        assert text.to_text(again) == text.to_text(after), f"{step.name} is not idempotent"
        graph = after


@pytest.mark.untraced
@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("name", NAMES)
def test_each_pass_alone_keeps_the_meaning(name: str, net: str) -> None:
    graph, inputs = captured(NETS[net])
    ledger = Ledger()
    after = run_passes(graph, ledger, (name,))
    plain = run_passes(graph, Ledger(), "none")
    nets.assert_same_meaning(plain, after, inputs)


@pytest.mark.parametrize("net", NETS)
def test_passes_do_not_change_the_graph_they_are_given(net: str) -> None:
    graph, _ = captured(NETS[net])
    kept = {name: tensor.clone() for name, tensor in graph.tensors.items()}
    shown = text.to_text(graph)
    run_passes(graph, Ledger())
    assert text.to_text(graph) == shown
    assert all(torch.equal(graph.tensors[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("net", NETS)
def test_every_captured_node_still_has_a_holder_or_was_removed(net: str) -> None:
    graph, _ = captured(NETS[net])
    ledger = Ledger()
    after = run_passes(graph, ledger)
    held = {origin for node in after.nodes() for origin in node.origins}
    mentioned = {name for event in ledger.events if event.accepted for name in event.nodes}
    missing = {node.name for node in graph.compute_nodes()} - held - mentioned
    assert not missing


# Postconditions of single passes.


def after(name: str, make_net: Callable[[], Made]) -> Graph:
    return STEPS[name].run(before(STEPS[name], make_net), Ledger())


def ops(graph: Graph) -> list[str]:
    return [node.op for node in graph.compute_nodes()]


def test_no_identity_is_left() -> None:
    graph = after("drop_identities", identities)
    assert ops(graph) == ["conv2d"]
    assert graph.outputs()[1] == Value(graph.graph_inputs()[0].name)


def test_constants_are_folded_in_fp64() -> None:
    graph = after("fold_constants", constants)
    module, _ = constants()
    weight = module.conv.weight.detach().double()
    scale = (weight.square().sum((1, 2, 3), keepdim=True) + 1e-5).rsqrt()
    (node,) = (node for node in graph.nodes() if node.op == "conv2d")
    folded = graph.inputs(node.name)[1]
    assert ops(graph) == ["conv2d"]
    assert graph.constant(folded).dtype is torch.float64
    assert graph.spec(folded).dtype is torch.float32
    torch.testing.assert_close(graph.constant(folded), weight * scale, rtol=1e-14, atol=1e-14)


def test_constants_become_whole_numbers_not_truth_values() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        return x + m.numbers.long(), x[:, m.numbers.int().long() % 3]

    module, inputs = make(function, (2, 3))
    module.register_buffer("numbers", torch.tensor([2.7, 5.2, -3.9]))
    exe = convloom.compile(module, inputs, target="reference")
    for ours, theirs in zip(exe(*inputs), module(*inputs), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.interpreter
def test_all_results_of_constants_are_folded() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        largest, places = F.max_pool2d(m.weight, 2, return_indices=True)
        return x + largest, places + 1

    module, inputs = make(function, (2, 6, 3, 2))
    module.register_buffer("weight", nets.inputs_of((1, 6, 6, 4))[0])
    for target in ("reference", "interpreter"):
        for ours, theirs in zip(
            convloom.compile(module, inputs, target=target)(*inputs), module(*inputs), strict=True
        ):
            assert torch.equal(ours, theirs)


@pytest.mark.interpreter
def test_zeros_of_different_signs_are_different_numbers() -> None:
    """In equal nodes, and in the stages of siblings."""

    def function(m: Any, x: torch.Tensor) -> Any:
        return x / 0.0, x / -0.0, m.a(x) / 0.0, m.b(x) / -0.0

    module, inputs = make(function, IMAGE, a=conv(1, k=8), b=conv(1, k=8))
    for target in ("reference", "interpreter"):
        results = convloom.compile(module, inputs, target=target)(*inputs)
        for ours, theirs in zip(results, module(*inputs), strict=True):
            assert torch.equal(ours, theirs)


def test_equal_nodes_become_one() -> None:
    graph = after("eliminate_common_subexpressions", equal_nodes)
    assert ops(graph).count("conv2d") == 2, "one of each input"
    assert ops(graph).count("sub") == 2, "x - r and r - x differ"
    values = graph.outputs()
    assert values[2] == values[4] != values[3]


def test_dead_nodes_are_gone_but_inputs_stay() -> None:
    graph = after("eliminate_dead_nodes", dead_nodes)
    assert sorted(ops(graph)) == ["conv2d", "relu", "reshape", "slice"]
    assert len(graph.graph_inputs()) == 2
    used = {source for source, _ in graph.net.edges()}
    assert all(node.name in used for node in graph.nodes() if node.op == CONSTANT)


def test_batch_norm_is_folded_into_weight_and_bias_in_fp64() -> None:
    graph = after("fold_batch_norm", normalised)
    assert "batch_norm" not in ops(graph)
    for node in graph.nodes():
        if node.op in HEAVY:
            weight, bias = graph.inputs(node.name)[1:]
            assert graph.constant(weight).dtype is graph.constant(bias).dtype is torch.float64
            assert [str(stage) for stage in node.epilogue] == ["add"]


def test_batch_norm_is_not_folded_into_what_others_read() -> None:
    graph, ledger = before(STEPS["fold_batch_norm"], unfoldable), Ledger()
    after = STEPS["fold_batch_norm"].run(graph.copy(), ledger)
    assert text.to_text(after) == text.to_text(graph)
    assert all(not event.accepted for event in ledger.events)
    reasons = {graph.node(e.nodes[-1]).module_path: e.reason for e in ledger.events}
    assert "is also read by" in reasons["norm_a"]
    assert "so its result must be stored; it would be fused if only" in reasons["norm_a"]
    assert reasons["norm_b"].startswith("the weight is shared by")
    assert reasons["norm_d"] == "linear has rank 3; linear layers are folded at rank 2"
    assert reasons.keys() == {"norm_a", "norm_b", "norm_d"}, "others have no layer before them"


def test_batch_norm_is_not_folded_past_a_stage() -> None:
    """A constant factor in the epilogue is no bias, whoever fused it so early."""

    def net() -> Made:
        factor = torch.rand(6, 1, 1)
        layers = {"conv": conv(bias=False), "norm": norm()}
        return make(lambda m, x: m.norm(m.conv(x) * factor), IMAGE, **layers)

    graph, inputs = captured(net)
    fused = STEPS["fuse_epilogues"].run(graph.copy(), Ledger())
    folded = STEPS["fold_batch_norm"].run(fused, Ledger())
    assert "batch_norm" in ops(folded)
    nets.assert_same_meaning(graph, folded, inputs)


def test_what_cannot_be_folded_is_lowered_to_two_stages() -> None:
    graph = after("lower_batch_norm", unfoldable)
    assert "batch_norm" not in ops(graph)
    assert ops(graph).count("mul") == 5


def test_a_residual_block_is_two_kernels() -> None:
    graph = after("fuse_epilogues", residual_block)
    first, second = graph.compute_nodes()
    assert [str(stage) for stage in first.epilogue] == ["add", "relu"]
    assert [str(stage) for stage in second.epilogue] == ["add", "add", "relu"]


def test_only_a_one_pixel_filter_takes_a_prologue() -> None:
    graph = after("sink_prologues", preactivation)
    convs = {node.module_path: node for node in graph.nodes() if node.op == "conv2d"}
    assert [str(stage) for stage in convs["small"].prologue] == ["mul", "add", "add(0.5)", "relu"]
    assert not convs["large"].prologue


@pytest.mark.parametrize("dtype", [None, torch.float16])
@pytest.mark.parametrize("net", NETS)
def test_layouts_and_dtypes_after_the_last_pass(net: str, dtype: torch.dtype | None) -> None:
    graph = before(STEPS["choose_layout"], NETS[net])
    own = graph.graph_inputs()[0].spec.dtype
    graph = choose_layout(choose_dtype(graph, dtype), Ledger())
    verify(graph)
    for node in graph.compute_nodes():
        for spec in node.outputs:
            wanted = Layout.NHWC if spec.rank == 4 and node.definition.images else Layout.DENSE
            returned = all(reader == OUTPUT for reader, _ in graph.uses(Value(node.name)))
            assert spec.layout is wanted or node.op == "relayout", node
            assert spec.dtype is (dtype or own) or returned, node
    for value in graph.outputs():
        assert graph.spec(value).layout is Layout.DENSE
        assert graph.spec(value).dtype is own, "the module's own dtype"


def test_one_conversion_serves_all_readers() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        return m.conv(x) + m.conv(x + 1.0) + F.max_pool2d(x, 3, 1, 1)

    graph = run_passes(capture(*make(function, IMAGE, conv=conv())), Ledger())
    (x,) = graph.graph_inputs()
    assert [graph.node(reader).op for reader, _ in graph.uses(Value(x.name))] == ["relayout"]


def test_a_view_of_five_dimensions_of_an_image_is_copied_once() -> None:
    """It is dense for what computes with it: it is no volume, though it comes from an image."""
    module, inputs = make(
        lambda m, x: m.conv(x).view(2, 2, 3, 9, 7).sum(1), (2, 6, 9, 7), conv=conv()
    )
    exe = convloom.compile(module, inputs, target="interpreter", tuning="heuristic")
    assert [step.op for step in exe.plan.steps].count("relayout") == 3  # in, dense, out
    nets.check(exe(*inputs), module, inputs)


def test_choosing_the_same_dtype_changes_nothing() -> None:
    graph = before(STEPS["choose_layout"], mixed_layouts)
    for dtype in (None, torch.float32):
        assert text.to_text(choose_dtype(graph.copy(), dtype)) == text.to_text(graph)


# Numbers, through the kernels.


@pytest.mark.interpreter
@pytest.mark.parametrize("padding", [0, 1, (2, 1)])
@pytest.mark.parametrize("r", [1, 3])
def test_borders_stay_zero_under_a_shift_before_a_padded_convolution(r: int, padding: Any) -> None:
    """relu(s·x + t) of a zero border would be relu(t): the padding comes after the activation."""

    def function(m: Any, x: torch.Tensor) -> Any:
        return m.conv(torch.relu(m.norm(x) + 1.5))

    module, inputs = make(function, IMAGE, norm=norm(), conv=conv(r, padding=padding))
    exe = convloom.compile(module, inputs, target="interpreter")
    sunk = any(step.problem.prologue for step in exe.plan.steps)
    assert sunk is (r == 1)
    nets.check(exe(*inputs), module, inputs)
    border = module.conv.bias.detach()
    if r == 1 and padding != 0:
        corner = exe(*inputs)[:, :, 0, 0]
        torch.testing.assert_close(corner, border.expand_as(corner))


@pytest.mark.untraced
@pytest.mark.interpreter
@pytest.mark.parametrize("net", [name for name in NETS if name != "mixed_layouts"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_compiled_networks_agree_with_eager(net: str, dtype: torch.dtype | None) -> None:
    module, inputs = made(NETS[net])
    with nets.exporting_once():
        exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
    nets.check(exe(*inputs), module, inputs, dtype)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", NAMES)
def test_each_pass_alone_runs(name: str) -> None:
    module, inputs = made(residual_block)
    with nets.exporting_once():
        exe = convloom.compile(module, inputs, target="interpreter", passes=(name,))
    nets.check(exe(*inputs), module, inputs)


# Choosing passes.


def test_select() -> None:
    required = [step.name for step in PASSES if step.required]
    assert select("default") == PASSES
    assert [step.name for step in select("none")] == required
    assert [step.name for step in select(())] == required
    chosen = [step.name for step in select(("sink_prologues", "fold_batch_norm"))]
    assert chosen == [n for n in NAMES if n in {*required, "fold_batch_norm", "sink_prologues"}]
    assert select("fuse_epilogues") == select(("fuse_epilogues",))


def test_every_pass_says_why_it_stands_where_it_stands() -> None:
    assert all(len(step.why) > 20 and step.run.__doc__ for step in PASSES)
    assert len(set(NAMES)) == len(NAMES)


def test_graphs_are_shown_after_each_pass_on_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    graph, _ = captured(residual_block)
    monkeypatch.setenv("CONVLOOM_DEBUG", "3")
    run_passes(graph, Ledger())
    shown = capsys.readouterr().out
    assert all(f"# after {name} (" in shown for name in NAMES)
    assert "[add, add, relu]" in shown


def test_evaluation_in_the_graph_own_dtypes_is_what_eager_computes() -> None:
    module, inputs = made(residual_block)
    graph, _ = captured(residual_block)
    with torch.no_grad():
        want = module(*inputs)
        got = evaluate(graph, inputs)[graph.outputs()[0]]
    assert torch.equal(got, want)
