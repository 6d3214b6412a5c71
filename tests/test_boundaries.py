"""The count of kernels and bytes beside Inductor and tinygrad, and README's table of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from convloom.benchmarks import boundaries, inductor
from torch import nn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A 3x3 convolution with a bias, and ReLU; the elements of its tensors."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()).eval()
    x = torch.randn(2, 16, 8, 8)
    monkeypatch.setattr(inductor, "example", lambda name, batch: (net, x))
    return {"x": x.numel(), "w": 16 * 32 * 9, "b": 32, "y": 2 * 32 * 8 * 8}


def test_inductors_kernels_as_counted_by_hand(one_layer: dict[str, int]) -> None:
    """The library's convolution, then bias and ReLU; as a template one kernel, or since torch 2.14
    two: Inductor then says that the template lays its result out otherwise than ReLU reads it."""
    x, w, b, y = one_layer.values()
    count = boundaries.CONTENDERS["Inductor"]("", 2)
    apart = (2, 2 * ((x + w + y) + (y + b + y)))
    assert count == apart
    count = boundaries.CONTENDERS["Inductor, all templates"]("", 2)
    is_older = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
    assert count == ((1, 2 * (x + w + b + y)) if is_older else apart)


def test_our_kernels_are_those_of_the_plan(one_layer: dict[str, int]) -> None:
    x, w, b, y = one_layer.values()
    kernels, size_bytes = boundaries.ours("", 2)
    assert kernels in (2, 3)  # The conversions of the image, and of the result.
    assert size_bytes > 2 * (x + w + b + y)


@pytest.mark.skipif(find_spec("tinygrad") is None, reason="tinygrad is not installed")
def test_tinygrads_kernels_as_counted_by_hand(one_layer: dict[str, int]) -> None:
    assert boundaries.tinygrads("", 2) == (1, 2 * sum(one_layer.values()))


def test_peers_that_cannot_be_counted_are_told_and_we_are_not_excused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(name: str, batch: int) -> boundaries.Count:
        raise ValueError("moved")

    fine = boundaries.CONTENDERS | {name: fails for name in boundaries.CONTENDERS}
    monkeypatch.setattr(boundaries, "CONTENDERS", fine | {"convloom": lambda name, batch: (2, 10)})
    row = boundaries.measured("lenet5", 1)
    assert row["convloom"] == {"kernels": 2, "mb": 0.0}
    assert row["tinygrad"] == {"impossible": "ValueError: moved"}
    monkeypatch.setattr(boundaries, "CONTENDERS", fine)
    with pytest.raises(ValueError, match="moved"):
        boundaries.measured("lenet5", 1)


def test_a_peer_that_is_not_installed_keeps_what_was_counted_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def is_missing(name: str, batch: int) -> boundaries.Count:
        raise ModuleNotFoundError("No module named 'tinygrad'")

    def count_with(tinygrad: Callable[[str, int], boundaries.Count]) -> tuple[str, Any]:
        counts = {"convloom": lambda name, batch: (2, 10**6), "tinygrad": tinygrad}
        monkeypatch.setattr(boundaries, "CONTENDERS", counts)
        boundaries.main()
        report: dict[str, Any] = json.loads(file.read_text())
        return report["machine"]["tinygrad"], report["rows"]["lenet5"].get("tinygrad")

    file = tmp_path / "boundaries.json"
    monkeypatch.setattr(sys, "argv", ["boundaries", "lenet5", "--output", str(file)])
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))
    assert count_with(is_missing) == ("not installed", None)
    monkeypatch.setattr(metadata, "version", lambda name: "0.14.0")
    counted = ("0.14.0", {"kernels": 3, "mb": 2.0})
    assert count_with(lambda name, batch: (3, 2 * 10**6)) == counted
    monkeypatch.setattr(metadata, "version", Mock(side_effect=metadata.PackageNotFoundError))
    assert count_with(is_missing) == counted


def test_the_summary_is_the_median_and_the_range() -> None:
    def row(kernels: int, mb: float) -> dict[str, Any]:
        peer = {"kernels": kernels, "mb": mb}
        return {"convloom": {"kernels": 10, "mb": 2.0}, "Inductor": peer}

    lines = boundaries.summary({"a": row(20, 2.0), "b": row(15, 5.0), "c": row(30, 3.0)})
    assert lines[2] == "| Inductor | 2.00 (1.50 to 3.00) | 1.50 (1.00 to 2.50) |"
    assert lines[4] == "| tinygrad | not counted | not counted |"


def test_the_table_of_the_readme_is_that_of_the_results() -> None:
    report = json.loads(boundaries.RESULTS.read_text())
    assert tuple(report["rows"]) == boundaries.MODELS and len(boundaries.MODELS) == 10
    table = "\n".join(boundaries.summary(report["rows"]))
    assert table in (ROOT / "README.md").read_text()
