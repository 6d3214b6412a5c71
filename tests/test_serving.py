"""Files in service: latency of calls, a model repository for an inference server, and HTTP."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import convloom
import pytest
import torch
from convloom import zoo
from convloom.cli import export_server, networks
from convloom.cli.inputs import SAMPLE
from convloom.compiler.artifact.read import open_artifact
from convloom.errors import InvalidInputError
from PIL import Image
from torch import nn

from .test_cli import answer, refusal

__all__ = ["answer", "refusal"]
EXAMPLE = Path(__file__).parent.parent / "benchmarks" / "examples" / "http_service.py"
REFERENCE = ("--target", "reference")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("files") / "lenet5.loom"
    model = zoo.lenet5(weights="digits").eval()
    example = (torch.zeros(4, 1, 32, 32),)
    convloom.compile(model, example, target="reference", dynamic_batch=(1, 4)).save(path)
    return path


# Latency.


def test_run_times_calls_of_a_file(path: Path, answer: Callable[..., Any]) -> None:
    command = ("run", path, "--random", "--warmup", "1", "--iterations", "5", "--batch", "3")
    found = answer(*command, *REFERENCE, "--json")
    assert found["input_shapes"] == [[3, 1, 32, 32]] and found["iterations"] == 5
    assert found["timed_on"] == "the CPU, not a GPU" and found["target"] == "reference"
    ms = found["latency_ms"]
    assert 0 < ms["least"] <= ms["p50"] <= ms["p90"] <= ms["p99"] <= ms["most"]
    assert ms["least"] <= ms["mean"] <= ms["most"]
    assert found["images_per_s"] == pytest.approx(3e3 / ms["mean"])
    text = answer("run", path, "--random", "--warmup", "1", "--iterations", "2", *REFERENCE)
    flat = " ".join(text.split())  # Lines are broken where they are too long.
    assert "p99 ms" in flat and "2 calls after 1" in flat and "(4, 1, 32, 32)" in flat


def test_run_draws_masks_as_masks(tmp_path: Path, answer: Callable[..., Any]) -> None:
    class Masked(nn.Module):
        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return torch.where(mask, x, -x)

    inputs = torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.bool)
    convloom.compile(Masked(), inputs, target="interpreter").save(tmp_path / "masked.loom")
    command = ("run", tmp_path / "masked.loom", "--random", "--warmup", "1", "--iterations", "1")
    assert answer(*command, "--json")["input_shapes"] == [[2, 5], [2, 5]]


def test_run_times_calls_of_a_model(answer: Callable[..., Any]) -> None:
    command = ("run", "mlp", "--random", "--warmup", "1", "--iterations", "1", "--batch", "2")
    assert answer(*command, *REFERENCE, "--json")["input_shapes"][0][0] == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((), "expected INPUT, an image or a .npy file, or --random without INPUT"),
        (("digit.png", "--random"), "--random without INPUT"),
        (("--random", "--output", "y.npy"), "--random without INPUT and --output"),
        (("digit.png", "--batch", "2"), "--batch: expected with --random only"),
    ],
)
def test_run_wants_an_input_or_random_numbers(
    given: tuple[str, ...], message: str, refusal: Callable[..., str]
) -> None:
    assert message in refusal("run", "lenet5", *given)


def test_a_model_of_two_tensors_is_refused_with_what_to_do() -> None:
    exe = convloom.compile(Two(), (torch.zeros(2, 5),) * 2, target="reference")
    interface = SimpleNamespace(placed=lambda tensors: (tuple(tensors), {}))
    made = {"place": exe.place, "interface": interface, "__call__": lambda self, x: exe(x, x)}
    pair = type("Pair", (), made)()
    with pytest.raises(InvalidInputError, match=r"returns a tuple; call it in Python$"):
        networks.run(pair, torch.zeros(2, 5))


# The Triton Inference Server.


@dataclass
class Tensor:
    """What the server's Python backend calls a tensor."""

    called: str
    held: torch.Tensor

    def name(self) -> str:
        return self.called

    def to_dlpack(self) -> Any:
        return torch.utils.dlpack.to_dlpack(self.held)

    @staticmethod
    def from_dlpack(name: str, capsule: Any) -> Tensor:
        return Tensor(name, torch.utils.dlpack.from_dlpack(capsule))


