"""The gate: what the compiler makes of every op, against a committed snapshot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import triton
from convloom.benchmarks import gate
from convloom.kernels import registry

ONE = {"config": "warps=4", "registers": 40, "spill_bytes": 0, "instructions": 100}


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ({"a": [ONE]}, {"a": [ONE]}, []),
        ({"a": [ONE]}, {"a": [{**ONE, "registers": 48, "instructions": 90}]},
         ["a: registers 40 -> 48, instructions 100 -> 90"]),
        ({"a": [ONE], "b": [ONE]}, {"a": [ONE]}, ["b: gone"]),
        ({}, {"a": [ONE]}, ["a: new"]),
        ({"a": [ONE]}, {"a": [ONE, ONE]}, ["a: 1 launches -> 2"]),
    ],
)  # fmt: skip
def test_differences_are_named(before: Any, after: Any, lines: list[str]) -> None:
    assert gate.differences(before, after) == lines


def test_every_op_passes_through_the_gate() -> None:
    names = [name for name, _, _ in gate.problems()]
    assert len(names) == len(set(names))
    assert {op.name for _, op, _ in gate.problems()} == set(registry.BY_NAME)
    known = json.loads(gate.SNAPSHOT.read_text())["figures"]
    expected = {f"{name}, {each}" for name in names for each in gate.GENERATIONS}
    assert set(known) <= expected, "run: make gate ARGS=--update"


def test_the_exit_status_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gate.json"
    monkeypatch.setattr(gate, "SNAPSHOT", path)
    monkeypatch.setattr(gate, "measured", lambda names=(): {"relu, sm_90": [ONE]})

    def store(**changes: Any) -> None:
        figures = {"relu, sm_90": [{**ONE, **changes}], "conv2d depthwise, sm_90": [ONE]}
        path.write_text(json.dumps({"triton": triton.__version__, "figures": figures}))

    assert gate.main([]) == 2 and "take a snapshot" in capsys.readouterr().err
    store()
    assert gate.main(["relu"]) == 0
    assert gate.main([]) == 1 and "conv2d depthwise, sm_90: gone" in capsys.readouterr().out
    store(registers=32)
    assert gate.main(["relu"]) == 1 and "registers 32 -> 40" in capsys.readouterr().out
    assert gate.main(["--update"]) == 0 and gate.main([]) == 0
    path.write_text(json.dumps({"triton": "0.1", "figures": {}}))
    assert gate.main([]) == 2 and "made with triton 0.1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gate.main(["--update", "relu"])
