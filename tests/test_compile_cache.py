"""The cache of compiled kernels after crashes and on full disks, and it and tuning records where
others may write."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import convloom
import pytest
import torch
from convloom.cli import doctor
from convloom.compiler.records.store import Store
from convloom.errors import ArtifactError, KernelError
from convloom.kernels.devices import offline
from convloom.kernels.devices.offline import CompileRequest
from torch import nn

from .test_records import conv, record_of


@pytest.fixture(scope="module")
def wanted() -> CompileRequest:
    exe = convloom.compile(nn.ReLU(), (torch.zeros(64),), target="cuda:sm_80", tuning="heuristic")
    (kernel,) = exe.kernels
    assert kernel.request is not None
    return kernel.request


@pytest.fixture(scope="module")
def filled(wanted: CompileRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in which it is compiled already."""
    cache = tmp_path_factory.mktemp("filled") / "cache"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVLOOM_CACHE_DIR", str(cache))
        offline.compile_request(wanted)
    return cache


@pytest.fixture
def cache(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copied = shutil.copytree(filled, tmp_path / "cache")
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(copied))
    return copied


def code(wanted: CompileRequest) -> bytes:
    return bytes(offline.compile_request(wanted).asm["cubin"])


def entry(cache: Path, kind: str) -> Path:
    (path,) = (path for path in cache.glob(f"triton/*/*.{kind}") if "__grp__" not in path.name)
    return path


def test_what_is_kept_is_this_users_alone(cache: Path) -> None:
    assert (cache.stat().st_mode & 0o777, (cache / "triton").stat().st_mode & 0o777) == (
        0o700, 0o700,
    )  # fmt: skip
    files = [path for path in cache.rglob("*") if path.is_file()]
    assert files and all(path.stat().st_mode & 0o777 == 0o600 for path in files)


def test_what_was_compiled_is_found(
    cache: Path, wanted: CompileRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = entry(cache, "cubin").read_bytes()
    monkeypatch.setattr(offline.ASTSource, "make_ir", None)  # Nothing is compiled.
    assert code(wanted) == held


@pytest.mark.parametrize("kind", ["cubin", "ptx", "json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "emptied"])
def test_a_damaged_entry_is_a_miss_with_a_warning(
    cache: Path, wanted: CompileRequest, kind: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    held, path = entry(cache, "cubin").read_bytes(), entry(cache, kind)
    whole = bytearray(path.read_bytes())
    if damage == "cut":
        del whole[len(whole) // 2 :]
    elif damage == "changed":
        whole[len(whole) // 2] ^= 1
    path.write_bytes(b"" if damage == "emptied" else whole)
    with caplog.at_level(logging.WARNING, "convloom"):
        assert code(wanted) == held
    assert f"{path} is ignored and compiled again: its sha256 is another" in caplog.text
    caplog.clear()
    assert code(wanted) == held and not caplog.text


def test_an_entry_that_others_may_write_is_a_miss_with_a_warning(
    cache: Path, wanted: CompileRequest, caplog: pytest.LogCaptureFixture
) -> None:
    path = entry(cache, "cubin")
    held = path.read_bytes()
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING, "convloom"):
        assert code(wanted) == held
    assert "others may write it: its permissions are 666" in caplog.text
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("folder", ["", "triton"])
def test_a_folder_that_others_may_write_is_refused(
    cache: Path, wanted: CompileRequest, folder: str
) -> None:
    (cache / folder).chmod(0o777)
    with pytest.raises(KernelError, match=r"others may write it: its permissions are 777; .*chmod"):
        offline.compile_request(wanted)


def test_doctor_says_that_others_may_write_the_cache(cache: Path) -> None:
    cache.chmod(0o777)
    found = doctor._cache()
    assert found.status == doctor.BROKEN and "others may write it" in found.found


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_folder_of_somebody_else_is_refused(cache: Path, wanted: CompileRequest) -> None:
    os.chown(cache, 12345, -1)
    with pytest.raises(KernelError, match="it belongs to user 12345, this is 0"):
        offline.compile_request(wanted)


def test_a_damaged_statistic_is_a_miss_with_a_warning(
    cache: Path, wanted: CompileRequest, caplog: pytest.LogCaptureFixture
) -> None:
    offline.resources.cache_clear()
    first = offline.resources(wanted)
    (path,) = cache.glob("resources/*.json")
    data = json.loads(path.read_text())
    data["data"]["registers"] += 1
    path.write_text(json.dumps(data))
    offline.resources.cache_clear()
    with caplog.at_level(logging.WARNING, "convloom"):
        assert offline.resources(wanted) == first
    assert "statistics of a kernel" in caplog.text and "its sha256 is another" in caplog.text


def in_child(work: object, *arguments: object) -> multiprocessing.process.BaseProcess:
    child = multiprocessing.get_context("fork").Process(target=work, args=arguments)
    child.start()
    return child


def _compile_on_a_full_disk(wanted: CompileRequest, cache: str) -> None:
    os.environ["CONVLOOM_CACHE_DIR"] = cache
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))
    try:
        offline.compile_request(wanted)
    except KernelError as error:
        os._exit(7 if "cannot be written" in str(error) else 8)


def test_a_full_disk_is_said_and_leaves_nothing_half(
    wanted: CompileRequest, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = in_child(_compile_on_a_full_disk, wanted, str(tmp_path / "cache"))
    child.join()
    assert child.exitcode == 7
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path / "cache"))
    assert code(wanted) == entry(filled, "cubin").read_bytes()


def _compile_for_ever(wanted: CompileRequest, cache: str) -> None:
    os.environ["CONVLOOM_CACHE_DIR"] = cache
    while True:
        code(wanted)
        shutil.rmtree(next(Path(cache).glob("triton/*")), ignore_errors=True)


@pytest.mark.slow
def test_eight_writers_killed_at_any_moment_leave_no_wrong_entry(
    wanted: CompileRequest, filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of them deletes what the others read."""
    draw = random.Random(0)
    held = entry(filled, "cubin").read_bytes()
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(6):
        writers = [
            in_child(_compile_for_ever, wanted, str(tmp_path / "cache")) for _ in range(8)
        ]
        time.sleep(draw.uniform(0.5, 3.0))
        for writer in writers:
            writer.kill()
            writer.join()
        assert code(wanted) == held


@pytest.mark.parametrize("what", ["folder", "architecture", "op", "file"])
def test_a_record_that_others_may_write_is_ignored_with_a_warning(
    tmp_path: Path, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A record chooses what is compiled and saved."""
    record, folder = record_of(conv()), tmp_path / "records"
    Store(folder).put(record)
    path = Store(folder).path(record.key)
    places = {"folder": folder, "architecture": path.parent.parent, "op": path.parent, "file": path}
    assert all(place.stat().st_mode & 0o077 == 0 for place in places.values())
    places[what].chmod(0o777)
    with caplog.at_level(logging.WARNING, "convloom"):
        assert Store(folder).get(record.key) is None
    assert "is ignored" in caplog.text and "others may write it" in caplog.text
    if what != "file":
        with pytest.raises(ArtifactError, match="others may write it"):
            Store(folder).put(record)
