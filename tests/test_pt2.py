"""Files of torch.export.save as models, and files that would run code when they are loaded."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.capture import pt2
from convloom.errors import ArtifactError, InvalidInputError
from torch import nn

Members = dict[str, bytes]
MODEL = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"


class Net(nn.Module):
    """Shared, strided, repeated and constant tensors; a nested result; a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.register_buffer("turned", torch.randn(1, 6, 4, 6).transpose(1, 2))
        self.register_buffer("repeated", torch.randn(1).expand(4))
        self.factor = torch.tensor(0.5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor, flag: bool = False) -> Any:
        y = torch.relu(self.norm(self.conv(x))) + self.turned
        y = y * self.repeated.view(1, 4, 1, 1) + scale
        return {"flat": y.flatten(1), "both": [y.mean((2, 3)), y * self.factor if flag else y]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pt2") / "net.pt2"
    torch.manual_seed(0)
    model = Net().eval()
    for tensor in model.norm.buffers():
        tensor.uniform_(0.5, 1.5) if tensor.is_floating_point() else None
    example = (torch.randn(1, 3, 8, 8), torch.randn(1, 4, 1, 1))
    torch.export.save(torch.export.export(model, example, {"flag": True}), path)
    return path


def program_of(path: Path) -> Any:
    return torch.export.load(path).module()


def test_a_file_is_a_model(saved: Path) -> None:
    exe = convloom.compile(saved, target="reference")
    x, scale = torch.randn(1, 3, 8, 8), torch.randn(1, 4, 1, 1)
    expected = program_of(saved)(x, scale, flag=True)
    torch.testing.assert_close(exe(x, scale, flag=True), expected)
    assert exe.graph.name == "Net"
    assert "conv" in {node.module_path for node in exe.ledger.account().nodes}
    same = convloom.compile(torch.export.load(saved), target="reference")
    assert exe.plan.to_text() == same.plan.to_text()


def test_a_batch_that_the_file_leaves_open(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(0, 1), nn.ReLU()).eval()
    shapes = ({0: torch.export.Dim("batch", max=64)},)
    exported = torch.export.export(model, (torch.randn(2, 3, 6, 6),), dynamic_shapes=shapes)
    path = tmp_path / "open.pt2"
    torch.export.save(exported, path)
    exe = convloom.compile(str(path), target="reference")
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(exe(x), model(x))
    exe = convloom.compile(path, target="reference", dynamic_batch=(1, 8))
    x = torch.randn(5, 3, 6, 6)
    torch.testing.assert_close(exe(x), model(x))


def test_other_suffixes_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"path of an \.onnx or \.pt2 file, got 'x\.pth'"):
        convloom.compile("x.pth", target="reference")


# Files that lie.


