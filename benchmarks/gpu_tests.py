"""Runs the tests that need a GPU so that no run is in vain: a few at a time, each group in a
process of its own, with what passed kept in tests.json.

A fault of the device fails every later test of its process: what failed in a group is run again by
itself, and only that counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE = "tests/test_gpu.py"
GROUP = 16
PYTEST = (sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider")
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"

Outcomes = dict[str, str]
"""By test: "passed", "skipped", or "failed" and the end of the message."""


def collected() -> list[str]:
    """The names of all tests, `test_x[parameter]`.

    Raises: RuntimeError where pytest cannot collect them.
    """
    done = subprocess.run(
        [*PYTEST, "--collect-only", FILE], cwd=ROOT, capture_output=True, text=True
    )
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not names:
        raise RuntimeError(f"pytest collects nothing:\n{done.stdout}\n{done.stderr}")
    return names


def run_group(names: Sequence[str]) -> Outcomes:
    """Runs the tests in one process; what it did not get to has failed."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.xml"
        command = [*PYTEST, f"--junitxml={answer}", *(f"{FILE}::{name}" for name in names)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        try:
            cases = list(ElementTree.parse(answer).getroot().iter("testcase"))
        except (OSError, ElementTree.ParseError):
            cases = []
    last = f"exit status {done.returncode}: {(done.stdout + done.stderr)[-2_000:]}"
    found = {name: f"{FAILED}: the process ended before it: {last}" for name in names}
    for case in cases:
        if (name := case.get("name", "")) in found:
            found[name] = _outcome(case)
    return found


def _outcome(case: ElementTree.Element) -> str:
    for kind in ("failure", "error"):
        if (wrong := case.find(kind)) is not None:
            return f"{FAILED}: {(wrong.get('message') or '')[:500]}\n{(wrong.text or '')[-2_000:]}"
    return SKIPPED if case.find("skipped") is not None else PASSED


def run(
    path: Path,
    names: Sequence[str],
    tell: Callable[[str], None],
    group: Callable[[Sequence[str]], Outcomes] = run_group,
) -> Outcomes:
    """Runs what has not passed yet; the state is written after each group.

    Returns the outcomes of all `names`.
    """
    known = {name: outcome for name, outcome in read(path).items() if name in names}
    waiting = [name for name in names if known.get(name) != PASSED]
    for at in range(0, len(waiting), GROUP):
        part = waiting[at : at + GROUP]
        tell(f"tests {at + 1} to {at + len(part)} of {len(waiting)}")
        found = group(part)
        failed = [name for name in part if found[name].startswith(FAILED)]
        if len(part) > 1:
            for name in failed:
                found |= group([name])
        known |= found
        path.write_text(json.dumps(known, indent=1) + "\n")
    return {name: known[name] for name in names}


def read(path: Path) -> Outcomes:
    """What earlier runs found; nothing where the file is missing or damaged."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(stored, dict):
        return {}
    return {str(name): str(outcome) for name, outcome in stored.items()}
