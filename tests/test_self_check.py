"""The Hopper core proves itself on a device before anything relies on it; what does not gives way
to the plain core."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from convloom.compiler import api
from convloom.compiler.run.workers import WorkerError
from convloom.compiler.tuning import self_check
from convloom.compiler.tuning.bench import Trial
from convloom.compiler.tuning.self_check import SelfCheck, smaller
from convloom.errors import KernelError, TargetUnavailableError
from convloom.kernels import registry
from convloom.kernels.contract.op import config
from convloom.kernels.contract.targets import parse
from convloom.kernels.devices import offline
from convloom.kernels.devices.offline import Resources
from convloom.kernels.hopper import core, gluon
from convloom.kernels.tile.conv_geometry import Conv2d
from torch import nn

from .test_hopper import SAME, conv

pytestmark = pytest.mark.skipif(gluon.MISSING is not None, reason=str(gluon.MISSING))

SM_90 = parse("cuda:sm_90")
FITS = Resources(100, 0, 0)
PROBLEM = conv(SAME, (56, 56), (3, 3), (256, 256), 64)
TILE = next(iter(core.tiles(PROBLEM, SM_90)), config())


class Device:
    """What runs configurations, as a test wants it. answer: a trial, or an error to raise."""

    device, driver = "H200", "1"

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.asked: list[Any] = []
        self.closed = 0

    def open(self) -> None:
        if isinstance(self.answer, TargetUnavailableError):
            raise self.answer

    def trial(self, problem: Any, config: Any, reports: Any, timeout_s: float) -> Trial:
        self.asked.append((problem, config))
        if isinstance(self.answer, Exception):
            raise self.answer
        trial: Trial = self.answer
        return trial

    def close(self) -> None:
        self.closed += 1


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The core is asked for, on a machine with the GPU; nothing is compiled."""
    monkeypatch.setenv("CONVLOOM_CORE", "hopper")
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(self_check, "local_device", lambda target: "H200")
    monkeypatch.setattr(offline, "compile_all", lambda requests: None)
    monkeypatch.setattr(offline, "resources", lambda request: FITS)


def checking(device: Device) -> SelfCheck:
    return SelfCheck(SM_90, lambda target: cast("Any", device))


def planned(device: Device, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The plan of a layer for which the model prefers the core."""
    monkeypatch.setattr(api, "SelfCheck", lambda target: checking(device))
    net, x = nn.Conv2d(256, 256, 3, padding=1), torch.randn(32, 256, 56, 56, dtype=torch.float16)
    _, plan, _ = api.lowered(
        net.half().eval(), (x,), target="cuda:sm_90", compiled=True, tuning="heuristic"
    )
    return next(step for step in plan.steps if step.op == "conv2d")


def test_what_is_right_stays_and_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(Trial())
    step = planned(device, monkeypatch)
    assert core.uses_core(step.config) and step.chosen_by == "heuristic; Hopper core"
    assert len(device.asked) == 1 and device.closed == 1
    again = Device(Trial("asked again"))
    assert core.uses_core(planned(again, monkeypatch).config) and not again.asked


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Trial("results differ"), "its self-check on H200 failed: results differ"),
        (WorkerError("timeout", "no answer after 180 s"), "failed: timeout: no answer after 180 s"),
        (WorkerError("died", "the process ended"), "failed: died: the process ended"),
        (KernelError("H200 cannot be used any more"), "could not be run: H200 cannot be used"),
        (TargetUnavailableError("cannot measure here"), "could not be run: cannot measure here"),
    ],
)
def test_what_fails_is_refused_with_a_warning(
    answer: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    check = checking(Device(answer))
    with caplog.at_level(logging.WARNING, logger="convloom"):
        for _ in range(2):
            assert reason in str(check.failure(PROBLEM, TILE))
    told = [each for each in caplog.messages if "the untried kernel of conv2d" in each]
    assert len(told) == 1 and reason in told[0] and "HOPPER=1" in told[0]


def test_what_fails_gives_way_to_the_plain_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """No other tile of the core is tried for the layer then, and the failure is remembered."""
    device = Device(Trial("results differ"))
    step = planned(device, monkeypatch)
    assert not core.uses_core(step.config) and len(device.asked) == 1
    assert "its self-check on H200 failed: results differ" in step.chosen_by
    again = Device(Trial())
    assert not core.uses_core(planned(again, monkeypatch).config) and not again.asked


def test_nothing_is_tried_without_a_gpu_or_of_the_plain_core(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = registry.get("conv2d").configs(PROBLEM, SM_90)
    plain = next(each for each in every if not core.uses_core(each))
    device = Device(Trial("results differ"))
    check = checking(device)
    assert check.failure(PROBLEM, plain) is None
    monkeypatch.setattr(self_check, "local_device", lambda target: None)
    assert check.failure(PROBLEM, TILE) is None and not device.asked
    check.close()


def test_clusters_are_tried_too() -> None:
    """A problem as it is: of batch 1, which several programs share the sums of."""
    few = conv(SAME, (7, 7), (3, 3), (512, 512), 1)
    shared = config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, SPLIT=4)
    clusters = replace(shared, blocks=(*shared.blocks, ("CLUSTER", 1)))
    device = Device(Trial("results differ"))
    check = checking(device)
    assert check.failure(few, shared) is None
    assert "self-check on H200 failed" in str(check.failure(few, clusters))
    assert device.asked == [(few, clusters)]


def test_a_small_batch_gives_every_program_several_tiles() -> None:
    small = smaller(PROBLEM, TILE, SM_90)
    batch = small.output.spec.batch
    assert batch is not None and small.inputs[0].shape[0] == small.output.shape[0] == batch < 64
    large, launch = (core.launch(each, TILE, SM_90) for each in (PROBLEM, small))
    assert large.constexprs == launch.constexprs and launch.most_programs is not None
    assert 2 * launch.most_programs < launch.tiles_at(batch) < 3 * launch.most_programs
    fixed = conv(Conv2d(), (4, 4), (1, 1), (64, 64), 2)
    assert smaller(fixed, next(iter(core.tiles(fixed, SM_90))), SM_90) == fixed
