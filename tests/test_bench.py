"""The benchmark, the profiler and the script for machines with a GPU, without one."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import convloom
import pytest
import torch
from convloom import zoo
from convloom.benchmarks import charts, devices, machine_info, measure, peers, profile, report
from convloom.benchmarks import zoo as benchmark
from convloom.benchmarks.devices import Sample
from convloom.benchmarks.measure import Choices, Result, Row
from convloom.benchmarks.peers import Absentee, Entrant, UnavailableError
from convloom.cli.main import main
from convloom.compiler.run import runtime
from convloom.errors import ArtifactError, ConvloomError, InvalidInputError, TargetUnavailableError
from convloom.kernels.contract import targets
from torch import nn

SVG = "{http://www.w3.org/2000/svg}"


class FakeDevice(devices.Cpu):
    """An H200 whose clock is a list: each call takes what the contender's name says."""

    kind = "fake"

    def __init__(self, times: dict[str, float] | None = None) -> None:
        super().__init__()
        self.name = "NVIDIA H200"
        self.times = times or {}
        self.freed = 0
        self.order: list[str] = []

    def sample(self, call: devices.Call) -> Sample:
        name = str(call())
        self.order.append(name)
        return Sample(self.times[name], self.times[name] / 2, 5.0)

    def peak_mb(self) -> float | None:
        return 12.0

    def free(self) -> None:
        self.freed += 1


def choices(**more: Any) -> Choices:
    common = {"batches": (2,), "dtype": torch.float32, "target": "reference", "against": ("eager",)}
    return Choices(**{**common, "seconds": 0.0, **more})


# Whole runs on the CPU.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of LeNet-5 on the CPU, made once."""
    made: Path = tmp_path_factory.mktemp("bench")
    command = ["bench", "lenet5", "--batch", "1", "2", "--dtype", "float32"]
    command += ["--target", "reference"]
    command += ["--against", "eager,eager-nhwc-graph", "--seconds", "0", "--output", str(made)]
    assert main(command) == 0
    return made


