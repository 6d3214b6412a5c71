"""What spills or does not fit gives way to the next best; the plan and its file say so."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.artifact import read, rederive
from convloom.compiler.plan.plan import KernelStep
from convloom.compiler.records import choose
from convloom.compiler.records.choose import Choice
from convloom.compiler.tuning import fit
from convloom.errors import KernelError, UnsafeKernelError
from convloom.kernels import registry
from convloom.kernels.contract.op import Config, Op, Problem
from convloom.kernels.contract.targets import Target
from convloom.kernels.devices import offline
from convloom.kernels.devices.offline import CompileRequest, Resources
from torch import nn

X = torch.zeros(2, 16)
FITS = Resources(40, 0, 0)
Said = Callable[[CompileRequest], Resources]


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Said], None]:
    """Makes the compiler's reports up; nothing is compiled."""

    def says(said: Said) -> None:
        monkeypatch.setattr(offline, "compile_all", lambda requests: None)
        monkeypatch.setattr(offline, "resources", said)

    return says


def step_of(net: nn.Module, tuning: str = "heuristic") -> KernelStep:
    exe = convloom.compile(net.eval(), (X,), target="cuda:sm_90", tuning=tuning)
    (step,) = exe.plan.steps
    assert isinstance(step, KernelStep)
    return step


def default_of(step: KernelStep, target: Target) -> Config:
    return registry.get(step.op).default(step.problem, target)


def warps_spill(count: int, spill_bytes: int = 8) -> Said:
    """Kernels of so many warps spill."""
    return lambda request: Resources(255, spill_bytes * (request.num_warps == count), 0)


def test_the_next_by_the_model_is_taken(compiler: Callable[[Said], None], tmp_path: Path) -> None:
    compiler(lambda request: FITS)
    default = step_of(nn.Linear(16, 40))
    assert default.chosen_by == "heuristic"
    compiler(warps_spill(default.config.num_warps))
    step = step_of(nn.Linear(16, 40))
    assert step.config.num_warps != default.config.num_warps
    assert step.chosen_by.startswith("next by the model; heuristic refused: ")
    assert "keeps 8 bytes per thread on the stack, beside 255 registers of 255" in step.chosen_by


