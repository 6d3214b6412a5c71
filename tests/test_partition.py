"""The choice among overlapping fusions, and what users may force and forbid."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import convloom
import pytest
import torch
from convloom import zoo
from convloom.compiler import api
from convloom.compiler.capture.capture import capture
from convloom.compiler.fusion import overrides, partition
from convloom.compiler.graph import text
from convloom.compiler.graph.ir import OUTPUT, CompileTarget, Value
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.passes import LABELS, PASSES, choose_partition
from convloom.compiler.passes.fusions import fuse
from convloom.compiler.run.executable import Executable
from convloom.compiler.run.runtime import ReferenceRunner
from convloom.errors import InvalidInputError
from convloom.kernels.contract import targets
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from . import nets

worths = st.floats(0.125, 64.0, width=16)
families = st.lists(
    st.tuples(worths, st.frozensets(st.sampled_from("abcdefgh"), min_size=1, max_size=4)),
    max_size=9,
)


def by_trying_everything(family: list[tuple[float, frozenset[str]]]) -> float:
    """The largest total worth of pairwise disjoint sets."""
    best = 0.0
    for count in range(len(family) + 1):
        for chosen in combinations(family, count):
            names = [name for _, members in chosen for name in members]
            if len(names) == len(set(names)):
                best = max(best, sum(worth for worth, _ in chosen))
    return best


@given(family=families)
def test_the_best_disjoint_sets_are_found(family: list[tuple[float, frozenset[str]]]) -> None:
    values, sets = [worth for worth, _ in family], [members for _, members in family]
    chosen = partition.best_disjoint(values, sets)
    names = [name for at in chosen for name in sets[at]]
    assert len(names) == len(set(names))
    assert sum(values[at] for at in chosen) == by_trying_everything(family)
    assert partition.best_disjoint(values, sets) == chosen


def test_equal_totals_keep_the_earlier_choice() -> None:
    sets = [frozenset("ab"), frozenset("bc"), frozenset("a"), frozenset("c")]
    assert partition.best_disjoint([1.0, 1.0, 0.5, 0.5], sets) == {0, 3}
    assert partition.best_disjoint([1.0, 1.0], sets[:2]) == {0}


def test_a_long_chain_of_overlaps_is_solved_without_recursion() -> None:
    sets = [frozenset((str(at), str(at + 1))) for at in range(3000)]
    assert len(partition.best_disjoint([1.0] * len(sets), sets)) == 1500


def test_a_proposal_is_not_made_where_its_rule_refuses_by_then() -> None:
    """What was chosen before it has rewritten its surroundings."""
    graph = nets.captured(Bottlenecks(32, 16).eval().half(), (torch.zeros(1, 32, 14, 14).half(),))
    for step in PASSES[: [step.name for step in PASSES].index("choose_partition")]:
        graph = step.run(graph, Ledger())
    (proposal, *_) = partition.propose_matches(fuse.RULES, graph, Ledger())
    inner = proposal.nodes[0]
    graph.set_inputs(OUTPUT, (*graph.outputs(), Value(inner.name)))
    before = text.to_text(graph)
    assert not proposal.make(graph, Ledger())
    assert text.to_text(graph) == before


# Whole compilations.


class Bottlenecks(nn.Module):
    """Two residual bottlenecks, as modules with paths."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.layer1, self.layer2 = Bottleneck(wide, narrow), Bottleneck(wide, narrow)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layer2(self.layer1(x))
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and the shortcut."""

    def __init__(self, wide: int, narrow: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide, narrow, 1)
        self.conv2 = nn.Conv2d(narrow, narrow, 3, padding=1)
        self.conv3 = nn.Conv2d(narrow, wide, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.conv2(torch.relu(self.conv1(x))))
        return torch.relu(self.conv3(y) + x)


def compiled(
    target: str = "reference", *, batch: int = 1, wide: int = 32, narrow: int = 16, **options: Any
) -> Executable:
    module, x = Bottlenecks(wide, narrow).eval(), torch.zeros(batch, wide, 14, 14)
    return convloom.compile(module.half(), (x.half(),), target=target, **options)


def planned(target: str, **sizes: Any) -> Executable:
    """As `compiled`, without machine code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(api, "fitted", lambda lowering, choose, _: lowering(choose))
        patch.setattr(api, "runner_for", lambda graph, *_: ReferenceRunner(graph))
        return compiled(target, **sizes)


def refusals(exe: Executable) -> str:
    return "\n".join(event.reason for event in exe.ledger.events if not event.accepted)


