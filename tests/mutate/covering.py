"""Which tests run which line, and how long each takes: collected once for a tree.

Contexts are test names, or names of fixtures that several tests share, whose lines count for all of
those.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import coverage
import pytest

from . import judge
from .mutant import Mutant

NO_JUDGES = {
    "tests/test_project.py": "reads the source: any change of a line may break its style",
    "tests/test_imports.py": "reads the source",
    "tests/test_mutate.py": "would mutate mutants",
}
"""Test files that judge no mutant, and why."""
MAP_LIMIT_S = 3600
FILES_AT_FIRST = 5
"""See `Map.judges`."""


class Covering(judge.Chosen):
    """A pytest plugin: collects the lines, durations and failures of every test of a run. Those
    that fail in an unchanged copy judge nothing."""

    def __init__(self, data_file: Path, tree: str) -> None:
        super().__init__(())
        self.tree = tree
        self.data_file = data_file
        self.tests: dict[str, dict[str, Any]] = {}
        self.failed: set[str] = set()
        self.context = ""

    def pytest_sessionstart(self) -> None:
        self.coverage = coverage.Coverage(
            data_file=str(self.data_file), config_file=False, source=["compiler", "kernels"]
        )
        self.coverage.set_option("run:relative_files", True)
        self.coverage.start()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        pass

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        started = time.process_time()
        shared = [
            _context(definition)
            for name in item.fixturenames
            for definition in item._fixtureinfo.name2fixturedefs.get(name, ())
            if definition.scope != "function"
        ]
        self._switch(item.nodeid)
        try:
            return (yield)
        finally:
            seconds = round(time.process_time() - started, 3)
            self.tests[item.nodeid] = {"seconds": seconds, "fixtures": shared}

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        if fixturedef.scope == "function":
            return (yield)
        before = self.context
        self._switch(_context(fixturedef))
        try:
            return (yield)
        finally:
            self._switch(before)

    def _switch(self, context: str) -> None:
        self.context = context
        self.coverage.switch_context(context)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        super().pytest_runtest_logreport(report)
        if report.failed:
            self.failed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        self.coverage.stop()
        self.coverage.save()
        kept = {name: test for name, test in self.tests.items() if name not in self.failed}
        summary = {"tree": self.tree, "tests": kept, "failed": sorted(self.failed)}
        self.data_file.with_suffix(".json").write_text(json.dumps(summary))


def _context(definition: pytest.FixtureDef[Any]) -> str:
    return f"fixture {definition.baseid}::{definition.argname}"


def collect(folder: Path, judging: str, jobs: int) -> Iterator[str]:
    """Runs the test files that judge, each in a process of its own; what was made of this tree
    stays. Tells of each file what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    tree = _digest()
    files = [path for path in _judging_files(judging) if not _is_fresh(folder, path, tree)]
    if not files:
        return
    with judge.copies(jobs) as free, ThreadPoolExecutor(jobs) as pool:

        def run(path: Path) -> str:
            copy = free.get()
            plugin = Covering(folder.resolve() / f"{path.stem}.data", tree)
            verdict = judge.run(copy, [f"tests/{path.name}"], plugin, MAP_LIMIT_S)
            free.put(copy)
            return f"{path.name}: {verdict.outcome} in {verdict.seconds} s; {verdict.reason}"

        for task in as_completed(pool.submit(run, path) for path in files):
            yield task.result()


def _judging_files(pattern: str) -> list[Path]:
    paths = sorted((judge.ROOT / "tests").glob(pattern))
    paths = [path for path in paths if f"tests/{path.name}" not in NO_JUDGES]
    return sorted(paths, key=lambda path: path.name != "test_ops.py")  # the longest first


def _digest() -> str:
    """Of the source whose lines the map names."""
    paths = (path for room in ("compiler", "kernels") for path in (judge.ROOT / room).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(paths))).hexdigest()


def _is_fresh(folder: Path, path: Path, tree: str) -> bool:
    summary = folder / f"{path.stem}.json"
    if not summary.exists() or summary.stat().st_mtime < path.stat().st_mtime:
        return False
    return bool(json.loads(summary.read_text())["tree"] == tree)


def _file(test: str) -> str:
    return test.partition("::")[0]


class Map:
    """What `collect` found out: which tests judge a mutant, in which order."""

    def __init__(self, folder: Path, judging: str) -> None:
        self.seconds: dict[str, float] = {}
        self._sharing: dict[str, list[str]] = defaultdict(list)
        self._data: list[coverage.CoverageData] = []
        for path in _judging_files(judging):
            summary = json.loads((folder / f"{path.stem}.json").read_text())
            for name, test in summary["tests"].items():
                self.seconds[name] = test["seconds"]
                for fixture in test["fixtures"]:
                    self._sharing[fixture].append(name)
            data = coverage.CoverageData(basename=str(folder / f"{path.stem}.data"))
            data.read()
            self._data.append(data)
        self._tests = Counter(map(_file, self.seconds))
        """How many tests a file has."""

    def judges(self, mutant: Mutant, budget_s: float) -> Iterator[list[str]]:
        """Tests that run its lines, or its file where the lines run at import only: the fastest of
        every test function first, then the next ones, as far as the budget goes. Those of the
        files that are most about these lines come first, since collecting a file takes time."""
        chosen = self._chosen(mutant, budget_s)
        counts = Counter(map(_file, chosen))
        share = {file: count / self._tests[file] for file, count in counts.items()}
        near = set(sorted(counts, key=lambda file: share[file])[-FILES_AT_FIRST:])
        for is_near in (True, False):
            if group := [name for name in chosen if (_file(name) in near) is is_near]:
                yield group

    def _chosen(self, mutant: Mutant, budget_s: float) -> list[str]:
        first, last = mutant.lines
        lines = self._lines(mutant.judges_of)
        names = {name for line in range(first, last + 1) for name in lines.get(line, ())}
        if not names:
            names = set().union(*lines.values())
        rounds: dict[str, list[str]] = defaultdict(list)
        stem = Path(mutant.judges_of).stem
        for name in sorted(names, key=lambda name: (stem not in name, self.seconds[name], name)):
            rounds[name.partition("[")[0]].append(name)
        order = sorted(
            (index, self.seconds[name], name)
            for group in rounds.values()
            for index, name in enumerate(group)
        )
        chosen, left = [], budget_s
        for _, seconds, name in order:
            if seconds <= left:
                left -= seconds
                chosen.append(name)
        return chosen

    def _lines(self, file: str) -> dict[int, set[str]]:
        """The tests that run each line of a file."""
        tests: dict[int, set[str]] = defaultdict(set)
        for data in self._data:
            for line, contexts in data.contexts_by_lineno(file).items():
                for context in contexts:
                    names = self._sharing.get(context, [context])
                    tests[line] |= {name for name in names if name in self.seconds}
        return tests
