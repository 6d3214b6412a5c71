"""The tables of `python -m tests.mutate` follow the sources: what moves or goes is moved or goes in
them, too. Needs no tool of mutation."""

from __future__ import annotations

import re

import pytest

from .mutate import edits, judge, score


@pytest.mark.parametrize("edit", edits.EDITS, ids=lambda edit: edit.pattern)
def test_every_edit_of_a_kernel_applies(edit: edits.Edit) -> None:
    kernels = (judge.ROOT / "kernels" / f"{name}.py" for name in edits.sources())
    assert any(re.search(edit.pattern, path.read_text(), re.M) for path in kernels)


def test_files_that_others_launch_are_there() -> None:
    names = {*edits.LAUNCHED_BY, *edits.LAUNCHED_BY.values(), *edits.NOT_EDITED}
    assert [name for name in names if not (judge.ROOT / "kernels" / f"{name}.py").exists()] == []


def test_edited_kernels_are_programs() -> None:
    mutants = edits.mutants(0)
    assert len(mutants) > 300
    for mutant in mutants[:60]:
        compile(mutant.code, mutant.file, "exec", dont_inherit=True)


@pytest.mark.parametrize("key", score.equivalents())
def test_equivalent_mutants_are_of_this_source(key: str) -> None:
    file, _, rest = key.partition("::")
    before = rest.partition(": ")[2].partition(" => ")[0]
    lines = (line.strip() for line in (judge.ROOT / file).read_text().splitlines())
    assert before in " ".join(lines)