class Summed(nn.Module):
    """Two layers with a torch op between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 40), nn.Linear(40, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.second(torch.logcumsumexp(self.first(x), 1))
        return y


def test_every_step_is_looked_at(compiler: Callable[[Said], None]) -> None:
    """Behind a step that fits, and behind a torch op."""

    def steps() -> list[KernelStep]:
        exe = convloom.compile(
            Summed().eval(), (X,), target="cuda:sm_90", tuning="heuristic", fallback="torch"
        )
        return [step for step in exe.plan.steps if isinstance(step, KernelStep)]

    compiler(lambda request: FITS)
    spilling = steps()[1].config.num_warps

    def said(request: CompileRequest) -> Resources:
        x: Any = dict(request.constexprs).get("X")
        is_second = x is not None and x.C == 40
        return Resources(255, 8 * (is_second and request.num_warps == spilling), 0)

    compiler(said)
    first, second = steps()
    assert first.chosen_by == "heuristic"
    assert second.config.num_warps != spilling


def test_what_does_not_fit_gives_way_too(compiler: Callable[[Said], None]) -> None:
    compiler(lambda request: FITS)
    warps = step_of(nn.Linear(16, 40)).config.num_warps
    compiler(lambda request: Resources(40, 0, 1 << (20 if request.num_warps == warps else 10)))
    step = step_of(nn.Linear(16, 40))
    assert step.config.num_warps != warps and "of shared memory" in step.chosen_by


def test_what_the_compiler_makes_unsafe_gives_way_too(compiler: Callable[[Said], None]) -> None:
    """Any other fault of the compiler is one, whatever the configuration."""
    compiler(lambda request: FITS)
    warps = step_of(nn.Linear(16, 40)).config.num_warps

    def failing(error: type[KernelError]) -> Said:
        def said(request: CompileRequest) -> Resources:
            if request.num_warps == warps:
                raise error("no barrier")
            return FITS

        return said

    compiler(failing(UnsafeKernelError))
    step = step_of(nn.Linear(16, 40))
    assert step.config.num_warps != warps
    assert step.chosen_by == "next by the model; heuristic refused: no barrier"
    compiler(failing(KernelError))
    with pytest.raises(KernelError, match="no barrier"):
        step_of(nn.Linear(16, 40))


def test_where_all_spill_the_least_spilling_is_taken_and_said(
    compiler: Callable[[Said], None], caplog: pytest.LogCaptureFixture
) -> None:
    spilled: list[int] = []

    def said(request: CompileRequest) -> Resources:
        tile: Any = dict(request.constexprs)["TILE"]
        spilled.append(8 * tile.M)
        return Resources(255, spilled[-1], 0)

    compiler(said)
    with caplog.at_level(logging.WARNING, "convloom"):
        step = step_of(nn.Linear(16, 40))
    assert min(spilled) == 8 * step.launches[0].constexprs["TILE"].M
    assert step.chosen_by.startswith("least spilling of ")
    assert "linear of float32[2, 40]: every configuration tried spills" in caplog.text


def test_where_nothing_fits_it_is_an_error(compiler: Callable[[Said], None]) -> None:
    compiler(lambda request: Resources(40, 0, 1 << 20))
    message = r"no configuration of linear for float32\[2, 40\]: gemm_kernel needs 1048576 bytes"
    with pytest.raises(KernelError, match=message):
        step_of(nn.Linear(16, 40))


def test_a_record_that_spills_is_not_used(
    compiler: Callable[[Said], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiler(lambda request: FITS)
    default = step_of(nn.Linear(16, 40)).config

    def of_record(self: choose.Records, op: Op, problem: Problem, target: Target) -> Choice:
        others = fit.candidates(op, problem, target)
        return Choice(next(c for c in others if c.num_warps != default.num_warps), "record: mine")

    monkeypatch.setattr(choose.Records, "choose", of_record)
    recorded = step_of(nn.Linear(16, 40), "records").config
    compiler(warps_spill(recorded.num_warps))
    with caplog.at_level(logging.WARNING, "convloom"):
        step = step_of(nn.Linear(16, 40), "records")
    assert step.config.num_warps != recorded.num_warps
    assert "record: mine is not used: " in caplog.text and "8 bytes per thread" in caplog.text


def test_a_file_keeps_what_was_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    resources, default = offline.resources, step_of(nn.Linear(16, 40)).config

    def said(request: CompileRequest) -> Resources:
        spills = request.num_warps == default.num_warps
        return Resources(255, 8, 0) if spills else resources(request)

    monkeypatch.setattr(offline, "resources", said)
    exe = convloom.compile(nn.Linear(16, 40).eval(), (X,), target="cuda:sm_90", tuning="heuristic")
    exe.save(tmp_path / "net.loom")
    artifact = read.open_artifact(tmp_path / "net.loom")
    (program,) = artifact.programs
    assert program.steps[0].tile.num_warps != default.num_warps
    assert "refused" in program.steps[0].chosen_by
    assert rederive.differences(artifact) == []


def test_the_ledger_tells_it_once(compiler: Callable[[Said], None]) -> None:
    """Lowering once more records no refusal or view a second time."""
    compiler(lambda request: FITS)
    net = nn.Sequential(nn.Linear(16, 40), nn.Flatten(0), nn.ReLU())
    first = convloom.compile(net, (X,), target="cuda:sm_90", tuning="heuristic")
    warps = first.kernels[0].launch.num_warps
    compiler(warps_spill(warps))
    second = convloom.compile(net, (X,), target="cuda:sm_90", tuning="heuristic")
    assert second.kernels[0].launch.num_warps != warps
    assert first.ledger.events == second.ledger.events
