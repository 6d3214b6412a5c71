"""A new user's first ten minutes, as `benchmarks/examples/first_minutes.sh` records them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from convloom.cli.main import main

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "examples" / "first_minutes.sh"


def commands(text: str) -> Iterator[tuple[list[str], int]]:
    """The commands of the script, and the exit status that each of them should have."""
    for line in text.splitlines():
        if line.startswith("convloom "):
            command, refused, _ = line.partition(" || ")
            yield shlex.split(command)[1:], 2 if refused else 0


@pytest.mark.interpreter
def test_the_first_minutes_go_as_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All commands in this process, but for the demo, which has a test of its own."""
    script = SCRIPT.read_text()
    ((name, network),) = re.findall(r"^cat > (\S+) <<'END'\n(.*?)^END$", script, re.M | re.S)
    (tmp_path / name).write_text(network)
    monkeypatch.chdir(tmp_path)
    printed: dict[str, str] = {}
    for arguments, status in commands(script):
        if arguments[0] != "demo":
            assert main(arguments) == status, arguments
            said = capsys.readouterr()
            printed[" ".join([arguments[0], arguments[1], arguments[-1]])] = said.out + said.err
    # test_page.py opens such pages in a browser.
    assert "mynet.py:build on cuda:sm_90" in (tmp_path / "mynet.html").read_text()
    assert "wrote mynet.html" in printed["explain mynet.py:build mynet.html"]
    explained = printed["explain mynet.py:Odd cuda:sm_90"]
    assert re.search(
        r"Odd has 1 op without a kernel:\n  the top module: aten\.erfinv\.default\(float32\[1, 10\]"
        r"\) at mynet\.py:\d+: return torch\.erfinv.*: no kernel for this op\n"
        r"To run it by torch, between the kernels, pass fallback='torch' \(--fallback torch\)$",
        explained.strip(),
    ), explained
    assert "as exact as its type allows" in printed["verify mynet.py:build interpreter"]
    assert "sha256" in printed["compile mynet.py:build mynet.loom"]
    assert "class" in printed["run mynet.loom interpreter"]
    read = re.search(r"^sed -n '/\^(.*?)/,/\^(.*?)/p' \"\$DOCS/(\S+)\"$", script, re.M)
    assert read is not None
    page = (SCRIPT.parents[2] / "docs" / read[3]).read_text()
    section = page.partition(f"\n{read[1]}\n")[2].partition(f"\n{read[2]}\n")[0]
    assert 'fallback="torch"' in section and "UnsupportedOpError" in section


@pytest.mark.slow
@pytest.mark.interpreter
def test_the_script_runs_as_it_stands(tmp_path: Path) -> None:
    (binaries := tmp_path / "bin").mkdir()
    program = binaries / "convloom"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m convloom "$@"\n')
    program.chmod(0o755)
    (folder := tmp_path / "empty").mkdir()
    path = f"{binaries}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", str(SCRIPT)], cwd=folder, env={**os.environ, "PATH": path},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("(refused, as it should be)\n") == 1
    assert 'pass `fallback="torch"`' in done.stdout
    assert {path.name for path in folder.iterdir()} >= {"demo", "mynet.html", "mynet.loom"}
