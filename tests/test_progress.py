"""Long commands tell how far they are, and Ctrl-C ends every one of them within a second."""

from __future__ import annotations

import json
import os
import re
import shutil
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
from convloom.cli import main, output
from convloom.kernels.devices import offline
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
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


def test_what_a_command_answers_and_how_far_it_is_go_different_ways(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`convloom compile ... | cat`, and `2> err.txt`: plain lines there, the answer on stdout."""
    assert main.main(["compile", "lenet5", "--target", "reference", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["summary"]["kernels"]
    first, last, *_ = [line for line in shown.err.splitlines() if "for reference" in line]
    assert first == "compiling lenet5 for reference, batch 1 ..."
    assert re.fullmatch(r"compiling lenet5 for reference, batch 1: \d+\.\d s", last)
    assert "\r" not in shown.err and "\x1b" not in shown.err


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
    "run": (
        ("run", *OWN, "--target", "interpreter", "--random", "--iterations", "100000"),
        "running net.py:build",
    ),
    "evaluate": (
        ("evaluate", "resnet18", "--target", "interpreter", "--data", "images", "--classes", "2"),
        "1 crop ...",
    ),
    "ablate": (("ablate", "inception_v3", "--plot", "chart.svg"), "planning inception_v3"),
    "profile": (
        ("profile", *OWN, "--target", "interpreter", "--repeats", "100000", "--trace", "trace"),
        "timing net.py:build",
    ),
    "demo": (("demo", "photo", "--output-dir", "out"), "compiling ResNet-18"),
    "zoo": (("zoo", "inception_resnet_v2"), "capturing inception_resnet_v2"),
    "doctor": (("doctor", "net.loom"), "making net.loom again"),
}
"""A command, and what it says when it is to be interrupted, or 0.7 seconds later."""
QUICK = {"export-server"}
"""Commands that only copy a file."""


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
    for folder in ("a", "b"):
        (tmp_path / "images" / folder).mkdir(parents=True)
        shutil.copy(ROOT / "zoo" / "digit.png", tmp_path / "images" / folder)
    (temporary := tmp_path / "tmp").mkdir()
    environment = {
        **os.environ, "CONVLOOM_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(temporary),
    }  # fmt: skip
    program = [sys.executable, "-m", "convloom"]
    if "net.loom" in command and "-o" not in command:
        save = ("compile", *OWN, *SM_90, "-o", "net.loom")
        subprocess.run([*program, *save], cwd=tmp_path, env=environment, check=True)
    before = files_in(tmp_path)
    process = subprocess.Popen(
        [*program, *command], cwd=tmp_path, stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL, text=True, start_new_session=True, env=environment,
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
    assert files_in(tmp_path) == before


def files_in(folder: Path) -> set[str]:
    """All but records and what is only temporary."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    found = [path for path in found if path.parts[0] not in ("cache", "tmp", "__pycache__")]
    return {str(path) for path in found if path.suffix != ".json"}


def test_every_command_that_takes_long_is_interrupted_here() -> None:
    names = {command.__name__.rpartition(".")[2].replace("_", "-") for command in main.COMMANDS}
    assert names == {*COMMANDS, *QUICK}


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
