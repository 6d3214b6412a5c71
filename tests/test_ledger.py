"""The ledger: one record per captured node, figures that add up, JSON that can be read back, and
what differs between two compilations."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom import zoo
from convloom.compiler.api import lowered
from convloom.compiler.explain import account as acc
from convloom.compiler.explain import account_text, diff, picture
from convloom.compiler.explain.account import Account, KernelNode, Record, from_json
from convloom.compiler.explain.report import Report
from convloom.compiler.graph.ledger import Event, Ledger
from convloom.errors import ArtifactError, GraphError, InvalidInputError
from torch import nn
from torch.nn import functional as F

from . import nets
from .nets import IMAGE, Made, make

SM_90 = "cuda:sm_90"


@pytest.fixture(scope="module", autouse=True)
def exporting_once() -> Iterator[None]:
    with nets.exporting_once():
        yield


def residual() -> Made:
    """Two convolutions, batch normalisation that folds, a residual addition, dropout."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(m.norm(m.conv1(x)))
        y = m.drop(torch.relu(m.conv2(y) + x))
        return m.head(y.mean((2, 3)))

    return make(
        function,
        (2, 8, 9, 9),
        conv1=nn.Conv2d(8, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        conv2=nn.Conv2d(8, 8, 3, padding=1),
        drop=nn.Dropout(),
        head=nn.Linear(8, 5),
    )


def branches() -> Made:
    """Siblings and a pooling branch, joined in place, one result read twice."""

    def function(m: Any, x: torch.Tensor) -> Any:
        left, right = torch.relu(m.left(x)), torch.relu(m.right(x))
        joined = torch.cat([left, right, m.project(F.avg_pool2d(x, 3, 1, 1))], 1)
        return m.last(joined), F.max_pool2d(joined, 2)

    layers = {name: nn.Conv2d(8, 16, 1) for name in ("left", "right", "project")}
    return make(function, (2, 8, 8, 8), **layers, last=nn.Conv2d(48, 8, 3))


def leaky() -> Made:
    """A batch normalisation that cannot fold: the convolution's result has two readers."""
    layers = {"conv": nn.Conv2d(6, 4, 3), "norm": nn.BatchNorm2d(4)}

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return m.norm(y) + y

    return make(function, IMAGE, **layers)


def composite() -> Made:
    """Mish by hand, which is put together again."""

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return y * torch.tanh(F.softplus(y))

    return make(function, IMAGE, conv=nn.Conv2d(6, 8, 3))


def small_zoo(name: str) -> Callable[[], Made]:
    def build() -> Made:
        torch.manual_seed(0)
        return zoo.build(name).eval(), (torch.zeros(2, *zoo.entry(name).input_shape),)

    build.__name__ = name
    return build


@cache
def made(net: Callable[[], Made]) -> Made:
    """One module per net, so that it is captured once."""
    return net()


NETS = (residual, branches, leaky, composite, small_zoo("lenet5"), small_zoo("squeezenet1_1"))
every_net = pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)


@cache
def ledger_of(
    net: Callable[[], Made], passes: str = "default", target: str = SM_90, **options: Any
) -> Ledger:
    """The ledger of a compilation that generates no code."""
    module, inputs = made(net)
    _, plan, ledger = lowered(module, inputs, target=target, passes=passes, **options)
    ledger.plan = plan
    return ledger


def account_of(net: Callable[[], Made], passes: str = "default", **options: Any) -> Account:
    return ledger_of(net, passes, **options).account()


def record_of(account: Account, path: str, op: str = "") -> Record:
    found = [r for r in account.nodes if r.module_path == path and op in ("", r.op)]
    assert len(found) == 1, found
    return found[0]


# Records.


@every_net
@pytest.mark.parametrize("passes", ["default", "none"])
def test_every_captured_node_has_one_record(net: Callable[[], Made], passes: str) -> None:
    ledger = ledger_of(net, passes)
    account = ledger.account()
    captured = ledger.snapshot.captured.compute_nodes()
    assert [r.node for r in account.nodes] == [node.name for node in captured]
    kernels = {place.name: place for place in account.kernels}
    assert list(kernels) == [step.name for step in ledger.plan.steps]
    places = {place.name: place for place in account.places}
    assert len(places) == len(account.places)
    for record in account.nodes:
        assert record.kernel in {*kernels, "view", "in place", "removed", "constant"}, record
        assert record.node in places[record.place].nodes
        assert record.before.how == record.after.how == acc.MODELLED
    held = [node for place in account.places for node in place.nodes]
    assert sorted(held) == sorted(r.node for r in account.nodes), "each in one place"
    for source, target in account.edges:
        assert source in places and target in places


