"""The script for machines with a GPU: its stages, its state, and what it measures of a machine."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from convloom.benchmarks import constants, devices, gpu, gpu_tests
from convloom.benchmarks.gpu import Entry, Stage
from convloom.kernels import machine, targets

ROOT = Path(__file__).resolve().parent.parent


def options(**more: Any) -> argparse.Namespace:
    """Those of a dry run."""
    found = gpu.parser().parse_args(["--dry-run"])
    vars(found).update({**gpu.TINY, **more})
    return found


def python(code: str, name: str = "stage", **more: Any) -> Stage:
    return Stage(name, ("-c", code), "key", **more)


# Stages.


def test_the_order_is_correctness_first(tmp_path: Path) -> None:
    found = [stage.name for stage in gpu.stages(options(models=["resnet50", "vgg_d"]), tmp_path)]
    assert found == [
        "tests", "constants", "profile-resnet50-1", "correlation",
        "tune-resnet50", "tune-vgg_d", "bench-resnet50", "bench-vgg_d",
    ]  # fmt: skip
    real = gpu.parser().parse_args([])
    stages = {stage.name: stage for stage in gpu.stages(real, tmp_path)}
    assert {"profile-resnet50-1", "profile-resnet50-256"} <= set(stages)
    tune = stages["tune-resnet50"].arguments
    assert tune[tune.index("--to") + 1] == str(ROOT / "kernels" / "records")
    assert real.budget < 600


def test_every_command_is_understood(tmp_path: Path) -> None:
    """By the command line's own parser, and by this program's."""
    from convloom.cli.main import parser

    for stage in gpu.stages(gpu.parser().parse_args([]), tmp_path):
        _, module, *rest = stage.arguments
        if module == "convloom.cli.main":
            parser().parse_args([*rest, "--budget", "60s"] if stage.timed else rest)
        elif module == "convloom.benchmarks.gpu":
            assert gpu.parser().parse_args(rest).stage in gpu.STAGES


def test_tests_are_skipped_where_they_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "FOR_TESTS", ("pytest", "no_such_module"))
    first = next(gpu.stages(options(), tmp_path))
    entry = gpu.run_stage(first, 10.0, tmp_path, None)
    assert (entry.status, entry.reason) == (gpu.SKIPPED, "not installed: no_such_module")
    assert not gpu.is_open(first, entry) and gpu.is_open(replace(first, skip=""), entry)


def test_a_failing_stage_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    stage = python("print('so far'); raise ValueError('broken here')")
    entry = gpu.run_stage(stage, 60.0, tmp_path, None)
    assert entry.status == gpu.FAILED and entry.attempts == 1
    assert "Traceback" in entry.reason and "ValueError: broken here" in entry.reason
    assert "so far" in entry.reason
    assert gpu.is_open(stage, entry)
    again = gpu.run_stage(stage, 60.0, tmp_path, entry)
    assert again.attempts == gpu.ATTEMPTS and not gpu.is_open(stage, again)
    assert gpu.is_open(replace(stage, key="other"), again)


def test_a_stage_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    entry = gpu.run_stage(python(code), 4.0, tmp_path, None)
    assert entry.status == gpu.UNFINISHED and time.monotonic() - started < 30
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in _state(pid):
            return
        time.sleep(0.1)
    raise AssertionError("the stage's child is still running")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


def test_tuning_goes_on_until_it_is_done(tmp_path: Path) -> None:
    code = "import json, sys; print(json.dumps({'out_of_time': True, 'argv': sys.argv[1:]}))"
    entry = gpu.run_stage(python(code, timed=True), 60.0, tmp_path, None)
    assert (entry.status, entry.reason) == (gpu.UNFINISHED, "its budget is spent")
    assert '"--budget", "45s"' in (tmp_path / "logs" / "stage.out").read_text()
    finished = python("print('{\"out_of_time\": false}')", timed=True)
    done = gpu.run_stage(finished, 60.0, tmp_path, entry)
    assert done.status == gpu.DONE


# A call.


def statuses(given: dict[str, list[str]]) -> Any:
    """A runner that gives each stage its statuses, one per call."""

    def run(stage: Stage, left_s: float, output: Path, before: Entry | None) -> Entry:
        status = given.get(stage.name, [gpu.DONE])
        attempts = (before.attempts if before else 0) + 1
        return Entry(status.pop(0) if len(status) > 1 else status[0], stage.key, 1.0, attempts, "x")

    return run


def test_calls_go_on_where_the_last_one_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = statuses({"constants": [gpu.FAILED], "tune-lenet5": [gpu.UNFINISHED, gpu.DONE]})
    assert gpu.run_all(options(), tmp_path, run) == gpu.EXIT_UNFINISHED
    assert "call again: tune-lenet5" in capsys.readouterr().err
    seen: list[str] = []

    def watched(stage: Stage, *rest: Any) -> Entry:
        seen.append(stage.name)
        return run(stage, *rest)

    assert gpu.run_all(options(), tmp_path, watched) == gpu.EXIT_FAILED
    assert seen == ["constants", "tune-lenet5"]
    seen.clear()
    assert gpu.run_all(options(), tmp_path, watched) == gpu.EXIT_FAILED
    assert seen == []
    assert gpu.run_all(options(restart=True), tmp_path, statuses({})) == gpu.EXIT_DONE


def test_no_stage_starts_after_the_budget(tmp_path: Path) -> None:
    assert gpu.run_all(options(budget=1.0), tmp_path, statuses({})) == gpu.EXIT_UNFINISHED
    assert not (tmp_path / "state.json").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": {"tests": {"no": 1}}}', '{"stages": 1}'])
def test_a_damaged_state_is_started_anew(text: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(text)
    assert gpu.read_state(path) == {}
    gpu.write_state(path, {"tests": Entry(gpu.DONE, "key")})
    assert gpu.read_state(path) == {"tests": Entry(gpu.DONE, "key")}


def test_without_a_gpu_it_says_what_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--output", str(tmp_path)]) == gpu.EXIT_FAILED
    assert "--dry-run" in capsys.readouterr().err
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_module"))
    assert gpu.main(["--dry-run"]) == gpu.EXIT_FAILED
    assert "not installed: no_such_module" in capsys.readouterr().err


def test_the_package_is_found_where_it_is_not_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    for _ in range(2):
        found = gpu.environment()
    first = found["PYTHONPATH"].split(os.pathsep)[0]
    code = "import convloom; print(convloom.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=found, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(Path(first) / "convloom" / "__init__.py"), done.stderr


@pytest.mark.slow
def test_a_dry_run_ends_in_every_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    wanted = {"constants.json", "correlation.json", "tests.json", "zoo.json", "zoo.md", "records"}
    assert wanted <= names
    found = json.loads((tmp_path / "correlation.json").read_text())
    # The network is one kernel: two configurations of one problem.
    assert found["configurations"] == 2 and not found["wrong_or_failed"]
    stages = gpu.read_state(tmp_path / "state.json")
    assert {entry.status for entry in stages.values()} == {gpu.DONE}


# Tests in groups.


def test_what_passed_is_not_run_again_and_what_failed_is_run_alone(tmp_path: Path) -> None:
    groups: list[list[str]] = []
    poisoned = {"test_b"}

    def group(names: Any) -> dict[str, str]:
        """After a fault of the device everything in its process fails."""
        groups.append(list(names))
        at = next((i for i, name in enumerate(names) if name in poisoned), len(names))
        return {n: "passed" if i < at else "failed: fault" for i, n in enumerate(names)}

    names = ["test_a", "test_b", "test_c"]
    path = tmp_path / "tests.json"
    found = gpu_tests.run(path, names, lambda text: None, group)
    assert found == {"test_a": "passed", "test_b": "failed: fault", "test_c": "passed"}
    assert groups == [names, ["test_b"], ["test_c"]]
    groups.clear()
    poisoned.clear()
    assert set(gpu_tests.run(path, names, lambda text: None, group).values()) == {"passed"}
    assert groups == [["test_b"]]
    path.write_text("{")
    assert gpu_tests.read(path) == {}


def test_a_group_is_run_in_a_process() -> None:
    name = "test_replay_follows_its_inputs_and_is_repeatable"
    found = gpu_tests.run_group([name])
    assert found == {name: "passed" if torch.cuda.is_available() else "skipped"}


# Constants.


def test_constants_of_a_cpu() -> None:
    found, missing = constants.measure(devices.Cpu())
    assert not missing and set(found) == {"cache_gbps", "memory_gbps", "tensor_tflops"}
    assert all(value > 0 for value in found.values())


def test_an_experiment_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*rest: Any) -> float:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(constants, "product_tflops", broken)
    found, missing = constants.measure(devices.Cpu())
    assert "cache_gbps" in found and "too large" in missing["tensor_tflops"]


@pytest.mark.parametrize("early", [False, True])
def test_the_chain_of_kernels_compiles_for_a_gpu_that_is_not_here(early: bool) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {"x": "*i32", "EARLY": "constexpr"}
    source = ASTSource(constants._bump_kernel, signature, {(1,): early})
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1, "launch_pdl": early}
    )
    assert ("griddepcontrol.wait" in compiled.asm["ptx"]) == early


def test_rank_correlation() -> None:
    assert constants.rank_correlation([(1, 10), (2, 20), (3, 500)]) == pytest.approx(1)
    assert constants.rank_correlation([(1, 3), (2, 2), (3, 1)]) == pytest.approx(-1)
    # With ties: the value that the formula for Pearson's gives on mean ranks.
    assert constants.rank_correlation([(1, 1), (1, 2), (2, 3)]) == pytest.approx(math.sqrt(3) / 2)
    assert math.isnan(constants.rank_correlation([(1, 1)]))
    assert math.isnan(constants.rank_correlation([(1, 1), (1, 2)]))


def test_fitting_finds_the_machine_that_made_the_times() -> None:
    """Times are those of the model itself with other constants: fitting must find them."""
    target = targets.parse("cuda:sm_90")
    works = constants.problems(["lenet5"], [32], torch.float16, target.name)
    truth = replace(machine.machine_for(target), start_us=1.4, loop_us=0.05, launch_us=3.0)
    configs = [(work, config) for work in works for config in constants._spaced(work, 6)]
    with constants.assuming(target, truth):
        timed = [
            constants.Trial(
                str(work.key), work, config,
                constants.rank.modelled_us(work.op, work.problem, target, config),
            )
            for work, config in configs
        ]  # fmt: skip
    failed = constants.Trial("x", works[0], configs[0][1], None, "wrong")
    found = constants.summary([*timed, failed], target, {"launch_us": 3.0, "unknown": 1.0})
    assert found["before"]["off"] > 1.2 and found["after"]["off"] == pytest.approx(1.0, abs=0.02)
    assert found["after"]["correlation"] > 0.95
    assert found["proposed"]["start_us"] == 1.4 and found["proposed"]["launch_us"] == 3.0
    assert [each["reason"] for each in found["wrong_or_failed"]] == ["wrong"]
    assert machine.machine_for(target).launch_us != 3.0