class Evil:
    """A pickle that makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def changed(path: Path, into: Path, change: Callable[[Members], None]) -> Path:
    """The file with other members."""
    with zipfile.ZipFile(path) as source:
        members = {name.partition("/")[2]: source.read(name) for name in source.namelist()}
    change(members)
    with zipfile.ZipFile(into, "w") as target:
        for name, content in members.items():
            target.writestr(f"net/{name}", content)
    return into


def with_json(name: str, edit: Callable[[Any], None]) -> Callable[[Members, Path], None]:
    def change(members: Members, mark: Path) -> None:
        value = json.loads(members[name])
        edit(value)
        members[name] = json.dumps(value).replace("MARK", str(mark)).encode()

    return change


def node(**fields: Any) -> Callable[[Members, Path], None]:
    return with_json(MODEL, lambda d: d["graph_module"]["graph"]["nodes"][0].update(fields))


def payload(**fields: Any) -> Callable[[Members, Path], None]:
    return with_json(WEIGHTS, lambda d: d["config"]["conv.weight"].update(fields))


def size(**fields: Any) -> Callable[[Members, Path], None]:
    def edit(value: Any) -> None:
        value["config"]["conv.weight"]["tensor_meta"].update(fields)

    return with_json(WEIGHTS, edit)


def shape_text(text: str) -> Callable[[Members, Path], None]:
    def edit(value: Any) -> None:
        symbol = {"as_expr": {"expr_str": text, "hint": {"as_int": 1}}}
        value["graph_module"]["graph"]["tensor_values"]["x"]["sizes"][0] = symbol

    return with_json(MODEL, edit)


def structure(text: str) -> Callable[[Members, Path], None]:
    def edit(value: Any) -> None:
        value["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = text

    return with_json(MODEL, edit)


def pickled(name: str) -> Callable[[Members, Path], None]:
    def change(members: Members, mark: Path) -> None:
        buffer = io.BytesIO()
        torch.save((Evil(mark),), buffer)
        members[name] = buffer.getvalue()

    return change


def member(name: str, content: bytes = b"") -> Callable[[Members, Path], None]:
    return lambda members, _: members.update({name: content})


def without(name: str) -> Callable[[Members, Path], None]:
    return lambda members, _: members.pop(name) and None


CODE = "__import__('pathlib').Path('MARK').touch()"
ENUM = json.dumps({"__enum__": True, "fqn": "this:that", "name": "x"})
HOSTILE = {
    "example": (pickled("data/sample_inputs/model.pt"), "holds an example of inputs that is more"),
    "weight by pickle": (payload(use_pickle=True), "'conv.weight' as a pickle"),
    "weights of old": (pickled("data/weights/model.pt"), "holds 'data/weights/model.pt', which is"),
    "opaque": (pickled("data/constants/opaque_obj_0"), "is loaded by running code"),
    "script": (member("data/constants/custom_obj_0"), "is loaded by running code"),
    "library": (member("data/aotinductor/model/x.so"), "is loaded by running code"),
    "size": (shape_text(CODE), "as expr_str, which is not what torch.export writes"),
    "power": (shape_text("Pow(Integer(9), Integer(999999999))"), "as expr_str"),
    "attribute": (shape_text("Integer.mro()"), "as expr_str"),
    "function": (node(target="torch.os.system"), "has 'torch.os.system' as target"),
    "file": (node(target="torch.ops.aten.from_file.default"), "as target"),
    "no op": (node(target="torch.ops.aten.nothing.default"), "as target"),
    "other ops": (node(target="torch.ops.higher_order.cond"), "as target"),
    "name": (node(name="x=print()"), "has 'x=print()' as name"),
    "import": (structure(f'[1, {{"type": "builtins.dict", "context": {json.dumps(ENUM)}, '
                         '"children_spec": []}]'), "as out_spec"),
    "class": (structure('[1, {"type": "os.PathLike", "context": "null", "children_spec": []}]'),
              "as out_spec"),
    "no structure": (structure("[1]"), "as out_spec"),
    "absurd shape": (size(sizes=[{"as_int": 1 << 40}], strides=[{"as_int": 0}]), "has the shape"),
    "beyond": (size(storage_offset={"as_int": 1 << 20}), "damaged, or of another torch"),
    "gone": (payload(path_name="weight_99"), "is in 'data/weights/weight_99', which is not there"),
    "above": (payload(path_name="../weight_0"), "as path_name"),
    "no program": (without(MODEL), "has no 'models/model.json'"),
    "no JSON": (member(MODEL, b"{"), "'models/model.json' is not JSON"),
    "a list": (member(MODEL, b"[]"), "'models/model.json' is not a JSON object"),
    "deep": (member(MODEL, b"[" * 100_000), "'models/model.json' is not JSON"),
    "empty": (member(MODEL, b"{}"), "damaged, or of another torch"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_would_run_code_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    change, message = HOSTILE[name]
    mark = tmp_path / "mark"
    path = changed(saved, tmp_path / "evil.pt2", lambda members: change(members, mark))
    with pytest.raises(ArtifactError) as error:
        pt2.load(path)
    assert str(path) in str(error.value) and message in str(error.value)
    assert not mark.exists()


def test_guards_are_not_evaluated(saved: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    change = with_json(MODEL, lambda d: d.update(guards_code=[CODE]))
    path = changed(saved, tmp_path / "guarded.pt2", lambda members: change(members, mark))
    convloom.compile(path, target="reference")
    assert not mark.exists()


def test_the_tests_would_see_code_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    pickle.loads(pickle.dumps(Evil(mark)))
    assert mark.exists()


def test_zips_of_others(saved: Path, tmp_path: Path) -> None:
    def refused(path: Path) -> str:
        with pytest.raises(ArtifactError) as error:
            pt2.load(path)
        assert str(path) in str(error.value)
        return str(error.value)

    path = tmp_path / "x.pt2"
    assert "No such file" in refused(path)
    assert "Is a directory" in refused(tmp_path)
    path.write_bytes(b"x" * 100)
    assert "is not an exported program" in refused(path)
    path.write_bytes(saved.read_bytes()[:-10])
    assert "is not an exported program" in refused(path)
    for compression, twice, message in (
        (zipfile.ZIP_DEFLATED, 1, "'models/model.json' is compressed"),
        (zipfile.ZIP_STORED, 2, "holds 'models/model.json' twice"),
    ):
        with zipfile.ZipFile(path, "w", compression) as target:
            for _ in range(twice):
                target.writestr("net/models/model.json", "{}")
        assert message in refused(path)


def test_a_flipped_byte_is_never_a_stranger_error(saved: Path, tmp_path: Path) -> None:
    """Whatever is damaged, the error names the file; where nothing is noticed, it loads."""
    data = bytearray(saved.read_bytes())
    path = tmp_path / "flipped.pt2"
    refusals = 0
    for at in range(0, len(data), len(data) // 60):
        data[at] ^= 0x5A
        path.write_bytes(data)
        data[at] ^= 0x5A
        try:
            pt2.load(path)
        except ArtifactError as error:
            refusals += 1
            assert str(path) in str(error)
    assert refusals > 10