@every_net
def test_without_fusion_nothing_is_saved(net: Callable[[], Made]) -> None:
    account = account_of(net, "none")
    t = account.totals
    assert t.kernels_before == t.kernels_after
    assert t.bytes_before == t.bytes_after
    assert t.before.us == pytest.approx(t.after.us)
    for record in account.nodes:
        assert record.bytes_saved == record.kernels_saved == 0
        assert record.before.us == pytest.approx(record.after.us)


def kernels_of_nodes(account: Account) -> list[KernelNode]:
    """Conversions belong to no node."""
    used = {record.kernel for record in account.nodes}
    return [place for place in account.kernels if place.name in used]


@every_net
def test_what_nodes_save_adds_up(net: Callable[[], Made]) -> None:
    fused, unfused = account_of(net), account_of(net, "none")
    saved = sum(record.kernels_saved for record in fused.nodes)
    launches = [sum(p.launches for p in kernels_of_nodes(each)) for each in (unfused, fused)]
    assert saved == launches[0] - launches[1] >= 0
    assert fused.totals.before == unfused.totals.after
    moved = [sum(place.size_bytes for place in kernels_of_nodes(each)) for each in (unfused, fused)]
    assert sum(record.bytes_saved for record in fused.nodes) == moved[0] - moved[1] > 0
    parts = sum(record.after.us for record in fused.nodes)
    own = {record.kernel for record in fused.nodes}
    assert parts == pytest.approx(sum(p.modelled.us for p in fused.kernels if p.name in own))
    assert sum(place.share for place in fused.kernels) == pytest.approx(1.0)


def test_what_became_of_each_node() -> None:
    account = account_of(residual)
    conv, norm = record_of(account, "conv1", "conv2d"), record_of(account, "norm")
    assert norm.kernel == conv.kernel and norm.kernels_saved == 1 and conv.kernels_saved == 0
    assert norm.bytes_saved == norm.bytes_before - 4 * 8 * 4, "all but its four vectors"
    assert record_of(account, "drop").kernel == acc.REMOVED
    assert record_of(account, "conv1", "reshape").kernel == acc.CONSTANT
    kinds = {place.kind for place in account.kernels if conv.node in place.nodes}
    assert kinds == {"convolution"}
    siblings = account_of(branches)
    left, right = (record_of(siblings, name, "conv2d") for name in ("left", "right"))
    assert left.kernel == right.kernel and left.kernels_saved + right.kernels_saved == 1


def test_concatenations_in_place_and_partly_in_place() -> None:
    def net(m: Any, x: torch.Tensor) -> Any:
        return m.last(torch.cat([m.wide(x), m.narrow(x)], 1))

    convs = {"wide": nn.Conv2d(6, 8, 3, padding=1), "narrow": nn.Conv2d(6, 16, 1)}
    whole = account_of(cache(lambda: make(net, IMAGE, **convs, last=nn.Conv2d(24, 8, 1))))
    concat = next(record for record in whole.nodes if record.op == "concat")
    assert concat.kernel == whole.place(concat.place).what == acc.IN_PLACE
    assert concat.bytes_saved == concat.bytes_before > 0
    assert concat.kernels_saved == concat.kernels_before > 0

    def partly(m: Any, x: torch.Tensor) -> Any:
        return m.last(torch.cat([m.wide(x), x], 1))

    layers = {"wide": nn.Conv2d(8, 8, 3, padding=1), "last": nn.Conv2d(16, 8, 1)}
    account = account_of(cache(lambda: make(partly, (2, 8, 7, 5), **layers)))
    concat = next(record for record in account.nodes if record.op == "concat")
    copies = account.place(concat.kernel)
    assert copies.op == "relayout" and copies.nodes == ()
    assert account.place(concat.place).what == acc.IN_PLACE
    assert concat.bytes_saved == concat.bytes_before - copies.size_bytes > 0
    assert {(copies.name, concat.place)} <= set(account.edges)


def test_a_composite_stands_at_its_last_node() -> None:
    account = account_of(composite)
    pieces = [record for record in account.nodes if record.part_of == "mish"]
    assert [record.op for record in pieces] == ["softplus", "tanh"]
    assert all(r.before.us == 0 and r.kernels_before == 0 for r in pieces)
    (last,) = [record for record in account.nodes if record.op == "mul"]
    assert last.kernels_before == 1 and last.before.us > 0 and not last.part_of
    assert "a part of mish" in account_text.to_text(account)


