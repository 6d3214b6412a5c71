"""The checks of a GPU rehearsed without one, a few of each kind: a machine is lent for minutes, and
no check may fail there for a reason that has nothing to do with the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from convloom.benchmarks import measure
from convloom.compiler.run.executable import Executable
from convloom.kernels import registry
from convloom.kernels.contract import targets
from convloom.kernels.contract.op import Op

from . import gpu_checks, gpu_model_checks, gpu_sample, gpu_stress, harness, test_fusions
from .gpu_device import Rehearsed
from .gpu_model_checks import Run
from .harness import INTERPRETED

pytestmark = pytest.mark.interpreter
DEVICE = Rehearsed(targets.parse("cuda:sm_90"))


@pytest.mark.parametrize("precision", gpu_checks.PRECISIONS)
@pytest.mark.parametrize("name", ["conv2d", "linear", "add", "max_pool2d_with_indices", "softmax"])
def test_ops(name: str, precision: str) -> None:
    ran = gpu_checks.check_op(DEVICE, name, precision, count=1)
    assert (ran == 0) == (precision == "tf32" and name not in ("conv2d", "linear"))


def test_every_op_has_draws_that_stay_the_same() -> None:
    for op in registry.OPS:
        first, second = (gpu_checks.drawn(op, "float16") for _ in range(2))
        assert [str(case) for case in first] == [str(case) for case in second]


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d", "normalize"])
def test_special_values_epilogues_and_batches(name: str) -> None:
    gpu_checks.check_special_values(DEVICE, name, "float16")
    gpu_checks.check_epilogue(DEVICE, name, "float16")
    assert gpu_checks.check_smaller_batch(DEVICE, name)
    if registry.get(name).takes_prologue:
        gpu_checks.check_prologue(DEVICE, name, "float16")


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever rounding excuses, it is no wrong number."""
    real = harness.run_on

    def off(device: Any, op: Op, *others: Any, **more: Any) -> tuple[torch.Tensor, ...]:
        (result,) = real(device, op, *others, **more)
        result[(-1,) * result.dim()] += 0.5 * result.abs().nan_to_num(1.0, 1.0).max() + 0.5
        return (result,)

    monkeypatch.setattr(harness, "run_on", off)
    for check in (gpu_checks.check_op, gpu_checks.check_special_values):
        with pytest.raises(AssertionError, match="element"):
            check(DEVICE, "conv2d", "float16")
    (found,) = gpu_stress.eight_warps(DEVICE, gpu_stress.TAPPED_LAYERS[2], torch.float16, 1)
    assert not found["right"] and "element" in found["said"]


def test_split_sums_are_repeated() -> None:
    layer = gpu_stress.SMALL_SPLIT
    (tile,) = gpu_stress.check_repeatable(DEVICE, layer, torch.float16, times=3, most=1)
    assert "SPLIT" in tile
    for each in gpu_stress.SPLIT_LAYERS:
        op, problem = registry.get(each.op), each.problem(torch.float16)
        assert len(gpu_stress.exchanging(op, problem, DEVICE, 4)) == 4


