"""Plans without machine code, and what each fusion buys."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.cli.main import main
from convloom.compiler import api
from convloom.compiler.explain import ablation
from convloom.errors import InvalidInputError, TargetUnavailableError
from torch import nn

SM_90 = "cuda:sm_90"


class Block(nn.Module):
    """A separable convolution with a residual, and a module that bears the name of a fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.separable = nn.Conv2d(32, 32, 1)
        self.pool = nn.MaxPool2d(3, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = self.separable(torch.relu(self.depthwise(x)))
        return self.pool(torch.relu(y + x))


MODEL, X = Block().eval(), torch.randn(2, 3, 16, 16)


def test_a_plan_is_that_of_compile() -> None:
    planned = convloom.plan(MODEL, X, target="interpreter", dtype="float16")
    exe = convloom.compile(MODEL, X, target="interpreter", dtype="float16", tuning="heuristic")
    assert planned.plan.to_text() == exe.plan.to_text()
    assert planned.summary == exe.summary
    assert planned.account() == exe.ledger.account()
    assert planned.explain().startswith("Block on interpreter: 10 -> 4 kernels")
    count = planned.summary["kernels"]
    assert repr(planned) == f"<Plan of Block for interpreter: {count} kernel(s)>"


def test_a_plan_copies_no_weights_and_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: tensor.clone() for name, tensor in MODEL.state_dict().items()}
    kept: list[Any] = []
    monkeypatch.setattr(api, "_keep_weights", lambda *graphs: kept.append(graphs))
    convloom.plan(MODEL, X, target=SM_90)
    assert not kept
    convloom.compile(MODEL, X, target="reference")
    assert len(kept) == 1
    assert all(map(torch.equal, before.values(), MODEL.state_dict().values()))


def test_an_executable_keeps_a_snapshot() -> None:
    model = nn.Conv2d(3, 4, 3)
    exe = convloom.compile(model, X, target="reference")
    expected = exe(X)
    with torch.no_grad():
        model.weight.zero_()
    assert torch.equal(exe(X), expected)


@pytest.mark.parametrize("target", [SM_90, "interpreter"])
def test_no_fusion_is_every_op_alone(target: str) -> None:
    """The figures of `explain`: batch normalisation is not folded, dropout is a copy, and the
    memory format changes twice."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), MODEL.pool).eval()
    _, none = convloom.ablate(model, X, target=target, fusions=()).rows
    totals = convloom.plan(model, X, target=target).account().totals
    assert (none.how, none.kernels) == (ablation.NONE, totals.kernels_before)
    assert totals.kernels_before == 6 and none.size_bytes == totals.bytes_before
    assert none.modelled_us == (totals.before.us if target == SM_90 else None)


def test_a_plan_is_refused_like_a_compilation() -> None:
    with pytest.raises(TargetUnavailableError, match="unknown target 'cuda:sm_70'"):
        convloom.plan(MODEL, X, target="cuda:sm_70")
    with pytest.raises(InvalidInputError, match="force='head@x': no module path of that name"):
        convloom.plan(MODEL, X, target=SM_90, force=["head@x"])


def test_rows_are_those_of_plans_with_these_fusions() -> None:
    """Each row is what `compile` plans where the same fusions are forbidden."""
    found = convloom.ablate(MODEL, X, target=SM_90)
    rows = {row.title: row for row in found.rows}
    assert (found.target, found.dtype, rows["all fusions"].batch) == (SM_90, "float32", 2)
    labels = set(ablation.LABELS.all.values())
    for title, forbid in {
        "all fusions": [], "without epilogue": ["epilogue"],
        "epilogue alone": labels - {"epilogue"}, "without separable": ["separable"],
    }.items():  # fmt: skip
        planned = convloom.plan(
            MODEL, X, target=SM_90, forbid=[f"{label}@*" for label in sorted(forbid)]
        )
        totals = planned.account().totals
        assert rows[title].kernels == totals.kernels_after, title
        assert rows[title].size_bytes == totals.bytes_after, title
        assert rows[title].modelled_us == pytest.approx(totals.after.us), title
    assert rows["no fusion"].kernels > rows["all fusions"].kernels
    assert (rows["without separable"].modelled_us or 0) > (rows["all fusions"].modelled_us or 0)
    made = {label for label in labels if f"without {label}" in rows}
    assert {"epilogue", "separable"} <= made < labels, "those that the network has"


def test_families_are_left_out_as_one() -> None:
    found = convloom.ablate(MODEL, X, target=SM_90, fusions=["separable*", "conv-pool"])
    titles = [row.title for row in found.rows]
    assert titles == ["all fusions", "no fusion", "without separable*", "separable* alone",
                      "without conv-pool", "conv-pool alone"]  # fmt: skip
    with pytest.raises(InvalidInputError, match="no fusion is named 'seperable'; did you mean sep"):
        convloom.ablate(MODEL, X, target=SM_90, fusions=["seperable"])
    assert ablation.groups_of("separable*", ()) == {"separable*": ("separable-chain", "separable")}


def test_times_are_never_invented() -> None:
    for target in ("interpreter", "reference", "emulator:sm_90"):
        on_cpu = convloom.ablate(MODEL, X, target=target, fusions=["epilogue"])
        assert {row.modelled_us for row in on_cpu.rows} == {None} and on_cpu.target == target

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.erfinv(torch.tanh(x) / 2)

    found = convloom.ablate(Odd(), X, target=SM_90, fallback="torch")
    assert {row.modelled_us for row in found.rows} == {None}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "chart.svg"
    arguments = ["ablate", "lenet5", "--dtype", "float16", "--batch", "4", "--fusions"]
    drawn_too = ["all", "small*", "--batch", "1", "4", "--plot", str(plot), "--json"]
    assert main([*arguments, *drawn_too]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dtype"] == "float16" and {row["batch"] for row in found["rows"]} == {1, 4}
    assert {row["fusion"] for row in found["rows"]} >= {"", "epilogue", "small-net", "small*"}
    assert main([*arguments, "small-net"]) == 0
    text = capsys.readouterr().out
    assert "lenet5, batch 4, float16, cuda:sm_90" in text and "1.00x" in text
    assert "without small-net" in text and "times are modelled, not measured" in text
    drawn = ElementTree.parse(plot).getroot()
    bars = [e for e in drawn.iter() if e.tag.endswith("rect")]
    assert len(bars) == 1 + 3 * len(found["rows"])
    said = [e.text for e in drawn.iter() if e.tag.endswith("text")]
    assert {"kernels", "MB read and written", "modelled us", "lenet5, batch 1"} <= set(said)
    assert main(["ablate", "lenet5", "--fusions", "no-such"]) == 2
    assert "no fusion is named 'no-such'" in capsys.readouterr().err
    assert main(["ablate", "lenet5", "--target", "reference", "--fusions", "epilogue"]) == 0
    assert "modelled, not measured" not in capsys.readouterr().out


def test_labels_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--labels", "--json"]) == 0
    listed = {row["label"]: row["rules"] for row in json.loads(capsys.readouterr().out)}
    assert {rule: label for label, rules in listed.items() for rule in rules} == (
        ablation.LABELS.all
    )
    assert main(["explain", "--labels"]) == 0
    text = capsys.readouterr().out
    assert all(label in text for label in listed)
    assert main(["explain", "lenet5", "--labels"]) == 2
    assert "--labels: leave out lenet5: the labels are the same" in capsys.readouterr().err