def test_torch_fallbacks_have_no_time() -> None:
    def net() -> Made:
        return make(lambda m, x: torch.relu(torch.logcumsumexp(m.conv(x), 1)), IMAGE,
                    conv=nn.Conv2d(6, 4, 3))  # fmt: skip

    ledger = ledger_of(net, fallback="torch")
    account = ledger.account()
    record = next(r for r in account.nodes if "logcumsumexp" in r.op)
    assert account.place(record.kernel).what == acc.FALLBACK
    assert record.before == record.after == acc.UNKNOWN and record.bytes_before == 0
    assert account.totals.torch_fallbacks == 1
    text = ledger.to_text()
    assert "not measured -> not measured" in text
    assert "torch fallbacks (in no figure above)" in text
    assert Report.from_json(ledger.to_json()).account() == account


def test_refusals_are_told_with_their_reason() -> None:
    account = account_of(leaky)
    norm = record_of(account, "norm")
    assert any("is also read by" in refusal.reason for refusal in norm.refused)
    assert "refused  batch_norm(heavy(x, w) + b)" in account_text.to_text(account)


@pytest.mark.parametrize("target", ["interpreter", "reference", "emulator:sm_90"])
def test_what_is_for_no_gpu_has_no_times(target: str) -> None:
    """Not in the account, its text, its pictures and a comparison: no machine would show them."""
    account, on_gpu = account_of(composite, target=target), account_of(composite)
    assert account.machine == "" and account.totals.bytes_before == on_gpu.totals.bytes_before
    assert account.totals.kernels_before == on_gpu.totals.kernels_before
    times = [(r.before, r.after) for r in account.nodes]
    times += [(place.modelled, place.measured) for place in account.places]
    times.append((account.totals.before, account.totals.after))
    assert all(time == acc.UNKNOWN for pair in times for time in pair)
    assert not any(place.share for place in account.places)
    none = account_of(composite, "none", target=target)
    told = (
        account_text.to_text(account), picture.to_svg(account),
        diff.to_text(diff.compare(none, account, ("none", "default"))),
    )  # fmt: skip
    for text in told:
        assert not re.search(r"\d us\b|modelled time|not measured", text), text
    assert "is not a GPU: no times are modelled; nothing was measured" in told[0]
    first = account.kernels[0].name
    measured = account_text.to_text(account.with_measured({first: 5.0}, "the interpreter"))
    assert "5.0 us measured" in measured and "measured times are from the interpreter" in measured


def test_other_gpus_are_modelled_as_they_are() -> None:
    on_gpu, older = (account_of(leaky, target=name) for name in (SM_90, "cuda:sm_80"))
    assert older.machine != on_gpu.machine and older.totals.before != on_gpu.totals.before


def test_half_precision_halves_the_bytes() -> None:
    single, half = account_of(branches), account_of(branches, dtype=torch.float16)
    assert (single.dtype, half.dtype) == ("float32", "float16")
    assert 0.4 < half.totals.bytes_before / single.totals.bytes_before < 0.7


def test_the_account_does_not_depend_on_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    cold, warm = (
        convloom.compile(*leaky(), target=SM_90, tuning="heuristic").ledger for _ in range(2)
    )
    assert any(tmp_path.rglob("*")), "the second compilation found compiled kernels"
    assert cold.account() == warm.account()
    assert cold.events == warm.events


# Events.


def test_events_carry_further_figures() -> None:
    ledger = Report()
    ledger.accept("a => b", [], "b", 8, label="ab", kernels_saved=1)
    for _ in range(3):
        ledger.refuse("a => b", [], "too wide", label="ab")
    assert ledger.events == [
        Event("a => b", (), True, "", "b", 8, "ab", 1),
        Event("a => b", (), False, "too wide", label="ab"),
    ]
    assert ledger.bytes_saved == 8


def test_an_account_needs_a_plan() -> None:
    with pytest.raises(GraphError, match="no plan yet"):
        Report().account()


# Measured times.


