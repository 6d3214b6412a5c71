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
from convloom.benchmarks import constants, devices, gpu, gpu_findings, gpu_state, gpu_tests, saved
from convloom.benchmarks.gpu_state import Entry, Stage
from convloom.kernels.contract import cost_model, targets
from convloom.kernels.devices import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor

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
        "compile", "tests", "constants", "saved", "tests-networks", "profile-lenet5-1",
        "correlation", "tune-resnet50", "bench-resnet50", "tune-vgg_d", "bench-vgg_d",
        "tune-resnet50-tf32", "bench-resnet50-tf32",
    ]  # fmt: skip
    real = gpu.parser().parse_args([])
    stages = {stage.name: stage for stage in gpu.stages(real, tmp_path)}
    profiles = {
        f"profile-{model}-{batch}"
        for model in ("resnet50", "mobilenet_v2", "inception_v3")
        for batch in (1, 256)
    }
    assert profiles == {name for name in stages if name.startswith("profile")}
    tune = stages["tune-resnet50"].arguments
    assert tune[tune.index("--to") + 1] == str(ROOT / "kernels" / "records")
    assert real.budget < 600 and real.problems * real.per_problem >= 100
    for kind, dtype, precision in (("float32", "float32", "ieee"), ("tf32", "float32", "tf32")):
        bench = stages[f"bench-resnet50-{kind}"].arguments
        for option, value in (("--dtype", dtype), ("--precision", precision)):
            assert bench[bench.index(option) + 1] == value
        assert bench[bench.index("--output") + 1] == str(tmp_path / kind)


def test_only_some_stages_are_run(tmp_path: Path) -> None:
    seen: list[str] = []

    def watched(stage: Stage, *rest: Any) -> Entry:
        seen.append(stage.name)
        return Entry(gpu_state.DONE, stage.key)

    assert gpu.run_all(options(only=["tests", "saved"]), tmp_path, watched) == gpu.EXIT_DONE
    assert seen == ["tests", "saved", "tests-networks"]


