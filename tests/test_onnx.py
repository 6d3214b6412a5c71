"""ONNX files: every operator against ONNX Runtime, whole files, names, and files that lie."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import convloom
import numpy as np
import pytest
import torch
from convloom.errors import ArtifactError, CaptureError, InvalidInputError, UnsupportedOpError

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
from convloom.compiler.onnx import file  # noqa: E402
from convloom.compiler.onnx.model import load  # noqa: E402
from convloom.compiler.onnx.operator import OPERATORS  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

LIGHT = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
X4, X3 = (2, 6, 7, 9), (2, 6, 9)


def numbers(*shape: int, seed: int = 0, low: float = -2.0) -> Any:
    rng = np.random.default_rng((seed, *shape))
    return rng.uniform(low, 2.0, shape).astype(np.float32)


def whole(*values: int) -> Any:
    return np.array(values, np.int64)


def model_of(
    nodes: Sequence[Any], constants: dict[str, Any], shape: Sequence[Any], opset: int = 17,
    outputs: Sequence[str] = ("y",),
) -> Any:  # fmt: skip
    """A model of one float32 input "x"."""
    graph = helper.make_graph(
        list(nodes), "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    made.ir_version = 8
    if not any(node.domain for node in nodes):
        made = onnx.shape_inference.infer_shapes(made)
    for output in made.graph.output:  # Of the operators that are functions nothing is inferred.
        if not output.type.tensor_type.HasField("shape"):
            output.type.CopyFrom(made.graph.input[0].type)
    return made


def saved(model: Any, folder: Path) -> Path:
    path = folder / "net.onnx"
    onnx.save(model, path)
    return path


def expected(model: Any, *inputs: Any) -> list[Any]:
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    session = runtime.InferenceSession(model.SerializeToString(), options)
    names = [each.name for each in session.get_inputs()]
    return list(session.run(None, dict(zip(names, inputs, strict=True))))


def check(model: Any, folder: Path, x: Any, tolerance: float = 2e-5) -> Any:
    """Our results of a model are those of ONNX Runtime; returns the module."""
    net = load(saved(model, folder))
    got = net(torch.from_numpy(x))
    got = got if isinstance(got, tuple) else (got,)
    for ours, theirs in zip(got, expected(model, x), strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs, rtol=tolerance, atol=tolerance)
    return net


# (operator, attributes, further inputs, shape of x, opset)
Case = tuple[str, dict[str, Any], list[Any], tuple[int, ...], int]
W = numbers(4, 6, 3, 3, seed=1)
CONV = {"kernel_shape": [3, 3]}
POOL = {"kernel_shape": [3, 2], "strides": [2, 2]}
CASES: dict[str, Case] = {
    "conv": ("Conv", CONV, [W, numbers(4)], X4, 17),
    "conv asymmetric": ("Conv", {**CONV, "pads": [1, 0, 2, 1], "strides": [2, 1]}, [W], X4, 17),
    "conv same upper": ("Conv", {"auto_pad": "SAME_UPPER", "strides": [2, 2]}, [W], X4, 17),
    "conv same lower": ("Conv", {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, [W], X4, 17),
    "conv valid": ("Conv", {"auto_pad": "VALID", "dilations": [2, 3]}, [W], X4, 17),
    "conv groups": ("Conv", {"group": 2, "pads": [1, 1, 1, 1]}, [numbers(4, 3, 3, 3)], X4, 17),
    "conv 1d": ("Conv", {"pads": [1, 1]}, [numbers(4, 6, 3)], X3, 17),
    "transposed": ("ConvTranspose", {"strides": [2, 2], "pads": [1, 1, 1, 1]},
                   [numbers(6, 4, 3, 3), numbers(4)], X4, 17),
    "transposed output padding": ("ConvTranspose", {"strides": [2, 3], "output_padding": [1, 2]},
                                  [numbers(6, 4, 3, 3)], X4, 17),
    "transposed asymmetric": ("ConvTranspose", {"strides": [2, 2], "pads": [0, 1, 1, 2]},
                              [numbers(6, 4, 3, 3)], X4, 17),
    "transposed to a shape": ("ConvTranspose", {"strides": [2, 2], "output_shape": [14, 18]},
                              [numbers(6, 4, 3, 3)], X4, 17),
    "transposed groups": ("ConvTranspose", {"group": 3, "dilations": [2, 2]},
                          [numbers(6, 2, 3, 3)], X4, 17),
    "max pool": ("MaxPool", {**POOL, "pads": [1, 0, 1, 0]}, [], X4, 17),
    "max pool asymmetric": ("MaxPool", {**POOL, "pads": [0, 1, 1, 0]}, [], X4, 17),
    "max pool ceil": ("MaxPool", {**POOL, "ceil_mode": 1}, [], X4, 17),
    "max pool same": ("MaxPool", {**POOL, "auto_pad": "SAME_UPPER"}, [], X4, 17),
    "max pool dilated": ("MaxPool", {"kernel_shape": [2, 2], "dilations": [2, 3]}, [], X4, 17),
    "average pool": ("AveragePool", {**POOL, "pads": [1, 1, 1, 1]}, [], X4, 17),
    "average pool with padding": ("AveragePool", {**POOL, "pads": [1, 1, 1, 1],
                                  "count_include_pad": 1}, [], X4, 17),
    "average pool asymmetric": ("AveragePool", {**POOL, "pads": [0, 1, 1, 0]}, [], X4, 17),
    "average pool same": ("AveragePool", {**POOL, "auto_pad": "SAME_LOWER"}, [], X4, 17),
    "power pool": ("LpPool", {**POOL, "p": 3}, [], X4, 17),
    "global average": ("GlobalAveragePool", {}, [], X4, 17),
    "global maximum": ("GlobalMaxPool", {}, [], X4, 17),
    "global power": ("GlobalLpPool", {"p": 2}, [], X4, 17),
    "batch norm": ("BatchNormalization", {"epsilon": 1e-3},
                   [numbers(6), numbers(6), numbers(6), numbers(6, low=0.5)], X4, 9),
    "instance norm": ("InstanceNormalization", {}, [numbers(6), numbers(6)], X4, 17),
    "layer norm": ("LayerNormalization", {"axis": -1}, [numbers(9), numbers(9)], X4, 17),
    "group norm": ("GroupNormalization", {"num_groups": 3}, [numbers(6), numbers(6)], X4, 21),
    "lrn": ("LRN", {"size": 3, "alpha": 0.1, "bias": 2.0}, [], X4, 17),
    "lp norm": ("LpNormalization", {"p": 2, "axis": 1}, [], X4, 17),
    "mean variance": ("MeanVarianceNormalization", {}, [], X4, 13),
    "depth to space": ("DepthToSpace", {"blocksize": 2}, [], (2, 8, 3, 5), 17),
    "pixel shuffle": ("DepthToSpace", {"blocksize": 2, "mode": "CRD"}, [], (2, 8, 3, 5), 17),
    "space to depth": ("SpaceToDepth", {"blocksize": 2}, [], (2, 3, 4, 6), 17),
    "upsample": ("Upsample", {"mode": "nearest"}, [np.array([1, 1, 2, 3], np.float32)], X4, 9),
    "resize 10": ("Resize", {}, [np.array([1, 1, 2, 2], np.float32)], X4, 10),
    "resize nearest": ("Resize", {"coordinate_transformation_mode": "asymmetric",
                       "nearest_mode": "floor"},
                       [None, np.array([1, 1, 2, 3], np.float32)], X4, 17),
    "resize half pixel": ("Resize", {}, [None, np.array([1, 1, 2, 2], np.float32)], X4, 17),
    "resize linear": ("Resize", {"mode": "linear"}, [None, None, whole(2, 6, 11, 5)], X4, 17),
    "resize corners": ("Resize", {"mode": "linear",
                       "coordinate_transformation_mode": "align_corners"},
                       [None, None, whole(2, 6, 14, 12)], X4, 17),
    "resize cubic": ("Resize", {"mode": "cubic"}, [None, None, whole(2, 6, 14, 18)], X4, 17),
    "resize axes": ("Resize", {"mode": "linear", "axes": [2, 3]},
                    [None, None, whole(14, 18)], X4, 18),
    "clip 6": ("Clip", {"min": -0.5, "max": 1.0}, [], X4, 9),
    "clip": ("Clip", {}, [np.float32(-0.5), np.float32(1.0)], X4, 17),
    "clip above": ("Clip", {}, [None, np.float32(1.0)], X4, 17),
    "prelu": ("PRelu", {}, [numbers(6, 1, 1)], X4, 17),
    "prelu of one": ("PRelu", {}, [numbers(1)], X4, 17),
    "leaky": ("LeakyRelu", {"alpha": 0.2}, [], X4, 17),
    "elu": ("Elu", {"alpha": 0.7}, [], X4, 17),
    "celu": ("Celu", {"alpha": 0.7}, [], X4, 17),
    "selu": ("Selu", {}, [], X4, 17),
    "selu of others": ("Selu", {"alpha": 1.0, "gamma": 2.0}, [], X4, 17),
    "hard sigmoid": ("HardSigmoid", {}, [], X4, 17),
    "hard sigmoid of torch": ("HardSigmoid", {"alpha": 1 / 6}, [], X4, 17),
    "gelu": ("Gelu", {"approximate": "tanh"}, [], X4, 20),
    "thresholded": ("ThresholdedRelu", {"alpha": 0.5}, [], X4, 17),
    "softmax": ("Softmax", {"axis": 1}, [], X4, 17),
    "softmax 11": ("Softmax", {"axis": 1}, [], X4, 11),
    "log softmax": ("LogSoftmax", {}, [], X4, 17),
    "add": ("Add", {}, [numbers(6, 1, 1)], X4, 17),
    "times a number": ("Mul", {}, [np.float32(3.0)], X4, 17),
    "power": ("Pow", {}, [np.float32(2.0)], X4, 17),
    "sum": ("Sum", {}, [numbers(*X4), numbers(6, 1, 1)], X4, 17),
    "max": ("Max", {}, [numbers(*X4), np.float32(0.3)], X4, 17),
    "min": ("Min", {}, [numbers(*X4)], X4, 17),
    "mean": ("Mean", {}, [numbers(*X4)], X4, 17),
    "fmod": ("Mod", {"fmod": 1}, [np.float32(0.7)], X4, 17),
    "gemm": ("Gemm", {"transB": 1}, [numbers(5, 7), numbers(5)], (3, 7), 17),
    "gemm scaled": ("Gemm", {"alpha": 0.5, "beta": 2.0}, [numbers(7, 5), numbers(1, 5)],
                    (3, 7), 17),
    "gemm without bias": ("Gemm", {}, [numbers(7, 5)], (3, 7), 17),
    "gemm turned": ("Gemm", {"transA": 1}, [numbers(3, 5), numbers(7, 1)], (3, 7), 17),
    "matmul": ("MatMul", {}, [numbers(9, 5)], X4, 17),
    "reduce mean": ("ReduceMean", {"axes": [2, 3]}, [], X4, 13),
    "reduce mean 18": ("ReduceMean", {"keepdims": 0}, [whole(-1, -2)], X4, 18),
    "reduce sum": ("ReduceSum", {}, [whole(1)], X4, 17),
    "reduce all": ("ReduceMax", {}, [], X4, 17),
    "reduce l2": ("ReduceL2", {"axes": [1]}, [], X4, 17),
    "reduce l1": ("ReduceL1", {"axes": [1]}, [], X4, 17),
    "sum of squares": ("ReduceSumSquare", {"axes": [3]}, [], X4, 17),
    "log sum exp": ("ReduceLogSumExp", {"axes": [3]}, [], X4, 17),
    "transpose": ("Transpose", {"perm": [0, 2, 3, 1]}, [], X4, 17),
    "flatten": ("Flatten", {}, [], X4, 17),
    "flatten 2": ("Flatten", {"axis": 2}, [], X4, 17),
    "reshape": ("Reshape", {}, [whole(0, -1, 9)], X4, 17),
    "squeeze": ("Squeeze", {}, [whole(1)], (2, 1, 7), 17),
    "squeeze 9": ("Squeeze", {"axes": [1]}, [], (2, 1, 7), 9),
    "unsqueeze": ("Unsqueeze", {}, [whole(1, -1)], (2, 7), 17),
    "expand": ("Expand", {}, [whole(6, 1, 9)], (2, 1, 7, 1), 17),
    "tile": ("Tile", {}, [whole(1, 2, 1, 1)], X4, 17),
    "concat": ("Concat", {"axis": 1}, [numbers(2, 3, 7, 9)], X4, 17),
    "slice": ("Slice", {}, [whole(1, 0), whole(5, 100), whole(1, 3), whole(2, 3)], X4, 17),
    "slice backwards": ("Slice", {}, [whole(-1), whole(-100), whole(2), whole(-2)], X4, 17),
    "slice 9": ("Slice", {"starts": [1, -3], "ends": [5, -1], "axes": [1, 3]}, [], X4, 9),
    "gather one": ("Gather", {"axis": 1}, [np.array(2, np.int64)], X4, 17),
    "gather some": ("Gather", {"axis": 1}, [whole(5, -6, 2)], X4, 17),
    "pad": ("Pad", {}, [whole(0, 1, 2, 3, 0, 0, 1, 2), np.float32(1.5)], X4, 17),
    "pad reflecting": ("Pad", {"mode": "reflect"}, [whole(0, 0, 2, 3, 0, 0, 1, 2)], X4, 17),
    "pad edges": ("Pad", {"mode": "edge"}, [whole(0, 0, 0, 3, 0, 0, 0, 2)], X4, 17),
    "pad 9": ("Pad", {"pads": [0, 0, 1, 1, 0, 0, 2, 0], "value": 0.5}, [], X4, 9),
    "pad axes": ("Pad", {}, [whole(1, 2), np.float32(0), whole(3)], X4, 18),
    "dropout": ("Dropout", {}, [], X4, 17),
    "subtract": ("Sub", {}, [numbers(6, 1, 1)], X4, 17),
    "divide": ("Div", {}, [numbers(6, 1, 1, low=0.5)], X4, 17),
    "reduce min": ("ReduceMin", {"axes": [1]}, [], X4, 17),
    "einsum": ("Einsum", {"equation": "nchw,kc->nkhw"}, [numbers(4, 6)], X4, 17),
    "cumulative": ("CumSum", {}, [np.array(1, np.int64)], X4, 17),
}  # fmt: skip
UNARY = (
    "Abs", "Ceil", "Cos", "Erf", "Exp", "Floor", "HardSwish", "Mish", "Neg", "Relu", "Round",
    "Sigmoid", "Sign", "Sin", "Softplus", "Softsign", "Tan", "Tanh", "Atan", "Identity",
)  # fmt: skip
CASES |= {name: (name, {}, [], X4, 18) for name in UNARY}


@pytest.mark.parametrize("name", CASES)
def test_operators_compute_what_onnx_runtime_does(name: str, tmp_path: Path) -> None:
    op, attributes, others, shape, opset = CASES[name]
    names = [f"c{at}" if other is not None else "" for at, other in enumerate(others)]
    constants = {n: o for n, o in zip(names, others, strict=True) if o is not None}
    nodes = [helper.make_node(op, ["x", *names], ["y"], name="it", **attributes)]
    x = numbers(*shape, seed=3, low=-2.0)
    check(model_of(nodes, constants, shape, opset), tmp_path, x)


@pytest.mark.parametrize("op", ["Log", "Reciprocal", "Sqrt", "ReduceLogSum"])
def test_operators_of_positive_numbers(op: str, tmp_path: Path) -> None:
    check(model_of([helper.make_node(op, ["x"], ["y"])], {}, X4), tmp_path, numbers(*X4, low=0.5))


COMPARED = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")


@pytest.mark.parametrize("op", COMPARED)
@pytest.mark.parametrize("logic", ["And", "Or", "Xor"])
def test_comparisons_choose(op: str, logic: str, tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [make(op, ["x", "c"], ["a"]), make("Less", ["x", "zero"], ["b"]),
             make(logic, ["a", "b"], ["both"]), make("Not", ["both"], ["other"]),
             make("Where", ["other", "x", "c"], ["y"])]  # fmt: skip
    x = np.round(numbers(*X4))
    constants = {"c": np.round(numbers(*X4, seed=5)), "zero": np.float32(0)}
    net = check(model_of(nodes, constants, X4), tmp_path, x)
    exe = convloom.compile(net, (torch.from_numpy(x),), target="reference")
    assert torch.equal(exe(torch.from_numpy(x)), net(torch.from_numpy(x)))


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
def test_places_of_the_extremes(op: str, tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [make(op, ["x"], ["i"], axis=1), make("CastLike", ["i", "x"], ["y"])]
    check(model_of(nodes, {}, X4), tmp_path, numbers(*X4))


def test_sizes_counted_out(tmp_path: Path) -> None:
    """Range, Size, Constant and ReduceProd, all while capturing: (2, 6, 7, 9) -> (2, 378)."""
    make = helper.make_node
    nodes = [make("Shape", ["x"], ["s"]), make("Constant", [], ["four"], value_int=4),
             make("Constant", [], ["one"], value_int=1),
             make("Range", ["one", "four", "one"], ["r"]),
             make("Gather", ["s", "r"], ["sizes"]), make("ReduceProd", ["sizes"], ["p"]),
             make("Size", ["x"], ["all"]), make("Squeeze", ["p"], ["p0"]),
             make("Div", ["all", "p0"], ["n0"]), make("Unsqueeze", ["n0", "first"], ["n"]),
             make("Concat", ["n", "p"], ["shape"], axis=0),
             make("Reshape", ["x", "shape"], ["y"])]  # fmt: skip
    check(model_of(nodes, {"first": whole(0)}, X4), tmp_path, numbers(*X4))


def test_every_operator_is_among_those_tested() -> None:
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_onnx*.py"))
    assert [op for op in OPERATORS if f'"{op}"' not in text] == []


def test_several_results(tmp_path: Path) -> None:
    nodes = [helper.make_node("Split", ["x", "sizes"], ["a", "b"], axis=1),
             helper.make_node("TopK", ["b", "k"], ["y", "i"], axis=1)]  # fmt: skip
    model = model_of(nodes, {"sizes": whole(2, 4), "k": whole(2)}, X4, outputs=("a", "y"))
    check(model, tmp_path, numbers(*X4))


# Sizes computed in the graph.


def shuffled() -> Any:
    """A channel shuffle as exporters write it: the shape is taken apart and put together."""
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w"], ["c"], name="features.0/conv"),
        make("Shape", ["c"], ["s"]),
        make("Gather", ["s", "zero"], ["n"]), make("Gather", ["s", "three"], ["wide"]),
        make("Cast", ["wide"], ["f"], to=TensorProto.FLOAT), make("Mul", ["f", "half"], ["g"]),
        make("Floor", ["g"], ["h"]), make("Cast", ["h"], ["i"], to=TensorProto.INT64),
        make("Mul", ["i", "two"], ["even"]),
        make("Unsqueeze", ["n", "first"], ["n1"]), make("Unsqueeze", ["even", "first"], ["e1"]),
        make("Slice", ["c", "first", "e1", "last"], ["cut"]),
        make("Concat", ["n1", "rest", "e1"], ["shape"], axis=0),
        make("Reshape", ["cut", "shape"], ["parts"]),
        make("Transpose", ["parts"], ["turned"], perm=[0, 2, 1, 3, 4]),
        make("Concat", ["n1", "whole", "e1"], ["back"], axis=0),
        make("Reshape", ["turned", "back"], ["y"], name="shuffle"),
    ]  # fmt: skip
    constants = {
        "w": numbers(4, 6, 1, 1), "zero": np.array(0), "three": np.array(3), "two": np.array(2),
        "half": np.float32(0.5), "first": whole(0), "last": whole(3), "rest": whole(2, 2, 7),
        "whole": whole(4, 7),
    }  # fmt: skip
    return model_of(nodes, constants, ("batch", *X4[1:]))


def test_sizes_are_numbers_while_capturing(tmp_path: Path) -> None:
    net = check(shuffled(), tmp_path, numbers(3, *X4[1:]))
    assert [step.call.op for step in net.steps if not step.read] == []
    exe = convloom.compile(net, net.example(2), target="interpreter", dynamic_batch=(1, 4))
    x = torch.from_numpy(numbers(3, *X4[1:]))
    torch.testing.assert_close(exe(x), net(x))


def test_the_ledger_speaks_the_names_of_the_file(tmp_path: Path) -> None:
    net = load(saved(shuffled(), tmp_path))
    assert {"features.0/conv", "shuffle"} <= dict(net.named_modules()).keys()
    assert dict(net.named_buffers()).keys() == {"w"}
    exe = convloom.compile(net, net.example(2), target="reference")
    assert any(node.module_path == "features.0/conv" for node in exe.graph.nodes())


def test_names_that_clash_or_are_empty(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [make("Mul", ["x", "w"], ["a"], name="w"), make("Add", ["a", "w.b"], ["b"], name=".c"),
             make("Relu", ["b"], ["y"], name="steps")]  # fmt: skip
    check(model_of(nodes, {"w": numbers(9), "w.b": numbers(9)}, X4), tmp_path, numbers(*X4))


# The light models, with weights that show mistakes.


def with_random_weights(model: Any) -> Any:
    graph = model.graph
    shapes = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    variances = {node.input[4] for node in graph.node if node.op_type == "BatchNormalization"}
    for at, node in enumerate(list(graph.node)):
        if node.op_type == "ConstantOfShape":
            (name,), shape = node.output, tuple(map(int, shapes[node.input[0]]))
            fan_in = max(int(np.prod(shape[1:])), 1) if len(shape) > 1 else 100
            made = numbers(*shape, seed=at) * 1.2 / np.sqrt(fan_in)
            made = np.abs(made) + 0.5 if name in variances else made
            graph.initializer.append(numpy_helper.from_array(made.astype(np.float32), name))
            graph.node.remove(node)
    model.ir_version = 4
    return model


@pytest.mark.parametrize("name", ["shufflenet", "squeezenet", "resnet50", "inception_v2"])
def test_light_models(name: str, tmp_path: Path) -> None:
    model = with_random_weights(onnx.load(LIGHT / f"light_{name}.onnx"))
    x = numbers(*load(saved(model, tmp_path)).example()[0].shape)
    check(model, tmp_path, x, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["bvlc_alexnet", "densenet121", "inception_v1", "vgg19", "zfnet512"]
)
def test_other_light_models(name: str, tmp_path: Path) -> None:
    test_light_models(name, tmp_path)


def test_a_light_model_as_an_executable(tmp_path: Path) -> None:
    model = with_random_weights(onnx.load(LIGHT / "light_squeezenet.onnx"))
    net = load(saved(model, tmp_path))
    exe = convloom.compile(net, net.example(), target="reference")
    x = torch.from_numpy(numbers(*net.example()[0].shape))
    torch.testing.assert_close(exe(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_path_stands_where_a_module_does(tmp_path: Path) -> None:
    path = saved(shuffled(), tmp_path)
    exe = convloom.compile(path, target="reference")
    x = torch.from_numpy(numbers(1, *X4[1:]))
    torch.testing.assert_close(exe(x), load(path)(x))
    assert exe.graph.name == "net"
    exe = convloom.compile(str(path), (torch.zeros(3, *X4[1:]),), target="reference")
    x = torch.from_numpy(numbers(3, *X4[1:]))
    torch.testing.assert_close(exe(x), load(path)(x))
    with pytest.raises(InvalidInputError, match=r"path of an .onnx or .pt2 file, got 'net.pt'"):
        convloom.compile("net.pt", target="reference")


# Files that lie.


def refused(path: Path, *parts: str, error: type[Exception] = ArtifactError) -> None:
    with pytest.raises(error) as caught:
        load(path)
    assert all(part in str(caught.value) for part in parts), caught.value


def relu(constants: dict[str, Any] | None = None, opset: int = 17) -> Any:
    names = list(constants or ())
    nodes = [helper.make_node("Sum", ["x", *names], ["y"])]
    return model_of(nodes, constants or {}, X4, opset)


def external(folder: Path, location: str, **entries: Any) -> Path:
    """A model whose weight lies in another file."""
    model = relu({"w": numbers(*X4)})
    (tensor,) = model.graph.initializer
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return saved_raw(model, folder)


def saved_raw(model: Any, folder: Path) -> Path:
    path = folder / "net.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data_in_the_folder_of_the_model(tmp_path: Path) -> None:
    weight, x = numbers(*X4), torch.from_numpy(numbers(*X4, seed=1))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "w.bin").write_bytes(b"1234" + weight.tobytes())
    net = load(external(tmp_path, "weights/w.bin", offset=4))
    assert torch.equal(net(x), x + torch.from_numpy(weight))


@pytest.mark.parametrize("location", ["/etc/passwd", "../w.bin", "a/../../w.bin", "", "a\0b"])
def test_external_data_elsewhere(location: str, tmp_path: Path) -> None:
    refused(external(tmp_path, location), "initializer 'w'", "inside the model's folder")


def test_external_data_that_is_not_what_it_says(tmp_path: Path) -> None:
    size = numbers(*X4).nbytes
    (tmp_path / "w.bin").write_bytes(bytes(size))
    os.symlink(tmp_path / "w.bin", tmp_path / "link.bin")
    os.mkfifo(tmp_path / "fifo")
    for location, entries, part in (
        ("w.bin", {"offset": 1}, f"bytes 1 to {size + 1}"),
        ("w.bin", {"offset": -4}, "bytes -4"),
        ("w.bin", {"length": 12}, "12 bytes"),
        ("w.bin", {"offset": "x"}, "are not numbers"),
        ("none.bin", {}, "no file 'none.bin'"),
        ("link.bin", {}, "behind a link"),
        ("fifo", {}, "is not a regular file"),
    ):
        refused(external(tmp_path, location, **entries), "initializer 'w'", part)


def test_weights_that_are_not_what_they_say(tmp_path: Path) -> None:
    model = relu({"w": numbers(*X4)})
    (tensor,) = model.graph.initializer
    tensor.dims[0] = 1 << 40
    refused(saved_raw(model, tmp_path), "initializer 'w' has 3024 bytes", "takes")
    tensor.dims[0] = -2
    refused(saved_raw(model, tmp_path), "sizes of at least 0")
    tensor.dims[0], tensor.data_type = 2, TensorProto.COMPLEX64
    refused(saved_raw(model, tmp_path), "initializer 'w' has data type COMPLEX64")
    tensor.ClearField("raw_data")
    tensor.data_type = TensorProto.FLOAT
    tensor.float_data.extend([1.0, 2.0])
    refused(saved_raw(model, tmp_path), "initializer 'w' has 2 numbers")


def test_a_constant_of_an_absurd_size(tmp_path: Path) -> None:
    nodes = [helper.make_node("ConstantOfShape", ["s"], ["w"], name="fill"),
             helper.make_node("Add", ["x", "w"], ["y"])]  # fmt: skip
    model = model_of(nodes, {"s": whole(1 << 40)}, X4)
    refused(saved_raw(model, tmp_path), "ConstantOfShape 'fill'", "2^28", error=CaptureError)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    refused(path, "cannot be read", "No such file")
    path.write_bytes(b"")
    refused(path, "is empty")
    path.write_bytes(b"\x89PNG" + bytes(100))
    refused(path, str(path))
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "is not a regular file")
    refused(tmp_path, "cannot be read")


def test_truncated_files(tmp_path: Path) -> None:
    data = relu({"w": numbers(*X4)}).SerializeToString()
    path = tmp_path / "net.onnx"
    for size in range(1, len(data), 97):
        path.write_bytes(data[:size])
        refused(path, str(path))


def test_cycles_and_names_that_nothing_makes(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [make("Add", ["x", "b"], ["a"]), make("Relu", ["a"], ["b"]), make("Relu", ["b"], ["y"])]
    refused(saved_raw(model_of(nodes, {}, X4), tmp_path), "is not valid ONNX")
    nodes = [make("Add", ["x", "nobody"], ["y"])]
    refused(saved_raw(model_of(nodes, {}, X4), tmp_path), "is not valid ONNX")


@pytest.mark.parametrize("opset", [8, 99])
def test_opsets_out_of_range(opset: int, tmp_path: Path) -> None:
    refused(saved_raw(relu(opset=opset), tmp_path), f"opset {opset}", "expected 9 to")


def test_unknown_operators_are_named_all_at_once(tmp_path: Path) -> None:
    make = helper.make_node
    nodes = [
        make("Multinomial", ["x"], ["a"], name="draw"),
        make("NonZero", ["x"], ["b"]),
        make("NonZero", ["x"], ["c"]),
        make("Fused", ["x"], ["y"], domain="com.acme"),
    ]
    model = model_of(nodes, {}, X4)
    model.opset_import.append(helper.make_opsetid("com.acme", 1))
    parts = "NonZero, 2 times: b, c", "Multinomial, 1 times: draw", "acme::Fused", "it again"
    refused(saved_raw(model, tmp_path), *parts, error=UnsupportedOpError)
    model = relu()
    model.graph.node.extend([make("Frob", ["x"], ["z"]), make("Dabble", ["x"], ["v"])])
    refused(saved_raw(model, tmp_path), "is not valid ONNX: it has no Dabble, Frob")


REFUSED: dict[str, tuple[Case, str]] = {
    "even window": (("LRN", {"size": 4}, [], X4, 17), "a window of 4 channels"),
    "asymmetric lines": (("Resize", {"mode": "linear", "coordinate_transformation_mode":
                          "asymmetric"}, [None, None, whole(2, 6, 14, 18)], X4, 17), "asymmetric"),
    "cropping": (("Resize", {"coordinate_transformation_mode": "tf_crop_and_resize"},
                  [None, None, whole(2, 6, 14, 18)], X4, 17), "tf_crop_and_resize"),
    "channels": (("Resize", {}, [None, None, whole(2, 5, 7, 9)], X4, 17), "or the channels"),
    "last index": (("ArgMax", {"select_last_index": 1}, [], X4, 17), "takes the first"),
    "reverse sum": (("CumSum", {"reverse": 1}, [np.array(1)], X4, 17), "reversed"),
    "training": (("BatchNormalization", {"training_mode": 1}, [numbers(6)] * 4, X4, 15),
                 "training_mode"),
    "dilated average": (("AveragePool", {"kernel_shape": [2, 2], "dilations": [2, 2]}, [], X4, 19),
                        "dilations"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_uses_that_are_refused(name: str, tmp_path: Path) -> None:
    (op, attributes, others, shape, opset), reason = REFUSED[name]
    names = [f"c{at}" if other is not None else "" for at, other in enumerate(others)]
    constants = {n: o for n, o in zip(names, others, strict=True) if o is not None}
    nodes = [helper.make_node(op, ["x", *names], ["y"], name="it", **attributes)]
    with pytest.raises(CaptureError, match="it") as caught:
        load(saved_raw(model_of(nodes, constants, shape, opset), tmp_path))(torch.zeros(shape))
    assert reason in str(caught.value)


def test_shapes_that_depend_on_pixels(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["x"], ["s"], to=TensorProto.INT64),
             helper.make_node("Reshape", ["x", "s"], ["y"], name="free")]  # fmt: skip
    net = load(saved_raw(model_of(nodes, {}, (2,)), tmp_path))
    with pytest.raises(CaptureError, match="'free': its shape is computed from pixels"):
        net(torch.zeros(2))


def test_inputs_that_the_file_leaves_open(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    net = load(saved_raw(model_of(nodes, {}, ("batch", 3, "high", 9)), tmp_path))
    with pytest.raises(InvalidInputError, match="leaves high open; pass example inputs"):
        net.example()
    with pytest.raises(InvalidInputError, match="takes 1 inputs; got 2"):
        net(torch.zeros(1), torch.zeros(1))
    nodes = [helper.make_node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    model = model_of(nodes, {}, X4)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
    refused(saved_raw(model, tmp_path), "input 'x' is not a tensor of float32")


def test_the_package_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused(tmp_path / "net.onnx", file.INSTALL)


def test_weights_are_copied_once(tmp_path: Path) -> None:
    """The parser never sees the numbers of a large weight."""
    model = relu({"w": numbers(*X4)})
    data = memoryview(saved_raw(model, tmp_path).read_bytes())
    skeleton, places = file._without_weights(data)
    assert len(skeleton) < len(data) - 3000 and places.keys() == {0}
    start, end = places[0]
    assert bytes(data[start:end]) == model.graph.initializer[0].raw_data


def draws(count: int) -> Callable[[Any], Any]:
    return pytest.mark.parametrize("seed", range(count))


@draws(40)
def test_damaged_files_are_refused_or_read(seed: int, tmp_path: Path) -> None:
    """Some bytes of a file changed: an error of ours, or a network."""
    data = bytearray(shuffled().SerializeToString())
    rng = np.random.default_rng(seed)
    for _ in range(3):
        data[rng.integers(len(data))] = rng.integers(256)
    path = tmp_path / "net.onnx"
    path.write_bytes(data)
    with contextlib.suppress(ArtifactError, CaptureError, UnsupportedOpError):
        load(path)