def test_a_sum_that_depends_on_the_call_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it is as right as before, and where a semaphore is not given back."""
    calls: list[torch.Tensor] = []

    def nudge(scratch: int) -> None:
        real = Rehearsed.bound

        def bound(self: Rehearsed, launch: Any, tensor_of: Any, batch: int) -> Any:
            action = real(self, launch, tensor_of, batch)
            kinds = [gpu_stress.Ref("output", 0), gpu_stress.Ref("scratch", 1)]

            def run() -> None:
                action()
                calls.append(tensor_of(kinds[scratch]))
                if len(calls) % 3 == 0:
                    calls[-1][0] += 1

            return run

        monkeypatch.setattr(Rehearsed, "bound", bound)

    for scratch, told in enumerate(("1 of 3 launches differ", "semaphores are left at")):
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Rehearsed, "bound", Rehearsed.bound)
            nudge(scratch)
            with pytest.raises(AssertionError, match=told):
                layer = gpu_stress.SMALL_SPLIT
                gpu_stress.check_repeatable(DEVICE, layer, torch.float16, times=3, most=1)
        monkeypatch.undo()


def test_eight_warps_over_taps_are_launched() -> None:
    (found,) = gpu_stress.eight_warps(DEVICE, gpu_stress.TAPPED_LAYERS[2], torch.float16, 1)
    assert found["right"] and "warps=8" in found["configuration"]


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d_with_indices", "gelu"])
def test_the_interpreter_is_compared(name: str) -> None:
    assert gpu_stress.interpreter_fails() is None
    gpu_stress.check_against_interpreter(DEVICE, name, "float16")


def test_an_interpreter_that_does_not_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*rest: Any, **more: Any) -> None:
        raise TypeError("only 0-dimensional arrays")

    monkeypatch.setattr(harness, "run_interpreted", broken)
    assert gpu_stress.interpreter_fails() == "TypeError: only 0-dimensional arrays"


def test_the_sample(capsys: pytest.CaptureFixture[str]) -> None:
    gpu_sample.main(["cuda:sm_90", "conv2d", gpu_sample.SPLIT])
    assert capsys.readouterr().out.split("\n")[:2] == ["conv2d: right", "split: right"]
    assert {*gpu_sample.OPS} - {gpu_sample.SPLIT} <= {*registry.BY_NAME}


@pytest.mark.parametrize(
    ("does", "told"),
    [('shift 4; exec "$@"', None), ("echo 'Device not supported'; exit 1", "Device not supported"),
     ("echo 'Invalid __global__ write'; exit 99", "Invalid __global__ write")],
)  # fmt: skip
def test_a_tool_watches_the_sample(does: str, told: str | None, tmp_path: Path) -> None:
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\n{does}\n")
    program.chmod(0o755)
    arguments = str(program), "memcheck", "cuda:sm_90", "softmax"
    if told is not None and "Invalid" in told:
        with pytest.raises(AssertionError, match=told):
            gpu_sample.watched(*arguments)
        return
    refusal = gpu_sample.watched(*arguments)
    assert refusal is None if told is None else told in str(refusal)


# Executables.


@pytest.mark.parametrize("precision", gpu_checks.PRECISIONS)
def test_rules(precision: str) -> None:
    for name in list(test_fusions.RULES)[:: len(test_fusions.RULES) // 4]:
        fired = gpu_model_checks.check_rule(INTERPRETED, name, precision)
        assert fired or precision in ("float32", "tf32"), f"{name} did not fire"


def test_a_rule_that_changes_the_meaning_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    name = next(iter(test_fusions.RULES))
    real = Executable.__call__
    monkeypatch.setattr(Executable, "__call__", lambda self, *x: real(self, *x) * 1.5)
    with pytest.raises(AssertionError, match="fused: result 0: element"):
        gpu_model_checks.check_rule(INTERPRETED, name, "float16")


def test_a_model_in_every_precision() -> None:
    runs = (Run("float16", (1,)), Run("float32", (1, 2)), Run("bfloat16", (2,)), Run("tf32", (1,)))
    found = list(gpu_model_checks.check_model(INTERPRETED, "lenet5", runs))
    assert [(each["precision"], each["batch"]) for each in found] == [
        ("float16", 1), ("float32", 1), ("float32", 2), ("bfloat16", 2), ("tf32", 1),
    ]  # fmt: skip
    assert all(each["problem"] is None and 0 < each["compiled"] < 0.1 for each in found)
    allowed = torch.backends.cuda.matmul.allow_tf32
    with measure.products(tf32=not allowed):
        assert torch.backends.cudnn.allow_tf32 != allowed
    assert torch.backends.cuda.matmul.allow_tf32 == allowed


def test_random_networks() -> None:
    gpu_model_checks.check_seeds(INTERPRETED, range(2))


def test_saved_executables(tmp_path: Path) -> None:
    gpu_model_checks.check_saved(INTERPRETED, tmp_path, "lenet5", "interpreter", (1, 2))
