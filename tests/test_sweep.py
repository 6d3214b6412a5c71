"""The sweep over other people's networks: what it writes, and a few of them (`slow`)."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from convloom.benchmarks import foreign, sweep
from convloom.benchmarks.sweep import Row
from convloom.errors import CaptureError, InvalidInputError
from torch import nn

RESULTS = Path(foreign.__file__).parent / "results"


class Small(nn.Module):
    """Takes images of 96 pixels or more; `function` is what it does behind a convolution."""

    def __init__(self, function=torch.relu) -> None:
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, stride=8), function
        self.register_buffer("running_mean", torch.zeros(4))
        self.register_buffer("filter", torch.ones(4))
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        assert x.shape[-1] >= 96, "too small"
        return self.function(self.conv(x)) * self.gain


def refused(x):
    if x.sum() > 0:
        return x
    return -x


NETWORKS = {
    "torchvision/good": torch.relu,
    "torchvision/odd": lambda x: torch.erfinv(torch.tanh(x)),
    "timm/refused": refused,
    "timm/infinite": lambda x: torch.exp(1e4 * x.abs() + 1e4),
}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instead of torchvision and timm."""
    versions = SimpleNamespace(__version__="1.2+cu1"), SimpleNamespace(__version__="3.4")
    monkeypatch.setattr(foreign, "import_libraries", lambda: versions)
    monkeypatch.setattr(foreign, "FAMILIES", {name: "family" for name in NETWORKS})
    monkeypatch.setattr(foreign, "FIRST", frozenset(NETWORKS))
    monkeypatch.setattr(sweep, "SWEPT", ("timm/asked",))
    families = {
        library: {"family": tuple(n.partition("/")[2] for n in NETWORKS if n.startswith(library))}
        for library in foreign.LIBRARIES
    }
    monkeypatch.setattr(foreign, "LIBRARIES", families)
    monkeypatch.setattr(
        foreign, "build", lambda name: foreign.randomised(Small(NETWORKS[name])).eval()
    )


def test_the_names_are_those_asked_for() -> None:
    """22 of torchvision, 57 of timm, each once; every family has a member whose kernels run."""
    libraries = [name.partition("/")[0] for name in foreign.FAMILIES]
    assert (libraries.count("torchvision"), libraries.count("timm")) == (22, 57)
    members = [m for families in foreign.LIBRARIES.values() for m in families.values()]
    assert len(list(itertools.chain(*members))) == len(foreign.FAMILIES)
    assert {foreign.FAMILIES[name] for name in foreign.FIRST} == set(foreign.FAMILIES.values())


@pytest.mark.interpreter
def test_a_network_that_compiles(small: None) -> None:
    row = sweep.tried("torchvision/good", interpret=True)
    assert (row.status, row.reason, row.reference, row.interpreter) == (
        "compiles", "", "agrees", "agrees",
    )  # fmt: skip
    assert (row.side, row.convs, row.missing) == (96, 1, {})
    assert row.kernels > 0 and row.planned > 0 and row.git
    assert sweep.tried("torchvision/good", interpret=False).interpreter == ""


def test_a_network_with_an_op_that_is_missing(small: None) -> None:
    row = sweep.tried("torchvision/odd", interpret=True)
    assert row.status == "ops missing"
    (missing,) = row.missing
    assert missing == "aten.erfinv.default: no kernel for this op"
    assert row.reason == f"1x {missing}"
    assert (row.reference, row.interpreter) == ("agrees", "")