def test_records_are_kept_beside_the_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A repository that is laid anew between two calls has them again."""
    records, output = tmp_path / "records", tmp_path / "output"
    monkeypatch.setattr(gpu, "RECORDS", records)
    records.mkdir()

    def tunes(stage: Stage, *rest: Any) -> Entry:
        (records / "H200.json").write_text("{}")
        return Entry(gpu_state.DONE, stage.key)

    asked = options(dry_run=False, output=output, only=["tune-lenet5"])
    gpu.run_all(asked, output, tunes)
    (records / "H200.json").unlink()
    gpu.run_all(options(dry_run=False, output=output, only=["none"]), output, tunes)
    assert (records / "H200.json").read_text() == "{}"


def test_findings_become_a_page(tmp_path: Path) -> None:
    gpu_findings.write(tmp_path)
    assert not (tmp_path / "correctness.md").exists()
    told = {"test_op[a]": "passed", "test_op[b]": "failed: got | 1", "test_x": "skipped: no tool"}
    (tmp_path / "tests.json").write_text(json.dumps(told))
    (tmp_path / "tests-networks.json").write_text(json.dumps({"test_model[m]": "passed"}))
    row = {"model": "m", "precision": "tf32", "batch": 8, "compiled": 0.0012, "eager": 0.002,
           "kernels": 7, "problem": None}  # fmt: skip
    warps = {"layer": "conv2d", "dtype": "float16", "configuration": "warps=8", "right": False,
             "said": "element (0,)"}  # fmt: skip
    findings = {
        "test_model[m]": [["model", [row]]], "test_rule[r]": [["rule that did not fire", "r"]],
        "test_eight_warps_over_taps[0]": [["eight warps over taps", [warps]]],
    }  # fmt: skip
    (tmp_path / "findings.json").write_text(json.dumps(findings))
    gpu_findings.write(tmp_path)
    page = (tmp_path / "correctness.md").read_text()
    for line in ("| test_op | 1 | 1 | 0 |", "| test_op[b] | failed: got / 1 |", "- r",
                 "| m | tf32 | 8 | 7 | 0.0012 | 0.002 | right |",
                 "| conv2d | float16 | warps=8 | element (0,) |"):  # fmt: skip
        assert line in page.splitlines()


def test_profiles_become_a_page(tmp_path: Path) -> None:
    kernels = [
        {"name": name, "op": "conv2d", "config": "warps=4", "time_us": us, "share": us / 30,
         "gbps": 1234.5, "tflops": 6.78, "of_bound": bound}
        for name, us, bound in (("fast", 10.0, 0.5), ("slow", 20.0, None))
    ]  # fmt: skip
    found = {"model": "m", "batch": 8, "timed_on": "GPU", "total_us": 30.0, "kernels": kernels}
    stage = replace(python(f"print({json.dumps(json.dumps(found))})"), answer="profile-m-8.json")
    assert gpu.run_stage(stage, 60.0, tmp_path, None).status == gpu_state.DONE
    (tmp_path / "profile-broken-1.json").write_text("{")
    gpu_findings.write(tmp_path)
    page = (tmp_path / "profiles.md").read_text().splitlines()
    assert "## m, batch 8: 30.0 us in 2 steps (GPU)" in page
    slow = "| slow | conv2d | warps=4 | 20.0 | 66.7% | 1,234 | 6.8 | - |"
    assert page.index(slow) < page.index(
        "| fast | conv2d | warps=4 | 10.0 | 33.3% | 1,234 | 6.8 | 50% |"
    )


def test_a_file_is_built_apart_loaded_and_compared(tmp_path: Path) -> None:
    rows = saved.measure_all(
        ["lenet5", "no_such_model"], "interpreter", "float16", (1, 2), devices.Cpu(), calls=1
    )
    assert rows[0]["equal"] == {"1": True, "2": True} and rows[0]["load_s"] > 0
    assert rows[0]["host_us"]["loaded"].keys() == rows[0]["host_us"]["compiled"].keys()
    assert "no_such_model" in rows[1]["failed"]


def test_a_file_is_not_built_where_there_is_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="sees a GPU"):
        saved.build("lenet5", "cuda:sm_90", "float16", (1, 2), tmp_path / "x.loom")


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
    _, first, *_ = gpu.stages(options(), tmp_path)
    entry = gpu.run_stage(first, 10.0, tmp_path, None)
    assert (entry.status, entry.reason) == (gpu_state.SKIPPED, "not installed: no_such_module")
    assert not gpu_state.is_open(first, entry) and gpu_state.is_open(replace(first, skip=""), entry)


def test_a_failing_stage_is_recorded_with_its_traceback(tmp_path: Path) -> None:
    stage = python("print('so far'); raise ValueError('broken here')")
    entry = gpu.run_stage(stage, 60.0, tmp_path, None)
    assert entry.status == gpu_state.FAILED and entry.attempts == 1
    assert "Traceback" in entry.reason and "ValueError: broken here" in entry.reason
    assert "so far" in entry.reason
    assert gpu_state.is_open(stage, entry)
    again = gpu.run_stage(stage, 60.0, tmp_path, entry)
    assert again.attempts == gpu_state.ATTEMPTS and not gpu_state.is_open(stage, again)
    assert gpu_state.is_open(replace(stage, key="other"), again)


def test_a_stage_that_hangs_is_ended_with_what_it_started(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    started = time.monotonic()
    entry = gpu.run_stage(python(code), 4.0, tmp_path, None)
    assert entry.status == gpu_state.UNFINISHED and time.monotonic() - started < 30
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
    assert (entry.status, entry.reason) == (gpu_state.UNFINISHED, "its budget is spent")
    assert '"--budget", "45s"' in (tmp_path / "logs" / "stage.out").read_text()
    finished = python("print('{\"out_of_time\": false}')", timed=True)
    done = gpu.run_stage(finished, 60.0, tmp_path, entry)
    assert done.status == gpu_state.DONE


# A call.


def statuses(given: dict[str, list[str]]) -> Any:
    """A runner that gives each stage its statuses, one per call."""

    def run(stage: Stage, left_s: float, output: Path, before: Entry | None) -> Entry:
        status = given.get(stage.name, [gpu_state.DONE])
        attempts = (before.attempts if before else 0) + 1
        return Entry(status.pop(0) if len(status) > 1 else status[0], stage.key, 1.0, attempts, "x")

    return run


def test_calls_go_on_where_the_last_one_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = statuses(
        {
            "constants": [gpu_state.FAILED],
            "tune-lenet5": [gpu_state.UNFINISHED, gpu_state.DONE],
        }
    )
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
    assert gpu_state.read_state(path) == {}
    gpu_state.write_state(path, {"tests": Entry(gpu_state.DONE, "key")})
    assert gpu_state.read_state(path) == {"tests": Entry(gpu_state.DONE, "key")}


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
    monkeypatch.setattr(gpu, "INSTALLED", False)
    for _ in range(2):
        found = gpu.environment()
    first = found["PYTHONPATH"].split(os.pathsep)[0]
    code = "import convloom; print(convloom.__file__)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=found, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == str(Path(first) / "convloom" / "__init__.py"), done.stderr


def test_the_program_runs_where_the_package_is_not_installed(tmp_path: Path) -> None:
    """As on a machine that is lent: the folder of the repository has another name, and nothing of
    it is installed."""
    program = (
        "import importlib.util as util, sys; real = util.find_spec; "
        "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]; "
        "assert real('convloom') is None; from benchmarks import gpu; "
        f"sys.exit(gpu.main(['--dry-run', '--only', 'constants', '--output', {str(tmp_path)!r}]))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "constants: done" in done.stderr and (tmp_path / "constants.json").exists()


@pytest.mark.slow
def test_a_dry_run_ends_in_every_file(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    wanted = {"constants.json", "correctness.md", "correlation.json", "profile-lenet5-1.json",
              "profiles.md", "records", "saved.json", "tests.json", "tests-networks.json", "tf32",
              "zoo.json", "zoo.md"}  # fmt: skip
    assert wanted <= names
    found = json.loads((tmp_path / "correlation.json").read_text())
    # The network is one kernel: two configurations of one problem.
    assert found["configurations"] == 2 and not found["wrong_or_failed"]
    stages = gpu_state.read_state(tmp_path / "state.json")
    assert {entry.status for entry in stages.values()} == {gpu_state.DONE}


# Tests in groups.


def test_what_passed_is_not_run_again_and_what_a_fault_failed_is_run_alone(tmp_path: Path) -> None:
    groups: list[list[str]] = []
    poisoned = {"test_b[1]"}

    def group(names: Any) -> gpu_tests.Answer:
        """After a fault of the device everything in its process fails."""
        groups.append(list(names))
        at = next((i for i, name in enumerate(names) if name in poisoned), len(names))
        fault = "failed: CUDA error: an illegal memory access"
        return gpu_tests.Answer(
            {n: "passed" if i < at else fault for i, n in enumerate(names)},
            {names[0]: [("model", {"error": 1.5})], names[-1]: []},
        )

    def told(text: str) -> None:
        assert text.endswith(("3 tests in all", "1 tests in all"))

    names = ["test_b[0]", "test_b[1]", "test_b[2]"]
    path = tmp_path / "tests.json"
    found = gpu_tests.run(path, names, told, group, workers=1)
    assert [outcome[:6] for outcome in found.values()] == ["passed", "failed", "passed"]
    assert groups == [names, ["test_b[1]"], ["test_b[2]"]]
    findings = json.loads((tmp_path / "findings.json").read_text())
    assert findings["test_b[0]"] == [["model", {"error": 1.5}]]
    groups.clear()
    poisoned.clear()
    assert set(gpu_tests.run(path, names, told, group).values()) == {"passed"}
    assert groups == [["test_b[1]"]]
    path.write_text("{")
    assert gpu_tests.read(path) == {}
    path.write_text("[]")
    assert gpu_tests.read(path) == {}


def test_a_wrong_result_is_not_computed_again(tmp_path: Path) -> None:
    groups: list[list[str]] = []

    def group(names: Any) -> gpu_tests.Answer:
        groups.append(list(names))
        return gpu_tests.Answer({name: "failed: element (0, 1): got 1" for name in names})

    gpu_tests.run(tmp_path / "tests.json", ["test_a[0]", "test_a[1]"], lambda text: None, group)
    assert groups == [["test_a[0]", "test_a[1]"]]


def test_groups_are_of_one_function_and_long_tests_stand_alone() -> None:
    names = [*(f"test_op[{at}]" for at in range(20)), "test_rule[0]", "test_model[a]",
             "test_model[b]", "test_x"]  # fmt: skip
    found = [[*group] for group in gpu_tests.groups_of(names)]
    assert [len(group) for group in found] == [16, 4, 1, 1, 1, 1]
    assert [name for group in found for name in group] == names


def test_a_group_is_run_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    names = gpu_tests.collected()
    assert names[0] == "test_a_kernel_runs" and {*gpu_tests.ALONE} <= {
        name.partition("[")[0] for name in names
    }
    found = gpu_tests.run_group(names[:1])
    if not torch.cuda.is_available():
        assert found.outcomes == {names[0]: "skipped: needs an NVIDIA GPU"}


TESTS = '''
import json, os, time
import pytest
pytestmark = pytest.mark.gpu
def test_right(record_property): record_property("model", json.dumps({"error": 0.5}))
@pytest.mark.parametrize("name", ["a b"])
def test_also_right(name): pass
def test_wrong(): assert 1 == 2, "other numbers"
def test_fatal(): END
def test_after(): pass
'''


@pytest.mark.parametrize(
    ("end", "told"), [("os._exit(7)", "exit status 7"), ("time.sleep(60)", "no end after")]
)
def test_what_passed_before_the_end_of_a_process_has_passed(
    end: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(TESTS.replace("END", end))
    monkeypatch.setattr(gpu_tests, "FILE", str(file))
    names = gpu_tests.collected()
    found = gpu_tests.run_group(names, 5.0)
    outcomes = [found.outcomes[name].partition(": the")[0] for name in names]
    assert outcomes[:2] == ["passed", "passed"] and told in found.outcomes["test_fatal"]
    assert all(found.outcomes[name].startswith("failed: ") for name in names[2:])
    answer = gpu_tests.run_group(names[:3])
    assert answer.findings["test_right"] == [("model", {"error": 0.5})]
    assert "other numbers" in answer.outcomes["test_wrong"]
    assert not gpu_tests.FAULT.search(answer.outcomes["test_wrong"])


# Constants.


def test_constants_of_a_cpu() -> None:
    found, missing = constants.measure(devices.Cpu())
    assert not missing and set(found) == {"memory_gbps", "tensor_tflops"}
    assert all(value > 0 for value in found.values())


def test_an_experiment_that_fails_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*rest: Any) -> float:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(constants, "product_tflops", broken)
    found, missing = constants.measure(devices.Cpu())
    assert "memory_gbps" in found and "too large" in missing["tensor_tflops"]


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


@pytest.mark.interpreter
@pytest.mark.parametrize("boxes", [False, True])
def test_the_reads_of_the_cache_read_every_byte(boxes: bool) -> None:
    """Three tiles read round and round by two programs: each adds up what it says it does."""
    x = torch.arange(192 * 64).reshape(192, 64).to(torch.float16).remainder(7)
    y = torch.zeros(2)
    source = TensorDescriptor(x, [192, 64], [64, 1], [64, 64]) if boxes else x
    sizes = {"ROUNDS": 4, "BOXES": boxes, "ROWS": 64, "COLUMNS": 64}
    with interpreter.interpreting():
        interpreter.run(
            constants._read_kernel, (2, 1, 1), {"x": source, "y": y, "rows": 192}, sizes
        )
    tiles = x.float().reshape(3, -1).sum(1)
    assert y.tolist() == [float(tiles.sum() + tiles[at]) for at in (0, 1)]


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
    changes = {"fill_cycles": 4_500.0, "store_bytes": 11.0, "launch_us": 3.0}
    truth = replace(cost_model.machine_for(target), **changes)
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
    assert found["proposed"]["fill_cycles"] == 4_500.0 and found["proposed"]["launch_us"] == 3.0
    assert [each["reason"] for each in found["wrong_or_failed"]] == ["wrong"]
    assert cost_model.machine_for(target).launch_us != 3.0