@pytest.mark.interpreter
def test_measured_times_are_shown_when_they_are_known() -> None:
    module, inputs = leaky()
    exe = convloom.compile(module, inputs, target="interpreter")
    assert "nothing was measured" in exe.explain()
    times = dict(exe.profile(*inputs))
    account = exe.ledger.account()
    assert {p.name: p.measured.us for p in account.kernels} == pytest.approx(times)
    assert account.totals.measured.us == pytest.approx(sum(times.values()))
    assert account.measured_on == "the interpreter, not a GPU"
    text = exe.explain()
    assert "measured times are from the interpreter" in text and "us measured" in text
    assert from_json(exe.ledger.to_json(), "x") == account


def test_measured_times_of_some_steps_are_no_time_of_the_network() -> None:
    ledger = ledger_of(residual)
    first, *_ = [step.name for step in ledger.plan.steps]
    for known in (ledger, Report.from_json(ledger.to_json())):
        measured = known.with_measured({first: 12.5}, "a GPU")
        account = measured.account()
        assert account.place(first).measured == acc.Time(12.5, acc.MEASURED)
        assert account.totals.measured == acc.UNKNOWN
        assert "12.5 us measured" in measured.to_text()
        assert "nothing was measured" in known.to_text()
        with pytest.raises(InvalidInputError, match=r"no step 'nowhere'"):
            known.with_measured({"nowhere": 1.0}, "a GPU")


# JSON.


@every_net
def test_an_account_survives_json(net: Callable[[], Made]) -> None:
    ledger = ledger_of(net)
    data = json.loads(json.dumps(ledger.to_json(), allow_nan=False))
    assert list(data)[:2] == ["schema", "version"]
    again = Report.from_json(data, "file")
    assert again.account() == ledger.account()
    assert again.bytes_saved == ledger.bytes_saved
    assert again.to_text() == ledger.to_text()


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda data: {key: value for key, value in data.items() if key != name}


def _node(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda data: {**data, "nodes": [{**data["nodes"][0], **changes}, *data["nodes"][1:]]}


DAMAGE = (
    (lambda data: [data], "expected a ledger as `convloom explain NAME --json` writes it"),
    (_without("schema"), "expected a ledger"),
    (lambda data: {**data, "version": 1}, "expected version 2 of the ledger's schema, got 1"),
    (_without("totals"), "at ledger expected the field 'totals'"),
    (lambda data: {**data, "nodes": {}}, "at ledger.nodes expected a list, got {}"),
    (_node(bytes_saved="many"), "at ledger.nodes[0].bytes_saved expected a value of type int"),
    (_node(bytes_saved=True), "ledger.nodes[0].bytes_saved expected a value of type int, got True"),
    (_node(before=3.5), "at ledger.nodes[0].before expected the field 'us', got 3.5"),
    (lambda data: {**data, "edges": [["a", "b", "c"]]}, "at ledger.edges[0] expected 2 values"),
)


@pytest.mark.parametrize(("damage", "message"), DAMAGE)
def test_damaged_json_is_refused(damage: Callable[[Any], Any], message: str) -> None:
    data = json.loads(json.dumps(ledger_of(leaky).to_json()))
    with pytest.raises(ArtifactError) as error:
        from_json(damage(data), "old.json")
    assert message in str(error.value) and "old.json" in str(error.value)


# Text.


def test_text_is_a_tree_of_modules() -> None:
    module = nn.Sequential()
    module.add_module("stem", nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    module.add_module("body", nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())))

    def net() -> Made:
        return module.eval(), (torch.zeros(2, 3, 8, 8),)

    text = ledger_of(net).to_text()
    lines = text.splitlines()
    stem, body = (next(at for at, line in enumerate(lines) if line.startswith(name))
                  for name in ("stem ", "body "))  # fmt: skip
    assert " ops, 2 -> 1 kernels, modelled" in lines[stem] and stem < body
    assert any(line.startswith("  0 ") for line in lines[body:])
    assert any(line.startswith("    1  ") and "relu" in line for line in lines[body:])
    assert "    by       epilogue" in text
    assert text.rindex("measured time") > text.rindex("modelled time") > text.rindex("relu")
    assert "\nrules\n" in text and "f(heavy(x)) => heavy(x, epilogue=[f])" in text


