"""Every message of `convloom.compile` and of executables: what, where, expected, got."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import convloom
import numpy as np
import pytest
import torch
from convloom import settings
from convloom.compiler.run.executable import Executable
from convloom.errors import (
    ArtifactError,
    CaptureError,
    ConvloomError,
    GraphError,
    InvalidInputError,
    KernelError,
    TargetUnavailableError,
    UnsupportedOpError,
    near_names,
)
from convloom.kernels.contract import targets
from torch import nn

from . import nets
from .nets import make

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def exporting_once() -> Iterator[None]:
    with nets.exporting_once():
        yield


@cache
def net() -> nn.Module:
    return nets.randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))


def compiled(example: Any = (X,), module: Any = None, **options: Any) -> Executable:
    return convloom.compile(module or net(), example, **{"target": "reference", **options})


def refused(error: type[ConvloomError], *parts: str, **options: Any) -> None:
    """Asserts that `compile` refuses, with a message that contains all parts."""
    with pytest.raises(error) as caught:
        compiled(**options)
    assert type(caught.value) is error
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_one_family() -> None:
    family = (
        ArtifactError, CaptureError, GraphError, InvalidInputError, KernelError,
        TargetUnavailableError, UnsupportedOpError,
    )  # fmt: skip
    assert all(issubclass(error, ConvloomError) for error in family)
    assert issubclass(InvalidInputError, ValueError)
    assert all(getattr(convloom, error.__name__) is error for error in family)


def test_near_names() -> None:
    known = ("conv2d", "linear", "relu")
    assert near_names("conv2", known) == "did you mean conv2d?"
    assert near_names("xyz", known) == "known: conv2d, linear, relu"
    many = [f"layer{at:03}" for at in range(50)]
    lines = near_names("xyz", many).splitlines()
    assert len(lines) > 4 and max(map(len, lines)) <= 96
    assert "".join(lines).count("layer") == 50
    assert near_names("xyz", many, "`list`") == "`list` lists the 50 that there are"


# Options.


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("precision", "tf16", "expected one of ieee, tf32; got 'tf16'"),
        ("precision", None, "expected one of ieee, tf32; got None"),
        ("tuning", "guess", "heuristic, records"),
        ("fallback", "eager", "expected one of error, torch; got 'eager'"),
        ("dtype", torch.float64, "expected None, float32, float16 or bfloat16, got torch.float64"),
        ("dtype", torch.int8, "got torch.int8"),
        ("dtype", "float15", "got float15"),
        ("passes", ("fuse_epilogue",), "unknown pass 'fuse_epilogue'; did you mean fuse_epilogues"),
        ("passes", "nones", "unknown pass 'nones'; did you mean none?"),
        ("passes", None, "expected 'default', 'none' or names, got None"),
        ("passes", (1,), "unknown pass '1'"),
        ("dynamic_batch", 8, "expected (lowest, highest), got 8"),
        ("dynamic_batch", (4,), "expected (lowest, highest), got (4,)"),
        ("dynamic_batch", (1, 2, 3), "expected (lowest, highest), got (1, 2, 3)"),
        ("dynamic_batch", (1.0, 4.0), "expected (lowest, highest), got (1.0, 4.0)"),
        ("dynamic_batch", (True, 3), "got (True, 3); both are whole numbers"),
        ("dynamic_batch", (1.5, 3), "got (1.5, 3); both are whole numbers"),
        ("dynamic_batch", (1, np.bool_(True)), "both are whole numbers"),
        ("dynamic_batch", (1, torch.tensor(3)), "both are whole numbers"),
        ("dynamic_batch", (-1, 4), "at least 1 as highest, got (-1, 4)"),
        ("dynamic_batch", (0, 0), "at least 1 as highest, got (0, 0)"),
        ("dynamic_batch", (4, 1), "expected 0 <= lowest <= highest and"),
    ],
)
def test_options(option: str, value: Any, expected: str) -> None:
    refused(InvalidInputError, f"{option}: ", expected, **{option: value})


@pytest.mark.parametrize("target", ["cuda:sm_91", "gpu", "cuda:90", None, 3])
def test_unknown_targets(target: Any) -> None:
    refused(TargetUnavailableError, f"unknown target {target!r}", target=target)


def test_the_cpu_is_two_targets() -> None:
    refused(TargetUnavailableError, "target 'cpu': ", "'interpreter'", "'reference'", target="cpu")


def test_a_module_of_float64() -> None:
    refused(
        CaptureError,
        "computes in float64 (",
        "model.float(), x.float()",
        module=copy.deepcopy(net()).double(),
    )


def test_near_targets_are_named() -> None:
    refused(TargetUnavailableError, "did you mean", "cuda:sm_90", target="cuda:sm90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu() -> None:
    parts = ("no usable NVIDIA GPU", "target='interpreter'", "target='cuda:sm_90'")
    refused(TargetUnavailableError, "target 'cuda': ", *parts, target="cuda")


def test_gpus_that_are_too_old() -> None:
    with pytest.raises(TargetUnavailableError, match=r"this GPU is sm_75; supported are sm_80, "):
        targets.nearest(75)
    assert targets.nearest(87) is targets.parse("cuda:sm_86")


# The module and the example.


@pytest.mark.parametrize(
    ("module", "got"),
    [(torch.relu, "builtin_function_or_method"), (nn.ReLU, "type"), ("resnet50", "'resnet50'")],
)
def test_not_a_module(module: Any, got: str) -> None:
    expected = "model: expected a torch.nn.Module, a torch.export.ExportedProgram or the path of an"
    refused(InvalidInputError, f"{expected} .onnx or .pt2 file, got {got}", module=module)


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (3, "example inputs: expected a tuple of tensors, got int"),
        (None, "example inputs: expected a tuple of tensors, got NoneType"),
        ({"x": X}, "example inputs: expected a tuple of tensors, got dict"),
        ((), "example inputs: expected a tuple of tensors, got nothing"),
        (("a", None, 3), "example inputs: expected a tuple of tensors, got nothing"),
        ((X, 1j), "example input 1: expected a tensor or a constant (bool, int, "),
        ((X.long(),), "example input 0: expected float32, float16 or bfloat16, got torch.int64"),
        (
            (X.double(),),
            "example input 0: expected float32, float16 or bfloat16, got torch.float64; con",
        ),
        ((X[:, :0],), "example input 0: expected at least one element, got shape "),
    ],
    ids=[str(at) for at in range(9)],
)
def test_examples(example: Any, expected: str) -> None:
    refused(InvalidInputError, expected, example=example)


def test_a_scalar_has_no_batch() -> None:
    options = {"module": nn.ReLU(), "example": (torch.tensor(1.0),), "dynamic_batch": (1, 2)}
    refused(InvalidInputError, "example input 0: a scalar has no batch dimension", **options)


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        ((X, X), "too many positional arguments"),
        ((X[0, 0],), "conv2d"),
        ((X[:, :2],), "expected input[2, 2, 8, 8] to have 3 channels"),
        ((X.half(),), "Half"),
    ],
)
def test_what_the_module_itself_refuses(example: Any, reason: str) -> None:
    refused(CaptureError, "torch.export could not capture Sequential: ", reason, example=example)


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Selects(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]


class Raises(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not today")


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Branches(), "decides by the values of a tensor at test_errors.py:"),
        (Raises(), "torch.export could not capture Raises: not today"),
        (nn.Conv2d(3, 4, 3, device="meta"), "'weight' has no data"),
        (nn.Dropout(), "Dropout would still train"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_that_cannot_be_captured(module: nn.Module, reason: str) -> None:
    refused(CaptureError, reason, module=module)


def test_results_of_unknown_size() -> None:
    parts = ("the top module: aten.index.Tensor at test_errors.py:", "the values of a tensor")
    refused(UnsupportedOpError, *parts, module=Selects())
    refused(UnsupportedOpError, *parts, module=Selects(), dynamic_batch=(1, 4), fallback="torch")


def test_failures_under_a_dynamic_batch_say_so() -> None:
    parts = ("could not capture Raises (with a dynamic batch)", "not today")
    refused(CaptureError, *parts, module=Raises(), dynamic_batch=(1, 4))


class Turns(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flip(0)


def test_unsupported_geometry_names_the_op_and_the_reason() -> None:
    parts = ("Turns has 1 op without a kernel", "the top module: aten.flip.default(float32[N, 3, ")
    reason = "flip: the batch of float32[N, 3, 8, 8] must stay in order"
    refused(UnsupportedOpError, *parts, reason, module=Turns(), dynamic_batch=(1, 4))


def test_fp64_inside_a_module_is_unsupported() -> None:
    module, _ = make(lambda m, x: (x.double() + 1.0).float(), X.shape)
    refused(UnsupportedOpError, "aten._to_copy", "torch.float64 is not supported", module=module)


# Calls.


@pytest.fixture(scope="module", params=["reference", "interpreter"])
def static(request: pytest.FixtureRequest) -> Executable:
    return compiled(target=request.param)


@pytest.fixture(scope="module", params=["reference", "interpreter"])
def dynamic(request: pytest.FixtureRequest) -> Executable:
    return compiled(target=request.param, dynamic_batch=(2, 4))


CALLS: dict[str, tuple[Callable[[], tuple[Any, ...]], str]] = {
    "none": (lambda: (), "inputs: expected 1 tensor(s) structured as the example"),
    "two": (lambda: (X, X), "(input float32[2, 3, 8, 8]), got 2"),
    "list": (lambda: ([X],), "structured as the example"),
    "dict": (lambda: ({"input": X},), "structured as the example"),
    "set": (lambda: ({1},), "expected a tensor float32[2, 3, 8, 8], got set"),
    "number": (lambda: (1.0,), "expected a tensor float32[2, 3, 8, 8], got float"),
    "rank": (lambda: (X[0],), "expected rank 4 (float32[2, 3, 8, 8]), got torch.float32 (3, 8, 8)"),
    "height": (lambda: (X[:, :, :7],), "expected shape (2, 3, 8, 8), got torch.float32 (2, 3, 7, "),
    "channels": (lambda: (X[:, :2],), "expected shape (2, 3, 8, 8), got torch.float32 (2, 2, "),
    "batch": (lambda: (X[:1],), "expected shape (2, 3, 8, 8), got torch.float32 (1, 3, "),
    "half": (lambda: (X.half(),), "expected dtype torch.float32, got torch.float16 (2, 3, 8, 8)"),
    "whole": (lambda: (X.long(),), "expected dtype torch.float32, got torch.int64"),
    "device": (lambda: (X.to("meta"),), "expected device cpu, got torch.float32 (2, 3, 8, 8) on m"),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls(static: Executable, name: str) -> None:
    arguments, expected = CALLS[name]
    with pytest.raises(InvalidInputError) as caught:
        static(*arguments())
    assert expected in str(caught.value), str(caught.value)
    if "structured" not in str(caught.value) and name != "two":
        assert str(caught.value).startswith("input input: "), "the argument is named"


@pytest.mark.parametrize("batch", [0, 1, 5])
def test_batches_out_of_range(dynamic: Executable, batch: int) -> None:
    expected = rf"input input: expected a batch from 2 to 4, got torch.float32 \({batch}, 3, 8, 8\)"
    with pytest.raises(InvalidInputError, match=expected):
        dynamic(torch.zeros(batch, 3, 8, 8))


def test_other_dimensions_stay_fixed_under_a_dynamic_batch(dynamic: Executable) -> None:
    expected = r"expected shape \(3, 3, 8, 8\), got torch.float32 \(3, 3, 8, 9\)"
    with pytest.raises(InvalidInputError, match=expected):
        dynamic(torch.zeros(3, 3, 8, 9))


@pytest.mark.interpreter
def test_a_refused_call_leaves_the_executable_usable(static: Executable) -> None:
    with pytest.raises(InvalidInputError):
        static(X[:1])
    nets.check(static(X), net(), (X,))


def test_two_inputs_are_told_apart() -> None:
    module, inputs = make(lambda m, x, r: x + r, (2, 3), (2, 3))
    exe = compiled(inputs, module)
    with pytest.raises(InvalidInputError, match=r"input inputs_1: expected shape \(2, 3\)"):
        exe(inputs[0], inputs[1].T.contiguous())


# Settings.


@pytest.mark.parametrize("level", ["loud", "-1", "1.5", ""])
def test_debug_levels(monkeypatch: pytest.MonkeyPatch, level: str) -> None:
    monkeypatch.setenv("CONVLOOM_DEBUG", level)
    refused(InvalidInputError, f"CONVLOOM_DEBUG: expected an integer from 0 to 4, got {level!r}")


@pytest.mark.parametrize(
    ("level", "shown", "hidden"),
    [
        ("0", (), ("conv2d",)),
        ("1", ("conv2d(float32",), ("refused",)),
        ("2", ("refused conv2d(f(x), w)",), ("# after",)),
        ("3", ("# after fuse_epilogues",), ("@triton.jit",)),
        ("4", ("@triton.jit", "# after fuse_epilogues"), ()),
    ],
)
def test_debug_output(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    level: str,
    shown: tuple[str, ...],
    hidden: tuple[str, ...],
) -> None:
    module, inputs = make(lambda m, x: m.conv(x.relu()), X.shape, conv=nn.Conv2d(3, 4, 3))
    monkeypatch.setenv("CONVLOOM_DEBUG", level)
    compiled(inputs, module)
    printed = capsys.readouterr().out
    assert all(part in printed for part in shown)
    assert not any(part in printed for part in hidden)


def test_settings_are_read_at_each_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CONVLOOM_CHECK", "0")
    assert settings.read() == settings.Settings(debug=0, check=0, cache_dir=tmp_path)
    monkeypatch.setenv("CONVLOOM_CHECK", "1")
    assert settings.read().check == 1
    monkeypatch.delenv("CONVLOOM_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert settings.read().cache_dir == tmp_path / "home" / "convloom"


def test_an_unknown_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, level in (("", 0), ("2", 2)):
        monkeypatch.setenv("CONVLOOM_CHECK", value)
        assert settings.read().check == level
    for value in ("3", "-1", "yes"):
        monkeypatch.setenv("CONVLOOM_CHECK", value)
        refused(InvalidInputError, f"CONVLOOM_CHECK: expected 0, 1 or 2, got {value!r}")


def test_checking_finds_a_pass_that_breaks_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    from convloom.compiler import passes

    def break_graph(graph: Any, ledger: Any) -> Any:
        graph.net.remove_edges_from(list(graph.net.in_edges("output", keys=True)))
        graph.net.add_edge("input", "output", key=3, index=0)
        return graph

    step = passes.Pass(break_graph, "to be found out")
    monkeypatch.setattr(passes, "PASSES", (step, *passes.PASSES))
    refused(GraphError, "output: input slots [3] are not 0..n-1")


def test_a_device_s_capability_is_one_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: (12, 1))
    assert targets.local_capability() == 121
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert targets.local_capability() is None