def test_a_run_on_the_cpu_ends_in_every_file(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(report.FILES[:-1])
    stored = json.loads((folder / "zoo.json").read_text())
    assert stored["timed_on"] == "the CPU"
    for known in ("torch", "triton", "git", "gpu", "state"):
        assert known in stored["machine"]
    for row in report.read_rows(folder / "zoo.json"):
        mine, eager, graph = row.results
        assert mine.status == "ok" and mine.name == peers.OURS
        assert mine.p10_us <= mine.median_us <= mine.p90_us
        assert mine.images_per_s == pytest.approx(row.batch / mine.median_us * 1e6)
        assert mine.error < 1e-5 and eager.error < 1e-5 and eager.ratio is None
        assert eager.median_us > 0
        assert mine.rounds == measure.LEAST_ROUNDS and mine.compile_s > 0
        assert (graph.status, graph.median_us) == ("not available", None)
        assert row.bound_us is None and row.flops > 0
    text = (folder / "zoo.md").read_text()
    assert "Times of this CPU, which say nothing about a GPU; so no speed-ups" in text
    assert "CUDA graphs need a GPU (lenet5 1, lenet5 2)" in text
    assert "| eager us |" in text and not re.search(r"\d+x\b|Where we lose|[Rr]atio", text)
    lines = list(csv.DictReader(io.StringIO((folder / "zoo.csv").read_text())))
    assert len(lines) == 6 and {line["name"] for line in lines} == {
        "convloom", "eager", "eager-nhwc-graph",
    }  # fmt: skip
    assert ElementTree.parse(folder / "roofline.svg").getroot().tag == f"{SVG}svg"


def test_a_run_goes_on_where_it_stopped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []

    def count(name: str, batch: int, *rest: Any) -> Row:
        measured.append(batch)
        return replace(report.read_rows(folder / "zoo.json")[0], batch=batch)

    monkeypatch.setattr(measure, "measured", count)
    asked = choices(batches=(1, 2, 3), against=("eager", "eager-nhwc-graph"))
    rows = benchmark.bench(["lenet5"], asked, folder, resume=True)
    assert measured == [3] and [row.batch for row in rows] == [1, 2, 3]
    benchmark.bench(["lenet5"], replace(asked, batches=(1,)), None)
    assert measured == [3, 1]


@pytest.mark.parametrize(
    "other", [{"dtype": torch.float16}, {"against": ()}, {"tuning": "heuristic"}, {"git": "older"}]
)
def test_rows_of_another_setup_are_measured_again(
    other: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if git := other.pop("git", None):
        monkeypatch.setattr(benchmark, "git_hash", lambda: git)
    asked = choices(**{"against": ("eager", "eager-nhwc-graph"), **other})
    rows = report.read_rows(folder / "zoo.json")
    assert not any(benchmark._fits(row, asked, row.device) for row in rows)


def test_the_interpreter_is_timed_and_labelled(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "mlp", "--batch", "1", "--dtype", "float32", "--target", "interpreter"]
    assert main([*command, "--against", "none", "--seconds", "0", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["target"] == "interpreter" and row["results"][0]["kernels"] >= 1
    assert row["results"][0]["status"] == "ok" and row["device"].startswith("CPU")


def test_the_table_leaves_out_what_is_unknown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "lenet5", "--batch", "1", "2", "--dtype", "float32"]
    command += ["--target", "reference"]
    command += ["--against", "eager,eager-nhwc-graph", "--output", str(folder), "--resume"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "eager us" in printed and "warm L2" not in printed and "of bound T" not in printed
    assert "not measured: eager-nhwc-graph" in printed
    assert not re.search(r"\d+x\b|Where we lose|vs eager", printed)


# Turns, ratios, failures.


def entrant(name: str, call: Callable[[], Any] | None = None) -> Entrant:
    return Entrant(name, call or (lambda: name), 1.0)


def test_contenders_take_turns() -> None:
    device = FakeDevice({"convloom": 10.0, "eager": 20.0, "inductor": 5.0})
    rounds = measure.in_turns([entrant(name) for name in device.times], device, 0.0)
    assert device.order == [
        "convloom", "eager", "inductor", "eager", "inductor", "convloom",
        "inductor", "convloom", "eager",
    ]  # fmt: skip
    found = {name: measure._result(entrant(name), 1e-3, None, rounds, 8) for name in device.times}
    assert found["convloom"].ratio is None and found["eager"].ratio == 2.0
    assert found["inductor"].ratio == 0.5 and found["inductor"].warm_us == 2.5
    assert found["convloom"].images_per_s == pytest.approx(8e5)


def test_a_contender_without_memory_is_dropped_and_freed() -> None:
    """The next one runs, and the others go on."""
    device = FakeDevice({"convloom": 10.0, "eager": 20.0})
    calls = iter([None])

    def greedy() -> str:
        if next(calls, "full") == "full":
            raise torch.OutOfMemoryError("tried to allocate 2 TiB")
        return "eager"

    rounds = measure.in_turns([entrant("convloom"), entrant("eager", greedy)], device, 0.0)
    assert rounds.failed["eager"].status == "out of memory" and device.freed == 1
    assert len(rounds.samples["convloom"]) == measure.LEAST_ROUNDS
    result = measure._result(entrant("eager"), None, None, rounds, 1)
    assert (result.status, result.median_us) == ("out of memory", None)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("tried to allocate 2 TiB"), "out of memory"),
        (UnavailableError("not installed: no module"), "not available"),
        (RuntimeError("a compiler's\n\n trouble" + " x" * 400), "failed"),
    ],
)
def test_a_contender_that_cannot_start_says_why(error: Exception, status: str) -> None:
    device = FakeDevice()

    def prepare() -> Entrant:
        raise error

    found = peers.enter("inductor", prepare, device)
    assert isinstance(found, Absentee) and found.status == status and device.freed == 2
    assert len(found.reason) <= peers.REASON_LIMIT and "\n" not in found.reason
    assert peers.enter("eager", lambda: entrant("eager"), device).name == "eager"


def test_a_peer_that_fails_is_a_column_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(model: nn.Module, xs: Any, device: devices.Device) -> devices.Call:
        raise UnavailableError("not installed: No module named 'torch._inductor'")

    monkeypatch.setitem(peers.PEERS, "inductor", missing)
    row = measure.measured("lenet5", 1, choices(against=("inductor",)), devices.Cpu())
    assert row.ours.status == "ok"
    assert report.cells(row)[6] == "not available"
    assert report.absences([row]) == [
        "inductor: not available: not installed: No module named 'torch._inductor' (lenet5 1)"
    ]


def test_an_uninstalled_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._inductor", None)
    found = peers.enter(
        "inductor",
        lambda: peers.peer("inductor", nn.Identity(), [torch.zeros(1, 1, 2, 2)], devices.Cpu()),
        devices.Cpu(),
    )
    assert isinstance(found, Absentee) and found.reason.startswith("not installed")


def test_a_failure_of_ours_is_a_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*rest: Any) -> Entrant:
        raise torch.OutOfMemoryError("tried to allocate 2 TiB")

    monkeypatch.setattr(measure, "ours", broken)
    row = measure.measured("lenet5", 1, choices(), devices.Cpu())
    assert row.result("eager").status == "ok" and row.result("eager").ratio is None
    assert report.losses([row])[0].startswith("lenet5, batch 1: convloom: out of memory")
    assert "out of memory" in report.as_markdown([row])


