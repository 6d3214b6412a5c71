"""What kernels are compiled to, run in the emulator: the checks of a GPU, without one."""

from __future__ import annotations

import pytest
from convloom.kernels import registry

from . import gpu_checks, gpu_model_checks, test_fusions
from .gpu_model_checks import Run
from .harness import Emulator

AMPERE, HOPPER = Emulator("sm_80"), Emulator("sm_90", seed=1)
"""Products of warps, and of groups of four warps; the generations between have the former."""
DEVICES = [pytest.param(AMPERE, id="sm_80"), pytest.param(HOPPER, id="sm_90")]
OPS = sorted(registry.BY_NAME)


@pytest.mark.parametrize("name", OPS)
def test_op(name: str) -> None:
    """One draw in every precision, each on another generation."""
    for precision, device in (("float16", HOPPER), ("float32", AMPERE)):
        gpu_checks.check_op(device, name, precision, count=1, tiles=False, interesting=0)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", gpu_checks.PRECISIONS)
@pytest.mark.parametrize("name", OPS)
def test_op_thoroughly(name: str, precision: str, device: Emulator) -> None:
    if gpu_checks.check_op(device, name, precision, count=4) == 0:
        pytest.skip("computes no products: TF32 changes nothing")


@pytest.mark.parametrize("name", ["conv2d", "max_pool2d", "normalize", "softmax"])
def test_special_values_epilogues_prologues_and_batches(name: str) -> None:
    for check in (gpu_checks.check_special_values, gpu_checks.check_epilogue):
        check(HOPPER, name, "float16")
    assert gpu_checks.check_smaller_batch(HOPPER, name)
    if registry.get(name).takes_prologue:
        gpu_checks.check_prologue(HOPPER, name, "float16")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", OPS)
def test_special_values_epilogues_prologues_and_batches_of_all(name: str, device: Emulator) -> None:
    op = registry.get(name)
    for precision in ("float16", "float32"):
        gpu_checks.check_special_values(device, name, precision)
    gpu_checks.check_smaller_batch(device, name)
    if op.takes_epilogue:
        gpu_checks.check_epilogue(device, name, "float16")
    if op.takes_prologue:
        gpu_checks.check_prologue(device, name, "float16")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", test_fusions.RULES)
def test_rule(name: str, device: Emulator) -> None:
    for precision in ("float16", "tf32"):
        gpu_model_checks.check_rule(device, name, precision)


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("first", range(0, 200, 5))
def test_random_networks(first: int, device: Emulator) -> None:
    gpu_model_checks.check_seeds(device, range(first, first + 5))


def test_a_model() -> None:
    found = list(gpu_model_checks.check_model(HOPPER, "lenet5", (Run("float16", (1, 3)),)))
    assert [each["problem"] for each in found] == [None, None]
