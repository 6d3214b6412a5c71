"""Kernels of the Hopper core in a file are compared with the plain core on a device before they are
used there; what is wrong gives way to it."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import convloom
import pytest
import torch
from convloom.compiler.artifact import device as gpu
from convloom.compiler.artifact import program as programs
from convloom.compiler.artifact import twins, write
from convloom.compiler.artifact.check import check_document
from convloom.compiler.artifact.program import Argument, Program
from convloom.compiler.artifact.read import Artifact, open_artifact
from convloom.compiler.graph.memory import BufferSlice, Memory
from convloom.compiler.run.executable import Executable
from convloom.compiler.run.workers import WorkerError
from convloom.errors import ArtifactError
from convloom.kernels.contract import epilogue, targets
from convloom.kernels.contract.op import Ref
from convloom.kernels.devices import execute, interpreter
from convloom.kernels.hopper import core, gluon
from convloom.kernels.tile import geometry
from torch import nn

from .artifact_files import save_by_core
from .fake_driver import FakeDriver, Started
from .nets import make

pytestmark = pytest.mark.skipif(gluon.MISSING is not None, reason=str(gluon.MISSING))

CPU = torch.device("cpu")
CHANNELS = 64


def network() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Two convolutions by the same kernel, and one with stride 2 and a residual."""

    def forward(m: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = torch.relu(m.second(torch.relu(m.first(x))))
        return torch.relu(m.third(x) + y)

    module, inputs = make(
        forward,
        (4, CHANNELS, 8, 8),
        first=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        second=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1),
        third=nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, stride=2),
    )
    return module, (*inputs, torch.randn(4, CHANNELS, 4, 4))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Executable]:
    """All of the network by the core, whatever the model says of such small layers."""
    return save_by_core(
        tmp_path_factory.mktemp("files"),
        network(),
        lambda tiles, plain: next((each for each in tiles if each[core.BLOCK] != core.HALO), plain),
    )


@pytest.fixture(scope="module")
def artifact(saved: tuple[Path, Executable]) -> Artifact:
    return open_artifact(saved[0])


def driver_of(artifact: Artifact, **options: Any) -> FakeDriver:
    (program,) = artifact.programs
    return FakeDriver(
        {(artifact.code(each.cubin), each.entry): each.signature for each in program.images},
        **options,
    )


# What a file holds.


def test_every_launch_of_the_core_has_a_twin_of_the_plain_core(artifact: Artifact) -> None:
    (program,) = artifact.programs
    assert programs.UNTRIED == (core.BLOCK, geometry.CLUSTER)
    assert len(program.twins) == 3
    for twin in program.twins:
        own = twins.own_call(program, twin)
        assert "hopper_kernel" in program.images[own.image].entry
        assert "hopper" not in program.images[twin.image].entry
        assert not any(argument.map for argument in twin.arguments)
    images = [twins.own_call(program, twin).image for twin in program.twins]
    assert images[0] == images[1], "two layers by one kernel"


def test_twins_compute_the_same_steps(saved: tuple[Path, Executable]) -> None:
    """In the interpreter, against each op's reference, in the memory of the plan."""
    plan, checked = saved[1].plan, 0
    for step, launch in write._twins(plan):
        problem = step.problem
        memory = Memory(plan, plan.constants, 4)
        places = {
            Ref(kind, at): BufferSlice(step.buffers[Ref(kind, at)], operand)
            for kind, group in problem.groups.items()
            for at, operand in enumerate(group)
        }
        torch.manual_seed(0)
        for place in places.values():
            if place.buffer not in plan.constants:
                memory.flat(place.buffer).normal_()
        x = memory.view(places[Ref("input", 0)]).float()
        w = memory.flat(places[Ref("input", 1)].buffer).float()
        with interpreter.interpreting():
            execute.interpret(launch, partial(_buffer, memory, step.buffers), 4)
        found = memory.view(places[Ref("output", 0)]).float()
        _, c, r, s = problem.inputs[1].shape
        filters = w.view(-1, r, s, c).permute(0, 3, 1, 2)
        stride = x.shape[2] // found.shape[2]
        raw = nn.functional.conv2d(x, filters, stride=stride, padding=1)
        count = len(problem.operands)
        operands = tuple(memory.view(places[Ref("operand", at)]).float() for at in range(count))
        expected = epilogue.apply_reference(problem.epilogue, raw, operands)
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=5e-2)
        checked += 1
    assert checked == 3


def _buffer(memory: Memory, buffers: Any, ref: Ref) -> torch.Tensor:
    return memory.flat(buffers[ref])


def refused(artifact: Artifact, program: Program, message: str) -> None:
    document = replace(artifact.document, programs=(program,))
    members = set(artifact.archive.members)
    with pytest.raises(ArtifactError, match=message):
        check_document(document, members, artifact.tensors, (1, 1), "plan")


