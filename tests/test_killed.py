"""kill -9 in the middle of compiling or tuning: what was there stays, and the next run goes on."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import convloom
import pytest
import torch
from convloom.compiler.records.store import Store, user_folder
from convloom.kernels.devices import offline
from torch import nn

CHILD = """
import os, signal, sys, torch
from tests.test_killed import compiled

left = iter(range(int(sys.argv[1])))
replace = os.replace

def dies(*arguments, **options):
    if next(left, None) is None:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(*arguments, **options)

os.replace = dies
compiled(*sys.argv[2:])
"""


def compiled(target: str, tuning: str) -> convloom.Executable:
    """A convolution with a channel or two."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    return convloom.compile(net, (torch.zeros(1, 3, 6, 6),), target=target, tuning=tuning)


def killed(cache: Path, writes: int, target: str, tuning: str) -> None:
    """Compiles in another process, which dies when it is about to put its next file in place."""
    environment = {**os.environ, "CONVLOOM_CACHE_DIR": str(cache)}
    command = [sys.executable, "-c", CHILD, str(writes), target, tuning]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("writes", [0, 3])
def test_while_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    killed(tmp_path, writes, "cuda:sm_90", "heuristic")
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    # What was read before in this process would not be read again.
    offline.report.cache_clear()
    found = [kernel.report() for kernel in compiled("cuda:sm_90", "heuristic").kernels]
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path / "other"))
    offline.report.cache_clear()
    assert found == [kernel.report() for kernel in compiled("cuda:sm_90", "heuristic").kernels]


def test_while_tuning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    killed(tmp_path, 1, "interpreter", "search")
    (kept,) = Store(user_folder()).all()
    exe = compiled("interpreter", "search")
    records = Store(user_folder()).all()
    # The search goes on with a record that it had not finished.
    assert kept.key in [record.key for record in records] and len(records) > 1
    assert all(record.complete for record in records)
    told = [each.message for each in caplog.records if each.levelno >= logging.WARNING]
    assert not told, "damaged records are told"
    assert exe(torch.ones(1, 3, 6, 6)).shape == (1, 8, 4, 4)
