#!/usr/bin/env python3
"""Counts the lines of Python in each part of the repository and holds them to LIMITS.

    .ci/lines.py [ROOT]      prints the counts; the exit status is 1 if a part is too long

Run by `make test`, through tests/test_lines.py. All lines of all *.py files count, so that nothing
is gained by leaving out comments or blank lines. A limit is raised only by a commit that changes
nothing else and says in its body what the lines buy; whoever makes a part shorter lowers it.
"""

from __future__ import annotations

import sys
from pathlib import Path

LIMITS = {
    ("kernels", "compiler", "cli"): 50_700,
    ("zoo",): 3_440,
    ("benchmarks",): 6_560,
}
"""Folders that are counted together, and how many lines they may have."""


def lines_in(root: Path, folders: tuple[str, ...]) -> int:
    """Lines of all *.py files below these folders of `root`."""
    files = (path for folder in folders for path in (root / folder).rglob("*.py"))
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in files)


def main(root: Path) -> int:
    """Prints a line per part and returns the exit status: 0, or 1 where a part is too long."""
    status = 0
    for folders, limit in LIMITS.items():
        count, name = lines_in(root, folders), " + ".join(folders)
        print(f"{name}: {count:,} lines of at most {limit:,}")
        if count > limit:
            print(f"{name}: {count - limit:,} lines too many; see LIMITS in .ci/lines.py")
            status = 1
    return status


if __name__ == "__main__":
    here = Path(__file__).resolve().parent.parent
    sys.exit(main(Path(sys.argv[1]) if sys.argv[1:] else here))
