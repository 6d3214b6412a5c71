"""`compile(tuning=...)` and `convloom tune`, on a made-up device and in the interpreter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.cli.interruption import EXIT_STATUS
from convloom.cli.main import EXIT_ERROR, main
from convloom.compiler import api
from convloom.compiler.records import choose, records
from convloom.compiler.records.store import Store
from convloom.compiler.run.workers import PoisonedError
from convloom.compiler.tuning import cuda, search, timers
from convloom.compiler.tuning.bench import Bench
from convloom.compiler.tuning.cuda import CudaBackend
from convloom.compiler.tuning.search import Options, Tuner, Work
from convloom.errors import InvalidInputError, KernelError, TargetUnavailableError
from convloom.kernels.contract import targets
from convloom.kernels.contract.op import config
from convloom.kernels.contract.targets import GPU_TARGETS, INTERPRETER, Target
from torch import nn

from .nets import make
from .test_records import SM_90, conv, record_of, relu
from .test_tune import Device, X, faster_in_turn, interrupted_after, work_of

# compile(tuning=...)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def small_net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return make(lambda m, x: torch.tanh(m.conv(x)), X, conv=nn.Conv2d(3, 4, 3))


def sources(executable: Any) -> list[str]:
    return [step.chosen_by for step in executable.plan.steps]


@pytest.mark.interpreter
def test_search_records_and_heuristic(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Searching measures in the interpreter, in a process of its own; the records serve the next
    compilation; the heuristic ignores them."""
    monkeypatch.setattr(search, "Options", partial(Options, candidates=2))
    module, inputs = small_net()
    compiled = partial(convloom.compile, module, inputs, target="interpreter")
    searched = compiled(tuning="search")
    assert all(s.startswith("record: measured ") for s in sources(searched)), sources(searched)
    assert len(list((cache / "records").rglob("*.json"))) == len(searched.plan.steps)
    torch.testing.assert_close(searched(*inputs), module(*inputs))
    recorded = compiled(tuning="records")
    assert sources(recorded) == sources(searched)
    assert [s.config for s in recorded.plan.steps] == [s.config for s in searched.plan.steps]
    assert f"({sources(recorded)[0]})" in recorded.plan.to_text()
    shown = recorded.plan.to_json()["steps"][0]
    assert shown["chosen_by"] == sources(recorded)[0]
    heuristic = compiled(tuning="heuristic")
    assert set(sources(heuristic)) == {"heuristic"}
    assert torch.equal(compiled(tuning="heuristic")(*inputs), heuristic(*inputs))
    assert "(heuristic)" in heuristic.plan.to_text()


def test_searching_for_the_reference_is_refused() -> None:
    module, inputs = small_net()
    with pytest.raises(InvalidInputError, match="'reference' runs no kernels to tune"):
        convloom.compile(module, inputs, target="reference", tuning="search")
    exe = convloom.compile(module, inputs, target="reference", tuning="records")
    assert set(sources(exe)) == {"heuristic"}


class Pooled(nn.Module):
    """A convolution that can take the pooling behind it in."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.max_pool2d(torch.relu(self.conv(x)), 2)
        return result


@pytest.mark.parametrize(
    ("times_us", "expected"),
    [
        ({"conv_pool": 50.0, "conv2d": 20.0, "max_pool2d": 20.0}, ["conv2d", "max_pool2d"]),
        ({"conv_pool": 30.0, "conv2d": 20.0, "max_pool2d": 20.0}, ["conv_pool"]),
        ({"conv_pool": 500.0, "conv2d": 20.0}, ["conv_pool"]),
    ],
    ids=("apart is faster", "together is faster", "one is unknown"),
)
def test_measured_alternatives_decide_what_is_fused(
    times_us: dict[str, float], expected: list[str], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`search` times both sides of the choice; the times win over the model, which would fuse, if
    all of them are known."""
    searched: list[list[str]] = []

    def search(known: choose.Records, target: Target, works: list[Work]) -> None:
        searched.append([work.op.name for work in works])
        for work in works:
            if (time_us := times_us.get(work.op.name)) is not None:
                tile = work.op.default(work.problem, target)
                known.found[work.key] = record_of(work.problem, tile, time_us)

    monkeypatch.setattr(api, "search", search)
    inputs = (torch.zeros(8, 16, 32, 32),)
    compiled = partial(
        api.lowered, Pooled().eval(), inputs, target="cuda:sm_90", dtype=torch.float16
    )
    _, plan, ledger = compiled(tuning="search")
    fused = [step.op for step in plan.steps if step.op in times_us or step.op == "max_pool2d"]
    assert fused == expected
    assert {"conv_pool", "conv2d", "max_pool2d"} <= set(searched[0])
    told = [event.reason for event in ledger.events if not event.accepted]
    together = "measured 50.0 us together, 40.0 us apart on cuda:sm_90"
    assert (together in told) == (len(expected) == 2)
    assert "conv_pool" in [step.op for step in compiled(tuning="heuristic")[1].steps]


