"""What commands write: JSON, tables, progress, files."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

from ..atomic import replacing
from ..errors import ArtifactError, visible
from ..progress import heard_by

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

PLAIN_WIDTH = 120
"""Columns where the output is no terminal and COLUMNS does not say; rich would take 80 and fold
every table."""
INTERVAL_S = 20.0
"""Between lines that tell how far work is, where the output is no terminal."""


def print_json(value: Any) -> None:
    """The value as JSON on stdout; NaN and infinities become null, which JSON lacks."""
    print(json.dumps(_finite(value), indent=2, allow_nan=False))


def answer(options: argparse.Namespace, value: Any, *lines: object, text: str = "") -> None:
    """A command's result: under `--json` the value and nothing else, otherwise the lines, or the
    text as `show` prints it."""
    if options.json:
        print_json(value)
    elif text:
        show(text)
    else:
        say(*lines)


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


@dataclass
class Work:
    """What takes its time, and how far it is."""

    what: str
    counted: str = ""
    started: float = field(default_factory=time.perf_counter)

    def heard(self, what: str, done: int, total: int) -> None:
        """Keeps how many are done, of how many."""
        self.counted = f"{done:,} of {total:,} {what}, "

    def __str__(self) -> str:
        return f"{visible(self.what)}: {self.counted}{time.perf_counter() - self.started:.0f} s"

    def __rich__(self) -> Text:
        from rich.text import Text

        return Text(str(self))


@contextmanager
def working(what: str) -> Iterator[Work]:
    """Shows on stderr what takes its time and how far it is, on a terminal in a line that changes,
    else at long intervals; and afterwards how long it took. Yields it, to be changed."""
    notes, work = console(stderr=True), Work(what)
    with heard_by(work.heard):
        if notes.is_terminal:
            with notes.status(work):
                yield work
        else:
            notes.print(f"{visible(what)} ...", markup=False)
            with _repeated(lambda: notes.print(str(work), markup=False)):
                yield work
    seconds = time.perf_counter() - work.started
    notes.print(f"{visible(what)}: {seconds:.1f} s", markup=False)


@contextmanager
def _repeated(say: Callable[[], None]) -> Iterator[None]:
    """Inside the block `say` is called every INTERVAL_S seconds."""
    ended = threading.Event()

    def repeat() -> None:
        while not ended.wait(INTERVAL_S):
            say()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


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


def write_text(path: Path, text: str) -> None:
    """Writes a text, and says so on stderr. Raises: ArtifactError as `write_file` does."""
    write_file(path, text)
    say(f"wrote {path}", stderr=True)


def readable_size(size_bytes: int) -> str:
    """A size for people; 1 MB is 10**6 bytes."""
    if size_bytes < 1e6:
        return f"{size_bytes / 1e3:,.1f} kB"
    return f"{size_bytes / 1e6:,.1f} MB"