def kernels(exe: Executable) -> list[str]:
    return [step.op for step in exe.plan.steps]


def test_forbidden_fusions_are_refused_with_that_reason() -> None:
    chains = [op for op in kernels(compiled()) if op == "conv_chain"]
    assert len(chains) == 2
    exe = compiled(forbid=["rotated-bottleneck", "conv-1x1@layer2.*"])
    assert "forbidden by forbid='rotated-bottleneck'" in refusals(exe)
    assert "forbidden by forbid='conv-1x1@layer2.*'" in refusals(exe)
    accepted = {event.rule for event in exe.ledger.events if event.accepted}
    assert not any(LABELS.all.get(rule) == "rotated-bottleneck" for rule in accepted)


def test_a_module_path_forbids_every_fusion_there() -> None:
    exe = compiled(forbid=["layer1.*", "layer2.*"])
    assert kernels(exe).count("conv2d") == 6 and "relu" in kernels(exe)


def test_what_is_forbidden_still_computes_the_same() -> None:
    module, x = Bottlenecks(32, 16).eval(), torch.randn(1, 32, 6, 5)
    whole = convloom.compile(module, (x,), target="reference")
    parted = convloom.compile(
        module, (x,), target="reference", forbid=["epilogue", "rotated-bottleneck"]
    )
    torch.testing.assert_close(parted(x), whole(x))