def test_who_can_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timers.can_measure(INTERPRETER)
    monkeypatch.setattr(targets, "local_capability", lambda: None)
    assert not timers.can_measure(SM_90) and choose.local_device(SM_90) is None
    with pytest.raises(TargetUnavailableError, match=r"no such GPU to measure on\. Pass --offline"):
        timers.measuring(SM_90)
    monkeypatch.setattr(targets, "local_capability", lambda: 75)
    assert not timers.can_measure(SM_90)
    monkeypatch.setattr(targets, "local_capability", lambda: 90)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    assert choose.local_device(SM_90) == "NVIDIA H200"
    assert choose.local_device(GPU_TARGETS[0]) is None


# The backend for GPUs.


def cuda_backend(monkeypatch: pytest.MonkeyPatch, happens: Exception, healthy: bool) -> CudaBackend:
    """A backend in whose trials something happens, on a context that is or is not usable after."""

    def fail(*_: object) -> None:
        raise happens

    def synchronize() -> None:
        if not healthy:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    backend = object.__new__(CudaBackend)
    backend._bench, backend._copies = None, []
    monkeypatch.setattr(backend, "_trial", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    return backend


@pytest.mark.parametrize(
    ("happens", "healthy", "expected", "message"),
    [
        (torch.OutOfMemoryError("tried to allocate 2 TiB"), True, KernelError, "out of GPU memory"),
        (RuntimeError("out of resource: shared memory"), True, KernelError, "cannot be launched"),
        (RuntimeError("unspecified launch failure"), False, PoisonedError, "the device faulted"),
        (KernelError("does not compile"), False, KernelError, "does not compile"),
    ],
)
def test_only_a_fault_ends_the_process(
    happens: Exception,
    healthy: bool,
    expected: type[Exception],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backend = cuda_backend(monkeypatch, happens, healthy)
    with pytest.raises(expected, match=message):
        backend.trial(relu(), config())


def test_tensors_take_turns_until_the_cache_has_forgotten_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (1 << 30, 1 << 31))
    backend = object.__new__(CudaBackend)
    backend._place, backend._cache_bytes = torch.device("cpu"), 100_000
    made = Bench(relu(64, 64), torch.device("cpu"))
    copies = backend._copied(made)
    sizes = [sum(t.numel() * t.element_size() for t in each.values()) for each in copies]
    assert sum(sizes) > cuda.CACHE_FACTOR * 100_000 and len(set(sizes)) == 1
    addresses = {tensor.data_ptr() for each in copies for tensor in each.values()}
    assert len(addresses) == 2 * len(copies), "no two copies share memory"
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (sizes[0], 1 << 31))
    assert len(backend._copied(made)) == 1