def test_twins_that_do_not_belong_to_their_launches_are_refused(artifact: Artifact) -> None:
    (program,) = artifact.programs
    first, *others = program.twins
    own = "its twins are not those of its untried launches"
    refused(artifact, replace(program, twins=()), own)
    refused(artifact, replace(program, twins=(*others, first)), own)
    wrong = replace(first, image=len(program.images))
    refused(artifact, replace(program, twins=(wrong, *others)), "the twin of step 1 is of kernel")
    moved = [
        replace(each, buffer=program.twins[1].arguments[0].buffer)
        if each == first.arguments[0] else each
        for each in first.arguments
    ]  # fmt: skip
    refused(
        artifact,
        replace(program, twins=(replace(first, arguments=tuple(moved)), *others)),
        "the twin of step 1 touches other memory than its launch",
    )
    short = replace(first, arguments=first.arguments[1:])
    refused(artifact, replace(program, twins=(short, *others)), "the twin of step 1 passes")
    calls = list(program.calls)
    calls.insert(calls.index(twins.own_call(program, first)), twins.own_call(program, first))
    twice = replace(program, calls=tuple(calls), twins=(first, *program.twins))
    refused(artifact, twice, "an untried step has several launches")


# The comparison, on a device that a test plays.


class Device:
    """Launches write what a test says into the output: kernels of the core `own`, others ones."""

    def __init__(self, artifact: Artifact, monkeypatch: pytest.MonkeyPatch, own: Any) -> None:
        self.own, self.batch, self.position = own, 0, 0
        (self.program,) = artifact.programs
        self.driver = driver_of(artifact, observe=self.launched)
        self.kernels = gpu.load_kernels(self.driver, self.program, artifact.code, by_ptx=False)
        self.constants = gpu.upload(self.program, artifact.tensors, CPU)
        self.memory: Any = None
        monkeypatch.setattr(twins, "Memory", self.remembered)

    def remembered(self, *given: Any) -> Memory:
        self.memory = Memory(*given)
        self.batch = self.memory.batch
        return cast("Memory", self.memory)

    def places(self, position: int) -> list[BufferSlice]:
        call = twins.own_call(self.program, self.program.twins[position])
        written = [argument for argument in call.arguments if argument.kind == "write"]
        return [BufferSlice(each.buffer, cast("Any", each.operand)) for each in written]

    def launched(self, started: Started) -> None:
        for place in self.places(self.position):
            result = self.memory.view(place)
            assert bool(result.isnan().all()), "nobody has written it before"
            result.fill_(1.0)
        if started.entry in ("hopper_kernel", "chain_kernel"):
            self.own(result)

    def difference(self, position: int) -> str | None:
        self.position = position
        return twins.difference(
            self.driver, self.program, self.kernels, self.constants, lambda: 0, position
        )


def leave(result: torch.Tensor) -> None:
    result[-1] = float("nan")


def spoil(result: torch.Tensor) -> None:
    result[1, 2, 3, 3] += 0.02


def round_(result: torch.Tensor) -> None:
    result += 2.0**-10


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        (lambda result: None, None),
        (round_, None),
        (spoil, "1 of .* results differ from the plain core's, the first at .*.*instead of 1"),
        (leave, "nan instead of 1"),
    ],
)
def test_results_are_compared_with_the_twins(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, own: Any, reason: str | None
) -> None:
    device = Device(artifact, monkeypatch, own)
    for position in range(3):
        assert re.fullmatch(f".*{reason}.*", str(device.difference(position)))
    assert device.batch == 4, "blocks of so small a network never take two tiles"


