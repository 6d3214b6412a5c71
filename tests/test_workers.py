"""Worker processes that compile: what they are told, and that they end with who started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from convloom.compiler.records import rank
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.devices import offline
from convloom.kernels.devices.offline import CompileRequest, KernelReport, Resources
from convloom.kernels.products.linear import Linear

from . import harness

SM_90 = targets.parse("cuda:sm_90")
ROOT = Path(__file__).resolve().parent.parent
MANY = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # Not heard in the background of a shell.
from tests.test_workers import *
offline.compile_all(requests(range(1, 400)), workers=2)
"""


def requests(widths: range) -> list[CompileRequest]:
    """One kernel for each width of a linear layer."""
    op, found = registry.get("linear"), []
    for width in widths:
        specs = (TensorSpec((8, 16), torch.float16), TensorSpec((width, 16), torch.float16))
        problem = harness.problem_for(op, Linear(), specs)
        launches = op.launches(problem, op.default(problem, SM_90), SM_90)
        found += rank.requests(op, problem, launches, SM_90)
    return found


def files(folder: Path, kind: type[Resources]) -> int:
    return len(list((folder / offline.FOLDERS[kind]).glob("*.json")))


def test_they_use_the_cache_folder_of_the_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("first", "second"):
        monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path / name))
        offline.compile_all(requests(range(1, 5)), workers=2)
        assert files(tmp_path / name, Resources) == 4


def test_nothing_is_disassembled_that_nobody_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    wanted = requests(range(5, 9))
    offline.compile_all(wanted, workers=2)
    assert (files(tmp_path, Resources), files(tmp_path, KernelReport)) == (4, 0)
    offline.compile_all(wanted, workers=2, kind=KernelReport)
    assert files(tmp_path, KernelReport) == 4
    offline.report.cache_clear()
    offline.resources.cache_clear()
    report, resources = offline.report(wanted[0]), offline.resources(wanted[0])
    assert report.count("HMMA") + report.count("HGMMA")
    assert (report.registers, report.spill_bytes, report.shared_bytes) == (
        resources.registers, resources.spill_bytes, resources.shared_bytes,
    )  # fmt: skip


def _running(folder: Path) -> list[int]:
    """Processes whose environment names the folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
        except OSError:  # Gone, or not ours.
            continue
    return found


def _until(condition: object, seconds: float = 120.0) -> bool:
    end = time.monotonic() + seconds
    assert callable(condition)
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_none_is_left_behind(tmp_path: Path, end: signal.Signals) -> None:
    environment = {**os.environ, "CONVLOOM_CACHE_DIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", MANY], env=environment, cwd=ROOT, stderr=subprocess.DEVNULL
    )
    assert _until(lambda: files(tmp_path, Resources)), "nothing was compiled"
    assert len(_running(tmp_path)) > 2
    process.send_signal(end)
    process.wait(60)
    assert _until(lambda: not _running(tmp_path), 30), _running(tmp_path)