@dataclass
class Response:
    output_tensors: list[Tensor] | None = None
    error: Any = None


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub of the module that the server gives to its Python models."""
    stub: Any = ModuleType("triton_python_backend_utils")
    stub.Tensor, stub.InferenceResponse = Tensor, Response
    stub.TritonError = lambda text: SimpleNamespace(message=lambda: text)
    stub.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", stub)


def imported(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_server_answers_as_the_module(
    path: Path, tmp_path: Path, backend: None, answer: Callable[..., Any]
) -> None:
    found = answer("export-server", path, tmp_path, "--name", "digits", "--json")
    folder = tmp_path / "digits"
    assert [Path(file).relative_to(folder) for file in found["files"]] == [
        Path("1/model.loom"), Path("1/model.py"), Path("config.pbtxt"),
    ]  # fmt: skip
    assert (folder / "1" / "model.loom").read_bytes() == path.read_bytes()
    model = imported(folder / "1" / "model.py").TritonPythonModel()
    model.initialize({
        "model_repository": str(folder), "model_version": "1", "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    })  # fmt: skip
    ports = model.executable.inputs
    x = torch.rand(3, 1, 32, 32)
    right, wrong = ({ports[0].name: Tensor("x", each)} for each in (x, x[:, :, 1:]))
    one, other = model.execute([right, wrong])
    expected = zoo.lenet5(weights="digits").eval()(x)
    assert [each.name() for each in one.output_tensors] == [model.executable.outputs[0].name]
    torch.testing.assert_close(one.output_tensors[0].held, expected)
    assert "expected shape" in other.error.message() and other.output_tensors is None


def message_type() -> Any:
    """The server's ModelConfig, as far as it is written here (model_config.proto)."""
    pb = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    field = pb.FieldDescriptorProto
    file = pb.FileDescriptorProto(name="config.proto", package="config", syntax="proto3")
    kinds = {"string": field.TYPE_STRING, "int32": field.TYPE_INT32, "int64": field.TYPE_INT64}
    messages = {
        "Reshape": "shape:int64*",
        "Tensor": "name:string data_type:DataType dims:int64* reshape:Reshape",
        "Instances": "count:int32 kind:Kind",
        "Nothing": "",
        "Text": "string_value:string",
        "Parameter": "key:string value:Text",
        "ModelConfig": "name:string backend:string max_batch_size:int32 input:Tensor* "
        "output:Tensor* instance_group:Instances* dynamic_batching:Nothing parameters:Parameter*",
    }
    enums = {
        "DataType": ["TYPE_INVALID", *(f"TYPE_{name}" for name in export_server.TYPES.values())],
        "Kind": ["KIND_AUTO", "KIND_GPU", "KIND_CPU"],
    }
    for name, values in enums.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in messages.items():
        message = file.message_type.add(name=name)
        for number, (called, _, kind) in enumerate(
            (each.partition(":") for each in fields.split()), 1
        ):
            label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
            added = message.field.add(name=called, number=number, label=label)
            kind = kind.removesuffix("*")
            if kind in kinds:
                added.type = kinds[kind]
            else:
                added.type = field.TYPE_ENUM if kind in enums else field.TYPE_MESSAGE
                added.type_name = f".config.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("config.ModelConfig"))


def config_of(path: Path, name: str = "net") -> Any:
    made = message_type()
    from google.protobuf import text_format

    return text_format.Parse(export_server.config_of(open_artifact(path), name), made())


def test_the_configuration_says_what_the_file_takes(path: Path) -> None:
    config = config_of(path, 'a "name"')
    assert (config.name, config.backend, config.max_batch_size) == ('a "name"', "python", 4)
    (x,), (y,) = config.input, config.output
    assert x.name == open_artifact(path).programs[0].inputs[0].name
    assert list(x.dims) == [1, 32, 32] and list(y.dims) == [10]
    assert x.data_type == y.data_type == 1, "TYPE_FP32"
    assert config.instance_group[0].kind == 2 and config.HasField("dynamic_batching")


class Two(nn.Module):
    """Two inputs of any batch, and a result per image and one that is not a tensor of images."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return (x + y).amax(1), x.half()


def test_configurations_of_other_networks(tmp_path: Path) -> None:
    x = torch.zeros(2, 5)
    for at, bounds in enumerate((None, (1, 2), (2, 4))):
        exe = convloom.compile(Two(), (x, x), target="reference", dynamic_batch=bounds)
        exe.save(tmp_path / f"{at}.loom")
    fixed, batched, later = (config_of(tmp_path / f"{at}.loom") for at in range(3))
    assert (fixed.max_batch_size, batched.max_batch_size, later.max_batch_size) == (0, 2, 0)
    assert [list(each.dims) for each in fixed.input] == [[2, 5]] * 2
    assert [list(each.dims) for each in later.input] == [[-1, 5]] * 2
    assert [list(each.dims) for each in batched.output] == [[1], [5]]
    assert batched.output[0].HasField("reshape") and not list(batched.output[0].reshape.shape)
    assert batched.output[1].data_type == 2, "TYPE_FP16"
    assert not fixed.HasField("dynamic_batching")


def test_a_gpus_file_is_served_on_a_gpu(tmp_path: Path) -> None:
    linear, x = nn.Linear(4, 4).eval(), torch.zeros(1, 4)
    exe = convloom.compile(linear, (x,), target="cuda:sm_90", tuning="heuristic")
    exe.save(tmp_path / "net.loom")
    assert config_of(tmp_path / "net.loom").instance_group[0].kind == 1


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\nb"])
def test_names_that_are_no_folders_are_refused(
    name: str, path: Path, tmp_path: Path, refusal: Callable[..., str]
) -> None:
    said = refusal("export-server", path, tmp_path / "models", f"--name={name}")
    assert "--name: expected the name of a folder" in said and not (tmp_path / "models").exists()


# HTTP.


@pytest.fixture
def client(path: Path) -> Iterator[Any]:
    pytest.importorskip("httpx", reason="pip install starlette httpx")
    testing = pytest.importorskip("starlette.testclient", reason="pip install starlette httpx")
    with testing.TestClient(imported(EXAMPLE).service(str(path))) as client:
        yield client


def test_http_answers_with_the_digit(client: Any, path: Path) -> None:
    said = client.post("/classify", content=SAMPLE.read_bytes())
    assert said.status_code == 200 and said.json()["class"] == 5
    assert 0.5 < said.json()["probability"] <= 1
    assert client.get("/health").json() == {
        "sha256": open_artifact(path).sha256, "device": "reference",
    }  # fmt: skip


def test_http_refuses_what_is_no_image(client: Any) -> None:
    for content in (b"", b"words", SAMPLE.read_bytes()[:300]):
        said = client.post("/classify", content=content)
        assert said.status_code == 400 and said.json()["error"].startswith("expected an image")
    assert client.post("/classify", content=bytes((1 << 24) + 1)).status_code == 413
    assert client.get("/classify").status_code == 405


def test_http_takes_photographs(client: Any) -> None:
    file = io.BytesIO()
    Image.new("RGB", (300, 200), "red").save(file, "JPEG")
    assert json.loads(client.post("/classify", content=file.getvalue()).text)["class"] in range(10)
