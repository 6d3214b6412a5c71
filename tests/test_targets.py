"""The table of targets tells what was measured from what was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom.benchmarks import report, targets
from convloom.benchmarks.measure import Choices, Result, Row
from convloom.benchmarks.targets import Goal, verdict
from convloom.compiler.capture.capture import capture
from convloom.kernels.hopper import gluon

GOAL = Goal("resnet50", 256, ratio=1.7, share=0.75)


def row(time_us: float | None, ratio: float | None, **changes: object) -> Row:
    results = (
        Result("convloom", "ok", median_us=time_us),
        Result(targets.PEER, "ok", median_us=9_000.0, ratio=ratio),
    )
    plain = {"model": "resnet50", "batch": 256, "dtype": "float16", "target": "cuda"}
    fields: dict[str, Any] = {**plain, "device": "NVIDIA H200", "results": results, **changes}
    return Row(**fields)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (None, ("not measured", "-", "not measured")),
        (row(None, None), ("not measured", "-", "not measured")),
        (row(3_500.0, 1.8), ("3500.0 us, 1.80x, 86% of bound T", "NVIDIA H200", "reached")),
        (row(3_500.0, 1.6), ("3500.0 us, 1.60x, 86% of bound T", "NVIDIA H200", "missed")),
        (row(6_000.0, 1.8), ("6000.0 us, 1.80x, 50% of bound T", "NVIDIA H200", "missed")),
        (
            row(3_500.0, None),
            ("3500.0 us, inductor-max not measured, 86% of bound T", "NVIDIA H200", "missed"),
        ),
    ],
)
def test_verdicts(measured: Row | None, expected: tuple[str, str, str]) -> None:
    assert verdict(GOAL, measured) == expected


def test_latencies_are_goals_too() -> None:
    goal = Goal("resnet50", 1, time_us=135.0)
    assert str(goal) == "at most 135 us"
    assert verdict(goal, row(130.0, 2.0, batch=1))[2] == "reached"
    assert verdict(goal, row(140.0, 2.0, batch=1))[2] == "missed"


def test_only_a_gpu_s_half_precision_counts(tmp_path: Path) -> None:
    rows = [row(1.0, 1.0), row(2.0, 1.0, target="interpreter"), row(3.0, 1.0, dtype="float32")]
    folder = tmp_path / "nvidia-h200"
    folder.mkdir()
    choices = Choices((256,), torch.float16, "cuda", (targets.PEER,))
    (folder / "zoo.json").write_text(json.dumps(report.as_json(rows, choices)))
    assert [each.ours.median_us for each in targets.measured_rows(tmp_path)] == [1.0]
    assert targets.measured_rows(tmp_path / "nothing") == []


@pytest.mark.skipif(gluon.MISSING is not None, reason=str(gluon.MISSING))
def test_layers_are_told_by_both_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = torch.nn.Conv2d(256, 256, 3, padding=1).eval(), torch.zeros(32, 256, 56, 56)
    monkeypatch.setattr(targets.fusion, "captured_model", lambda model, batch: capture(net, (x,)))
    monkeypatch.setattr(targets, "MODELLED_LIMITS_MS", {"a layer": 1.0})
    lines = targets.core_markdown().splitlines()
    assert [line for line in lines if line.startswith("##")] == [
        "## a layer, batch 256", "## resnet50, batch 1",
    ]  # fmt: skip
    rows = [line.strip("| ").split(" | ") for line in lines]
    (_, result, plain, planned, way, bound, _), _ = (row for row in rows if "conv2d" in row[0])
    assert result == "256x56x56" and way in targets.WAYS[1:]
    assert float(plain) > float(planned) > 0.9 * float(bound)
    assert any(row[0].startswith("relayout") and row[2] == row[3] for row in rows)
