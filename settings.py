"""The environment variables convloom reads, in one place.

| variable            | meaning                                                               |
|---------------------|-----------------------------------------------------------------------|
| CONVLOOM_DEBUG      | 0 silent; 1 the plan; 2 + refusals; 3 + the graph after each pass;    |
|                     | 4 + generated source                                                  |
| CONVLOOM_CHECK      | 0 nothing; 1 verifies the graph before and after every pass, and      |
|                     | memory that nobody has written holds NaN; 2 + that the graph computes |
|                     | the same, in fp64 on one draw of its inputs                           |
| CONVLOOM_CACHE_DIR  | compiled kernels, their statistics, and tuning records (default       |
|                     | ~/.cache/convloom)                                                    |
| CONVLOOM_LAUNCH     | how kernels follow each other on a GPU, separated by commas; nothing  |
|                     | by default: programmatic (the next one starts early, sm_90 and        |
|                     | later), branches (independent ones run side by side), clusters        |
|                     | (programs that share sums exchange them among multiprocessors, sm_90) |
| CONVLOOM_CORE       | hopper: convolutions and linear layers by warps that do different     |
|                     | things, on sm_90 where they can (no GPU has run that); plain: never,  |
|                     | even where a file or a record says so; by default it is not chosen    |
| CONVLOOM_EXTENSIONS | none, or the names of the extensions to use, separated by commas; by  |
|                     | default all that are installed or registered                          |
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from .errors import InvalidInputError

VERSION = "0.1.0"
"""Of convloom; `pyproject.toml` says the same (a test compares them)."""


CHECKS = (NOTHING, LAWS, MEANING) = (0, 1, 2)
"""What CONVLOOM_CHECK asks for, each with all before it."""
LAUNCH_OPTIONS = (PROGRAMMATIC, BRANCHES, CLUSTERS) = ("programmatic", "branches", "clusters")
CORES = (PLAIN, HOPPER) = ("plain", "hopper")
"""What computes products (`kernels/hopper/core.py`)."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for."""

    debug: int
    check: int
    cache_dir: Path
    launch: frozenset[str] = frozenset()
    core: str = ""
    extensions: frozenset[str] | None = None


def core() -> str:
    """CONVLOOM_CORE alone, which is asked for with every problem.

    Raises: InvalidInputError when it is unknown.
    """
    found = os.environ.get("CONVLOOM_CORE", "")
    if found not in ("", *CORES):
        raise InvalidInputError(f"CONVLOOM_CORE: expected {' or '.join(CORES)}, got {found!r}")
    return found


def launch() -> frozenset[str]:
    """CONVLOOM_LAUNCH alone, which is asked for with every modelled time.

    Raises: InvalidInputError where a word is unknown, or two exclude each other.
    """
    words = os.environ.get("CONVLOOM_LAUNCH", "").replace(" ", "").split(",")
    launch = frozenset(filter(None, words))
    if unknown := launch - set(LAUNCH_OPTIONS):
        *others, last = LAUNCH_OPTIONS
        raise InvalidInputError(
            f"CONVLOOM_LAUNCH: expected {', '.join(others)} or {last}, got {', '.join(unknown)}"
        )
    if launch >= {PROGRAMMATIC, BRANCHES}:
        raise InvalidInputError(
            "CONVLOOM_LAUNCH: programmatic and branches exclude each other: a kernel that starts "
            "early behind another stream's event has not been tried; choose one"
        )
    return launch


def read() -> Settings:
    """The settings of this moment (read at each use, so that tests may change them).

    Raises: InvalidInputError when CONVLOOM_DEBUG is not an integer, or CONVLOOM_CHECK,
    CONVLOOM_LAUNCH or CONVLOOM_CORE unknown.
    """
    level = os.environ.get("CONVLOOM_DEBUG", "0")
    if not level.isdigit():
        raise InvalidInputError(f"CONVLOOM_DEBUG: expected an integer from 0 to 4, got {level!r}")
    check = os.environ.get("CONVLOOM_CHECK") or "0"
    if check not in map(str, CHECKS):
        raise InvalidInputError(f"CONVLOOM_CHECK: expected 0, 1 or 2, got {check!r}")
    names = os.environ.get("CONVLOOM_EXTENSIONS", "").replace(" ", "")
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "convloom"
    return Settings(
        debug=int(level),
        check=int(check),
        cache_dir=Path(os.environ.get("CONVLOOM_CACHE_DIR", default)),
        launch=launch(),
        core=core(),
        extensions=frozenset(filter(None, names.split(","))) - {"none"} if names else None,
    )
