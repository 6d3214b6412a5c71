"""Random networks hold the contract; the grammar reaches every op; failures shrink to a module."""

from __future__ import annotations

import random
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom.compiler.passes import PASSES, clean
from convloom.kernels import registry
from torch import nn

from . import nets
from .fuzz import __main__ as command
from .fuzz import contract, grammar
from .fuzz.builder import Builder, UnsuitableError
from .fuzz.contract import (
    AGAIN,
    BATCHES,
    CHECKS,
    OPTIONAL,
    OTHER,
    UNFUSED,
    BrokenError,
    Case,
    check,
    check_many,
    check_module,
    ops_in,
)
from .fuzz.grammar import GROUP, generate
from .fuzz.program import Program, Statement, merged
from .fuzz.shrink import candidates, shrink

SEEDS, MORE_SEEDS, SOME = 200, 3000, 150
"""Seeds of every run, those that are there for whoever has time, and those that are looked at."""
DRAWN = 500
"""Seeds that reach every op, in shares that can be counted."""
ROOT = Path(__file__).resolve().parent.parent

reached: dict[int, set[str]] = {}


def group(first: int) -> list[Case]:
    return [generate(seed) for seed in range(first, first + GROUP)]


def run(first: int) -> None:
    reached[first] = check_many(group(first))


@pytest.mark.untraced
@pytest.mark.interpreter
@pytest.mark.parametrize("first", range(0, SEEDS, GROUP))
def test_random_networks_hold_the_contract(first: int) -> None:
    run(first)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("first", range(SEEDS, MORE_SEEDS, GROUP))
def test_more_random_networks_hold_the_contract(first: int) -> None:
    run(first)


@pytest.mark.slow
def test_the_seeds_reach_every_op() -> None:
    """In what the tests before this one have run; what they have not is compiled."""
    for first in range(0, DRAWN, GROUP):
        if first not in reached:
            reached[first] = ops_in(group(first))
    found = set().union(*reached.values())
    missing = {op.name for op in registry.OPS} - found
    assert not missing, f"add lines to tests/fuzz/lines.py that are captured as {sorted(missing)}"


def test_the_seeds_are_held_to_all_there_is() -> None:
    """Shares are what the module of the grammar says."""
    groups = [generate(seed) for seed in range(0, DRAWN, GROUP)]
    assert {case.without for case in groups} == {None, *OPTIONAL}
    share = {check: sum(check in case.checks for case in groups) / len(groups) for check in CHECKS}
    assert share == pytest.approx({AGAIN: 1 / 2, OTHER: 1 / 4, UNFUSED: 1 / 4, BATCHES: 1 / 4}, 0.1)
    pairs = {(case.strided, case.dtype, check) for case in groups for check in case.checks}
    assert all({(True, None, check), (False, None, check)} <= pairs for check in CHECKS)


def test_a_seed_decides_all() -> None:
    assert [generate(seed).source() for seed in range(12)] == [
        generate(seed).source() for seed in range(12)
    ]


def test_programs_have_what_they_are_for() -> None:
    cases = [generate(seed) for seed in range(SOME)]
    text = "\n".join(case.source() for case in cases)
    wanted = ("groups=2", "stride=2", "dilation=2", "padding='same'", "'circular'", "Conv1d",
              "Conv3d", "torch.cat", ".chunk(", "F.max_unpool2d", "+ x0", "size=")  # fmt: skip
    assert [word for word in wanted if word not in text] == []
    programs = [case.program for case in cases]
    uses = [name for p in programs for s in p.statements for name in s.layers]
    assert len(uses) > len(set(uses)), "no layer is shared"
    assert any(len(p.inputs) > 1 for p in programs) and any(len(p.results) > 1 for p in programs)
    assert any(p.pruned().statements != p.statements for p in programs), "no branch is dead"
    for flag in ("special", "strided", "checks", "without"):
        assert 0.05 * SOME < sum(bool(getattr(case, flag)) for case in cases) < 0.9 * SOME, flag
    assert {case.dtype for case in cases} == {None, torch.float16, torch.bfloat16}


