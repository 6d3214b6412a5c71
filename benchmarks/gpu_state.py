"""The stages of `make gpu` and what became of them, kept between calls.

Imports nothing but Python's own: the program that uses it begins where convloom is not found yet.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

DONE, FAILED, UNFINISHED, SKIPPED = "done", "failed", "unfinished", "skipped"
ATTEMPTS = 2


@dataclass(frozen=True)
class Stage:
    """One process. arguments: of this Python; key: when it changes, the stage runs again.
    timed: takes `--budget`; skip: why the stage cannot run here; answer: the report that what it
    prints is."""

    name: str
    arguments: tuple[str, ...]
    key: str
    timed: bool = False
    skip: str = ""
    answer: str = ""


@dataclass(frozen=True)
class Entry:
    """What became of a stage."""

    status: str
    key: str
    seconds: float = 0.0
    attempts: int = 0
    reason: str = ""


def read_state(path: Path) -> dict[str, Entry]:
    """What earlier calls did; nothing where the file is missing or damaged."""
    try:
        stored = json.loads(path.read_text())["stages"]
        return {name: Entry(**entry) for name, entry in stored.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        print(f"{path} is not readable ({error}); starting anew", file=sys.stderr)
        return {}


def write_state(path: Path, entries: dict[str, Entry]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    plain = {"stages": {name: asdict(entry) for name, entry in entries.items()}}
    temporary.write_text(json.dumps(plain, indent=1) + "\n")
    temporary.replace(path)


def is_open(stage: Stage, entry: Entry | None) -> bool:
    """Whether a stage is to run: never ran, was cut off, changed, or failed for the first time."""
    if entry is None or entry.key != stage.key:
        return True
    if entry.status == FAILED:
        return entry.attempts < ATTEMPTS
    return entry.status == UNFINISHED or (entry.status == SKIPPED and not stage.skip)
