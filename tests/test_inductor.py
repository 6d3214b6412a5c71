"""The comparison with Inductor: what is counted, and what is printed of it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom.benchmarks import inductor, pretended
from convloom.benchmarks.inductor import FIRST, LARGEST, LIBRARIES, OURS

PLANNING = {
    "small": {OURS: 0.5, "inductor": 2.0},
    "odd": {OURS: 0.5, "inductor": "ValueError: no such op"},
}
COLD: dict[str, dict[str, Any]] = {
    OURS: {"cpu_seconds": 12.0, "kernels": 24},
    LIBRARIES: {"cpu_seconds": 8.0, "kernels": 9, "configurations": 30, "notes": "folded"},
    FIRST: {"cpu_seconds": 16.0, "kernels": 30, "configurations": 30, "notes": "folded"},
    LARGEST: {"impossible": "RuntimeError: moved"},
}


def test_children_of_a_child_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grandchild that nobody waits for burns a second after its parent has ended."""
    burn = "import time\nwhile time.process_time() < 1: pass"
    start = f"subprocess.Popen([sys.executable, '-c', {burn!r}], stdout=subprocess.DEVNULL)"
    child = f"import subprocess, sys\n{start}\nprint('{{}}')"
    monkeypatch.setattr(inductor, "CHILD", child)
    assert inductor.spent({})["total"] >= 1


def test_a_child_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "CHILD", "raise ValueError('torch has moved it')")
    with pytest.raises(RuntimeError, match="ValueError: torch has moved it"):
        inductor.spent({})
    monkeypatch.setattr(inductor, "CHILD", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="exit status 3"):
        inductor.spent({})


def test_what_counts_beyond_importing_torch() -> None:
    """Triton for both, convloom for us; not torch, and not what builds the model."""
    run = {"total": 20.0, "start": 9.0, "imports": {"triton": 0.5, OURS: 0.25}}
    assert inductor.beyond_torch(OURS, run) == 11.75
    assert inductor.beyond_torch(FIRST, run) == 11.5


def test_peers_that_are_impossible_are_told_and_we_are_not_excused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spent(work: dict[str, Any]) -> dict[str, Any]:
        if work["contender"] == failing:
            raise RuntimeError("moved")
        imports = {"triton": 0.0, OURS: 0.0}
        return {"total": 3.0, "start": 1.0, "imports": imports, "kernels": 2}

    monkeypatch.setattr(inductor, "spent", spent)
    failing = LARGEST
    rows = inductor.measure_cold("lenet5", 1, "float16")
    assert rows[LARGEST] == {"impossible": "RuntimeError: moved"}
    assert rows[OURS] == rows[FIRST] == {"cpu_seconds": 2.0, "kernels": 2}
    failing = OURS
    with pytest.raises(RuntimeError, match="moved"):
        inductor.measure_cold("lenet5", 1, "float16")


def test_tables() -> None:
    lines = inductor.cold_table(COLD).splitlines()
    assert [line.split("CPU s")[-1].split() for line in lines[:3]] == [
        ["24", "kernels"],
        ["9", "kernels", "in", "30", "configurations", "ours", "/", "theirs", "1.50"],
        ["30", "kernels", "ours", "/", "theirs", "0.75"],
    ]
    assert lines[3].endswith("not possible here: RuntimeError: moved")
    first, _, last = inductor.planning_table(PLANNING).splitlines()
    assert first.split() == ["small", "0.50", "2.00", "0.25"]
    assert last == "  odd: inductor: ValueError: no such op"


def test_the_largest_tile() -> None:
    tiles = [{"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}, {"BLOCK_M": 128, "BLOCK_N": 128}]
    assert max(tiles, key=pretended.area) is tiles[0]


def test_what_is_measured_joins_what_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "results" / "inductor.json"
    monkeypatch.setattr(inductor, "measure_cold", lambda *_: COLD)
    monkeypatch.setattr(inductor, "measure_planning", lambda *_: PLANNING)
    for options in (["--cold", "lenet5", "--plan"], ["--cold", "--plan", "small", "odd"]):
        monkeypatch.setattr(sys, "argv", ["inductor", *options, "--output", str(output)])
        inductor.main()
    report = json.loads(output.read_text())
    assert report["cold"]["lenet5"]["rows"] == COLD and report["planning"]["rows"] == PLANNING
    for part in (report["cold"]["lenet5"], report["planning"]):
        assert {"git", "torch"} <= set(part["machine"]) and "batch 32" in part["what"]
    assert report["left_out_of_inductor"]


def test_planned_models_join_those_of_the_same_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "inductor.json"

    def planned(commit: str, model: str) -> list[str]:
        monkeypatch.setattr(inductor, "describe", lambda: {"git": commit})
        monkeypatch.setattr(inductor, "measure_planning", lambda *_: {model: PLANNING["small"]})
        arguments = ["inductor", "--cold", "--plan", model, "--output", str(output)]
        monkeypatch.setattr(sys, "argv", arguments)
        inductor.main()
        return list(json.loads(output.read_text())["planning"]["rows"])

    assert planned("one", "a") == ["a"]
    assert planned("one", "b") == ["a", "b"]
    assert planned("two", "c") == ["c"]


@pytest.mark.slow
def test_inductor_compiles_for_a_gpu_that_is_not_here() -> None:
    """Nothing of it is left behind."""
    for contender in (LIBRARIES, FIRST):
        model, x = inductor.example("lenet5", 2)
        module, note = inductor.folded(model)
        configurations = inductor.inductor(module, x.shape, "float16", contender)
        assert note == inductor.FOLDED and len(configurations) >= 5
    assert not torch.cuda.is_available()