def test_a_line_that_torch_refuses_is_not_written() -> None:
    b = Builder(random.Random(0), batch=2)
    x = b.input(3, 4, 4)
    for line in (f"{x}.view(5, 5)", f"{x}[:, 3:]", f"{x}.sum(0)", f"{x}.repeat(1, 40, 2, 2)"):
        with pytest.raises(UnsuitableError):
            b.let(line)
    assert b.statements == []


LAYERS = (("a1", "nn.Conv2d(6, 6, 3, padding=1)"), ("a2", "nn.BatchNorm2d(6)"))
PROGRAM = Program(
    (("x0", (2, 6, 5, 4)), ("x1", (2, 6, 5, 4))),
    LAYERS,
    (
        Statement(("y2",), "self.a2(self.a1(x0))"),
        Statement(("y3",), "torch.relu(y2)"),
        Statement(("y4",), "torch.maximum(y3, x1)"),
        Statement(("y5", "i6"), "F.max_pool2d(y4, 2, return_indices=True)"),
        Statement(("y7",), "torch.sigmoid(y3)"),
    ),
    ("y5", "y7"),
)


def test_programs_are_cut_and_merged_as_text() -> None:
    assert PROGRAM.pruned() == PROGRAM
    only = replace(PROGRAM, results=("y7",)).pruned()
    assert [s.targets[0] for s in only.statements] == ["y2", "y3", "y7"]
    assert [name for name, _ in only.inputs] == ["x0"]
    assert str(PROGRAM.renamed({"y3": "x0"}).statements[2]) == "y4 = torch.maximum(x0, x1)"
    both = merged([PROGRAM, only])
    module = both.build().eval()
    inputs = nets.inputs_of(*(shape for _, shape in both.inputs))
    assert [tuple(y.shape) for y in module(*inputs)] == [(2, 6, 2, 2), *[(2, 6, 5, 4)] * 2]


def plant(patch: pytest.MonkeyPatch, wrong: str, right: str) -> None:
    """A pass from now on takes one op for another."""

    def broken(graph: object, ledger: object) -> object:
        for node in list(graph.nodes()):  # type: ignore[attr-defined]
            if node.op == right:
                graph.update(node.name, op=wrong)  # type: ignore[attr-defined]
        return clean.drop_identities(graph, ledger)  # type: ignore[arg-type]

    steps = tuple(
        replace(step, run=broken) if step.name == "drop_identities" else step for step in PASSES
    )
    patch.setattr("convloom.compiler.passes.PASSES", steps)
    # What a pass computes is not compared: the results are to show it.
    patch.setenv("CONVLOOM_CHECK", "1")


@pytest.mark.interpreter
def test_a_planted_bug_is_found_and_shrunk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    case = Case(PROGRAM, seed=3)
    assert {"max_pool2d", "conv2d", "maximum"} & check(case)
    plant(monkeypatch, "minimum", "maximum")
    with pytest.raises(BrokenError, match="fused: value: result 0: element"):
        check(case)
    small = shrink(case)
    (statement,) = small.program.statements
    assert re.fullmatch(r"torch\.maximum\(x\d, x\d\)", statement.expression)
    assert small.program.layers == ()
    assert all(size <= 2 for _, shape in small.program.inputs for size in shape)
    # What is printed runs, and shows the bug for as long as it is there.
    file = tmp_path / "small.py"
    file.write_text(small.source())
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(AssertionError, match="fused: value"):
        runpy.run_path(str(file), run_name="__main__")
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(ROOT))
    runpy.run_path(str(file), run_name="__main__")


def test_every_candidate_of_the_shrinker_is_smaller_or_other() -> None:
    case = Case(PROGRAM, special=True, strided=True, dtype=torch.float16)
    found = list(candidates(case))
    assert len(found) == len({(c.source(), c.program.inputs) for c in found})
    assert all(c != case for c in found)
    assert any(len(c.program.inputs) > 2 for c in found), "no value became an input"
    # Whatever fails the same way is taken: with a failure that never ends, one number is left.
    assert shrink(case, lambda _: True, most=40).program.statements == ()


