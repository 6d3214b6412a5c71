"""What a NAME on the command line may be: the zoo, libraries, what Python imports, files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convloom
import numpy as np
import pytest
import torch
from convloom import zoo
from convloom.benchmarks import foreign
from convloom.cli import networks
from convloom.cli.main import main, parser
from convloom.errors import InvalidInputError
from PIL import Image

SOURCE = """
import torch
from dataclasses import dataclass
from torch import nn

@dataclass
class Needs:
    size: int

class Net(nn.Module):
    def __init__(self, channels=4):
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, channels, 3), nn.ReLU()
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(channels * 9, 5)

    def forward(self, x):
        return self.head(self.pool(self.relu(self.conv(x))).flatten(1))

class Scaled(Net):
    def forward(self, x, *, times, shift=0.0):
        return super().forward(x) * times + shift

class Pair(nn.Module):
    def forward(self, x, y):
        return torch.relu(x) + y

READY, NUMBER = Net(6), 3

def make():
    return Net()

def wrong():
    return [1]

def failing():
    raise SystemExit("no weights")

class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, 5)

    def forward(self, x, keep, image):
        y = x + image.float().mean((1, 2))[:, None] / 255
        return {"scores": self.head(torch.where(keep, y, -y)), "mean": y.mean(), "sum": [y.sum(1)]}
"""
REFERENCE = ("--target", "reference")
INTERPRETER = ("--target", "interpreter")
SM_90 = ("--target", "cuda:sm_90")
IMAGES = ("--input", "2x3x8x8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of Python, the same network as .pt2 and .loom, images and an array."""
    path = tmp_path_factory.mktemp("networks")
    (path / "own_net.py").write_text(SOURCE)
    (path / "broken_net.py").write_text("x = 1\nraise ValueError('half written')\n")
    package = path / "own_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text(SOURCE)
    model = networks.find(f"{path}/own_net.py:Net", options(*IMAGES)).model
    x = torch.randn(2, 3, 8, 8)
    torch.export.save(torch.export.export(model, (x,)), path / "net.pt2")
    convloom.compile(model, (x,), target="interpreter").save(path / "net.loom")
    scaled = networks.find(f"{path}/own_net.py:Scaled", options(*IMAGES)).model
    torch.export.save(torch.export.export(scaled, (x,), {"times": 0.5}), path / "scaled.pt2")
    made = convloom.compile(scaled, (x,), kwargs={"times": 0.5}, target="interpreter")
    made.save(path / "scaled.loom")
    convloom.compile(model, (x,), target="cuda:sm_90", dynamic_batch=(1, 4)).save(path / "90.loom")
    for at in range(5):
        (path / "data" / str(at)).mkdir(parents=True)
        Image.new("RGB", (10, 10), (40 * at, 0, 9)).save(path / "data" / str(at) / "a.png")
    np.save(path / "x.npy", x.numpy())
    return path


@pytest.fixture(autouse=True)
def here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if "folder" in request.fixturenames:
        monkeypatch.chdir(request.getfixturevalue("folder"))
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.partition(".")[0] in ("own_net", "own_package", "broken_net", "fake"):
            del sys.modules[name]


def options(*arguments: str) -> Any:
    return parser().parse_args(["compile", "NAME", *arguments])


