"""The machinery of `python -m tests.mutate`: what it changes, and that it tells the dead from the
living."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

pytest.importorskip("cosmic_ray", reason="pip install -e '.[mutate]'")

from cosmic_ray.mutating import mutate_code

from .mutate import __main__ as command
from .mutate import judge, score, sites
from .mutate.mutant import Mutant, changed_lines
from .mutate.score import ALIVE, EQUIVALENT, KILLED, Result


@pytest.mark.parametrize("operator", [sites.DropOperand, sites.DropGuard])
def test_operators_do_what_their_examples_show(operator: type[sites.Operator]) -> None:
    for example in operator.examples():
        code = mutate_code(example.pre_mutation_code, operator(), example.occurrence)
        assert code == example.post_mutation_code


def test_a_seed_means_the_same_mutants() -> None:
    def keys(seed: int) -> list[str]:
        mutants = itertools.islice(sites.host_mutants(seed, "compiler/plan/streams.py"), 6)
        return [mutant.key for mutant in mutants]

    assert keys(0) == keys(0) != keys(1)


def test_mutants_change_what_computes() -> None:
    """No kernels, messages, annotations, examples, tuning spaces and costs."""
    file = "kernels/tile/split_k.py"
    source = (judge.ROOT / file).read_text().splitlines()
    mutants = list(sites.host_mutants(0, file))
    assert {mutant.function for mutant in mutants} == {"REDUCE_STAGES", "pointers", "scratch"}
    for mutant in mutants:
        first, last = mutant.lines
        assert mutant.before in " ".join(line.strip() for line in source[first - 1 : last])


@pytest.mark.parametrize("pattern", sites.NO_ANSWERS)
def test_files_that_compute_no_answer_are_there(pattern: str) -> None:
    assert list(judge.ROOT.glob(pattern))


def test_the_score_counts_what_could_be_noticed() -> None:
    outcomes = [KILLED, KILLED, ALIVE, EQUIVALENT]
    results = [Result(f"key {i}", "compiler", outcome) for i, outcome in enumerate(outcomes)]
    text = score.report(results, 7)
    assert "| compiler | 4 | 2 | 1 | 1 | 66.7% | 0.0 |" in text
    assert "- `key 2`" in text
    assert "--seed 7" in text


def test_results_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    for outcome in (ALIVE, KILLED):  # judged again
        score.append(path, Result("key", "kernels", outcome))
    assert score.read(path) == {"key": Result("key", "kernels", KILLED)}


TEXT = '"\\n".join(lines) + "\\n"'


@pytest.mark.slow
@pytest.mark.parametrize(
    ("planted", "outcome"),
    [
        ('"\\n".join(lines)', "failed"),
        ('"\\n".join([*lines, ""])', "passed"),
        ("str(sum(iter(int, 1)))", "stopped"),  # for ever
        ("nonsense(", "broken"),
    ],
)
def test_planted_mutants(planted: str, outcome: str) -> None:
    file, test = "compiler/graph/text.py", "tests/test_graph.py::test_text"
    source = (judge.ROOT / file).read_text()
    code = source.replace(TEXT, planted)
    mutant = Mutant(file, "to_text", *changed_lines(source, code), code, file, (1, 1))
    with judge.copies(1) as free:
        copy = free.get()
        verdict = judge.verdict_on(mutant, copy, [[test]], {test: 0.1})
        assert (copy / file).read_text() == source
    assert verdict.outcome == outcome
    assert verdict.test == (test if outcome == "failed" else "")
    assert score.result_of(mutant, verdict).outcome == (ALIVE if outcome == "passed" else KILLED)


@pytest.mark.slow
def test_a_small_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of one file, judged by one file: most are killed, and nothing is judged twice."""
    arguments = [
        "--only", "compiler/plan/streams.py", "--judges", "test_branches.py", "--mutants", "4",
        "--map", str(tmp_path / "map"), "--results", str(tmp_path / "results.jsonl"),
        "--report", str(tmp_path / "score.md"), "--at-least", "50", "--budget", "20",
    ]  # fmt: skip
    assert command.main(arguments) == 0
    first = (tmp_path / "results.jsonl").read_text()
    outcomes = [json.loads(line)["outcome"] for line in first.splitlines()]
    assert len(outcomes) == 4
    assert "| compiler |" in (tmp_path / "score.md").read_text()
    assert command.main(arguments) == 0
    assert (tmp_path / "results.jsonl").read_text() == first