class Broken:
    """An executable of one promise less than it should keep."""

    def __init__(self, exe: Any, how: str) -> None:
        self.exe, self.how, self.plan, self.graph = exe, how, exe.plan, exe.graph
        self.calls, self.kept = 0, None

    def __call__(self, *inputs: torch.Tensor) -> Any:
        self.calls += 1
        results = self.exe(*inputs)
        if self.how == "inputs changed":
            inputs[0].add_(1.0)
        elif self.how == "aliasing":
            return (results[0], results[0].view(results[0].shape), *results[2:])
        elif self.how == "other bits":
            results[0].add_(1e-8 * self.calls)
        elif self.how == "later calls":
            self.kept = results if self.kept is None else self.kept
            for kept, new in zip(self.kept, results, strict=True):
                kept.copy_(new)
            return self.kept
        elif self.how == "dtype":
            return tuple(result.double() for result in results)
        elif self.how == "shape":
            return (results[0][:1], *results[1:])
        elif self.how == "NaN":
            results[0].view(-1)[0] = float("nan")
        return results


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("inputs changed", "inputs changed"), ("aliasing", "share memory"),
        ("other bits", "other bits the second time"), ("later calls", "changed results"),
        ("dtype", "is torch.float64"), ("shape", "shape"), ("NaN", "NaN pattern"),
    ],
)  # fmt: skip
def test_every_broken_promise_is_told(monkeypatch: pytest.MonkeyPatch, how: str, told: str) -> None:
    case = Case(SUM, checks=CHECKS)
    real = convloom.compile

    def compile(module: Any, inputs: Any, **options: Any) -> Any:
        return Broken(real(module, inputs, **{**options, "target": "reference"}), how)

    monkeypatch.setattr(contract.convloom, "compile", compile)
    with pytest.raises(BrokenError, match=told):
        check(case)


SUM = Program(
    (("x0", (2, 3, 4)), ("x1", (2, 3, 4))),
    (),
    (Statement(("y2",), "x0 + x1"), Statement(("y3",), "x0 - x1")),
    ("y2", "y3"),
)


def test_eager_decides_which_pixels_a_resizing_reads() -> None:
    """The ratio 7 / 3 in float32 reaches one row further than in float64, and finds a NaN there."""
    conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(m.conv(x), size=[3, 2], mode="bilinear", antialias=True)

    module, _ = nets.make(forward, (2, 2, 7, 1), conv=conv)
    check_module(module, [(2, 2, 7, 1)], seed=924, special=True, dynamic=True)


def test_noise_excuses_only_what_is_ill_conditioned() -> None:
    """The sign of nearly zero may be anything; a sum may not."""
    x = torch.tensor([[1.0, 2.0, -3.0]])
    for expression, excused in (("torch.sign((x0 * 3.7 + 1.1) - (x0 * 3.7 + 1.1))", True),
                                ("x0 * 3.7 + 1.1", False)):  # fmt: skip
        program = Program((("x0", (1, 3)),), (), (Statement(("y1",), expression),), ("y1",))
        checks = contract._Checks(Case(program), program.build().eval())
        (exact,) = nets.run(checks.module, (x,), torch.float64)
        peer = checks.noisy((x,), 0, exact, torch.float32)
        deviation = (peer.double() - exact).abs().max().item()
        assert deviation > 0.5 if excused else deviation < 1e-4


@pytest.mark.interpreter
def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(["--seeds", "11:13"]) == 0
    told = capsys.readouterr()
    assert "2 of 2 networks, 0 broken" in told.err and told.out.startswith("2 networks in")
    monkeypatch.setattr(grammar, "generate", lambda seed: Case(PROGRAM, seed=seed))
    plant(monkeypatch, "minimum", "maximum")
    assert command.main(["--seeds", "20:21", "--no-shrink"]) == 1
    assert "# seed 20: fused: value" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--seeds", "5"])
    assert "expected FIRST:LAST" in capsys.readouterr().err


@pytest.mark.interpreter
def test_seeds_are_shared_out_among_processes() -> None:
    """As a user starts it: what a process is asked for must be found there."""
    command_line = [sys.executable, "-m", "tests.fuzz", "--seeds", "0:2", "--jobs", "2"]
    done = subprocess.run(command_line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "2 networks" in done.stdout + done.stderr, done.stderr
