"""What runs on a GPU, run on one that is not there: tensors lie where they must, graphs replay what
they recorded, and the programs that measure a GPU come to their end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom.benchmarks import constants, gpu, gpu_tests
from convloom.cli.main import main
from convloom.compiler.tuning import cuda, timers
from convloom.compiler.tuning.timers import cuda_handler
from convloom.kernels import registry

from . import gpu_checks, gpu_model_checks, gpu_stress, test_fusions
from .fake_gpu import FakePlaces, fake_gpu
from .gpu_device import Gpu
from .gpu_model_checks import Run

pytestmark = pytest.mark.interpreter


@pytest.fixture
def places() -> Iterator[FakePlaces]:
    with fake_gpu() as found:
        yield found


@pytest.fixture
def device(places: FakePlaces) -> Gpu:
    return Gpu()


@pytest.fixture
def few_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch is interpreted here."""
    for name, value in (("MOST_COPIES", 2), ("MOST_LAUNCHES", 2), ("REPLAYS", 3), ("WARM_UP", 1)):
        monkeypatch.setattr(cuda, name, value)


def test_tensors_lie_where_they_were_put(places: FakePlaces) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert there.is_cuda and there.device == torch.device("cuda", 0) and not here.is_cuda
    for made in (there + 1, there.double(), there[1:], here.cuda(), here.to(there), there * 2.0,
                 there.clone(), torch.zeros_like(there), there.to(torch.float16)):  # fmt: skip
        assert made.is_cuda
    assert not there.cpu().is_cuda and not there.to("cpu", torch.float64).is_cuda
    assert torch.nn.Linear(2, 2).to("cuda", torch.float16).weight.is_cuda
    here.copy_(there)
    for mixed in (lambda: here + there, lambda: torch.equal(here, there)):
        with pytest.raises(RuntimeError, match="same device"):
            mixed()
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there + torch.tensor(1.0)).is_cuda, "a number may lie anywhere"


def test_kernels(device: Gpu) -> None:
    assert gpu_checks.check_op(device, "conv2d", "float16", count=1)
    gpu_stress.check_repeatable(device, gpu_stress.SMALL_SPLIT, torch.float16, times=3, most=1)
    gpu_stress.check_against_interpreter(device, "relu", "float16")


def test_executables(device: Gpu) -> None:
    gpu_model_checks.check_replay(device, batches=(1, 2, 1))
    gpu_model_checks.check_places(device)
    gpu_model_checks.check_without_weights(device)
    for mode in ("programmatic", "branches"):
        gpu_model_checks.check_launch_mode(device, mode, "lenet5", 1, 2)


def test_rules_models_and_random_networks(device: Gpu) -> None:
    assert gpu_model_checks.check_rule(device, next(iter(test_fusions.RULES)), "float16")
    (found,) = gpu_model_checks.check_model(device, "lenet5", (Run("float16", (1,)),))
    assert found["problem"] is None
    gpu_model_checks.check_seeds(device, range(2))


def test_a_tensor_on_the_cpu_does_not_reach_a_kernel(device: Gpu) -> None:
    layer = gpu_stress.SMALL_SPLIT
    op, problem = registry.get(layer.op), layer.problem(torch.float16)
    (launch,) = op.launches(problem, op.default(problem, device.target), device.target)
    lost = torch.zeros(1 << 16, dtype=torch.float16)
    with pytest.raises(ValueError, match="cpu tensor"):
        device.run(launch, lambda ref: lost, 1)


def test_the_tests_of_a_gpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of each kind, as `make gpu` runs them."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p tests.fake_gpu")
    names = ["test_op[float16-add]", "test_op[tf32-add]", "test_rule[float16-rule0]",
             "test_op_keeps_nan_and_infinity[max_pool2d]", "test_epilogue[linear]",
             "test_prologue[conv2d]", "test_smaller_batch[linear]",
             "test_model[lenet5]"]  # fmt: skip
    found = gpu_tests.run_group(names)
    skipped = "skipped: computes no products: TF32 changes nothing"
    assert found.outcomes == dict.fromkeys(names, "passed") | {"test_op[tf32-add]": skipped}
    ((kind, rows),) = found.findings["test_model[lenet5]"]
    assert kind == "model" and [row["batch"] for row in rows] == [1, 8, 1, 8]


def test_configurations_are_timed(device: Gpu, few_launches: None) -> None:
    handler = cuda_handler()
    assert handler(None)[0] == "Fake GPU"
    layer = gpu_stress.SMALL_SPLIT
    op, problem = registry.get(layer.op), layer.problem(torch.float16)
    found = handler((problem, op.default(problem, device.target)))
    assert found.wrong is None and found.time_us > 0 and found.warm_us is not None


def test_profile_and_bench(places: FakePlaces, tmp_path: Path, capsys: Any) -> None:
    common = ["--batch", "1", "--dtype", "float16", "--target", "cuda", "--json"]
    assert main(["profile", "lenet5", *common, "--trace", str(tmp_path / "trace.json")]) == 0
    assert "Fake GPU" in capsys.readouterr().out
    peers = ["--against", "eager,eager-nhwc-graph", "--seconds", "0.01"]
    assert main(["bench", "lenet5", *common, *peers, "--output", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "zoo.json").read_text())["rows"]
    assert [each["status"] for each in row["results"]] == ["ok"] * 3, row


def test_constants_and_correlation(
    places: FakePlaces, few_launches: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NEAR_BYTES", "FAR_BYTES", "PRODUCT", "GAP_LAUNCHES", "REPLAYS"):
        monkeypatch.setattr(constants, name, 3 if name == "REPLAYS" else 64)

    class Near:
        """A child that is no process."""

        def __init__(self, factory: Any) -> None:
            self._handler = factory()

        def ask(self, request: Any, timeout_s: float) -> Any:
            return self._handler(request)

        def close(self) -> None:
            pass

    monkeypatch.setattr(timers, "WorkerProcess", Near)
    wanted = ["--models", "lenet5", "--batch", "1", "--problems", "1", "--per-problem", "2"]
    for stage in ("constants", "correlation"):
        assert gpu.main(["--stage", stage, "--output", str(tmp_path), *wanted]) == 0
    found = json.loads((tmp_path / "constants.json").read_text())
    assert {"memory_gbps", "tensor_tflops"} == found["measured"].keys()
    # What is launched by Triton's own hand needs a driver.
    assert found["missing"].keys() == {
        "launch_us", "programmatic_launch_us", "cache_gbps", "cache_by_boxes_gbps",
    }  # fmt: skip
    found = json.loads((tmp_path / "correlation.json").read_text())
    assert found["configurations"] == 2 and not found["wrong_or_failed"]
