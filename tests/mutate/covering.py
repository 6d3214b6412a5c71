"""Which tests run which line, and how long each takes: collected once for a tree.

Contexts are test names, or names of fixtures that several tests share, whose lines count for all of
those.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing
from pathlib import Path
from typing import Any

import coverage
import pytest
from coverage.numbits import numbits_to_nums

from . import judge
from .mutant import Mutant

NO_JUDGES = {
    "tests/test_project.py": "reads the source: any change of a line may break its style",
    "tests/test_imports.py": "reads the source",
    "tests/test_mutate.py": "would mutate mutants",
}
"""Test files that judge no mutant, and why."""
MAP_LIMIT_S = 3600
FILES_AT_FIRST, SECONDS_AT_FIRST = 3, 10.0
"""See `Map.judges`."""
LEAST_S = 0.05
"""What pytest takes for a test that does nothing."""
LINES = """
    SELECT context.context, file.path, line_bits.numbits FROM line_bits
    JOIN context ON context.id = line_bits.context_id JOIN file ON file.id = line_bits.file_id
"""
"""Of coverage.py's data file (its schema is documented)."""


class Covering(judge.Chosen):
    """A pytest plugin: collects the lines, durations and failures of every test of a run. Those
    that fail in an unchanged copy judge nothing."""

    def __init__(self, data_file: Path, digest: str) -> None:
        super().__init__(())
        self.digest = digest
        self.data_file = data_file
        self.tests: dict[str, dict[str, Any]] = {}
        self.fixtures: dict[str, float] = {}
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
        before, context = self.context, _context(fixturedef)
        started = time.process_time()
        self._switch(context)
        try:
            return (yield)
        finally:
            self._switch(before)
            self.fixtures[context] = round(time.process_time() - started, 3)

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
        summary = {
            "digest": self.digest,
            "tests": kept,
            "fixtures": self.fixtures,
            "failed": sorted(self.failed),
        }
        self.data_file.with_suffix(".json").write_text(json.dumps(summary))


def _context(definition: pytest.FixtureDef[Any]) -> str:
    return f"fixture {definition.baseid}::{definition.argname}"


def collect(folder: Path, judging: str, jobs: int) -> Iterator[str]:
    """Runs the test files that judge, each in a process of its own; what was made of this tree
    stays. Tells of each file what came of it."""
    folder.mkdir(parents=True, exist_ok=True)
    digests = _digests(_judging_files(judging))
    stale = [path for path, digest in digests.items() if not _is_fresh(folder, path, digest)]
    if not stale:
        return
    with judge.copies(jobs) as free, ThreadPoolExecutor(jobs) as pool:

        def run(path: Path) -> str:
            copy = free.get()
            plugin = Covering(folder.resolve() / f"{path.stem}.data", digests[path])
            verdict = judge.run(copy, [f"tests/{path.name}"], plugin, MAP_LIMIT_S)
            free.put(copy)
            return f"{path.name}: {verdict.outcome} in {verdict.seconds} s; {verdict.reason}"

        for task in as_completed(pool.submit(run, path) for path in stale):
            yield task.result()


def _judging_files(pattern: str) -> list[Path]:
    paths = sorted((judge.ROOT / "tests").glob(pattern))
    paths = [path for path in paths if f"tests/{path.name}" not in NO_JUDGES]
    return sorted(paths, key=lambda path: path.name != "test_ops.py")  # the longest first


def _digests(paths: list[Path]) -> dict[Path, str]:
    """Of each test file together with the source whose lines the map names."""
    rooms = (path for room in ("compiler", "kernels") for path in (judge.ROOT / room).rglob("*.py"))
    source = b"".join(path.read_bytes() for path in sorted(rooms))
    return {path: hashlib.sha256(source + path.read_bytes()).hexdigest() for path in paths}


def _is_fresh(folder: Path, path: Path, digest: str) -> bool:
    summary = folder / f"{path.stem}.json"
    return summary.exists() and bool(json.loads(summary.read_text())["digest"] == digest)


def _file(test: str) -> str:
    return test.partition("::")[0]


class Map:
    """What `collect` found out: which tests judge a mutant, in which order."""

    def __init__(self, folder: Path, judging: str) -> None:
        self.seconds: dict[str, float] = {}
        """What each test takes, fixtures that it shares included."""
        self._lines: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
        """The lines of each file, by test."""
        self._sizes: Counter[str] = Counter()
        """How many lines each test runs."""
        for path in _judging_files(judging):
            self._add(folder / path.stem)

    def _add(self, stem: Path) -> None:
        summary = json.loads(stem.with_suffix(".json").read_text())
        sharing: dict[str, list[str]] = defaultdict(list)
        for name, test in summary["tests"].items():
            setup = (summary["fixtures"].get(fixture, 0.0) for fixture in test["fixtures"])
            self.seconds[name] = test["seconds"] + sum(setup)
            sharing[name].append(name)
            for fixture in test["fixtures"]:
                sharing[fixture].append(name)
        with closing(sqlite3.connect(stem.with_suffix(".data"))) as database:
            for context, file, lines in database.execute(LINES):
                numbers = numbits_to_nums(lines)
                for name in sharing[context]:
                    self._lines[file][name].update(numbers)
                    self._sizes[name] += len(numbers)

    def judges(self, mutant: Mutant, budget_s: float) -> Iterator[list[str]]:
        """Tests that run its lines, or its file where the lines run at import only: of every test
        function first the one that is quickest and most about the file, then the next ones, as far
        as the budget goes. In two groups, as most mutants are killed soon and collecting a file
        takes time: the first has tests of few files."""
        chosen, left = [], budget_s
        for name in self._ordered(mutant):
            if self.seconds[name] <= left:
                left -= self.seconds[name]
                chosen.append(name)
        near = set(list(dict.fromkeys(map(_file, chosen)))[:FILES_AT_FIRST])
        first, left = [], SECONDS_AT_FIRST
        for name in chosen:
            if _file(name) in near and self.seconds[name] <= left:
                left -= self.seconds[name]
                first.append(name)
        yield from filter(None, (first, [name for name in chosen if name not in first]))

    def _ordered(self, mutant: Mutant) -> list[str]:
        tests = self._lines[mutant.judges_of]
        first, last = mutant.lines
        span = set(range(first, last + 1))
        names = [name for name, lines in tests.items() if lines & span] or list(tests)
        cost = {
            name: (self.seconds[name] + LEAST_S) * self._sizes[name] / len(tests[name])
            for name in names
        }
        rounds: Counter[str] = Counter()
        order = []
        for name in sorted(names, key=lambda name: (cost[name], name)):
            function = name.partition("[")[0]
            order.append((rounds[function], cost[name], name))
            rounds[function] += 1
        return [name for _, _, name in sorted(order)]