def test_short_kernels_are_launched_often_enough_to_be_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    captured: list[int] = []

    class Graph:
        def __init__(self, count: int) -> None:
            self.count = count

        def replay(self) -> None:
            pass

    def capture(turns: list[Any], count: int) -> tuple[Graph, int]:
        captured.append(count)
        return Graph(count), count

    monkeypatch.setattr(cuda, "_captured", capture)
    monkeypatch.setattr(cuda, "_replayed_us", lambda graph: 5.0 * graph.count)
    assert cuda._timed([[], []]) == [5.0] * cuda.REPLAYS
    assert captured[0] == 2 and captured[1] * 5.0 >= cuda.GRAPH_US and captured[1] % 2 == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_configurations_are_verified_and_timed_on_the_device(tmp_path: Path) -> None:
    target = targets.parse("cuda")
    known = choose.Records(Store(tmp_path / "shipped"), Store(tmp_path / "own"))
    works = [work_of(problem, target) for problem in (conv(n=32), conv(n=1), relu(4096, 256))]
    outcomes = Tuner(known, timers.measuring(target), Options(candidates=4)).run(works)
    for outcome in outcomes:
        record = outcome.record
        assert outcome.status == "tuned" and record is not None and outcome.default_us
        assert record.device == torch.cuda.get_device_name()
        assert record.time_us <= outcome.default_us
        assert record.warm_us is not None and record.warm_us < 1.2 * record.time_us
        stages = {each.stage for each in record.rejected}
        assert stages <= {"slower", "spills", "waste"}, record.rejected


# The command.


def lenet(*arguments: str) -> list[str]:
    """Unfused, so that there are several kernels."""
    passes = ("--passes", "none")
    return ["tune", "lenet5", "--target", "interpreter", "--candidates", "2", *passes, *arguments]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """Whatever is measured is measured on a made-up device."""
    made = Device(faster_in_turn())
    monkeypatch.setattr(timers, "WorkerProcess", lambda handler: made)
    return made


