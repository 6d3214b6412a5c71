"""Random networks hold the contract; the grammar reaches every op; failures shrink to a module."""

from __future__ import annotations

import random
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from convloom.compiler.passes import PASSES, clean
from convloom.kernels import registry, scalars

from . import nets
from .fuzz import __main__ as command
from .fuzz import contract, grammar, lines
from .fuzz.builder import Builder, UnsuitableError
from .fuzz.contract import BrokenError, Case, check, check_many
from .fuzz.grammar import GROUP, generate
from .fuzz.program import Program, Statement, merged
from .fuzz.shrink import candidates, shrink

SEEDS, MORE_SEEDS = 500, 3000
PER_TEST = 2 * GROUP
ROOT = Path(__file__).resolve().parent.parent

NEVER_FUSED_HERE = {
    "border_conv2d": "replaces a pad where the cost model of a GPU prefers it",
}
"""Ops that no seed reaches, and why."""

reached: dict[int, set[str]] = {}


def run(first: int) -> None:
    for start in range(first, first + PER_TEST, GROUP):
        reached[start] = check_many(generate(seed) for seed in range(start, start + GROUP))


@pytest.mark.interpreter
@pytest.mark.parametrize("first", range(0, SEEDS, PER_TEST))
def test_random_networks_hold_the_contract(first: int) -> None:
    run(first)


@pytest.mark.slow
@pytest.mark.interpreter
@pytest.mark.parametrize("first", range(SEEDS, MORE_SEEDS, PER_TEST))
def test_more_random_networks_hold_the_contract(first: int) -> None:
    run(first)


@pytest.mark.interpreter
def test_the_seeds_reach_every_op() -> None:
    for first in range(0, SEEDS, PER_TEST):
        if first not in reached:
            run(first)
    found = set().union(*reached.values())
    missing = {op.name for op in registry.OPS} - found
    assert missing == NEVER_FUSED_HERE.keys()


def test_a_seed_decides_all() -> None:
    assert [generate(seed).source() for seed in range(30)] == [
        generate(seed).source() for seed in range(30)
    ]


def test_programs_have_what_they_are_for() -> None:
    cases = [generate(seed) for seed in range(SEEDS)]
    text = "\n".join(case.source() for case in cases)
    wanted = ("groups=2", "stride=2", "dilation=2", "padding='same'", "'circular'", "Conv1d",
              "Conv3d", "torch.cat", ".chunk(", "F.max_unpool2d", "+ x0", "size=")  # fmt: skip
    assert [word for word in wanted if word not in text] == []
    programs = [case.program for case in cases]
    uses = [name for p in programs for s in p.statements for name in s.layers]
    assert len(uses) > len(set(uses)), "no layer is shared"
    assert any(len(p.inputs) > 1 for p in programs) and any(len(p.results) > 2 for p in programs)
    assert any(p.pruned().statements != p.statements for p in programs), "no branch is dead"
    for flag in ("special", "strided", "full"):
        assert 0.05 * SEEDS < sum(getattr(case, flag) for case in cases) < 0.6 * SEEDS, flag
    assert {case.dtype for case in cases} == {None, torch.float16, torch.bfloat16}


def test_a_line_that_torch_refuses_is_not_written() -> None:
    b = Builder(0, batch=2)
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


@pytest.mark.interpreter
def test_a_planted_bug_is_found_and_shrunk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = Case(PROGRAM, seed=3)
    assert {"max_pool2d", "conv2d", "maximum"} & check(case)
    plant(monkeypatch, "minimum", "maximum")
    with pytest.raises(BrokenError, match="fused: value: result 0: element"):
        check(case)
    small = shrink(case)
    assert [s.expression for s in small.program.statements] == ["torch.maximum(x0, x1)"] or [
        s.expression for s in small.program.statements
    ] == ["torch.maximum(x1, x0)"]
    assert small.program.layers == ()
    assert all(size <= 2 for _, shape in small.program.inputs for size in shape)
    # What is printed runs, and shows the bug as long as it is there.
    file = tmp_path / "small.py"
    file.write_text(small.source())
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(AssertionError, match="value"):
        runpy.run_path(str(file), run_name="__main__")
    monkeypatch.undo()
    done = subprocess.run([sys.executable, str(file)], cwd=ROOT, capture_output=True, text=True,
                          env={**__import__("os").environ, "PYTHONPATH": path_of_imports()})  # fmt: skip
    assert done.returncode == 0, done.stderr
