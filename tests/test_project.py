"""The project's own rules: packaging, sizes, documentation, and what works without torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import convloom
import pytest
from convloom import settings
from convloom.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "compiler", "zoo", "cli", "benchmarks")
COLUMNS, FILE_LINES, TEST_FILE_LINES, FUNCTION_LINES = 100, 500, 600, 80
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))


def python_files() -> list[Path]:
    folders = (*ROOMS, "tests")
    inner = (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return sorted([*ROOT.glob("*.py"), *inner])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pyproject_lists_the_packages_on_disk(project: dict[str, object]) -> None:
    found = {
        ".".join(("convloom", *path.parent.relative_to(ROOT).parts))
        for room in ROOMS
        for path in (ROOT / room).rglob("__init__.py")
    }
    listed = project["tool"]["setuptools"]["packages"]
    # Of the tests only what `convloom.testing` offers is shipped.
    assert sorted(listed) == sorted({"convloom", "convloom.tests.properties", *found})


def test_pyproject_ships_the_data_on_disk(project: dict[str, object]) -> None:
    """Everything in a room that is no Python source is listed as package data; and `py.typed`."""
    shipped = set()
    for package, patterns in project["tool"]["setuptools"]["package-data"].items():
        folder = ROOT.joinpath(*package.split(".")[1:])
        shipped |= {path for pattern in patterns for path in folder.glob(pattern)}
    data = {
        path
        for room in set(ROOMS) - {"benchmarks"}  # whose results stay in the repository
        for path in (ROOT / room).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    }
    assert data | {ROOT / "py.typed"} == shipped


def test_one_version(project: dict[str, Any]) -> None:
    assert project["project"]["version"] == settings.VERSION == convloom.__version__


def test_lines_are_short() -> None:
    long = [
        f"{name_of(path)}:{number}"
        for path in python_files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line.partition("  # noqa")[0]) > COLUMNS
    ]
    assert not long, f"longer than {COLUMNS} columns"


def test_files_are_short() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in python_files()}
    assert len(lines) > 500
    long = {
        name_of(path): count
        for path, count in lines.items()
        if count > (TEST_FILE_LINES if path.parent.name == "tests" else FILE_LINES)
    }
    assert not long


def _functions(path: Path) -> Iterator[ast.FunctionDef]:
    """Functions of a file, except kernels, whose length is that of the algorithm."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if not any("jit" in decorator for decorator in decorators):
                yield node


def test_functions_are_short() -> None:
    lines = {
        f"{name_of(path)}:{function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in python_files()
        for function in _functions(path)
    }
    assert len(lines) > 5_000
    assert not {name: count for name, count in lines.items() if count > FUNCTION_LINES}


def test_nothing_is_left_to_do() -> None:
    marks = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    paths = (*python_files(), *PAGES, ROOT / "Makefile")
    assert not [
        f"{name_of(path)}: {mark}" for path in paths for mark in marks if mark in path.read_text()
    ]


def test_makefile_targets_set_up_the_environment() -> None:
    makefile = (ROOT / "Makefile").read_text()
    sets_up = {"demo": "READY", "test": "READY_TEST", "docs": "READY_TEST", "lint": "READY_DEV",
               "types": "READY_DEV"}  # fmt: skip
    for target, what in sets_up.items():
        assert f"\n{target}: $({what})\n" in makefile
    ci = ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK) and "make test" in ci.read_text()


# Torch, Triton and what comes with them cannot be imported in these processes.
WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "triton", "numpy", "networkx", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code], capture_output=True, text=True, timeout=60
    )


def test_import_needs_neither_torch_nor_triton() -> None:
    done = run_without_torch(
        "import convloom\n"
        "print(convloom.__version__, convloom.ConvloomError.__name__, 'zoo' in dir(convloom))\n"
        "print(len(convloom.zoo.names()))\n"
        "try:\n    convloom.compile\nexcept ImportError as error:\n    print(error)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "No module named 'torch'" in done.stdout


def test_the_package_is_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "convloom", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"convloom {convloom.__version__}\n"


def test_help_needs_neither_torch_nor_triton() -> None:
    done = run_without_torch(
        "from convloom.cli.main import COMMANDS, main\n"
        "names = [c.__name__.rpartition('.')[2].replace('_', '-') for c in COMMANDS]\n"
        "for arguments in ([], *([name] for name in names)):\n"
        "    try:\n        main([*arguments, '--help'])\n"
        "    except SystemExit as stop:\n        assert stop.code == 0\n"
        "assert not {'rich', 'PIL', 'sklearn'} & set(sys.modules), 'help must be instant'\n"
    )
    assert done.returncode == 0, done.stderr
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        assert f"convloom {name}" in done.stdout


def test_the_list_of_models_needs_neither_torch_nor_triton() -> None:
    done = run_without_torch(
        "from convloom.cli.main import main\nsys.exit(main(['zoo', '--json']))"
    )
    assert done.returncode == 0, done.stderr
    assert '"name": "resnet50"' in done.stdout


def test_doctor_says_what_is_missing() -> None:
    done = run_without_torch("from convloom.cli.main import main\nsys.exit(main(['doctor']))")
    assert done.returncode == 1, done.stderr
    assert "torch" in done.stdout and "missing" in done.stdout and not done.stderr
