"""The command line about this machine: `convloom doctor` and `convloom demo`."""

from __future__ import annotations

import re
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom.cli import doctor
from convloom.cli.main import main
from PIL import Image

from .test_cli import answer, refusal

__all__ = ["answer", "refusal"]


def test_doctor(answer: Callable[..., Any]) -> None:
    found = answer("doctor", "--json")
    checks = {check["name"]: check for check in found["checks"]}
    assert found["ok"] and all(
        set(check) == {"name", "status", "found", "disables"} for check in checks.values()
    )
    assert checks["torch"]["found"] == torch.__version__
    assert checks["interpreter"]["status"] == checks["cross-compilation"]["status"] == "ok"
    assert "so these do not work" in answer("doctor")


def test_doctor_says_what_was_not_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    """The releases of the tests are those that the project and its Makefile ask for."""
    for version, remark in (("2.11.1+cpu", ""), ("2.15.3", ""), ("2.10.0", "(tested with 2.11 to "
                            "2.15)"), ("3.0.0a0+git1", "(tested with 2.11 to 2.15)")):  # fmt: skip
        monkeypatch.setattr(torch, "__version__", version)
        found = doctor._library("torch", "")
        assert found.status == "ok" and found.found == f"{version} {remark}".strip()
    root = Path(doctor.__file__).parents[1]
    asked = (root / "pyproject.toml").read_text()
    for name, (oldest, newest) in doctor.TESTED.items():
        major, minor = newest.split(".")
        assert f'"{name}>={oldest},<{major}.{int(minor) + 1}' in asked
    assert "(2, 11) <= v < (2, 16)" in (root / "Makefile").read_text()


def test_doctor_notices_a_cache_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: Callable[..., Any]
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(file / "cache"))
    checks = {check["name"]: check for check in answer("doctor", "--json")["checks"]}
    assert checks["cache"]["status"] == "broken" and "file" in checks["cache"]["found"]
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Check("gpu", doctor.MISSING, "")]))
    assert main(["doctor", "--strict"]) == 0, "what is missing is no fault"
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor._cache()]))
    assert main(["doctor"]) == 0 and main(["doctor", "--strict"]) == 1


def test_doctor_tells_what_launching_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert doctor._c_compiler().status == "missing"
    assert "but no " + str(tmp_path / "Python.h") in doctor._c_compiler().found
    (tmp_path / "Python.h").touch()
    assert doctor._c_compiler().status == "ok"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor._c_compiler().found == "no gcc, clang"


@pytest.mark.interpreter
def test_demo_reads_digits(tmp_path: Path, answer: Callable[..., Any]) -> None:
    found = answer("demo", "digits", "--json", "--output-dir", tmp_path)["parts"]["digits"]
    assert found["images"] == found["agreeing"] == 355
    assert found["top1"]["compiled"] == found["top1"]["eager"] >= 0.98
    with Image.open(tmp_path / "digits.png") as picture:
        assert picture.format == "PNG" and picture.width > picture.height > 100


def test_demo_emulates_a_gpu(tmp_path: Path, answer: Callable[..., Any]) -> None:
    found = answer("demo", "emulator", "--json", "--output-dir", tmp_path)["parts"]["emulator"]
    assert found == {"as_expected": True, "images": 16, "agreeing": 16}


def test_demo_refuses_unknown_parts(refusal: Callable[..., str]) -> None:
    assert "digits" in refusal("demo", "digit")


EMULATED = "--target", "emulator:sm_90", "--dtype", "float16"
NOT_TIMED = {
    "text": ["explain", "lenet5", *EMULATED],
    "files": ["explain", "squeezenet1_1", *EMULATED, "--json", "--svg", "a.svg", "--html",
              "a.html"],
    "diff": ["explain", "lenet5", "--diff", "none", "default", *EMULATED],
    "ablate": ["ablate", "lenet5", *EMULATED, "--fusions", "small*", "--plot", "a.svg"],
}  # fmt: skip


@pytest.mark.parametrize("words", NOT_TIMED.values(), ids=NOT_TIMED)
def test_no_command_shows_times_of_the_emulator(
    words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Nor in what it writes, nor in refusals, of which SqueezeNet has one that times decide."""
    monkeypatch.chdir(tmp_path)
    assert main(words) == 0
    told = capsys.readouterr()
    assert told.err.count("GPU") == 0
    for text in (told.out, *(file.read_text() for file in tmp_path.iterdir())):
        assert not re.search(r"[\d.]+ us\b", text) and "emulator:sm_90" in text
        assert not re.search(r'"us": ?[\d.]+|modelled_us": ?[\d.]+', text)
    if "squeezenet1_1" in words:
        assert "modelled slower than stem-loads on cuda:sm_90" in told.out