def test_all_results_of_a_launch_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain writes two; the second is spoilt."""

    def forward(m: Any, t: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.relu(m.expand(t) + r)
        return y, m.reduce(y)

    module, inputs = make(
        forward, (4, CHANNELS, 8, 8),
        expand=nn.Conv2d(CHANNELS, 128, 1), reduce=nn.Conv2d(128, CHANNELS, 1),
    )  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setenv("CONVLOOM_CORE", "hopper")
        patch.setattr(core, "faster", lambda *given: (given[3] or [given[2]])[0])
        exe = convloom.compile(
            module, (*inputs, torch.randn(4, 128, 8, 8)), target="cuda:sm_90", dtype=torch.float16,
            tuning="heuristic", force=["expand-reduce"],
        )  # fmt: skip
        exe.save(tmp_path / "chain.loom")
    artifact = open_artifact(tmp_path / "chain.loom")
    for own, reason in ((lambda result: None, None), (spoil, "1 of .* results differ from .*")):
        device = Device(artifact, monkeypatch, own)
        (place, other) = device.places(0)
        assert (place.operand.shape[1], other.operand.shape[1]) == (128, CHANNELS)
        assert re.fullmatch(str(reason), str(device.difference(0)))


def test_a_batch_in_which_blocks_take_several_tiles(artifact: Artifact) -> None:
    (program,) = artifact.programs
    call = twins.own_call(program, program.twins[0])
    tiles = call.grid.rows // 4 * call.grid.columns
    few = replace(call, grid=replace(call.grid, block_rows=1, most=tiles))
    assert twins._batch(program, few) == 3
    assert twins._batch(replace(program, batch=(2, 4)), replace(few, grid=call.grid)) == 4


# What becomes of verdicts.


class Child:
    """The process of its own, as a test wants it. answer: a reason, None, or an error to raise."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[int] = []
        self.closed = 0

    def __call__(self, factory: Any) -> Child:
        return self

    def ask(self, position: int, timeout_s: float) -> Any:
        self.asked.append(position)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, artifact: Artifact) -> None:
    """An H200 that is none, and an empty cache."""
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "cuda_driver", lambda: driver_of(artifact))


def used(artifact: Artifact, child: Child) -> Program:
    return twins.trusted(artifact, artifact.programs[0], child)


@pytest.mark.usefixtures("machine")
def test_right_kernels_are_used_and_asked_about_once(artifact: Artifact) -> None:
    child = Child(None)
    assert used(artifact, child) == artifact.programs[0]
    assert child.asked == [0, 2] and child.closed == 1, "one of two launches of one kernel"
    again = Child("asked again")
    assert used(artifact, again) == artifact.programs[0] and not again.asked


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(
    ("answer", "reason", "kept"),
    [
        ("results differ", "its self-check on H200 failed: results differ", True),
        (WorkerError("timeout", "no answer after 60 s"), "failed: timeout: no answer", True),
        (WorkerError("died", "signal SIGSEGV"), "failed: died: signal SIGSEGV", True),
        (WorkerError("error", "no memory"), "on H200 could not be run: no memory", False),
    ],
)
def test_wrong_kernels_give_way_to_their_twins_with_a_warning(
    artifact: Artifact, answer: Any, reason: str, kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    (program,) = artifact.programs
    with caplog.at_level(logging.WARNING, logger="convloom"):
        found = used(artifact, Child(answer))
    own = {twin.step: twin for twin in program.twins}
    assert [own.get(call.step, call) for call in program.calls] == list(found.calls)
    told = [each for each in caplog.messages if "the untried kernel of" in each]
    assert len(told) == 2 and all(reason in each for each in told)
    again = Child(None)
    assert (used(artifact, again) == found) is kept and bool(again.asked) is not kept


@pytest.mark.slow
@pytest.mark.usefixtures("machine")
def test_a_real_process_without_a_gpu_cannot_say(
    artifact: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    """It is started, opens nothing, and what it says reaches the warning."""
    if targets.local_capability() is not None:
        pytest.skip("this machine has a GPU")
    with caplog.at_level(logging.WARNING, logger="convloom"):
        found = twins.trusted(artifact, artifact.programs[0])
    assert not any("hopper" in found.images[call.image].entry for call in found.calls)
    assert all("could not be run: " in each for each in caplog.messages) and caplog.messages


@pytest.mark.usefixtures("machine")
def test_the_core_that_is_switched_off_is_not_tried(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLOOM_CORE", "plain")
    child = Child(None)
    found = used(artifact, child)
    assert not child.asked and {call.step for call in found.calls} == {
        call.step for call in artifact.programs[0].calls
    }
    assert not any("hopper" in found.images[call.image].entry for call in found.calls)


@pytest.mark.usefixtures("machine")
def test_load_uses_what_is_trusted(
    saved: tuple[Path, Executable], monkeypatch: pytest.MonkeyPatch
) -> None:
    child, ran = Child("results differ"), []

    def runner(artifact: Artifact, program: Program, by_ptx: bool) -> Any:
        ran.append(program)

    trusted = twins.trusted
    monkeypatch.setattr(twins, "trusted", lambda file, each: trusted(file, each, child))
    monkeypatch.setattr(gpu, "runner", runner)
    monkeypatch.setattr(targets, "local_capability", lambda: 90)
    loaded = convloom.load(saved[0])
    (program,) = ran
    assert loaded.programs == (program,) and child.asked
    assert not any("hopper" in program.images[call.image].entry for call in program.calls)


def test_programs_without_the_core_are_not_looked_at(artifact: Artifact) -> None:
    plain = replace(artifact.programs[0], twins=())
    assert twins.trusted(artifact, plain, cast("Any", None)) is plain
    assert Argument("rows").map is None