def test_refusals_are_counted_by_reason() -> None:
    base = account_of(leaky)
    reasons = (
        "conv2d_7 is also read by relu_3",
        "conv2d is also read by relu",
        "%add.1 is also read by made_12",
        "modelled 25.0 us together, 1,205.6 us apart on cuda:sm_90",
        "modelled 8.0 us together, 5.6 us apart on cuda:sm_90",
        "another fusion saves more: linear-chain at linear_2",
        "the linear layer is too wide",
    )
    names = ("conv2d", "relu", "add", "linear", "linear_2", "relu_3", "conv2d_7")
    records = tuple(replace(base.nodes[0], node=name, refused=()) for name in names)
    events = tuple(Event("rule", (), False, reason, label="short") for reason in reasons)
    found = account_text.refusals_by_reason(replace(base, nodes=records, events=events))
    assert found == [
        (3, "short", "conv2d_7 (conv) is also read by relu_3 (conv), for example"),
        (2, "short", "modelled 25.0 us together, 1,205.6 us apart on cuda:sm_90, for example"),
        (1, "short", "another fusion saves more: linear-chain at linear_2 (conv)"),
        (1, "short", "the linear layer is too wide"),
    ]


def test_reasons_name_modules() -> None:
    paths = {"conv2d_5": "layer1.conv", "relu": "relu"}
    assert account_text.with_paths("conv2d_5 and %relu, relu", paths) == (
        "conv2d_5 (layer1.conv) and %relu (relu), relu"
    )


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (999, "999 bytes"), (1500, "1.5 kB"), (2e6, "2.0 MB"),
     (3.21e9, "3.2 GB"), (-1500, "-1.5 kB")],
)  # fmt: skip
def test_sizes_are_readable(size: int, text: str) -> None:
    assert account_text.size_text(int(size)) == text


# Differences.


@every_net
def test_a_compilation_does_not_differ_from_itself(net: Callable[[], Made]) -> None:
    account = account_of(net)
    found = diff.compare(account, account, ("a", "b"))
    assert found.vanished == found.appeared == found.changes == ()
    assert found.gone_refusals == found.new_refusals == ()
    assert "0 kernels vanished" in diff.to_text(found)


@every_net
def test_differences_of_two_pass_selections(net: Callable[[], Made]) -> None:
    old, new = account_of(net, "none"), account_of(net)
    found = diff.compare(old, new, ("none", "default"))
    assert len(old.kernels) - len(found.vanished) == len(new.kernels) - len(found.appeared)
    assert (found.before.kernels, found.after.kernels) == (
        old.totals.kernels_after, new.totals.kernels_after,
    )  # fmt: skip
    back = diff.compare(new, old, ("default", "none"))
    assert (back.vanished, back.appeared) == (found.appeared, found.vanished)
    assert (back.new_refusals, back.gone_refusals) == (found.gone_refusals, found.new_refusals)
    assert {c.node for c in back.changes} == {c.node for c in found.changes}
    assert json.loads(json.dumps(found.to_json()))["schema"] == "convloom-ledger-diff"


def test_a_difference_names_kernels_nodes_rules_and_refusals() -> None:
    found = diff.compare(account_of(residual, "none"), account_of(residual), ("none", "default"))
    norm = next(change for change in found.changes if change.module_path == "norm")
    assert norm.before == "batch_norm" and norm.with_before == ()
    assert norm.after == "conv2d" and len(norm.with_after) == 2
    assert any("batch_norm" in rule for rule in norm.rules) and norm.dropped == ()
    text = diff.to_text(found)
    assert "Net: none -> default" in text and "  + conv2d(" in text and "  - relu(" in text
    assert "norm batch_norm" in text and "      was      batch_norm" in text
    leaks = diff.compare(account_of(leaky, "none"), account_of(leaky), ("none", "default"))
    assert any("is also read by" in reason for _, _, reason in leaks.new_refusals)
    assert "      without  " in diff.to_text(
        diff.compare(account_of(residual), account_of(residual, "none"), ("default", "none"))
    )


def test_a_difference_of_unlike_work_says_so() -> None:
    accounts = [account_of(leaky, target=name) for name in (SM_90, "cuda:sm_80")]
    text = diff.to_text(diff.compare(*accounts, ("a", "b")))
    assert "target, dtype or batch differ" in text


def test_different_models_are_not_compared() -> None:
    with pytest.raises(InvalidInputError) as error:
        diff.compare(account_of(residual), account_of(small_zoo("lenet5")), ("a.json", "b.json"))
    message = str(error.value)
    assert "got Net (a.json) and Sequential (b.json); captured ops only in a.json: " in message
    assert "; only in b.json: " in message and "more" in message
    account = account_of(residual)
    with pytest.raises(InvalidInputError, match=r"ops only in b\.json: extra \(relu top\)$"):
        extra = replace(account.nodes[0], node="extra", op="relu", module_path="top")
        diff.compare(account, replace(account, nodes=(*account.nodes, extra)), ("a", "b.json"))
