"""`convloom verify`: its figures, what it prints, and the exit status that CI looks at."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom import zoo
from convloom.cli import networks
from convloom.cli.main import main
from convloom.compiler import api
from convloom.compiler.passes import NAMES
from convloom.compiler.records import choose
from convloom.compiler.run import parity, runtime
from convloom.compiler.run.executable import Executable
from convloom.errors import InvalidInputError
from torch import nn

from . import nets
from .test_validate import lose_residuals

DIGITS = ("lenet5", "--weights", "digits", "--target", "reference")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = zoo.lenet5(weights="digits").eval()
    exe = convloom.compile(model, (torch.zeros(2, 1, 32, 32),), target="interpreter")
    path = tmp_path_factory.mktemp("verify") / "digits.loom"
    exe.save(path, model="lenet5")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten classes of one noisy image, and a second image in the first."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for name in (*(f"{digit}/0" for digit in range(10)), "0/1"):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.randint(256, (32, 32), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(path)
    return tmp_path / "data"


def told(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, dict[str, Any]]:
    status = main(["verify", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


@pytest.mark.interpreter
def test_a_file_layer_by_layer(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = told(capsys, file, "--target", "interpreter", "--batch", 9)
    assert status == 0 and found["passed"] and found["dtype"] == "float32"
    assert [step["module_path"] for step in found["steps"]] == ["conv1"]
    assert 0 < found["steps"][0]["compiled"] < 1e-5 and 0 < found["steps"][0]["eager"] < 1e-5
    (row,) = found["outputs"]
    assert row["worst"]["error"] < row["worst"]["allowed"] and len(row["worst"]["index"]) == 2
    assert found["agreement"] == {"images": 2, "compiled_top1": 2, "compiled_top5": 2,
                                  "eager_top1": 2, "eager_top5": 2}  # fmt: skip


def test_images_of_a_folder(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = told(capsys, *DIGITS, "--data", folder, "--batch", 4)
    assert status == 0 and found["agreement"]["images"] == 12, "the last batch is filled up"
    assert found["agreement"]["compiled_top1"] == 12
    status, found = told(capsys, *DIGITS, "--data", folder, "--limit", 3, "--dtype", "bfloat16")
    assert status == 0 and found["agreement"]["images"] == 3
    assert found["outputs"][0]["eager"] > 1e-4, "eager's yardstick is of the same type"


def test_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *DIGITS]) == 0
    text = capsys.readouterr().out
    assert "worst element (0, " in text and "as exact as its type allows" in text
    assert "--target interpreter or emulator:sm_90 compares layers" in text
    assert "likeliest class as in float64: compiled 1 of 1, eager 1" in text


def test_a_wrong_pixel_is_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Executable.__call__

    def wrong(self: Executable, *inputs: torch.Tensor) -> Any:
        y = real(self, *inputs)
        y[0, 3] += 0.01
        return y

    monkeypatch.setattr(Executable, "__call__", wrong)
    status, found = told(capsys, *DIGITS, "--batch", 2)
    assert status == 1 and not found["passed"]
    assert found["outputs"][0]["worst"]["index"] == [0, 3]
    assert found["outputs"][0]["problem"].startswith("element (0, 3): got ")
    assert main(["verify", *DIGITS]) == 1
    assert "output0: element (0, 3)" in capsys.readouterr().out


# Layers are compared with the module's own, and passes with the graph before them.


def residual_network(*_: Any) -> nn.Module:
    """For the images of lenet5."""

    def function(m: Any, x: torch.Tensor) -> Any:
        y = m.act1(m.conv1(x))
        y = m.act2(m.conv2(y) + y)
        return m.head(m.act3(m.conv3(y)).mean((2, 3)))

    convs = {"conv1": nn.Conv2d(1, 4, 3, 4), "conv2": nn.Conv2d(4, 4, 3, padding=1)}
    convs["conv3"] = nn.Conv2d(4, 4, 3)
    acts = {f"act{at}": nn.ReLU() for at in (1, 2, 3)}
    return nets.make(function, (1, 1, 32, 32), **convs, **acts, head=nn.Linear(4, 10))[0]


@pytest.mark.interpreter
def test_layers_are_those_of_the_module(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(networks, "zoo_model", residual_network)
    status, found = told(capsys, "lenet5", "--target", "interpreter")
    assert status == 0 and found["passed"]
    layers = [(step["module_path"], step["layer"]) for step in found["steps"]]
    assert ("conv2", "act2") in layers and layers[-1] == ("head", "head")
    assert len(found["passes"]) == len(NAMES) + 1, "and the choice of a dtype"


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("target", "expected"),
    [("interpreter", {"record"}), ("emulator:sm_90", {"record", "fit"})],
)
def test_what_is_verified_is_what_compile_makes(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    expected: set[str],
) -> None:
    """In the configurations of tuning records, and in those that fit."""
    asked: set[str] = set()
    choices, fitted = choose.Records.choose, api.fitted

    def recorded(self: choose.Records, *arguments: Any) -> choose.Choice:
        asked.add("record")
        return choices(self, *arguments)

    def fitting(*arguments: Any) -> Any:
        asked.add("fit")
        return fitted(*arguments)

    monkeypatch.setattr(choose.Records, "choose", recorded)
    monkeypatch.setattr(api, "fitted", fitting)
    status, _ = told(capsys, "lenet5", "--weights", "digits", "--target", target)
    assert status == 0 and asked == expected


@pytest.mark.interpreter
@pytest.mark.parametrize(("place", "where"), [
    ((0, 3, 0, 2), "on the border of the image"), ((0, 1, 2, 3), "not on a border"),
])  # fmt: skip
def test_a_wrong_pixel_of_a_layer_is_shown(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    place: tuple[int, ...],
    where: str,
) -> None:
    real = runtime.StepRunner._run_step

    def wrong(self: Any, step: Any, memory: Any) -> None:
        real(self, step, memory)
        if step.module_path == "conv2":
            memory.view(runtime.first_output(step))[place] += 1.0

    monkeypatch.setattr(runtime.StepRunner, "_run_step", wrong)
    monkeypatch.setattr(networks, "zoo_model", residual_network)
    assert main(["verify", "lenet5", "--target", "interpreter"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert f"first wrong layer: 'act2', step conv2d_1_3: element {place}: got " in text
    assert where in text and "'act3'" not in text


@pytest.mark.interpreter
def test_a_lost_residual_is_a_wrong_layer_and_a_wrong_pass(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels do as the fused graph says: only the module knows better."""
    monkeypatch.setattr(networks, "zoo_model", residual_network)
    lose_residuals(monkeypatch)
    assert main(["verify", "lenet5", "--target", "interpreter"]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert "pass 'fuse_epilogues' changes what Net computes; rule" in text
    assert "first wrong layer: 'act2', step conv2d_1" in text
    monkeypatch.setattr(runtime.StepRunner, "_run_step", None)
    status, found = told(capsys, "--passes", "lenet5", "--target", "interpreter")
    assert status == 1 and not found["passed"], "nothing is run for the passes alone"
    wrong = [check["name"] for check in found["passes"] if check["problem"] is not None]
    assert wrong == ["fuse_epilogues"]


def test_passes_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "lenet5", "--target", "reference", "--passes"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    row = next(row for row in rows if "fuse_epilogues" in row)
    assert row[1::2] == ["fuse_epilogues", "4", "0.0e+00", "ok"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "verify: expected a model or a file, got none"),
        (["--passes"], "verify: expected a model or a file, got none"),
        (["FILE", "--passes"], "--passes: expected a model, got the file 'FILE'"),
        (["no_such_model"], "unknown zoo model"),
        (["missing.loom", "--target", "reference"], "cannot read 'missing.loom'"),
        (["FILE", "--dtype", "float16"], "--dtype: expected a model, got"),
        (["FILE", "--forbid", "conv-pool"], "'FILE', which is compiled already"),
        (["lenet5", "--target", "reference", "--data", "missing"], "no such folder"),
    ],
)
def test_mistakes_are_status_2(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["verify", *(a.replace("FILE", str(file)) for a in arguments)]) == 2
    assert message.replace("FILE", str(file)) in capsys.readouterr().err


