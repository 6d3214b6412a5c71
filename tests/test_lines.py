"""The library stays as short as `.ci/lines.py` says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / ".ci" / "lines.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60
    )


def test_no_part_has_more_lines_than_its_limit() -> None:
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 3


def test_a_part_that_is_too_long_is_named(tmp_path: Path) -> None:
    (shown,) = re.findall(r"zoo: [\d,]+ lines of at most ([\d,]+)", run().stdout)
    limit = int(shown.replace(",", ""))
    (tmp_path / "zoo" / "inner").mkdir(parents=True)
    (tmp_path / "zoo" / "notes.txt").write_text("not Python\n" * 9)
    code = tmp_path / "zoo" / "inner" / "net.py"
    code.write_text("\n" * limit)
    assert run(str(tmp_path)).returncode == 0
    code.write_text("\n" * (limit + 2))
    done = run(str(tmp_path))
    assert done.returncode == 1
    assert "zoo: 2 lines too many; see LIMITS in .ci/lines.py" in done.stdout
