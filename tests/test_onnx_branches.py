"""ONNX files with If, whose condition is a constant or one of sizes; and how much memory reading
takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import convloom
import numpy as np
import pytest
import torch
from convloom.errors import CaptureError, UnsupportedOpError

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from convloom.compiler.onnx.model import load  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def branch(name: str, nodes: list[Any], output: str, **constants: Any) -> Any:
    made = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(nodes, name, [], [value], made)


def chosen(condition: str, then: Any, other: Any, result: str, name: str = "choice") -> Any:
    return helper.make_node("If", [condition], [result], name, then_branch=then, else_branch=other)


def saved(folder: Path, nodes: list[Any], **constants: Any) -> Path:
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", [2, 3]), ("y", None if "w" in constants else [2, 3]))
    ]
    made = [numpy_helper.from_array(array, key) for key, array in constants.items()]
    graph = helper.make_graph(nodes, "net", values[:1], values[1:], made)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, folder / "net.onnx")
    return folder / "net.onnx"


NODE = helper.make_node
WIDE = np.float32([[1.0, -2.0, 3.0]])


@pytest.mark.parametrize("inner", [True, False])
@pytest.mark.parametrize("outer", [True, False])
def test_a_constant_condition_chooses(outer: bool, inner: bool, tmp_path: Path) -> None:
    """Nested, with the same names in both branches, and the values around them."""
    nested = chosen(
        "second",
        branch("a", [NODE("Add", ["v", "b"], ["w"])], "w", b=WIDE),
        branch("b", [NODE("Sub", ["v", "x"], ["w"])], "w"),
        "n", "nested",
    )  # fmt: skip
    then = branch("c", [NODE("Mul", ["x", "b"], ["v"]), nested], "n", b=2 * WIDE)
    other = branch("d", [NODE("Relu", ["h"], ["v"])], "v")
    path = saved(
        tmp_path,
        [
            NODE("Not", ["first"], ["reversed"]), NODE("Neg", ["x"], ["h"]),
            chosen("reversed", then, other, "z"), NODE("Sigmoid", ["z"], ["y"]),
        ],
        first=np.array(not outer), second=np.array(inner),
    )  # fmt: skip
    x = np.random.default_rng(0).uniform(-2, 2, (2, 3)).astype(np.float32)
    (expected,) = runtime.InferenceSession(path).run(None, {"x": x})
    torch.testing.assert_close(load(path)(torch.from_numpy(x)), torch.from_numpy(expected))


def test_a_branch_may_return_what_is_around_it(tmp_path: Path) -> None:
    around = branch("a", [NODE("Identity", ["x"], ["v"])], "v")
    constant = branch("b", [], "b", b=np.tile(WIDE, (2, 1)))
    for is_first, expected in ((True, torch.ones(2, 3)), (False, torch.from_numpy(WIDE) + 0)):
        nodes = [chosen("first", around, constant, "z"), NODE("Relu", ["z"], ["y"])]
        net = load(saved(tmp_path, nodes, first=np.array(is_first)))
        assert torch.equal(net(torch.ones(2, 3)), expected.expand(2, 3).relu())


def test_another_condition_is_refused(tmp_path: Path) -> None:
    side = branch("a", [NODE("Relu", ["x"], ["v"])], "v")
    other = branch("b", [NODE("Neg", ["x"], ["v"])], "v")
    nodes = [
        NODE("ReduceMax", ["x"], ["most"], keepdims=0), NODE("Greater", ["most", "zero"], ["c"]),
        chosen("c", side, other, "y"),
    ]  # fmt: skip
    path = saved(tmp_path, nodes, zero=np.float32(0))
    with pytest.raises(CaptureError, match="If 'choice': its condition 'c' is computed from pix"):
        load(path)


@pytest.mark.parametrize("size", [3, 4])
def test_a_condition_of_sizes_is_that_of_the_files_shapes(size: int, tmp_path: Path) -> None:
    """Behind a layer; other inputs, for which it would be another, are refused."""
    side = branch("a", [NODE("Relu", ["h"], ["v"])], "v")
    other = branch("b", [NODE("Neg", ["h"], ["v"])], "v")
    nodes = [
        NODE("MatMul", ["x", "w"], ["h"]), NODE("Shape", ["h"], ["all"]),
        NODE("Gather", ["all", "last"], ["columns"]), NODE("Equal", ["columns", "three"], ["c"]),
        chosen("c", side, other, "y"),
    ]  # fmt: skip
    w = np.random.default_rng(0).normal(size=(3, size)).astype(np.float32)
    path = saved(tmp_path, nodes, w=w, last=np.array(1), three=np.array(3))
    x = np.random.default_rng(1).normal(size=(2, 3)).astype(np.float32)
    (expected,) = runtime.InferenceSession(path).run(None, {"x": x})
    exe = convloom.compile(path, target="interpreter")
    torch.testing.assert_close(exe(torch.from_numpy(x)), torch.from_numpy(expected))


def test_a_condition_of_other_sizes(tmp_path: Path) -> None:
    side = branch("a", [NODE("Relu", ["x"], ["v"])], "v")
    other = branch("b", [NODE("Neg", ["x"], ["v"])], "v")
    nodes = [
        NODE("Size", ["x"], ["n"]), NODE("Equal", ["n", "six"], ["c"]),
        chosen("c", side, other, "y"),
    ]  # fmt: skip
    path = saved(tmp_path, nodes, six=np.array(6))
    assert torch.equal(load(path)(torch.ones(3, 2)), torch.ones(3, 2))
    with pytest.raises(CaptureError, match="If 'choice': its condition is another one for these"):
        load(path)(torch.ones(4, 3))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "columns"
    onnx.save(model, path)
    with pytest.raises(CaptureError, match=r"computed from sizes: input 'x' .* leaves columns op"):
        load(path)


def test_operators_of_the_other_branch_do_not_matter(tmp_path: Path) -> None:
    side = branch("a", [NODE("Relu", ["x"], ["v"])], "v")
    odd = branch("b", [NODE("Det", ["x"], ["v"], "odd")], "v")
    load(saved(tmp_path, [chosen("c", side, odd, "y")], c=np.array(True)))
    path = saved(tmp_path, [chosen("c", side, odd, "y")], c=np.array(False))
    with pytest.raises(UnsupportedOpError, match="export it again:\n  Det, 1 times: odd"):
        load(path)


def test_reading_takes_little_more_memory_than_the_file(tmp_path: Path) -> None:
    path = saved(
        tmp_path, [NODE("MatMul", ["x", "w"], ["y"])], w=np.ones((3, 4_000_000), np.float32)
    )
    size = path.stat().st_size

    def memory(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]

    Path("/proc/self/clear_refs").write_text("5")  # The highest memory so far is forgotten.
    before = memory("VmRSS")
    net = load(path)
    assert size > 48e6 and memory("VmHWM") - before < 1.5 * size
    assert net(torch.ones(2, 3)).eq(3).all()
