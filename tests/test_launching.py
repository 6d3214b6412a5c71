"""Triton's own launcher, which hands a kernel's arguments to the driver, on a driver that is none:
the one part between a compiled kernel and a GPU that runs nowhere else without one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = next((name for name in ("gcc", "clang") if shutil.which(name)), None)
HEADER = Path(sysconfig.get_path("include")) / "Python.h"
PROGRAMMATIC = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""

pytestmark = pytest.mark.skipif(
    COMPILER is None or not HEADER.is_file(),
    reason="Triton's launcher needs a C compiler and Python's headers",
)


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("libcuda")
    done = subprocess.run(
        [sys.executable, "-m", "tests.launching", str(folder), str(COMPILER)],
        cwd=ROOT,
        env={**os.environ, "TRITON_CACHE_DIR": str(folder)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_kernels_get_their_arguments_in_the_order_of_their_code(
    launches: list[dict[str, Any]],
) -> None:
    """As many as the code declares, the tuple of operands flattened, whatever the batch."""
    for each in launches:
        assert each["launches"] == 1, each
        assert each["arrived"] == each["expected"], each


def test_kernels_are_started_as_they_were_compiled(launches: list[dict[str, Any]]) -> None:
    """Programs, threads, shared memory, the stream; with the attribute where they wait."""
    for each in launches:
        for name in ("grid", "threads", "shared_bytes"):
            wanted, got = each[name]
            assert got == wanted, each
        assert each["stream"] == 77
        assert each["attributes"] == [PROGRAMMATIC] * each["programmatic"], each


def test_every_kind_of_argument_was_tried(launches: list[dict[str, Any]]) -> None:
    assert {each["extras"] for each in launches} >= {0, 1, 2}
    assert {bool(each["boxes"]) for each in launches} == {False, True}
    assert {each["programmatic"] for each in launches} == {False, True}
    assert len({each["kernel"] for each in launches}) >= 3
