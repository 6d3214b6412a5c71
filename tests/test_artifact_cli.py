"""Saved executables on the command line: compile -o, run, explain, doctor."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import numpy as np
import pytest
import torch
from convloom import zoo
from convloom.cli import main as cli
from convloom.compiler.artifact.read import open_artifact

pytestmark = pytest.mark.interpreter


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Runs a command that succeeds; its JSON, or its text."""

    def run(*arguments: object, status: int = 0) -> Any:
        assert cli.main([str(argument) for argument in arguments]) == status
        text = capsys.readouterr().out
        return json.loads(text) if "--json" in arguments else text

    return run


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        assert cli.main([str(argument) for argument in arguments]) == cli.EXIT_ERROR
        return capsys.readouterr().err

    return run


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "lenet5.loom"
    command = ["compile", "lenet5", "--weights", "digits", "-o", str(path), "--batch", "1", "2-8",
               "--target", "cuda:sm_80", "cuda:sm_90", "--dtype", "float16", "--json"]  # fmt: skip
    assert cli.main(command) == 0
    return path


def test_compile_writes_every_target_and_batch(path: Path) -> None:
    held = [(p.target, p.batches) for p in open_artifact(path).programs]
    assert held == [
        ("cuda:sm_80", (1, 1)),
        ("cuda:sm_80", (2, 8)),
        ("cuda:sm_90", (1, 1)),
        ("cuda:sm_90", (2, 8)),
    ]


def test_compile_says_what_it_wrote(tmp_path: Path, answer: Callable[..., Any]) -> None:
    text = answer("compile", "lenet5", "--target", "reference", "-o", tmp_path / "x.loom")
    assert f"wrote {tmp_path / 'x.loom'}" in text and "sha256" in text


def test_a_range_may_begin_with_empty_batches(tmp_path: Path, answer: Callable[..., Any]) -> None:
    path = tmp_path / "x.loom"
    answer("compile", "lenet5", "--target", "reference", "-o", path, "--batch", "0-2")
    assert "reference (batch 0 to 2)" in answer("doctor", path)


def test_several_targets_without_a_file_are_refused(refusal: Callable[..., str]) -> None:
    message = refusal("compile", "lenet5", "--target", "reference", "--batch", "1", "2")
    assert "expected one of each, or -o FILE" in message


@pytest.mark.parametrize("batch", ["4-1", "0", "0-0", "-1-2", "1-", "x"])
def test_a_batch_that_is_none_is_refused(batch: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["compile", "lenet5", "--batch", batch])
    assert "expected" in capsys.readouterr().err


def test_run_gives_the_models_answer(
    path: Path, tmp_path: Path, answer: Callable[..., Any]
) -> None:
    x = np.random.default_rng(0).random((1, 1, 32, 32), np.float32)
    np.save(tmp_path / "x.npy", x)
    result = tmp_path / "y.npy"
    shared = (tmp_path / "x.npy", "--target", "interpreter", "--output", result, "--json")
    found = answer("run", path, *shared)
    assert found["model"] == "lenet5" and found["target"] == "interpreter"
    y = zoo.lenet5(weights="digits").eval()(torch.from_numpy(x))
    np.testing.assert_allclose(np.load(result), y.detach().numpy(), rtol=0.02, atol=0.02)


def test_a_file_of_no_zoo_model_takes_images_of_its_shape(
    tmp_path: Path, answer: Callable[..., Any], refusal: Callable[..., str]
) -> None:
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 5, 7)).eval()
    exe = convloom.compile(module, (torch.zeros(1, 3, 4, 5),), target="reference")
    exe.save(tmp_path / "own.loom")
    np.save(tmp_path / "x.npy", np.zeros((1, 3, 4, 5), np.float32))
    given = tmp_path / "x.npy", "--target", "reference"
    assert len(answer("run", tmp_path / "own.loom", *given, "--json")["top"][0]) == 5
    flat = torch.nn.Linear(4, 4).eval()
    convloom.compile(flat, (torch.zeros(1, 4),), target="reference").save(tmp_path / "flat.loom")
    assert "expected a network of one image" in refusal("run", tmp_path / "flat.loom", *given)


def test_options_of_a_compilation_come_too_late(path: Path, refusal: Callable[..., str]) -> None:
    message = refusal("run", path, "x.npy", "--target", "interpreter", "--dtype", "float16")
    assert "--dtype: expected a model, got" in message and "compiled already" in message


def test_explain_a_file(path: Path, tmp_path: Path, answer: Callable[..., Any]) -> None:
    text = answer("explain", path)
    assert "cuda:sm_90 (batch 2 to 8)" in text and "\nlenet5 on cuda:sm_80: " in text
    assert " kernels (every op alone -> this plan), 2 convs\n" in text
    found = answer("explain", path, "--target", "cuda:sm_90", "--json")
    assert found["target"] == "cuda:sm_90" and found["model"] == "lenet5"
    assert found["artifact"]["sha256"] == open_artifact(path).sha256
    answer("explain", path, "--html", tmp_path / "x.html")
    page = (tmp_path / "x.html").read_text()
    assert "<html" in page and "@triton.jit" in page, "with the source of its kernels"


def test_explain_names_what_the_file_holds(path: Path, refusal: Callable[..., str]) -> None:
    assert "holds cuda:sm_80 (batch 1 to 1)" in refusal("explain", path, "--target", "cuda:sm_100")


def test_doctor_refuses_what_is_no_executable(tmp_path: Path, refusal: Callable[..., str]) -> None:
    (tmp_path / "x.loom").write_bytes(b"hello" * 9)
    assert "not a convloom executable" in refusal("doctor", tmp_path / "x.loom")


UNINSTALLED = """
import sys

class WithoutTriton:
    def find_spec(name, path=None, target=None):
        if name == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, WithoutTriton)
from convloom.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def without_triton(*arguments: object) -> str:
    """What a command answers where Triton is not installed."""
    command = [sys.executable, "-c", UNINSTALLED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == cli.EXIT_ERROR and "Traceback" not in done.stderr, done.stderr
    return done.stderr


@pytest.mark.parametrize("device", ["interpreter", "reference"])
def test_without_triton_a_file_runs_on_a_gpu_only(path: Path, device: str) -> None:
    assert without_triton("run", path, "--random", "--target", device).endswith(
        f"convloom: error: '{path}' on {device} needs the package triton, which is not installed: "
        "pip install triton; without it a file runs only on a GPU that it has kernels for\n"
    )


def test_without_triton_a_model_is_not_compiled() -> None:
    assert without_triton("explain", "lenet5").endswith(
        "convloom: error: this needs the package triton, which is not installed: pip install "
        "triton\n"
    )
