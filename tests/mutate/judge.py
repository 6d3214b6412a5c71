"""Runs chosen tests in a copy of the project, in a forked process that has torch imported."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import Queue
from typing import Any

import hypothesis  # noqa: F401
import networkx  # noqa: F401
import numpy  # noqa: F401
import pytest
import torch  # noqa: F401
import triton  # noqa: F401

from .mutant import Mutant

ROOT = Path(__file__).resolve().parents[2]
SLACK_S, SLOWDOWN, LEAST_WAITING = 30.0, 3.0, 6.0
"""A run may take so many processor seconds, for imports and collection, and so many times what its
tests take in an unchanged copy. LEAST_WAITING: see `_waiting`."""


@dataclass(frozen=True)
class Verdict:
    """What some tests say of a copy.

    outcome: "passed"; "failed"; "stopped" where a time limit ended it; "broken" where pytest could
    not run the tests. test, reason: of the first failure.
    """

    outcome: str
    test: str = ""
    reason: str = ""
    seconds: float = 0.0


@contextmanager
def copies(count: int) -> Iterator[Queue[Path]]:
    """That many copies of the tracked and the new files, each in a folder named as the package;
    who works in one takes it out and puts it back."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True, text=True,
    )  # fmt: skip
    names = [name for name in listing.stdout.split("\0") if (ROOT / name).is_file()]
    free: Queue[Path] = Queue()
    with tempfile.TemporaryDirectory(prefix="convloom-mutate-") as folder:
        for index in range(count):
            copy = Path(folder, str(index), "convloom")
            for name in names:
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, copy / name)
            free.put(copy)
        yield free


class Chosen:
    """A pytest plugin: the named tests in this order, and what became of the first that fails."""

    def __init__(self, names: Sequence[str]) -> None:
        self.place = {name: index for index, name in enumerate(names)}
        self.test = self.reason = ""

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = [item for item in items if item.nodeid in self.place]
        items[:] = sorted(kept, key=lambda item: self.place[item.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.test:
            self.test, self.reason = report.nodeid, _last_line(report.longrepr)


def _last_line(failure: Any) -> str:
    crash = getattr(failure, "reprcrash", None)
    return str(crash.message if crash else failure).strip().partition("\n")[0][:200]


def verdict_on(
    mutant: Mutant, copy: Path, groups: Iterable[Sequence[str]], seconds: Mapping[str, float]
) -> Verdict:
    """What groups of tests, one after the other, say of a copy with the mutant in it; the first
    failure is enough. seconds: what each test takes in an unchanged copy."""
    path = copy / mutant.file
    changed = path.stat()
    original = path.read_text()
    verdict, spent = Verdict("passed"), 0.0
    path.write_text(mutant.code)
    try:
        for names in groups:
            files = sorted({name.partition("::")[0] for name in names})
            limit_s = SLACK_S + SLOWDOWN * sum(seconds[name] for name in names)
            verdict = run(copy, ["-x", *files], Chosen(names), limit_s)
            spent += verdict.seconds
            if verdict.outcome != "passed":
                break
    finally:
        path.write_text(original)
        os.utime(path, ns=(changed.st_atime_ns, changed.st_mtime_ns))
    return replace(verdict, seconds=round(spent, 1))


def run(copy: Path, arguments: list[str], chosen: Chosen, limit_s: float) -> Verdict:
    """What pytest says in a forked process; limit_s: of the processor, for any one process."""
    started = time.monotonic()
    report = copy.parent / "verdict.json"
    report.unlink(missing_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _in_child(copy, arguments, chosen, limit_s, report)
    hurried = _wait(child, _waiting() * limit_s)
    seconds = round(time.monotonic() - started, 1)
    if not report.exists():
        reason = "hangs" if hurried else "the process died, or its processor time was used up"
        return Verdict("stopped", reason=reason, seconds=seconds)
    return Verdict(**{**json.loads(report.read_text()), "seconds": seconds})


def _waiting() -> float:
    """Seconds of the clock for one of the processor, more where other work shares the machine: only
    what waits for ever shall run out of them."""
    return max(LEAST_WAITING, 4 * os.getloadavg()[0] / (os.cpu_count() or 1))


def _wait(child: int, limit_s: float) -> bool:
    """Whether the time was over first; all processes of the child's group are gone afterwards."""
    ends = time.monotonic() + limit_s
    hurried = False
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > ends and not hurried:
            hurried = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return hurried


def _in_child(
    copy: Path, arguments: list[str], chosen: Chosen, limit_s: float, report: Path
) -> None:
    """Never returns."""
    try:
        os.setsid()
        _enter(copy, int(limit_s) + 1)
        flags = ["-q", "-p", "no:cacheprovider", "--hypothesis-seed=0",
                 "--hypothesis-profile=judge", "--tb=short"]  # fmt: skip
        code = pytest.main([*flags, *arguments], plugins=[chosen])
        outcome = {0: "passed", 1: "failed"}.get(int(code), "broken")
        verdict = Verdict(outcome, chosen.test, chosen.reason or f"pytest ended with {code!r}")
        report.write_text(json.dumps(asdict(verdict)))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(0)


def _enter(copy: Path, limit_s: int) -> None:
    """Makes this process one that works in the copy, and forgets what it knows of the project."""
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, limit_s))
    output = os.open(copy.parent / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(copy)
    os.environ |= {"PYTHONPATH": str(copy.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path[:] = [str(copy.parent), str(copy), *(p for p in sys.path if p not in ("", str(ROOT)))]
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tests", "convloom"):
            del sys.modules[name]
    importlib.invalidate_caches()
