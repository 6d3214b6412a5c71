"""Runs the tests that need a GPU so that no run is in vain: a few at a time, each group in a
process of its own, several side by side, with what passed kept in tests.json and what was found out
in findings.json.

A fault of the device fails every later test of its process, and a kernel that never ends takes the
rest of its group with it: such tests are run again by themselves, and only that counts. What merely
gave a wrong result has failed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .report import write_text

ROOT = Path(__file__).resolve().parent.parent
FILE = "tests/test_gpu.py"
PYTEST = (
    sys.executable, "-m", "pytest", "-m", "gpu", "--color=no", "-p", "no:cacheprovider",
    "-o", "junit_family=xunit1",
)  # fmt: skip
PASSED, FAILED, SKIPPED = "passed", "failed", "skipped"
GROUP = 16
ALONE = ("test_model", "test_random_networks", "test_launch_mode", "test_sanitizer",
         "test_eight_warps_over_taps", "test_split_sums_ten_thousand_times")  # fmt: skip
"""Tests of minutes, or such as may fault: each has a process of its own."""
LONG = ("test_model", "test_random_networks", "test_interpreter_says_the_same", "test_sanitizer")
"""Tests of whole networks and by other tools: they can wait until constants are measured."""
GROUP_S = 300.0
MOST_WORKERS = 12
"""Processes side by side: each has a CUDA context of its own and compiles with one core."""
FAULT = re.compile(
    r"cuda error|cudaerror|illegal|misaligned|launch fail|device-side|restart the process|"
    r"the process ended|no end after",
    re.IGNORECASE,
)
"""Words of failures that may be an earlier test's."""

Outcomes = dict[str, str]
"""By test: "passed", "skipped: why", or "failed: ..." and the end of the message."""


@dataclass
class Answer:
    """What a process says of its tests. findings: (name, value) by test."""

    outcomes: Outcomes
    findings: dict[str, list[tuple[str, Any]]] = field(default_factory=dict)


def collected() -> list[str]:
    """The names of all tests, `test_x[parameter]`.

    Raises: RuntimeError where pytest cannot collect them.
    """
    command = [*PYTEST, "-q", "--collect-only", FILE]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    names = [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]
    if done.returncode or not names:
        raise RuntimeError(f"pytest collects nothing:\n{done.stdout}\n{done.stderr}")
    return names


def is_long(name: str) -> bool:
    """Whether a test is one of those that can wait."""
    return name.partition("[")[0] in LONG


def groups_of(names: Sequence[str]) -> Iterator[list[str]]:
    """The tests in order, in groups of one function."""
    group: list[str] = []
    for name in names:
        function = name.partition("[")[0]
        most = 1 if function in ALONE else GROUP
        if group and (len(group) >= most or group[0].partition("[")[0] != function):
            yield group
            group = []
        group.append(name)
    if group:
        yield group


def run_group(names: Sequence[str], seconds: float = GROUP_S) -> Answer:
    """Runs the tests in one process; what it did not get to has failed."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.xml"
        command = [*PYTEST, "-v", f"--junitxml={path}", *(f"{FILE}::{name}" for name in names)]
        with (Path(folder) / "output.txt").open("w+") as output:
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            try:
                how = f"the process ended before it: exit status {process.wait(seconds)}"
            except subprocess.TimeoutExpired:
                how = f"no end after {seconds:.0f} s"
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            told = output.read()
        try:
            cases = list(ElementTree.parse(path).getroot().iter("testcase"))
        except (OSError, ElementTree.ParseError):
            cases = []
    answer = Answer({name: f"{FAILED}: {how}: {told[-2_000:]}" for name in names})
    answer.outcomes |= {n: PASSED for n in _passed_before(told) if n in answer.outcomes}
    for case in cases:
        if (name := case.get("name", "")) in answer.outcomes:
            answer.outcomes[name] = _outcome(case)
            answer.findings[name] = [
                (found.get("name", ""), json.loads(found.get("value", "null")))
                for found in case.iter("property")
            ]
    return answer


def _passed_before(told: str) -> list[str]:
    """The tests that pytest said had passed, whatever happened then."""
    return re.findall(r"::(test_\S+(?:\[.*\])?) PASSED", told)


def _outcome(case: ElementTree.Element) -> str:
    for kind in ("failure", "error"):
        if (wrong := case.find(kind)) is not None:
            return f"{FAILED}: {(wrong.get('message') or '')[:500]}\n{(wrong.text or '')[-2_000:]}"
    skipped = case.find("skipped")
    return PASSED if skipped is None else f"{SKIPPED}: {skipped.get('message')}"


class _Results:
    """What is known of the tests, in two files that are whole at any moment."""

    def __init__(self, path: Path, names: Sequence[str]) -> None:
        self._path, self._lock = path, threading.Lock()
        known = {name: str(outcome) for name, outcome in read(path).items()}
        self.outcomes = {name: outcome for name, outcome in known.items() if name in names}
        self.findings = read(self._findings)

    @property
    def _findings(self) -> Path:
        return self._path.with_name("findings.json")

    def add(self, answer: Answer) -> None:
        """Takes over what a process said."""
        with self._lock:
            self.outcomes |= answer.outcomes
            self.findings |= {name: found for name, found in answer.findings.items() if found}
            write_text(self._path, json.dumps(self.outcomes, indent=1) + "\n")
            write_text(self._findings, json.dumps(self.findings, indent=1) + "\n")


def workers_here() -> int:
    """How many groups run side by side."""
    return max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 2))


def run(
    path: Path,
    names: Sequence[str],
    tell: Callable[[str], None],
    group: Callable[[Sequence[str]], Answer] = run_group,
    workers: int | None = None,
) -> Outcomes:
    """Runs what has not passed yet; the files are written after each group.

    Returns the outcomes of all `names`.
    """
    results = _Results(path, names)
    waiting = [name for name in names if results.outcomes.get(name) != PASSED]
    groups = list(groups_of(waiting))

    def work(part: list[str]) -> None:
        answer = group(part)
        results.add(answer)
        if len(part) == 1:
            return
        for name in part:
            outcome = answer.outcomes[name]
            if outcome.startswith(FAILED) and FAULT.search(outcome):
                results.add(group([name]))

    with ThreadPoolExecutor(workers or workers_here()) as pool:
        begun = [pool.submit(work, part) for part in groups]
        for count, ended in enumerate(as_completed(begun)):
            ended.result()
            tell(f"group {count + 1} of {len(groups)}, {len(waiting)} tests in all")
    return {name: results.outcomes[name] for name in names}


def read(path: Path) -> dict[str, Any]:
    """What earlier runs found; nothing where the file is missing or damaged."""
    try:
        stored = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