def test_a_file_of_no_zoo_model_takes_no_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exe = convloom.compile(torch.nn.ReLU(), (torch.zeros(1, 2, 3, 3),), target="reference")
    exe.save(tmp_path / "own.loom")
    path = str(tmp_path / "own.loom")
    assert main(["verify", path, "--target", "reference"]) == 0
    assert main(["verify", path, "--target", "reference", "--data", str(folder)]) == 2
    assert "does not say which model of the zoo it is" in capsys.readouterr().err


def test_the_border_is_that_of_images() -> None:
    image, volume = (2, 5, 4, 3), (2, 5, 4, 3, 6)
    assert parity.is_on_border((0, 2, 3, 1), image) and parity.is_on_border((1, 4, 1, 0), image)
    assert not parity.is_on_border((0, 0, 1, 1), image), "channels have no border"
    assert parity.is_on_border((0, 2, 1, 1, 5), volume)
    assert not parity.is_on_border((0, 2, 1, 1, 4), volume)
    assert not parity.is_on_border((0, 0), (2, 5)) and not parity.is_on_border((), ())


def test_parity_of_odd_results() -> None:
    exact = torch.tensor([[1.0, float("inf")]], dtype=torch.float64)
    truth = ([exact], [exact.float()])
    (row,) = parity.parity(("y",), [exact.float()], truth, torch.float32, 1)
    assert row.problem is None and row.compiled == row.eager == 0.0
    (row,) = parity.parity(("y",), [torch.full((1, 2), torch.inf)], truth, torch.float32, 1)
    assert row.problem is not None and row.compiled == float("inf")
    (row,) = parity.parity(("y",), [torch.ones(2)], truth, torch.float32, 1)
    assert row.problem == "shape (2,), expected (1, 2)" and row.worst is None
    infinite = torch.full((1, 2), torch.inf, dtype=torch.float64)
    (row,) = parity.parity(("y",), [infinite.float()], ([infinite], [infinite.float()]),
                           torch.float32, 1)  # fmt: skip
    assert row.problem is None and row.worst is None and row.compiled == row.eager == 0.0
    with pytest.raises(InvalidInputError, match="expected 1 to compare, got 2"):
        parity.parity(("y",), [torch.ones(2)] * 2, truth, torch.float32, 1)


def test_agreement_counts_answers() -> None:
    agreement = parity.Agreement()
    exact = torch.eye(7, dtype=torch.float64)[:2] + torch.arange(7) * 1e-3
    flipped = exact.flip(1)
    agreement.add(flipped, exact, exact)
    assert (agreement.images, agreement.eager_top1, agreement.compiled_top1) == (2, 2, 0)
    assert (agreement.eager_top5, agreement.compiled_top5) == (2, 2)