def test_forcing_overrides_the_cost_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """One tile of 1024 channels takes all the registers of a multiprocessor: by the model that
    loses more than the traffic it saves."""
    monkeypatch.setenv("CONVLOOM_CHECK", "1")  # Small bottlenecks are evaluated above.
    big = {"batch": 32, "wide": 1024, "narrow": 256}
    refused = planned("cuda:sm_90", **big)
    assert "conv_chain" not in kernels(refused)
    assert "us apart on cuda:sm_90" in refusals(refused)
    emulated = refusals(planned("emulator:sm_90", **big))
    assert "modelled slower together than apart on cuda:sm_90" in emulated
    assert "conv_chain" in kernels(planned("reference", **big)), "no GPU, no model of its times"
    forced = planned("cuda:sm_90", **big, force=["expand-reduce@layer1.*"])
    assert kernels(forced).count("conv_chain") == 1


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"force": ["rotated-botleneck"]}, ("rotated-botleneck", "did you mean", "rotated-bottl")),
        ({"forbid": ["layer9.*"]}, ("forbid='layer9.*'", "no fusion or module path", "layer1")),
        ({"forbid": ["epilog@layer1.*"]}, ("unknown fusion 'epilog'", "did you mean epilogue")),
        ({"forbid": ["epilogue@layr1.*"]}, ("no module path of that name",)),
        ({"force": ["epilogue"], "forbid": ["epilogue"]}, ("both forced and forbidden",)),
        (
            {"force": ["rotated-bottleneck"], "forbid": ["rotated-bottleneck@layer1.*"]},
            ("contradict each other at rotated-bottleneck", "narrow it"),
        ),
        ({"force": "epilogue"}, ("force: expected a list of names",)),
        ({"forbid": [3]}, ("forbid: expected a list of names",)),
    ],
)
def test_bad_wishes_are_refused(options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        compiled(**options)
    for part in parts:
        assert part in str(caught.value)


def test_a_forced_fusion_that_is_illegal_gives_the_reason_of_its_guard() -> None:
    module, x = Bottlenecks(32, 16).eval(), torch.randn(1, 32, 6, 5)
    with pytest.raises(InvalidInputError, match=r"cannot be fused.*float32 needs too many"):
        convloom.compile(module, (x,), target="reference", force=["rotated-bottleneck"])


def test_a_forced_fusion_that_matches_nothing_says_so() -> None:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    with pytest.raises(InvalidInputError, match="no fusion matches there"):
        convloom.compile(
            module, (torch.randn(1, 3, 8, 8),), target="reference", force=["rotated-bottleneck"]
        )


def test_a_forced_fusion_that_is_made_may_be_refused_elsewhere() -> None:
    graph, ledger = capture(Bottlenecks(32, 16).eval(), (torch.zeros(1, 32, 6, 5),)), Ledger()
    rule = next(name for name, label in LABELS.all.items() if label == "rotated-bottleneck")
    first, *_, last = graph.compute_nodes()
    ledger.refuse(rule, [first], "too large")
    with pytest.raises(InvalidInputError, match="too large"):
        overrides.check_forced(graph, ("rotated-bottleneck",), ledger, LABELS)
    ledger.accept(rule, [first], first.name)
    ledger.refuse(rule, [last], "too large")
    overrides.check_forced(graph, ("rotated-bottleneck",), ledger, LABELS)


def test_every_fusion_has_a_label_of_its_own_kind() -> None:
    assert all(label == label.lower() and "@" not in label for label in LABELS.all.values())
    assert all(LABELS.all.values())
    assert overrides.concerns("siblings", "siblings", ())
    assert not overrides.concerns("a.*", "s", ("b",))


def test_the_choice_is_the_same_every_time() -> None:
    plans = [compiled("cuda:sm_90").plan.to_text() for _ in range(2)]
    assert plans[0] == plans[1]


# Siblings with different ends.


def different_ends(m: Any, x: torch.Tensor) -> Any:
    return torch.relu(m.a(x)), m.b(x), torch.relu(m.c(x)), torch.sigmoid(m.d(x) * m.scale)


def sibling_net(bias: Callable[[str], bool]) -> nets.Made:
    layers = {name: nn.Conv2d(6, 8, 1, bias=bias(name)) for name in "abcd"}
    module, inputs = nets.make(different_ends, nets.IMAGE, **layers)
    module.register_buffer("scale", nets.inputs_of((8, 1, 1), seed=5)[0])
    return module, inputs


@pytest.mark.interpreter
@pytest.mark.parametrize("without", ["", "b", "ac", "abcd"])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_siblings_with_different_activations_are_one_kernel(
    without: str, dtype: torch.dtype | None
) -> None:
    module, inputs = sibling_net(lambda name: name not in without)
    exe = convloom.compile(module, inputs, target="interpreter", dtype=dtype)
    assert [step.op for step in exe.plan.steps].count("conv2d") == 1
    nets.Truth(module, inputs, dtype).check(exe(*inputs))


@pytest.mark.interpreter
def test_a_siblings_nan_stays_its_own() -> None:
    """A stage of one member may not touch the columns of another."""
    module, (x,) = sibling_net(lambda name: True)
    with torch.no_grad():
        module.b.bias[3] = float("nan")  # type: ignore[index, union-attr]
        module.b.bias[4] = float("inf")  # type: ignore[index, union-attr]
    exe = convloom.compile(module, (x,), target="interpreter")
    for ours, theirs in zip(exe(x), module(x), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert torch.equal(ours.isinf(), theirs.isinf())


def test_a_sibling_that_another_fusion_needs_is_left_out() -> None:
    """Groups less one member are proposals too: the best partition may want that member."""
    module, inputs = sibling_net(lambda name: True)
    graph = nets.captured(module, inputs)
    for step in PASSES[: [p.name for p in PASSES].index("choose_partition")]:
        graph = step.run(graph, Ledger())
    graph.goal = CompileTarget(targets.parse("reference"))
    from convloom.compiler.passes.fusions.siblings import propose_siblings

    sizes = sorted(len(proposal.nodes) for proposal in propose_siblings(graph, Ledger()))
    assert sizes == [3, 3, 3, 3, 4]
    after = choose_partition(graph, Ledger())
    assert sum(node.op == "conv2d" for node in after.compute_nodes()) == 1


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_small_network_of_up_to_three_layers_is_one_kernel(layers: int) -> None:
    def run(m: Any, x: torch.Tensor) -> torch.Tensor:
        for conv in m.convs:
            x = nn.functional.max_pool2d(torch.relu(conv(x)), 2)
        return m.last(torch.relu(m.hidden(x.flatten(1))))

    convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers))
    hidden = nn.Linear(4 * (16 >> layers) ** 2, 12)
    last = nn.Linear(12, 5)
    module, inputs = nets.make(run, (2, 4, 16, 16), convs=convs, hidden=hidden, last=last)
    exe = convloom.compile(module, inputs, target="reference")
    assert kernels(exe) == ["relayout", "small_net"]


@pytest.mark.parametrize(("batch", "whole"), [(8, True), (9, False)])
def test_the_interpreter_is_not_given_one_image_after_the_other(batch: int, whole: bool) -> None:
    """A network in one kernel has a program for each image."""
    exe = convloom.compile(
        zoo.build("lenet5").eval(), (torch.zeros(batch, 1, 32, 32),), target="interpreter"
    )
    assert ("small_net" in kernels(exe)) == whole
    assert ("9 images would be computed one after the other" in refusals(exe)) != whole