def test_networks_that_cannot_be_tried(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    row = sweep.tried("timm/refused", interpret=True)
    assert row.status == "refused" and "could not capture" in row.reason
    row = sweep.tried("timm/infinite", interpret=False)
    assert row.status == "wrong" and "not finite" in row.reason
    monkeypatch.setattr(foreign, "SIDES", (8, 64))
    row = sweep.tried("torchvision/good", interpret=False)
    assert row.status == "not built" and "takes no image of side (8, 64)" in row.reason
    assert "too small" in row.reason


def test_networks_of_pairs_and_videos_with_several_results() -> None:
    class Pairs(nn.Module):
        def forward(self, first, second):
            return {"sum": first[:, :, ::8] + second[:, :, ::8], "other": [first.amax(1)]}

    pair = foreign.fitting_inputs(Pairs())
    assert [tuple(x.shape) for x in pair] == [(2, 3, 64, 64)] * 2
    (video,) = foreign.fitting_inputs(nn.Conv3d(3, 4, 3))
    assert video.shape == (1, 3, 16, 64, 64)
    with torch.no_grad():
        results = list(Pairs()(*pair).values())
    results = [results[0], *results[1]]
    exact = [x.double() for x in results]
    network = foreign.Foreign(None, pair, exact, results, 1)
    assert network.check(Pairs()) is None
    wrong = {"sum": results[0], "other": [results[1] + 1]}
    assert "error" in (network.check(lambda *_: wrong) or "")


def test_the_unfused_graph_is_held_to_the_module_too(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable = foreign.Foreign.executable

    def wrong_unfused(network, target, passes="default"):
        right = executable(network, target, passes)
        if passes == "default":
            return right
        return lambda *inputs: right(*inputs) + 1

    monkeypatch.setattr(foreign.Foreign, "executable", wrong_unfused)
    row = sweep.tried("torchvision/good", interpret=False)
    assert row.status == "wrong" and row.reason.startswith("reference: unfused: element")


def test_a_wrong_result_is_seen(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    network = foreign.prepared("torchvision/good")
    executable = network.executable("reference")
    assert network.check(executable) is None
    assert "error" in (network.check(lambda x: executable(x) + 1e-2) or "")


def test_reasons_tell_no_paths() -> None:
    error = CaptureError("failed in /home/somebody/lib/net.py\nline 3 of a/b " + "x" * 300)
    text = sweep._one_line(error)
    assert text.startswith("failed in ... line 3 of a/b") and "home" not in text
    assert len(text) < 250 and "\n" not in text


def test_every_parameter_is_random_and_filters_are_not() -> None:
    module = foreign.randomised(Small())
    assert all((p != 0).all() for p in module.parameters())
    assert (module.running_mean != 0).all() and (module.filter == 1).all()
    again = foreign.randomised(Small())
    assert torch.equal(module.conv.weight, again.conv.weight)


def test_a_process_may_take_too_long_or_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(foreign.FAMILIES))
    monkeypatch.setattr(sweep, "tried", lambda *_: time.sleep(60))
    row = sweep.in_a_process(name, False, limit_s=0.2)
    assert (row.status, row.reason) == ("time limit", "not done after 0 s")
    monkeypatch.setattr(sweep, "tried", lambda *_: os._exit(7))
    row = sweep.in_a_process(name, False, limit_s=30)
    assert (row.status, row.reason) == ("crashed", "its process ended with status 7")
    expected = Row(name, foreign.FAMILIES[name], "compiles", seconds=1.5)
    monkeypatch.setattr(sweep, "tried", lambda *_: expected)
    assert sweep.in_a_process(name, False, limit_s=30) == expected


def test_the_sweep_goes_on_where_it_stopped(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []
    draws = iter([["timm/drawn"]])  # Drawn once: later calls go on with the names that were kept.
    monkeypatch.setattr(foreign, "draw", lambda: next(draws))

    def answer(name: str, interpret: bool, limit_s: float) -> Row:
        asked.append(name)
        status = "ops missing" if name in failing else "compiles"
        return Row(name, sweep.family_of(name), status, "1x a|b: no")

    monkeypatch.setattr(sweep, "in_a_process", answer)
    names, output = [*NETWORKS, "timm/drawn", "timm/asked"], ("--output", str(tmp_path))
    failing = names[1:4]
    assert sweep.main([*output, "--budget", "1e-9"]) == 1
    assert "left: call again" in capsys.readouterr().out and asked == []
    assert sweep.main([*output, "torchvision/odd"]) == 0
    assert sweep.main(output) == 0
    assert asked == [names[1], names[0], *names[2:]]
    assert sweep.main(output) == 0 and len(asked) == 6
    assert sweep.main([*output, "--again"]) == 0 and asked[6:] == failing
    assert sweep.main([*output, "--fresh"]) == 0 and asked[9:] == names
    written = json.loads((tmp_path / "foreign.json").read_text())
    assert [row["name"] for row in written["rows"]] == names
    assert written["versions"].endswith("torchvision 1.2, timm 3.4")
    with pytest.raises(InvalidInputError, match="unknown network 'timm/refusd': did you mean"):
        sweep.main([*output, "timm/refusd"])


def test_a_network_that_brings_its_inputs() -> None:
    row = sweep.tried("whole/siamfc", interpret=False)
    assert (row.family, row.status, row.side, row.convs) == ("asked for", "compiles", 27, 6)


def test_the_table_tells_what_is_missing() -> None:
    rows = [
        Row("timm/vgg16", "timm/vgg", "compiles", "", 64, 13, 17, 18, {}, "agrees", "agrees"),
        Row("timm/dla34", "timm/dla", "ops missing", "2x a: b; 1x c: d", 64, 9, 9, 0,
            {"a: b": 2, "c: d": 1}, "agrees"),
        Row("timm/dpn68", "timm/dpn", "wrong", "reference: x | y", 64, 9, 9, 9, {"a: b": 5},
            "x | y"),
    ]  # fmt: skip
    text = sweep.markdown(rows, "versions")
    assert "- torchvision: 0 of 22 compile\n- timm: 1 of 57 compile" in text
    assert "| timm/vgg16 | 64 | 13 | 17 | 18 | agrees | agrees | compiles |" in text
    assert "| timm/dla34 | 64 | 9 | 9 | - | agrees | - | **ops missing**: 2x a: b;" in text
    assert "| differs | - | **wrong**: reference: x / y |" in text
    assert "| a: b | 2 | 7 | timm/dla34, timm/dpn68 |\n| c: d | 1 | 1 | timm/dla34 |" in text
    assert "None." in sweep.markdown(rows[:1], "versions")
    drawn = Row("timm/tnt", "drawn", "compiles", "", 64, 1, 9, 9, {}, "agrees")
    asked = Row("whole/crnn", sweep.family_of("whole/crnn"), "compiles", "", 12, 3, 9, 9)
    first, second = sweep.markdown([*rows, drawn, asked], "versions").split("## Drawn")
    second, third = second.split("## Asked for")
    assert "- drawn: 1 of 1 compile; 99 are not tried yet" in first and "timm/tnt" not in first
    assert "| timm/tnt | 64 | 1 | 9 | 9 | agrees | - | compiles |" in second
    assert "- asked for: 1 of 1 compile" in first and "whole/" not in first + second
    assert "| whole/crnn | 12 | 3 | 9 | 9 | - | - | compiles |" in third


def test_the_committed_table_is_whole() -> None:
    """Every network was tried, the text is that of the data, and no reason is left out."""
    drawn, rows = sweep.kept(RESULTS / "foreign.json")
    known = (*foreign.FAMILIES, *drawn, *sweep.SWEPT)
    assert list(rows) == [name for name in known if name in rows]
    assert {*foreign.FAMILIES, *sweep.SWEPT} <= set(rows) and len({*drawn}) == foreign.DRAWN
    assert all(row.status == sweep.COMPILES or row.reason for row in rows.values())
    versions = json.loads((RESULTS / "foreign.json").read_text())["versions"]
    text = sweep.markdown(list(rows.values()), versions)
    assert text == (RESULTS / "foreign.md").read_text()


# Needs torchvision and timm, which are no requirements.


def libraries() -> None:
    try:
        foreign.import_libraries()
    except ImportError as error:
        pytest.skip(f"needs torchvision and timm: {error}")


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name",
    [
        "torchvision/squeezenet1_1",
        "torchvision/ssdlite320_mobilenet_v3_large",
        "torchvision/resnet18",
        "torchvision/mobilenet_v3_small",
        "timm/nfnet_f0",
        "timm/seresnet50",
        "timm/ghostnet_100",
        "timm/repvgg_a2",
    ],
)
def test_networks_of_other_people(name: str) -> None:
    libraries()
    row = sweep.tried(name, interpret=True)
    assert (row.status, row.reference, row.interpreter) == ("compiles", "agrees", "agrees"), row


@pytest.mark.slow
def test_every_name_is_a_network() -> None:
    libraries()
    torchvision, timm = foreign.import_libraries()
    known = {"torchvision": torchvision.models.list_models(), "timm": timm.list_models()}
    drawn, _ = sweep.kept(RESULTS / "foreign.json")
    asked = [name for name in sweep.SWEPT if not name.startswith("whole/")]
    for name in (*foreign.FAMILIES, *drawn, *asked):
        library, _, member = name.partition("/")
        assert member in known[library] or timm.is_model(member), name
