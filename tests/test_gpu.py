"""The same checks on a real GPU: what `gpu_checks.py`, `gpu_stress.py` and `gpu_model_checks.py`
ask, in the order in which the answers tell most.

Run with `pytest -m gpu` on a machine that has one, or with `make gpu`, which runs them in parallel
groups, each in a process of its own, and goes on where it stopped. `test_gpu_checks.py` rehearses
the checks without a GPU.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom import zoo
from convloom.kernels import registry
from convloom.kernels.devices import offline

from . import gpu_checks, gpu_model_checks, gpu_sample, gpu_stress, test_fusions
from .gpu_checks import PRECISIONS
from .gpu_device import Gpu
from .gpu_model_checks import MORE_RUNS, RUNS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
OPS = sorted(registry.BY_NAME)
FUZZ_SEEDS, FUZZ_GROUP = 200, 5
RULES = [pytest.param(name, id=f"rule{at}") for at, name in enumerate(test_fusions.RULES)]
"""Names of rules are equations, which no command line takes; the messages tell them."""
BENCHMARKED = ("resnet50", "mobilenet_v2", "inception_v3", "googlenet", "resnet18")
Note = Callable[[str, Any], None]


@pytest.fixture(scope="module")
def gpu() -> Gpu:
    return Gpu()


@pytest.fixture(autouse=True)
def compiling_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many of these processes run side by side: none starts others to compile."""
    compile_all = offline.compile_all
    monkeypatch.setattr(offline, "compile_all", lambda wanted: compile_all(wanted, 1))


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Note:
    """Keeps a finding: `benchmarks/gpu_tests.py` puts all of them into findings.json."""
    return lambda name, value: record_property(name, json.dumps(value))


# One of everything, so that what is broken everywhere shows at once.


def test_a_kernel_runs(gpu: Gpu) -> None:
    assert gpu_checks.check_op(gpu, "relu", "float32") and gpu_checks.check_op(
        gpu, "conv2d", "float16"
    )


def test_a_model_replays(gpu: Gpu) -> None:
    gpu_model_checks.check_replay(gpu)


def test_modules_and_examples_lie_anywhere(gpu: Gpu) -> None:
    gpu_model_checks.check_places(gpu)
    gpu_model_checks.check_without_weights(gpu)


@pytest.mark.parametrize("name", ["lenet5", "resnet18", "googlenet"])
def test_a_file_built_without_the_gpu(gpu: Gpu, name: str, tmp_path: Path) -> None:
    built_for = gpu.target.name
    assert built_for.startswith("cuda:sm_")
    gpu_model_checks.check_saved(gpu, tmp_path, name, built_for, (1, 8))


# Every op, every rule.


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("precision", PRECISIONS)  # Varies slowest.
def test_op(gpu: Gpu, precision: str, name: str) -> None:
    if gpu_checks.check_op(gpu, name, precision) == 0:
        pytest.skip("computes no products: TF32 changes nothing")


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rule(gpu: Gpu, precision: str, name: str, note: Note) -> None:
    if not gpu_model_checks.check_rule(gpu, name, precision):
        note("rule that did not fire", [name, precision])


@pytest.mark.parametrize("name", OPS)
def test_op_keeps_nan_and_infinity(gpu: Gpu, name: str) -> None:
    for precision in ("float16", "float32"):
        gpu_checks.check_special_values(gpu, name, precision)


@pytest.mark.parametrize("name", [op.name for op in registry.OPS if op.takes_epilogue])
def test_epilogue(gpu: Gpu, name: str) -> None:
    gpu_checks.check_epilogue(gpu, name, "float16")


@pytest.mark.parametrize("name", [op.name for op in registry.OPS if op.takes_prologue])
def test_prologue(gpu: Gpu, name: str) -> None:
    gpu_checks.check_prologue(gpu, name, "float16")


@pytest.mark.parametrize("name", OPS)
def test_smaller_batch(gpu: Gpu, name: str) -> None:
    if not gpu_checks.check_smaller_batch(gpu, name):
        pytest.skip("no draw of its domain has a batch")


# Semaphores, launches, warps.


@pytest.mark.parametrize("at", range(len(gpu_stress.SPLIT_LAYERS)))
def test_split_sums_ten_thousand_times(gpu: Gpu, at: int, note: Note) -> None:
    tiles = gpu_stress.check_repeatable(gpu, gpu_stress.SPLIT_LAYERS[at], torch.float16)
    note("stressed", tiles)


@pytest.mark.parametrize("mode", ["programmatic", "branches"])
@pytest.mark.parametrize("name", ["googlenet", "resnet50", "mobilenet_v2"])
def test_launch_mode(gpu: Gpu, name: str, mode: str) -> None:
    gpu_model_checks.check_launch_mode(gpu, mode, name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", range(len(gpu_stress.TAPPED_LAYERS)))
def test_eight_warps_over_taps(gpu: Gpu, at: int, dtype: torch.dtype, note: Note) -> None:
    """Two groups of warps over filter taps, found wrong elsewhere (pytorch issue 173068)."""
    found = list(gpu_stress.eight_warps(gpu, gpu_stress.TAPPED_LAYERS[at], dtype))
    note("eight warps over taps", found)
    assert found and all(each["right"] for each in found), found


# Whole networks.


@pytest.mark.parametrize(
    "name", [*BENCHMARKED, *(name for name in zoo.names() if name not in BENCHMARKED)]
)
def test_model(gpu: Gpu, name: str, note: Note) -> None:
    runs = MORE_RUNS if name in BENCHMARKED else RUNS
    found = list(gpu_model_checks.check_model(gpu, name, runs))
    note("model", found)
    wrong = [each for each in found if each["problem"] is not None]
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("first", range(0, FUZZ_SEEDS, FUZZ_GROUP))
def test_random_networks(gpu: Gpu, first: int) -> None:
    gpu_model_checks.check_seeds(gpu, range(first, first + FUZZ_GROUP))


# The interpreter, and a tool that watches.


@pytest.mark.parametrize("name", OPS)
def test_interpreter_says_the_same(gpu: Gpu, name: str) -> None:
    if (reason := gpu_stress.interpreter_fails()) is not None:
        pytest.skip(f"nothing can be interpreted here: {reason}")
    gpu_stress.check_against_interpreter(gpu, name, "float16")


@pytest.mark.parametrize("name", gpu_sample.OPS)
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool: str, name: str) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on the PATH")
    if (refusal := gpu_sample.watched(program, tool, "cuda", name)) is not None:
        pytest.skip(f"compute-sanitizer refuses this machine: {refusal}")
