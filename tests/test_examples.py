"""The examples for data-parallel engines: every image once, by several processes, as torch says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import convloom
import pytest
import torch
from convloom import zoo
from convloom.zoo.digits import load_digits_split
from PIL import Image

EXAMPLES = Path(__file__).resolve().parent.parent / "benchmarks" / "examples"


@pytest.fixture(scope="module")
def executable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "lenet5.loom"
    model = zoo.lenet5(weights="digits").eval()
    example = (torch.zeros(2, 1, 32, 32),)
    convloom.compile(model, example, target="reference", dynamic_batch=(1, 2)).save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven handwritten digits as bright ink over black."""
    folder = tmp_path_factory.mktemp("digits")
    images = load_digits_split().test_images[:7]
    for at, image in enumerate((images * 255).round().to(torch.uint8)):
        Image.fromarray(image.squeeze(0).numpy()).save(folder / f"{at}.png")
    return folder


def expected(folder: Path) -> dict[str, int]:
    import numpy as np

    paths = sorted(folder.iterdir())
    arrays = [np.asarray(Image.open(path), np.float32)[None] / 255 for path in paths]
    y = zoo.lenet5(weights="digits").eval()(torch.from_numpy(np.stack(arrays)))
    return {path.name: int(k) for path, k in zip(paths, y.argmax(1), strict=True)}


def run(*command: object) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_torchrun_shares_a_folder(executable: Path, folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "classes.json"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone")
    script = EXAMPLES / "torchrun_folder.py"
    given = (executable, folder, output, "--device", "reference")
    run(*launcher, "--nproc-per-node", 2, script, *given)
    assert json.loads(output.read_text()) == expected(folder)


def test_ray_shares_a_folder(executable: Path, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="pip install 'ray[data]>=2.40'")
    output = tmp_path / "classes.json"
    given = (executable, folder, output, "--device", "reference", "--actors", 1)
    run(sys.executable, EXAMPLES / "ray_folder.py", *given)
    assert json.loads(output.read_text()) == expected(folder)