def test_wrong_results_are_told() -> None:
    model, (x,) = measure.subject("lenet5", 2, torch.float32, torch.device("cpu"))
    errors = measure.Errors(model, (x,))
    with torch.no_grad():
        right = model(x)
    assert errors.of(entrant("a", lambda: right)) == (pytest.approx(0, abs=1e-5), None)
    error, reason = errors.of(entrant("b", lambda: right + 1))
    assert error > 0.1 and "elements off" in str(reason)
    assert errors.of(entrant("c", lambda: torch.zeros(())))[1] == "shape (), expected (2, 10)"
    assert errors.of(entrant("c", lambda: [right, right]))[1] == "2 results, expected 1"

    def failing() -> torch.Tensor:
        raise RuntimeError("an illegal memory access")

    assert errors.of(entrant("d", failing)) == (None, "RuntimeError: an illegal memory access")


# A GPU, as far as it goes without one.


class FakeEvent:
    """Its time is how many things had happened when it was recorded."""

    def __init__(self, log: list[str]) -> None:
        self._log, self.at = log, 0

    def record(self) -> None:
        self.at = len(self._log)
        self._log.append("event")

    def elapsed_time(self, other: FakeEvent) -> float:
        return float(other.at - self.at)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a fake GPU was told, in order."""
    told: list[str] = []
    properties = SimpleNamespace(name="NVIDIA Fake", L2_cache_size=256)
    real = torch.empty
    fakes: dict[str, Any] = {
        "current_device": lambda: 0,
        "get_device_properties": lambda place: properties,
        "Event": lambda enable_timing: FakeEvent(told),
        "synchronize": lambda: told.append("synchronize"),
        "_sleep": lambda cycles: told.append("sleep"),
        "memory_allocated": lambda: 1_000_000,
        "max_memory_allocated": lambda: 3_000_000,
        "reset_peak_memory_stats": lambda: None,
        "empty_cache": lambda: told.append("emptied"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, device: real(*size, dtype=dtype))
    return told


def test_samples_of_a_gpu(log: list[str]) -> None:
    """Cold after the cache was overwritten, warm after the same call; never while the host is
    still enqueueing."""
    device = devices.Cuda()
    assert device._flush.numel() == devices.FLUSH_FACTOR * 256
    sample = device.sample(lambda: log.append("call"))
    one = ["sleep", "event", "call", "event", "synchronize"]
    assert log == [*one, "call", *one, "call", "synchronize"]
    assert sample.cold_us == sample.warm_us == 2_000.0 and sample.host_us is not None
    device.reset_peak()
    assert device.peak_mb() == 2.0
    device.free()
    assert log[-1] == "emptied"


def test_the_state_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.gpu_state() == {} or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.shutil, "which", lambda name: name)
    answer = SimpleNamespace(stdout="1980 MHz, 3201 MHz, 1980 MHz, 3201 MHz, 700.00 W, 35\n")
    monkeypatch.setattr(devices.subprocess, "run", lambda *rest, **more: answer)
    monkeypatch.setattr(devices, "driver_version", lambda: "570.1")
    found = devices.gpu_state()
    assert found["driver"] == "570.1" and found["clocks.sm"] == "1980 MHz"
    assert found["temperature.gpu"] == "35"


# Bad input.


def no_gpu(monkeypatch: pytest.MonkeyPatch, capability: int | None = None) -> None:
    monkeypatch.setattr(targets, "local_capability", lambda: capability)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5O", "--target", "reference"], "unknown zoo model 'resnet5O'.*resnet50"),
        (["lenet5", "--target", "reference", "--batch", "0"], "batch: expected at least 1, got 0"),
        (["lenet5", "--target", "reference", "--against", "induktor"], "unknown peer.*inductor"),
        (["lenet5", "--target", "reference", "--against", "eager,eager"], "named 2 times"),
        (["lenet5"], "target cuda: this machine has no such GPU.*--target interpreter"),
        (["lenet5", "--target", "cuda:sm_90"], "no such GPU to measure on"),
        (["lenet5", "--target", "cuda:sm_70"], "unknown target"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    no_gpu(monkeypatch)
    assert main(["bench", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and re.search(message, " ".join(printed.err.split())), printed.err


def test_a_gpu_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    no_gpu(monkeypatch, 70)
    with pytest.raises(TargetUnavailableError, match=r"this GPU is sm_70; supported are sm_80"):
        measure.device_for("cuda")
    with pytest.raises(InvalidInputError, match="batch"):
        measure.check(["lenet5"], choices(batches=(-1,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"format": 99, "rows": []}', "a report from the future: format 99, expected 1"),
        ('{"rows": []}', "no report of benchmarks"),
        ("[1]", "no report of benchmarks"),
        ("{", "expected a report"),
        ('{"format": 1, "rows": [{"model": "x"}]}', "damaged report"),
    ],
)
def test_other_reports_are_refused_and_kept(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "zoo.json"
    path.write_text(text)
    with pytest.raises(ArtifactError, match=message):
        benchmark.bench(["lenet5"], choices(), tmp_path, resume=True)
    assert path.read_text() == text


def test_a_report_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write"):
        report.write_text(tmp_path / "file" / "zoo.md", "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet5O", "--target", "interpreter"], "unknown zoo model 'resnet5O'"),
        (["mlp", "--target", "cuda"], "no usable NVIDIA GPU.*interpreter"),
        (["mlp", "--target", "cuda:sm_70"], "unknown target"),
    ],
)
def test_profiling_what_is_not_there(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    no_gpu(monkeypatch)
    assert main(["profile", *arguments]) == 2
    assert re.search(message, " ".join(capsys.readouterr().err.split()))


def test_an_executable_survives_running_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call fails with a clear error and keeps nothing; the next one works."""
    model, (x,) = measure.subject("mlp", 2, torch.float32, torch.device("cpu"))
    exe = convloom.compile(model, (x,), target="interpreter")
    real = torch.empty

    def full(*size: Any, **more: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 2 TiB")

    monkeypatch.setattr(runtime.torch, "empty", full)
    with pytest.raises((ConvloomError, torch.OutOfMemoryError), match="2 TiB"):
        exe(x)
    monkeypatch.setattr(runtime.torch, "empty", real)
    with torch.no_grad():
        torch.testing.assert_close(exe(x), model(x))


# Reports.


def gpu_row(model: str = "resnet50", ratio: float = 1.5) -> Row:
    ours = Result("convloom", "ok", "", 4_000.0, 3_990.0, 4_010.0, 3_900.0, 30.0, 64_000.0, None,
                  1e-3, 12.0, 60.0, 40, 900.0, 20)  # fmt: skip
    other = replace(ours, name="inductor-max", median_us=4_000.0 * ratio, ratio=ratio)
    return Row(
        model, 256, "float16", "cuda", "NVIDIA H200", (ours, other), flops=2_000_000_000_000,
        size_bytes=8_600_000_000, bound_us=3_000.0, plan_bound_us=3_520.0, steps=40, tuned=38,
    )  # fmt: skip


def test_losses_come_worst_first() -> None:
    rows = [gpu_row(), gpu_row("vgg_d", 0.9), gpu_row("alexnet", 0.5), gpu_row("zfnet", 0.999)]
    first, second = report.losses(rows)
    assert first.startswith("alexnet, batch 256: 0.50x against inductor-max")
    assert second.startswith("vgg_d")
    text = report.as_markdown(rows)
    assert "75%" in text and "88%" in text and "12.0 + 60.0" in text and "1.50x" in text
    assert "Cold L2" in text and "Times of this CPU" not in text
    assert "Nowhere that was measured." in report.as_markdown([gpu_row()])


def test_nan_is_not_written() -> None:
    row = gpu_row()
    row = replace(row, results=(replace(row.ours, error=math.nan), row.results[1]))
    assert json.loads(json.dumps(report.as_json([row], None), allow_nan=False))["rows"]


def test_bars_say_what_they_show() -> None:
    text = charts.speed_ups("A & B", {"resnet50 1": {"eager": 2.0, "inductor": None}})
    root = ElementTree.fromstring(text)
    shown = [each.text for each in root.iter(f"{SVG}text")]
    assert {"A & B", "resnet50 1", "2.00x", "no figure", "eager", "inductor"} <= set(shown)
    bars = [r for r in root.iter(f"{SVG}rect") if r.find(f"{SVG}title") is not None]
    assert len(bars) == 1 and float(bars[0].attrib["width"]) > 100
    assert ElementTree.fromstring(charts.speed_ups("none", {})) is not None


def test_the_roof_is_above_the_points() -> None:
    text = charts.roofline("roof", [("resnet50", 230.0, 500.0)], 790.0, 4_300.0)
    root = ElementTree.fromstring(text)
    (line,) = root.iter(f"{SVG}polyline")
    top = min(float(pair.split(",")[1]) for pair in line.attrib["points"].split())
    (point,) = root.iter(f"{SVG}circle")
    assert float(point.attrib["cy"]) > top
    assert not list(ElementTree.fromstring(charts.roofline("none", [])).iter(f"{SVG}polyline"))


def test_bounds_hold_for_their_device_and_type_only() -> None:
    plan = zoo_plan()
    row = Row("lenet5", 2, "float32", "cuda", "NVIDIA H200", gpu_row().results)
    assert measure._with_plan(row, plan, torch.float16).bound_us == pytest.approx(0.0045)
    assert measure._with_plan(row, plan, torch.float32).bound_us is None
    elsewhere = replace(row, device="NVIDIA A100")
    found = measure._with_plan(elsewhere, plan, torch.float16)
    assert found.bound_us is None and found.plan_bound_us is None and found.flops > 0


def zoo_plan() -> Any:
    from convloom.compiler.api import lowered

    x = torch.zeros(2, *zoo.entry("lenet5").input_shape)
    return lowered(zoo.build("lenet5").eval(), (x,), target="cuda:sm_90", dtype=torch.float16)[1]


# The profiler.

COMPLETE = {"name": str, "cat": str, "ts": float, "dur": float, "pid": int, "tid": int}
METADATA = {"name": str, "pid": int, "tid": int}


def events_of(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The complete events of a trace; asserts that it is one of Chrome's trace event format, as
    ui.perfetto.dev imports it: an object of these fields, events with those of their phase."""
    assert set(trace) <= {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    assert all(isinstance(value, str | int) for value in trace["otherData"].values())
    found = []
    for event in trace["traceEvents"]:
        fields = {"X": COMPLETE, "M": METADATA}[event["ph"]]
        assert set(event) == {*fields, "ph", "args"} and isinstance(event["args"], dict)
        assert all(isinstance(event[name], kind) for name, kind in fields.items())
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            found.append(event)
        else:
            assert event["name"] in ("process_name", "thread_name")
            assert isinstance(event["args"]["name"], str)
    return found


def test_profiles_of_the_interpreter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.json"
    command = ["profile", "mlp", "--target", "interpreter", "--repeats", "1", "--trace", str(trace)]
    assert main([*command, "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["timed_on"] == "the interpreter, not a GPU" and answer["total_us"] > 0
    assert sum(each["share"] for each in answer["kernels"]) == pytest.approx(1)
    assert all(each["of_bound"] is None for each in answer["kernels"])
    events = events_of(json.loads(trace.read_text()))
    assert [each["name"] for each in events] == [each["name"] for each in answer["kernels"]]
    for before, after in itertools.pairwise(events):
        assert after["ts"] == pytest.approx(before["ts"] + before["dur"])


def test_profiles_of_a_gpu_that_is_not_here_are_modelled(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["profile", "lenet5", "--target", "cuda:sm_90", "--dtype", "float16"]
    assert main(command) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "modelled, not measured, for cuda:sm_90" in printed and "%" in printed
    found = profile.modelled("lenet5", 2, zoo_plan())
    times = [line.time_us for line in found.by_time()]
    assert times == sorted(times, reverse=True)
    assert all(0 < line.of_bound <= 1 for line in found.lines)
    line = found.lines[0]
    assert line.gbps == pytest.approx(line.size_bytes / line.time_us / 1e3)


def test_the_reference_has_no_profile(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "mlp", "--target", "reference"]) == 2
    assert "no steps that could be timed" in capsys.readouterr().err


def test_the_commit_is_marked_where_more_than_results_differ(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        name = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *name, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert machine_info.git_hash(tmp_path) == "unknown"
    results, code = tmp_path / "benchmarks/results/ops.md", tmp_path / "code.py"
    results.parent.mkdir(parents=True)
    for file in (results, code):
        file.write_text("before\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "all")
    results.write_text("after\n")
    assert machine_info.git_hash(tmp_path) == git("rev-parse", "--short=12", "HEAD")
    code.write_text("after\n")
    assert machine_info.git_hash(tmp_path) == git("rev-parse", "--short=12", "HEAD") + "-dirty"
