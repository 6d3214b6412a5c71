"""What commands write: JSON, tables, progress, files."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from ..atomic import replacing
from ..errors import ArtifactError, visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

PLAIN_WIDTH = 120
"""Columns where the output is no terminal and COLUMNS does not say; rich would take 80 and fold
every table."""


def print_json(value: Any) -> None:
    """The value as JSON on stdout; NaN and infinities become null, which JSON lacks."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def console(stderr: bool = False) -> Console:
    """A console for results, or with `stderr=True` for progress and notes."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    is_known = stream.isatty() or os.environ.get("COLUMNS", "").isdigit()
    return Console(stderr=stderr, width=None if is_known else PLAIN_WIDTH, highlight=False)


def say(*lines: object, stderr: bool = False) -> None:
    """Prints texts as they are, and tables."""
    out = console(stderr)
    for line in lines:
        out.print(visible(line) if isinstance(line, str) else line, markup=False)


def show(text: str) -> None:
    """Prints a text whose lines keep their length."""
    print(visible(text), end="" if text.endswith("\n") else "\n")


def table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None
) -> Table:
    """A table of cells as they are; a heading that begins with ">" stands over a column of numbers,
    which ends at the right."""
    from rich.table import Table
    from rich.text import Text

    shown = Table(title=title and Text(title))
    for heading in headings:
        side: Literal["right", "left"] = "right" if heading.startswith(">") else "left"
        shown.add_column(heading.removeprefix(">"), justify=side)
    for row in rows:
        shown.add_row(
            *(cell if isinstance(cell, Text) else Text(visible(str(cell))) for cell in row)
        )
    return shown


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows on stderr that something takes its time, and afterwards how long it took."""
    from rich.text import Text

    notes, what = console(stderr=True), visible(what)
    started = time.perf_counter()
    if not notes.is_terminal:
        notes.print(f"{what} ...", markup=False)
    with notes.status(Text(what)):
        yield
    notes.print(f"{what}: {time.perf_counter() - started:.1f} s", markup=False)


@contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, where that is a terminal. Yields what changes it: `advance` by so
    many, or `completed`, `total` and `description`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    text = TextColumn("{task.description}", markup=False)
    notes = console(stderr=True)
    quiet = not notes.is_terminal
    with Progress(*columns, text, console=notes, disable=quiet, transient=True) as bar:
        task = bar.add_task(visible(what), total=total)
        yield lambda **changes: bar.update(task, **changes)


def write_file(path: Path, content: str | Callable[[IO[bytes]], object]) -> None:
    """Writes a file that is whole or not there: a text, or what a function writes.

    Raises: ArtifactError when it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content.encode()) if isinstance(content, str) else content(file)
    except OSError as error:
        raise ArtifactError(f"cannot write '{path}': {error.strerror or error}") from error


def readable_size(size_bytes: int) -> str:
    """A size for people; 1 MB is 10**6 bytes."""
    if size_bytes < 1e6:
        return f"{size_bytes / 1e3:,.1f} kB"
    return f"{size_bytes / 1e6:,.1f} MB"
