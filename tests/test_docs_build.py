"""The documentation as pages: built with warnings as errors, where mkdocs is installed."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import convloom
import pytest
from convloom.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
needs_mkdocs = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="no mkdocs (extra: docs)",
)


def test_the_reference_has_every_public_name() -> None:
    """Each name of the facade is named with the module that it comes from; errors all at once."""
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    listed = {name.rpartition(".")[2] for name in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)}
    for name in set(convloom.__all__) - {"__version__"}:
        value = getattr(convloom, name)
        is_error = inspect.isclass(value) and issubclass(value, convloom.ConvloomError)
        assert ("errors" if is_error else name) in listed, name


@needs_mkdocs
def test_the_pages_build_without_warnings(tmp_path: Path) -> None:
    (tmp_path / "parent").mkdir()
    (tmp_path / "parent" / "convloom").symlink_to(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")],
        cwd=ROOT, env={**os.environ, "CONVLOOM_PARENT": str(tmp_path / "parent")},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "site"
    pages = {page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")}
    assert all((site / page.with_suffix(".html")).exists() for page in pages)
    assert not (site / "generate.py").exists()
    fusion = (site / "how" / "fusion.html").read_text()
    assert "does the kernel support it?</text>" in fusion and "language-flow" not in fusion
    options = (site / "reference" / "options.html").read_text()
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2].replace("_", "-")
        assert f"usage: convloom {name}" in options
    reference = (site / "reference" / "api.html").read_text()
    assert "dynamic_batch" in reference and "UnsupportedOpError" in reference
    for page in site.rglob("*.html"):
        fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]+)"',
                             page.read_text())  # fmt: skip
        assert not fetched, f"{page.name} fetches {fetched}"