@pytest.fixture
def answer(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def ask(*arguments: str) -> Any:
        capsys.readouterr()
        assert main(list(arguments)) == 0
        printed = capsys.readouterr().out
        return json.loads(printed) if "--json" in arguments else printed

    return ask


@pytest.fixture
def refusal(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def ask(*arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and "Traceback" not in printed.err
        return printed.err.partition("convloom: error: ")[2].strip()

    return ask


FILE, PROGRAM = ("own_net.py:Net", *IMAGES), ("net.pt2",)


@pytest.mark.parametrize(
    "given",
    [
        ("own_package.inner:make", *IMAGES),
        ("own_net.py:READY", *IMAGES),
        ("cifar_convnet", "--input", "2x3x32x32"),
    ],
    ids=["a function in a package", "a module that is there", "the zoo, of another size"],
)
def test_names_are_models(given: tuple[str, ...], folder: Path, answer: Callable[..., Any]) -> None:
    explained = answer("explain", *given, *REFERENCE, "--json")
    assert explained["model"] == given[0] and explained["summary"]["convs"] == 1


@pytest.mark.parametrize("given", [FILE, PROGRAM], ids=["a class in a file", ".pt2"])
def test_every_command_takes_every_model(
    given: tuple[str, ...], folder: Path, answer: Callable[..., Any], tmp_path: Path
) -> None:
    name = given[0]
    compiled = answer("compile", *given, *REFERENCE, "--json")
    assert compiled["summary"]["convs"] == 1 and compiled["summary"]["torch_fallbacks"] == 0
    profile = answer("profile", *given, *SM_90, "--json")
    assert (profile["model"], profile["batch"]) == (name, 2)
    verified = answer("verify", *given, *REFERENCE, "--json")
    assert verified["passed"] and verified["name"] == name
    (row,) = answer("zoo", *given, "--json")
    assert row["name"] == name and row["macs"] > 0 and row["parameters"] > 100
    bench = answer("bench", *given, *REFERENCE, "--batch", "2", "--seconds", "0.01", "--against",
                   "eager", "--dtype", "float32", "--json")  # fmt: skip
    assert [each["status"] for each in bench["rows"][0]["results"]] == ["ok", "ok"]
    tuned = answer("tune", *given, "--offline", *SM_90, "--candidates", "1", "--chosen-only",
                   "--budget", "1s", "--to", str(tmp_path), "--json")  # fmt: skip
    assert tuned["outcomes"]


@pytest.mark.parametrize("given", [FILE, PROGRAM])
def test_images_are_read_for_every_model(
    given: tuple[str, ...], folder: Path, answer: Callable[..., Any]
) -> None:
    name, *more = given
    answer("run", name, "x.npy", *more, *REFERENCE, "--output", "y.npy")
    model = networks.find(name, options(*more)).model
    expected = model(torch.from_numpy(np.load("x.npy")))
    torch.testing.assert_close(torch.from_numpy(np.load("y.npy")), expected.detach())
    for command in ("evaluate", "verify"):
        found = answer(command, *given, "--data", "data", *REFERENCE, "--json")
        assert found.get("images") == 5 or found["agreement"]["images"] == 6
    assert "5 classes" in answer("evaluate", *given, "--data", "data", *REFERENCE)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", ["scaled.pt2", "scaled.loom"])
def test_constants_and_keywords_are_those_of_the_example(
    name: str, folder: Path, answer: Callable[..., Any]
) -> None:
    model = networks.find("own_net.py:Scaled", options(*IMAGES)).model
    answer("run", name, "x.npy", *INTERPRETER, "--output", "y.npy")
    expected = model(torch.from_numpy(np.load("x.npy")), times=0.5)
    torch.testing.assert_close(torch.from_numpy(np.load("y.npy")), expected.detach())
    verified = answer("verify", name, *INTERPRETER, "--json")
    assert verified["passed"] and len(verified["steps"]) > 1
    (row, *_) = answer("evaluate", name, "--data", "data", *INTERPRETER, "--json")["results"]
    assert row["crops"] == 1
    bench = answer("bench", name, *INTERPRETER, "--batch", "2", "--seconds", "0.01", "--against",
                   "eager", "--dtype", "float32", "--json")["rows"][0]  # fmt: skip
    assert bench["results"][0]["status"] == "ok" and bench["results"][0]["error"] < 1e-5


@pytest.mark.interpreter
def test_files_that_are_compiled_already(folder: Path, answer: Callable[..., Any]) -> None:
    profile = answer("profile", "net.loom", "--repeats", "1", "--json")
    assert profile["batch"] == 2 and "interpreter" in profile["timed_on"]
    modelled = answer("profile", "90.loom", "--json")
    assert modelled["batch"] == 4
    assert modelled["timed_on"] == "modelled, not measured, for cuda:sm_90"
    on_cpu = answer("profile", "90.loom", *INTERPRETER, "--batch", "3", "--repeats", "1", "--json")
    assert on_cpu["batch"] == 3 and "interpreter" in on_cpu["timed_on"]
    (row,) = answer("evaluate", "net.loom", "--data", "data", "--json")["results"]
    assert row["network"] == "compiled" and row["same_answers"] is None
    bench = answer("bench", "net.loom", *INTERPRETER, "--batch", "2", "--seconds", "0.01",
                   "--against", "eager", "--json")["rows"][0]  # fmt: skip
    ours, eager = bench["results"]
    assert ours["status"] == "ok" and ours["error"] < 1e-5 and bench["dtype"] == "float32"
    assert eager["reason"] == "a saved executable holds no module that PyTorch could run"
    account = answer("explain", "net.loom", "--measure", "--json")
    assert account["measured_on"] == "the interpreter, not a GPU"
    assert "digraph" in answer("explain", "90.loom", "--dot")


def test_code_of_a_file_is_that_of_the_file(folder: Path, answer: Callable[..., Any]) -> None:
    kernel = answer("profile", "90.loom", "--json")["kernels"][0]["name"]
    asked = ("explain", "90.loom", "--kernel", kernel)
    assert "tl.load" in answer(*asked) and ".visible .entry" in answer(*asked, "--ptx")
    assert "MOV" in answer(*asked, "--sass", "--json")["sass"]
    again = answer("explain", "own_net.py:Net", *IMAGES, *SM_90, "--kernel", kernel, "--sass")
    assert again.count("\n") > 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.py:Net",), "absent.py:Net: expected a Python file, got no such file"),
        (("broken_net.py:Net",), "'broken_net.py' cannot be imported at broken_net.py:2: "
         "ValueError: half written. Run it with python"),
        (("no_such_package.x:Net",), "'no_such_package.x' cannot be imported: ModuleNotFoundError: "
         "No module named 'no_such_package'. Modules are found as"),
        (("own_net.py:Nett",), "'own_net.py' has no 'Nett'; did you mean Net"),
        (("own_net.py:NUMBER",), "expected a callable that returns a torch.nn.Module, or a module, "
         "got int"),
        (("own_net.py:wrong",), "own_net.py:wrong() returned list; expected a torch.nn.Module"),
        (("own_net.py:Needs",), "own_net.py:Needs() failed: TypeError: Needs.__init__() missing 1 "
         "required positional argument: 'size'. It is called without arguments"),
        (("own_net.py:failing",), "own_net.py:failing() failed at own_net.py:36: SystemExit: no "
         "weights"),
        (("own_net.py:Net",), "own_net.py:Net does not say what its inputs are; pass --input, such "
         "as --input 1x3x224x224"),
        (("absent.pt2",), "model 'absent.pt2': expected a file, got no such file"),
        (("absent.onnx",), "model 'absent.onnx': expected a file, got no such file"),
        (("net.pt2", "--weights", "x.pth"), "--weights: expected none with 'net.pt2', which holds "
         "its own"),
        (("net.loom",), "'net.loom' is compiled already; expected a model of the zoo"),
        (("own_net",), "unknown zoo model 'own_net'"),
        (("own/net",), "unknown model 'own/net': expected a model of the zoo (see `convloom zoo`), "
         "torchvision/NAME"),
        (("lenet5", "--input", "1x3"), "--input: expected the shape of one image for lenet5, such "
         "as 1x1x32x32"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused(
    arguments: tuple[str, ...], message: str, folder: Path, refusal: Callable[..., str]
) -> None:
    assert message in refusal("compile", *arguments, *REFERENCE)


def test_commands_that_need_images_or_one_input(folder: Path, refusal: Callable[..., str]) -> None:
    pair = ("own_net.py:Pair", "--input", "1x3", "1x3")
    assert "expected a network of one image" in refusal("run", pair[0], "x.npy", *pair[1:])
    bytes_ = networks.Network("bytes", torch.nn.Identity(), (torch.zeros(1, 3, 8, 8).byte(),))
    with pytest.raises(InvalidInputError, match="run bytes: expected a network of one image of fl"):
        bytes_.pictured("run")
    assert "--input: expected the NAME of a model too" in refusal("zoo", "--input", "1x3")
    said = refusal("evaluate", "own_net.py:Net", *IMAGES, "--classes", "5", "--data", "data")
    assert "--classes: expected a model of the zoo, got own_net.py:Net" in said
    said = refusal("evaluate", "net.loom", "--classes", "5", "--data", "data")
    assert "--classes: expected a model of the zoo, got 'net.loom'" in said


def test_several_inputs_with_dtypes(folder: Path, answer: Callable[..., Any]) -> None:
    pair = ("own_net.py:Pair", "--input", "2x3", "2x3:float32", "--batch", "4")
    found = answer("explain", *pair, *REFERENCE, "--json")
    assert {tuple(node["outputs"][0]["shape"]) for node in found["nodes"] if "outputs" in node} <= {
        (4, 3)
    }
    made = networks.find(pair[0], options(*pair[1:-2]))
    assert [tuple(x.shape) for x in made.tensors(4)] == [(4, 3)] * 2
    half = networks.find(pair[0], options("--input", "1x3:float16", "5x3"))
    assert [(x.dtype, tuple(x.shape)) for x in half.tensors(4)] == [
        (torch.float16, (4, 3)), (torch.float32, (5, 3)),
    ]  # fmt: skip


def test_floats_masks_and_bytes(folder: Path, answer: Callable[..., Any]) -> None:
    """Of a network and of a saved file; several results."""
    given = ("--input", "2x3", "2x3:bool", "2x4x4:uint8")
    mixed = networks.find("own_net.py:Mixed", options(*given))
    file = str(folder / "mixed.loom")
    convloom.compile(mixed.model, mixed.arguments, target="interpreter").save(file)
    for network in (("own_net.py:Mixed", *given), (file,)):
        asked = (*network, *INTERPRETER)
        timing = ("--batch", "2", "--against", "eager", "--seconds", "0.01")
        (row,) = answer("bench", *asked, "--dtype", "float32", *timing, "--json")["rows"]
        ours, eager = row["results"]
        assert ours["status"] == "ok" and 0 <= ours["error"] < 1e-5
        assert eager["status"] == ("not available" if network == (file,) else "ok")
        assert answer("verify", *asked, "--json")["passed"]
        assert answer("profile", *asked, "--json")
        assert answer("run", *asked, "--random", "--iterations", "1", "--json")["latency_ms"]


@pytest.mark.parametrize("text", ["", "x", "1x3x", "1x-3", "0x3", "1x3:int64", "1x3:", "1,3"])
def test_shapes_that_are_none(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options("--input", text)
    said = " ".join(capsys.readouterr().err.split())
    assert "expected sizes with x between them, such as 1x3x224x224" in said and repr(text) in said


# Libraries, of which small copies stand in.

TORCHVISION = """
import torch
torch.ops.torchvision.nms.default  # As the wheel for CUDA: it fails where the operator is not.
from . import models
"""
MODELS = """
from functools import partial
from enum import Enum
from types import SimpleNamespace
from torch import nn

def list_models():
    return ["tiny", "sizeless", "video"]

def get_model(name, weights=None):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def get_model_weights(name):
    if name == "sizeless":
        return []
    size = (12, 12) if name == "video" else 12
    return [SimpleNamespace(transforms=partial(print, crop_size=size))]
"""
TIMM = """
import torchvision
from torchvision.models import get_model

def list_models():
    return ["small"]

def create_model(name):
    model = get_model(name)
    model.pretrained_cfg = {"input_size": (3, 10, 14)}
    return model
"""


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    real = [name for name in sys.modules if name.partition(".")[0] in ("torchvision", "timm")]
    if real:
        pytest.skip("torchvision is imported already")
    for name, text in (("torchvision", TORCHVISION), ("timm", TIMM)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    (tmp_path / "torchvision" / "models.py").write_text(MODELS)
    monkeypatch.syspath_prepend(str(tmp_path))
    real_import = foreign.importlib.import_module

    def wheel(name: str) -> Any:
        try:
            return real_import(name)
        except AttributeError as error:
            raise RuntimeError("operator torchvision::nms does not exist") from error

    monkeypatch.setattr(foreign.importlib, "import_module", wheel)
    yield
    for kept in foreign._KEPT:
        kept._destroy()
    foreign._KEPT.clear()
    for name in [n for n in sys.modules if n.partition(".")[0] in ("torchvision", "timm")]:
        del sys.modules[name]


def test_libraries(
    libraries: None, refusal: Callable[..., str], answer: Callable[..., Any]
) -> None:
    (row,) = answer("zoo", "torchvision/tiny", "--json")
    assert row["input_shape"] == [3, 12, 12] and len(foreign._KEPT) == 1
    assert answer("zoo", "timm/small", "--json")[0]["input_shape"] == [3, 10, 14]
    assert answer("verify", "timm/small", *REFERENCE, "--batch", "2", "--json")["passed"]
    assert "torchvision has no model 'tinny'; did you mean tiny" in refusal(
        "compile", "torchvision/tinny", *REFERENCE
    )
    for name in ("torchvision/sizeless", "torchvision/video"):
        said = refusal("compile", name, *REFERENCE)
        assert f"{name} does not say what its inputs are; pass --input" in said
    one, other = (networks.find("timm/small", options()).model.state_dict() for _ in range(2))
    assert all(map(torch.equal, one.values(), other.values())), "weights are seeded"


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_libraries_that_are_not_installed(
    library: str, refusal: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    said = refusal("compile", f"{library}/resnet18", *REFERENCE)
    assert f"{library}/resnet18: {library} cannot be imported" in said
    lacking = "torchvision" if "No module named 'torchvision'" in said else library
    assert f"pip install {lacking}" in said


def test_zoo_models_are_what_they_were() -> None:
    network = networks.find("lenet5", options())
    assert network.entry == zoo.entry("lenet5") and network.is_random
    assert [tuple(x.shape) for x in network.tensors(3)] == [(3, 1, 32, 32)]
