"""`convloom evaluate`: crops, errors and the folder they are counted on."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convloom import zoo
from convloom.cli import evaluate, inputs
from convloom.cli.main import main
from convloom.errors import ArtifactError
from convloom.zoo.accuracy import Errors, mean_prediction
from convloom.zoo.digits import load_digits_split
from PIL import Image

REFERENCE = ("--target", "reference")


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first four held-out scans of each digit as images."""
    folder = tmp_path_factory.mktemp("digits")
    split = load_digits_split()
    for digit in range(10):
        (folder / str(digit)).mkdir()
        for at, scan in enumerate(split.test_images[split.test_labels == digit][:4]):
            values = (scan[0] * 255).round().byte().numpy()
            Image.fromarray(values).save(folder / str(digit) / f"{at}.png")
    return folder


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return printed.err.partition("convloom: error: ")[2].strip()


# The command


@pytest.mark.interpreter
def test_the_shipped_network_on_images(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(
        capsys, "lenet5", "--weights", "digits", "--data", digits, "--target", "interpreter",
        "--batch", 16,
    )  # fmt: skip
    assert (found["images"], found["classes"], found["target"]) == (40, 10, "interpreter")
    eager, compiled = found["results"]
    assert (eager["network"], compiled["network"]) == ("eager", "compiled")
    for row in (eager, compiled):
        assert row["crops"] == 1 and row["same_answers"] == 40 and row["images_per_s"] > 0
    expected = _errors_of_the_split(digits)
    assert eager["top1_error"] == compiled["top1_error"] == expected[0] <= 0.05
    assert eager["top5_error"] == compiled["top5_error"] == expected[1] == 0


def _errors_of_the_split(digits: Path) -> tuple[float, float]:
    """Counted by hand, on the tensors that the images were made from."""
    split, model = load_digits_split(), zoo.lenet5(weights="digits").eval()
    picked = torch.cat([(split.test_labels == digit).nonzero()[:4, 0] for digit in range(10)])
    with torch.no_grad():
        ranks = model(split.test_images[picked]).argsort(1, descending=True)
    right = ranks == split.test_labels[picked][:, None]
    return 1 - right[:, 0].double().mean().item(), 1 - right[:, :5].sum().item() / 40


def test_both_protocols_and_a_table(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("lenet5", "--weights", "digits", "--data", digits, *REFERENCE, "--batch", 7)
    found = answer(capsys, *arguments, "--crops", 1, 10, "--limit", 9)
    assert found["images"] == 9
    protocols = [(row["crops"], row["network"]) for row in found["results"]]
    assert protocols == list(itertools.product((1, 10), ("eager", "compiled")))
    assert main(["evaluate", *map(str, arguments), "--crops", "10", "--limit", "9"]) == 0
    printed = capsys.readouterr()
    assert "on reference" in printed.out and "9 of 9" in printed.out
    assert "9 images of 10 classes" in printed.out
    assert "random" not in printed.err


def test_random_weights_are_named(digits: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["evaluate", "lenet5", "--data", str(digits), *REFERENCE, "--limit", "2"]
    assert main(arguments) == 0
    assert "the weights are random (seed 0)" in capsys.readouterr().err


def test_another_number_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three classes of plain colours, and a network whose last bias always says the second."""
    data = colours(tmp_path / "data")
    model = zoo.cifar_convnet(num_classes=3)
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    last = [name for name in state if name.endswith("bias")][-1]
    state[last] = torch.tensor([0.0, 2.0, 1.0])
    torch.save(state, tmp_path / "second.pth")
    found = answer(
        capsys, "cifar_convnet", "--weights", tmp_path / "second.pth", "--data", data,
        "--classes", 3, *REFERENCE,
    )  # fmt: skip
    for row in found["results"]:
        assert row["top1_error"] == pytest.approx(2 / 3)
        assert row["top5_error"] is None  # five of three classes are always right


def colours(folder: Path) -> Path:
    for name, side in (("blue", 40), ("green", 32), ("red", 50)):
        (folder / name / "deeper").mkdir(parents=True)
        Image.new("RGB", (side, 36), name).save(folder / name / "a.png")
        Image.new("RGB", (36, side), name).save(folder / name / "deeper" / "b.JPG", "JPEG")
        (folder / name / "notes.txt").write_text("no image")
        (folder / name / ".hidden.png").write_text("no image")
    return folder


# What can be wrong


def test_unreadable_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = colours(tmp_path)
    (data / "green" / "z.png").write_bytes(b"no image")
    message = refusal(capsys, "cifar_convnet", "--data", data, "--classes", 3, *REFERENCE)
    assert str(data / "green" / "z.png") in message and "Pillow knows no such image" in message


def test_truncated_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = colours(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    cut = data / "red" / "cut.png"
    Image.fromarray(noise).save(cut)
    cut.write_bytes(cut.read_bytes()[:2000])
    message = refusal(capsys, "cifar_convnet", "--data", data, "--classes", 3, *REFERENCE)
    assert str(cut) in message and "cannot be decoded" in message


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([], "got a folder without sub-folders"),
        (["photo.png"], "got a folder without sub-folders"),
        ([".git/x.png"], "got a folder without sub-folders"),
        (["a/x.png", "b/x.png"], "expected 3 sub-folders, one for each class of the model, got 2 "
         "(a, b). Weights for 2 classes are loaded with --classes 2"),
        ([f"{name}/x.png" for name in "abcdefg"], "got 7 (a, b, c, d, e, ...)"),
        (["a/x.png", "b/x.txt", "c/x.png"], "expected images (.bmp .jpeg"),
    ],
    ids=str,
)  # fmt: skip
def test_folders_that_are_no_data(tmp_path: Path, made: list[str], expected: str) -> None:
    for name in made:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    with pytest.raises(ArtifactError) as error:
        evaluate.read_folder(tmp_path, 3)
    assert expected in str(error.value) and str(tmp_path) in str(error.value)


def test_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal(capsys, "lenet5", "--data", tmp_path / "gone", *REFERENCE)
    assert "expected a folder with one sub-folder per class, got no such folder" in message
    (tmp_path / "file").touch()
    message = refusal(capsys, "lenet5", "--data", tmp_path / "file", *REFERENCE)
    assert message.endswith("got a file")


def test_weights_of_another_number_of_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = colours(tmp_path)
    message = refusal(
        capsys, "lenet5", "--weights", "digits", "--data", data, "--classes", 3, *REFERENCE
    )
    assert "mis-shaped: fc3.bias (expected (3,), got (10,))" in message


def test_a_model_without_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = colours(tmp_path)
    message = refusal(capsys, "unet", "--data", data, "--classes", 3, "--batch", 1, *REFERENCE)
    assert "one score per class, got an output of shape (1, 3, 388, 388)" in message


@pytest.mark.parametrize("arguments", [("--crops", "5"), ("--batch", "0"), ("--limit", "-1"), ()])
def test_wrong_arguments(arguments: tuple[str, ...], tmp_path: Path) -> None:
    data = ("--data", str(tmp_path)) if arguments else ()
    with pytest.raises(SystemExit):
        main(["evaluate", "lenet5", *data, *arguments])


# The folder


def test_classes_in_order(tmp_path: Path) -> None:
    """By name, but by number where all are numbers: "10" stands behind "9"."""
    for name in map(str, range(12)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.png").touch()
    numbered = evaluate.read_folder(tmp_path, 12)
    assert numbered.classes == tuple(map(str, range(12)))
    (tmp_path / "11").rename(tmp_path / "eleven")
    named = evaluate.read_folder(tmp_path, 12)
    assert named.classes == tuple(sorted(named.classes)) and named.classes[2] == "10"
    assert [label for _, label in named.files] == list(range(12))


def test_a_limit_takes_from_every_class(tmp_path: Path) -> None:
    data = colours(tmp_path)
    assert len(evaluate.read_folder(data, 3).files) == 6
    assert [label for _, label in evaluate.read_folder(data, 3, limit=3).files] == [0, 1, 2]
    assert len(evaluate.read_folder(data, 3, limit=99).files) == 6


# Crops


def test_ten_crops_are_the_corners_the_centre_and_their_mirrors() -> None:
    noise = np.random.default_rng(1).integers(0, 255, (256, 300, 3), dtype=np.uint8)
    entry = zoo.entry("resnet18")
    crops = inputs.evaluation_crops(Image.fromarray(noise), entry, 10)
    scales = (torch.tensor(each)[:, None, None] for each in (inputs.MEAN, inputs.DEVIATION))
    mean, deviation = scales
    whole = (torch.from_numpy(noise).permute(2, 0, 1) / 255 - mean) / deviation
    corners = ((0, 0), (0, 76), (32, 0), (32, 76), (16, 38))
    expected = torch.stack([whole[:, y : y + 224, x : x + 224] for y, x in corners])
    torch.testing.assert_close(crops, torch.cat([expected, expected.flip(3)]))
    one = inputs.evaluation_crops(Image.fromarray(noise), entry, 1)
    torch.testing.assert_close(one[0], expected[4])


@pytest.mark.parametrize("name", ["resnet18", "alexnet", "inception_v3", "cifar_convnet", "lenet5"])
@pytest.mark.parametrize("size", [(300, 200), (10, 500), (224, 224), (1, 1)])
def test_any_image_is_cropped(name: str, size: tuple[int, int]) -> None:
    entry = zoo.entry(name)
    for count in (1, 10):
        crops = inputs.evaluation_crops(Image.new("RGB", size, "gray"), entry, count)
        assert crops.shape == (count, *entry.input_shape) and crops.dtype is torch.float32


def test_scales_of_the_published_weights() -> None:
    white = Image.new("RGB", (256, 256), "white")
    whites = {name: inputs.evaluation_crops(white, zoo.entry(name), 1)[0, :, 0, 0].tolist()
              for name in ("resnet18", "inception_v4")}  # fmt: skip
    assert whites["inception_v4"] == [1, 1, 1]
    expected = [(1 - m) / d for m, d in zip(inputs.MEAN, inputs.DEVIATION, strict=True)]
    assert whites["resnet18"] == pytest.approx(expected)
    assert set(inputs.HALF_RANGE_MODELS) <= set(zoo.names())


# Errors


def test_errors_are_counted() -> None:
    errors = Errors()
    scores = torch.arange(8.0).repeat(3, 1)  # the likeliest are 7, 6, 5, 4, 3
    errors.add(scores, torch.tensor([7, 3, 2]))
    errors.add(scores[:1], torch.tensor([7]))
    assert errors.images == 4
    assert (errors.top1, errors.top5) == (2 / 4, 1 / 4)


def test_no_answer_is_an_error() -> None:
    errors = Errors()
    errors.add(torch.full((8, 8), torch.nan), torch.arange(8))
    assert (errors.top1, errors.top5) == (1, 1)


def test_predictions_of_crops_are_averaged() -> None:
    """Shares, not scores: one crop that shouts does not silence the others."""
    scores = torch.tensor([[9.0, 0.0], [0.0, 1.0], [0.0, 1.0]] * 2)
    mean = mean_prediction(scores, 3)
    assert mean.shape == (2, 2)
    torch.testing.assert_close(mean[0], scores[:3].softmax(1).mean(0))
    torch.testing.assert_close(mean.sum(1), torch.ones(2))
