"""Every masked load of a kernel says what stands for the elements that it does not read.

Without `other=` they are undefined on a GPU, which neither the interpreter nor, where the compiler
makes asynchronous copies of the loads, the emulator shows: both have zeros there.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import convloom
import pytest

KERNELS = Path(convloom.__file__).parent / "kernels"


def masked_without_other(source: str) -> Iterator[int]:
    """Lines of the `tl.load` calls that have a mask, by name or position, and no `other`."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) != "tl.load":
            continue
        names = {keyword.arg for keyword in node.keywords}
        if ("mask" in names or len(node.args) > 1) and "other" not in names and len(node.args) < 3:
            yield node.lineno


@pytest.mark.parametrize("path", sorted(KERNELS.rglob("*.py")), ids=lambda path: path.stem)
def test_masked_loads_say_what_stands_outside(path: Path) -> None:
    missing = [f"{path.name}:{line}" for line in masked_without_other(path.read_text())]
    assert not missing, f"tl.load with a mask and without other=: {missing}"


@pytest.mark.parametrize(
    ("call", "count"),
    [
        ("tl.load(p, mask=m)", 1),
        ("tl.load(p, m)", 1),
        ("tl.load(p + 1, mask=m, cache_modifier='.cg').to(tl.float32)", 1),
        ("tl.load(p, mask=m, other=0.0)", 0),
        ("tl.load(p, m, 0.0)", 0),
        ("tl.load(p)", 0),
        ("tl.store(p, v, mask=m)", 0),
    ],
)
def test_loads_without_other_are_told_from_others(call: str, count: int) -> None:
    assert len(list(masked_without_other(call))) == count


def test_kernels_load_as_the_check_expects() -> None:
    """Under the name `tl.load`: nothing is imported from the language under another one."""
    sources = [path.read_text() for path in KERNELS.rglob("*.py")]
    assert sum("tl.load(" in source for source in sources) > 30
    imported = [
        alias.asname or alias.name
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name == "triton.language"
    ]
    assert set(imported) == {"tl"}
    assert not any(
        alias.name == "load"
        for source in sources
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("triton")
        for alias in node.names
    )
