"""README.md and docs/ are true: commands parse, examples run, files and links exist."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from convloom import settings
from convloom.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
README, DOCS = ROOT / "README.md", ROOT / "docs"
OTHERS = (ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md")
PAGES = (README, *OTHERS, *sorted(DOCS.rglob("*.md")))
LINES = 120
"""Of README.md, at most."""
TEXT = "\n".join(page.read_text() for page in PAGES)

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks of one language; "" for those without."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for name, block in fenced if name == language]


def inline(text: str) -> list[str]:
    """Code in single backticks, on one line or two."""
    outside = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", outside)]


def commands(text: str, program: str) -> Iterator[list[str]]:
    """Arguments of every call of a program in the text, without comments and pipes."""
    lines = [line for block in blocks(text, "") for line in block.splitlines()]
    for line in (*lines, *inline(text)):
        words = shlex.split(line.partition(" | ")[0], comments=True) if line else []
        if words[: len(program.split())] == program.split():
            yield words[len(program.split()) :]


def test_the_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= LINES


def test_every_page_is_in_both_indexes() -> None:
    index = (DOCS / "index.md").read_text()
    for page in set(PAGES) - {README, *OTHERS, DOCS / "index.md"}:
        path = page.relative_to(DOCS)
        assert f"](docs/{path})" in README.read_text(), path
        assert f"]({path})" in index, path


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@every_page
def test_files_that_are_named_exist(page: Path) -> None:
    rooms = "kernels|compiler|zoo|cli|tests|benchmarks|docs|\\.ci"
    for code in inline(page.read_text()):
        if re.fullmatch(rf"({rooms})/[\w./]*", code) and not re.search("FOLDER|FILE|NAME", code):
            assert (ROOT / code).exists(), code


@every_page
def test_commands_are_accepted(page: Path) -> None:
    for arguments in commands(page.read_text(), "convloom"):
        if arguments:
            cli.parser().parse_args(arguments)
    for arguments in commands(page.read_text(), "python -m"):
        assert find_spec(arguments[0]) or (ROOT / (arguments[0].replace(".", "/"))).exists()
    makefile = (ROOT / "Makefile").read_text()
    for arguments in commands(page.read_text(), "make"):
        target = next(word for word in arguments if "=" not in word)
        assert f"\n{target}:" in makefile, target


def test_every_command_and_variable_is_documented() -> None:
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        assert f"convloom {name}" in TEXT, name
    documented = [line.split("|")[1].strip() for line in (settings.__doc__ or "").splitlines()
                  if line.startswith("| CONVLOOM_")]  # fmt: skip
    assert documented
    for variable in documented:
        assert f"`{variable}`" in TEXT, variable


def test_the_example_in_the_readme_is_short() -> None:
    (code,) = blocks(README.read_text(), "python")
    assert 5 <= len(code.splitlines()) <= 15


@pytest.mark.interpreter
@every_page
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page follow one another."""
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for code in blocks(page.read_text(), "python"):
        exec(compile(code, page.name, "exec"), names)


def test_the_picture_is_of_the_network_as_it_is_compiled_today() -> None:
    """If this fails, draw it again: the command stands below it in README.md."""
    launches = json.loads((ROOT / "tests" / "golden" / "launches.json").read_text())
    title = re.findall("<title>(.*?)</title>", (DOCS / "resnet18.svg").read_text())[0]
    assert f"-&gt; {launches['resnet18']['kernels']} kernels" in title
    assert "nothing was measured" in title
    assert "convloom explain resnet18" in README.read_text()