def test_the_command_tunes_a_model(
    cache: Path, device: Device, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(lenet("--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["records"] == str(cache / "records") and answer["unsaved"] is None
    statuses = {each["status"] for each in answer["outcomes"]}
    assert statuses == {"tuned"} and len(device.asked) == 2 * len(answer["outcomes"])
    for each in answer["outcomes"]:
        assert records.from_json(each["record"]).complete
    assert main(lenet()) == 0
    text = capsys.readouterr().out
    assert "kept" in text and str(cache / "records") in text
    assert len(device.asked) == 2 * len(answer["outcomes"]), "nothing was tried again"
    op = records.from_json(answer["outcomes"][0]["record"]).key.op
    assert main(["tune", "--show", op]) == 0
    assert "Made-up GPU" in capsys.readouterr().out
    assert main(["tune", "--show", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(answer["outcomes"])
    assert main(["tune", "--prune", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []


def test_an_interrupted_command_says_what_it_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = interrupted_after(3)
    monkeypatch.setattr(timers, "WorkerProcess", lambda handler: made)
    assert main(lenet()) == EXIT_STATUS
    shown = capsys.readouterr()
    assert "started" in shown.err and "interrupted" in shown.err and not shown.out
    assert len(list((cache / "records").rglob("*.json"))) == 2


def test_records_of_the_command_go_where_it_is_told(
    cache: Path, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    assert main(lenet("--to", str(there), "--batch", "1", "2")) == 0
    files = list(there.rglob("*.json"))
    assert files and not (cache / "records").exists()
    assert {"1", "2"} <= {Store(there).all()[at].key.inputs[0].split()[1][0] for at in range(4)}
    capsys.readouterr()
    (there / "bad.json").write_text("{}")
    assert main(["tune", "--merge", str(there), "--json"]) == EXIT_ERROR
    shown = capsys.readouterr()
    assert f"1 of {len(files) + 1} files were not taken over" in shown.err
    found = [each["outcome"] for each in json.loads(shown.out)]
    assert sorted(found) == ["added"] * len(files) + ["refused"]
    (there / "bad.json").unlink()
    assert main(["tune", "--merge", str(there)]) == 0
    assert "kept" in capsys.readouterr().out


NET = "from torch import nn\ndef build(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh())\n"


def test_a_budget_for_a_network_of_ones_own(
    cache: Path, device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is spent before the first kernel asks for more; a longer one tunes them all."""
    (tmp_path / "net.py").write_text(NET)
    own = ["tune", f"{tmp_path / 'net.py'}:build", "--input", "1x3x9x9", *lenet()[2:]]
    assert main([*own, "--budget", "0.001s"]) == 0
    assert "waiting; the budget is spent, give more." in capsys.readouterr().out
    assert not (cache / "records").exists()
    assert main([*own, "--budget", "2h", "--json"]) == 0
    assert {e["status"] for e in json.loads(capsys.readouterr().out)["outcomes"]} == {"tuned"}


def test_files_that_cannot_be_merged(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Damaged ones, of other programs, of other versions and of ops that are not there."""
    (tmp_path / "empty").mkdir()
    assert main(["tune", "--merge", str(tmp_path / "empty")]) == EXIT_ERROR
    assert "empty': a folder without records (*.json)" in capsys.readouterr().err
    good = records.to_json(record_of(conv()))
    files = {
        "damaged": json.dumps(good)[:-40], "foreign": '{"name": "package"}', "binary": "PK\x03",
        "future": json.dumps({**good, "format": 999}),
        "op": json.dumps({**good, "key": {**good["key"], "op": "nosuch"}}),
        "time": json.dumps({**good, "time_us": -1.0}),
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / f"{name}.json").write_text(text)
    paths = [str(tmp_path / f"{name}.json") for name in files]
    assert main(["tune", "--merge", *paths, "--json"]) == EXIT_ERROR
    shown = capsys.readouterr()
    assert f"6 of 6 files were not taken over, the first one '{paths[0]}'" in shown.err
    reasons = [each["reason"] for each in json.loads(shown.out)]
    expected = (
        "no JSON", "expected an object with a format and a key", "no JSON",
        "a record from the future", "there is no op 'nosuch'", "record.time_us",
    )  # fmt: skip
    for reason, part in zip(reasons, expected, strict=True):
        assert part in reason
    assert not (cache / "records").exists()


def test_a_folder_that_cannot_be_written_is_told_and_loses_nothing_else(
    device: Device, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert main(lenet("--to", str(tmp_path / "file" / "records"), "--json")) == EXIT_ERROR
    shown = capsys.readouterr()
    assert "cannot write tuning record" in shown.err
    assert {each["status"] for each in json.loads(shown.out)["outcomes"]} == {"tuned"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("resnet5", "--offline", "--target", "cuda:sm_90"), "unknown zoo model 'resnet5'; did"),
        (("--show", "conv"), "unknown op 'conv'; did you mean"),
        ((), "expected the name of a model"),
        (("lenet5", "--prune"), "expected none with --show, --merge and --prune"),
        (("lenet5", "--target", "cuda:sm_90"), "Pass --offline"),
        (("lenet5", "--offline", "--target", "interpreter"), "no machine code to rank"),
        (("lenet5", "--target", "reference"), "no machine code to rank"),
        (("lenet5", "--target", "cuda:sm_91"), "unknown target 'cuda:sm_91'"),
        (("--merge", "missing.json"), "records to merge 'missing.json': no such file or folder"),
        (("--merge", __file__), "not a tuning record"),
    ],
)  # fmt: skip
def test_mistakes_are_told(
    arguments: tuple[str, ...],
    message: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(targets, "local_capability", lambda: None)
    assert main(["tune", *arguments]) == EXIT_ERROR
    assert message in capsys.readouterr().err.replace(": did", "; did")
    assert not (cache / "records").exists()


def test_without_a_gpu_the_command_points_to_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "local_capability", lambda: None)
    assert main(["tune", "lenet5"]) == EXIT_ERROR
    assert "Pass --offline --target cuda:sm_90" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["", "fast", "-3s", "0s", "12d", "1.s", "1e3", "s"])
def test_bad_budgets(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["tune", "lenet5", f"--budget={text}"])
    assert stop.value.code == 2
    assert "expected a time such as 90s, 20m or 2h" in capsys.readouterr().err


def test_budgets_have_units() -> None:
    from convloom.cli.tune import _seconds

    assert [_seconds(text) for text in ("90", "90s", "1.5m", "2h")] == [90, 90, 90, 7200]
