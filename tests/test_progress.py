"""Long commands tell how far they are, and Ctrl-C ends every one of them within a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import convloom
import pytest
import torch
from convloom import progress
from convloom.cli import output
from convloom.kernels.devices import offline
from torch import nn

Heard = list[tuple[str, int, int]]


def test_work_is_told_to_who_listens() -> None:
    heard: Heard = []
    progress.tell("kernels", 1, 2)
    with progress.heard_by(lambda *told: heard.append(told)):
        progress.tell("kernels", 2, 2)
    progress.tell("kernels", 3, 3)
    assert heard == [("kernels", 2, 2)]


@pytest.mark.interpreter
def test_kernels_that_run_are_counted() -> None:
    x = torch.zeros(1, 4)
    exe = convloom.compile(nn.Linear(4, 4).eval(), (x,), target="interpreter")
    heard: Heard = []
    with progress.heard_by(lambda *told: heard.append(told)):
        exe(x)
    count = len(exe.plan.steps)
    assert heard == [("kernels", done, count) for done in range(count)]


def test_kernels_that_are_compiled_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offline, "resources", lambda request: None)
    monkeypatch.setattr(offline, "_path_of", lambda kind, request: None)
    monkeypatch.setattr(offline, "_stored", lambda kind, path: None)
    heard: Heard = []
    with progress.heard_by(lambda *told: heard.append(told)):
        offline.compile_all(["a", "b", "a"], workers=1)
    assert heard == [("kernels", 1, 2), ("kernels", 2, 2)]


def test_a_pipe_gets_a_line_at_intervals(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = Event()
    show = output.Work.__str__

    def counted(work: output.Work) -> str:
        said.set()
        return show(work)

    monkeypatch.setattr(output, "INTERVAL_S", 0.01)
    monkeypatch.setattr(output.Work, "__str__", counted)
    with output.working("compiling \x1b[31m"):
        progress.tell("kernels", 3, 40)
        assert said.wait(10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "compiling \\x1b[31m ..." and lines[-1].startswith("compiling \\x1b[31m: 0")
    assert "compiling \\x1b[31m: 3 of 40 kernels, 0 s" in lines


# Interruption.

NETWORK = """
from torch import nn
def build():
    return nn.Sequential(*(nn.Conv2d(8 + 8 * at, 16 + 8 * at, 3, padding=1) for at in range(8)))
"""
OWN = ("net.py:build", "--input", "1x8x20x20")
SM_90 = ("--target", "cuda:sm_90")
COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "compile": (("compile", *OWN, *SM_90, "-o", "net.loom"), "compiling net.py:build"),
    "explain": (("explain", *OWN, *SM_90, "--html", "net.html"), "planning net.py:build"),
    "tune": (("tune", *OWN, "--offline", *SM_90, "--to", "records"), "tuning net.py:build"),
    "verify": (("verify", *OWN, "--target", "interpreter"), "batch 1"),
    "bench": (
        ("bench", *OWN, "--target", "interpreter", "--batch", "1", "--output", "results"),
        "net.py:build, batch 1: preparing convloom",
    ),
}
"""A command, and what it says when it is to be interrupted, or 0.7 seconds later."""


@pytest.fixture
def heard_signals() -> Iterator[None]:
    """Children hear Ctrl-C, which they do not where pytest runs in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("seconds", [0.0, pytest.param(0.7, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    ["compile", *(pytest.param(n, marks=pytest.mark.slow) for n in list(COMMANDS)[1:])],
)
def test_an_interrupted_command_ends_within_a_second(
    name: str, seconds: float, tmp_path: Path, heard_signals: None
) -> None:
    """With exit status 130; no process, no file and no traceback is left."""
    command, begun = COMMANDS[name]
    (tmp_path / "net.py").write_text(NETWORK)
    (temporary := tmp_path / "tmp").mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "convloom", *command], cwd=tmp_path, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, start_new_session=True,
        env={
            **os.environ, "CONVLOOM_CACHE_DIR": str(tmp_path / "cache"),
            "TMPDIR": str(temporary),
        },
    )  # fmt: skip
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if begun in line:
            break
    time.sleep(seconds)
    started = time.monotonic()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(30) == 130, lines
    assert time.monotonic() - started < 1.0
    rest = process.stderr.read()
    assert rest.endswith("convloom: interrupted\n") and "Traceback" not in rest
    _assert_ended(process.pid)
    assert not list(temporary.glob("pymp*"))
    kept = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    kept = [path for path in kept if path.parts[0] not in ("cache", "tmp", "__pycache__")]
    assert [str(path) for path in kept if path.suffix != ".json"] == ["net.py"]


def _assert_ended(group: int) -> None:
    """That no process of a group is left, but for a moment."""
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError("a process is left")
