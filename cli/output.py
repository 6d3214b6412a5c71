"""What commands write: JSON, tables, progress, files."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import ArtifactError

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 120
"""Columns where the output is no terminal; rich would take 80 and fold every table."""


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
    return Console(
        stderr=stderr, width=None if stream.isatty() else PLAIN_WIDTH, highlight=False
    )


@contextmanager
def working(what: str) -> Iterator[None]:
    """Shows on stderr that something takes its time, and afterwards how long it took."""
    notes = console(stderr=True)
    started = time.perf_counter()
    if not notes.is_terminal:
        notes.print(f"{what} ...", markup=False)
    with notes.status(what):
        yield
    notes.print(f"{what}: {time.perf_counter() - started:.1f} s", markup=False)


def write_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file under a temporary name and renames it: it is whole or not there.

    Raises: ArtifactError when it cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"cannot write '{path}': {error.strerror or error}") from error
    finally:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def readable_size(size_bytes: int) -> str:
    """A size for people; 1 MB is 10**6 bytes."""
    if size_bytes < 1e6:
        return f"{size_bytes / 1e3:,.1f} kB"
    return f"{size_bytes / 1e6:,.1f} MB"
