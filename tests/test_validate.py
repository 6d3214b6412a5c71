"""Translation validation (CONVLOOM_CHECK=2): planted faults of passes are found and named."""

from __future__ import annotations

import importlib
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from convloom.compiler import passes
from convloom.compiler.evaluation import validate
from convloom.compiler.evaluation.validate import RELATIVE, Validation
from convloom.compiler.fusion import rules
from convloom.compiler.fusion.pattern import Match, absorb
from convloom.compiler.graph.ir import CompileTarget, Graph, Value
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.passes import pads, rearrangements
from convloom.compiler.passes.fusions import siblings
from convloom.errors import GraphError
from convloom.kernels.contract import targets
from torch import nn

from . import nets, pass_nets
from .nets import IMAGE, Made, make

batch_norms = importlib.import_module("convloom.compiler.passes.fold_batch_norm")
"""The package has a function of that name."""


def refusal(made: Made, **options: Any) -> str:
    """What validation says of a network's passes; nothing where they are right."""
    try:
        passes.run_passes(nets.captured(*made), Ledger(), **options)
    except GraphError as error:
        return str(error)
    return ""


# Planted faults, and networks on which they show.


def lose_residuals(patch: pytest.MonkeyPatch) -> None:
    def rewrite(graph: Graph, found: Match) -> Value:
        anchor = found.nodes["anchor"]
        inputs = graph.inputs(anchor.name)
        return absorb(graph, found, anchor.name, inputs, epilogue=anchor.epilogue)

    changed = tuple(
        replace(rule, rewrite=rewrite) if rule.name.startswith("f(heavy(x), r)") else rule
        for rule in rules.EPILOGUE_RULES
    )
    patch.setattr(passes, "EPILOGUE_RULES", changed)


def permute_once(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(rearrangements, "composed", lambda first, second: first)


def shift_stages(patch: pytest.MonkeyPatch) -> None:
    real = siblings._joint_epilogue

    def shifted(graph: Graph, members: Any) -> Any:
        stages, parts = real(graph, members)
        moved = (s if s.channels is None else replace(s, channels=(0, 8)) for s in stages)
        return tuple(moved), parts

    patch.setattr(siblings, "_joint_epilogue", shifted)


def fold_any_channels(patch: pytest.MonkeyPatch) -> None:
    def unguarded(*arguments: Any) -> str | None:
        reason = batch_norms._why_not(*arguments)
        return None if reason and "folded at rank 2" in reason else reason

    rules = tuple(replace(rule, guard=unguarded) for rule in batch_norms.FOLD_RULES)
    patch.setattr(batch_norms, "FOLD_RULES", rules)


def pad_with_anything(patch: pytest.MonkeyPatch) -> None:
    rules = tuple(replace(rule, guard=lambda graph, found: None) for rule in pads.ZERO_RULES)
    patch.setattr(pads, "ZERO_RULES", rules)


def residuals() -> Made:
    return pass_nets.residual_block()


def permuted_twice() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        return F.pixel_shuffle(m.conv(x), 2).permute(0, 1, 3, 2)

    return make(function, (2, 8, 5, 5), conv=nn.Conv2d(8, 8, 1))


def heads() -> Made:
    def function(m: Any, x: torch.Tensor) -> Any:
        return m.a(x), torch.relu(m.b(x))

    return make(function, (2, 8, 5, 5), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1))


def sequence() -> Made:
    layers = {"linear": nn.Linear(6, 4), "norm": nn.BatchNorm1d(4)}
    return make(lambda m, x: m.norm(m.linear(x)), (2, 4, 6), **layers)


def bordered() -> Made:
    return make(lambda m, x: m.conv(F.pad(x, (1, 1, 1, 1), value=0.5)), IMAGE,
                conv=nn.Conv2d(IMAGE[1], 4, 3))  # fmt: skip


PLANTED = {
    "a residual is lost": (
        lose_residuals, residuals, "fuse_epilogues",
        "f(heavy(x), r) => heavy(x, epilogue=[f r])",
        "(conv2d of conv2d_1_3 in 'conv2', ",
    ),
    "one permutation of two": (
        permute_once, permuted_twice, "flatten_in_memory_order",
        "permute(rearrange(x)) => rearrange(x)",
        "(rearrange of permute, pixel_shuffle)",
    ),
    "an activation on other channels": (
        shift_stages, heads, "choose_partition",
        siblings.RULE,
        "(conv2d of conv2d in 'a', conv2d_1_3 in 'b'",
    ),
    "a batch norm of other channels": (
        fold_any_channels, sequence, "fold_batch_norm",
        batch_norms.FOLD_RULES[0].name,
        "(linear of linear in 'linear', ",
    ),
    "another border": (
        pad_with_anything, bordered, "choose_partition",
        pads.ZERO_RULES[0].name,
        "(conv2d of pad, conv2d in 'conv')",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted_faults_are_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, network, step, rule, made = PLANTED[name]
    assert refusal(network()) == "", "the network itself is compiled as it should be"
    plant(monkeypatch)
    told = refusal(network())
    assert told.startswith(f"pass {step!r} changes what Net computes; rule {rule!r} made %")
    assert made in told.partition("; seen at ")[0]
    assert re.search(r"element \(.*\): expected [-\d.e]+, got [-\d.e]+ \(relative error", told)
    assert "leave the pass (passes=) or the rule (forbid=) out" in told
    monkeypatch.setenv("CONVLOOM_CHECK", "1")
    assert refusal(network()) == "", "no law of graphs is broken"


def planted_pass(monkeypatch: pytest.MonkeyPatch, rewrite: Any) -> None:
    rewrite.__name__ = "planted"
    step = passes.Pass(rewrite, "to be found out")
    monkeypatch.setattr(passes, "PASSES", (step, *passes.PASSES))


def test_a_pass_that_tells_no_rewrite_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(graph: Graph, ledger: Ledger) -> Graph:
        graph.set_inputs("sub", graph.inputs("sub")[::-1])
        return graph

    planted_pass(monkeypatch, swap)
    told = refusal(make(lambda m, x, r: x - r, IMAGE, IMAGE))
    assert told.startswith("pass 'planted' changes what Net computes; seen at %sub (sub of sub)")


def test_what_cannot_be_evaluated_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A law that shape rules do not check: here the reference alone refuses."""

    def narrow(graph: Graph, ledger: Ledger) -> Graph:
        graph.tensors["p_conv_weight"] = graph.tensors["p_conv_weight"][:, :3].contiguous()
        monkeypatch.setattr(validate, "verify", lambda graph: None)
        return graph

    planted_pass(monkeypatch, narrow)
    told = refusal(make(lambda m, x: m.conv(x), IMAGE, conv=nn.Conv2d(IMAGE[1], 4, 3)))
    assert "seen at %conv2d (conv2d of conv2d in 'conv') cannot be evaluated: " in told


def test_a_wrong_whole_number_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(graph: Graph, ledger: Ledger) -> Graph:
        graph.set_inputs("output", graph.outputs()[::-1])
        return graph

    def function(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        return tuple(F.max_pool2d(y, 2, return_indices=True)[1] for y in (x, r))

    assert refusal(make(function, IMAGE, IMAGE)) == ""
    planted_pass(monkeypatch, swap)
    told = refusal(make(function, IMAGE, IMAGE))
    assert re.search(r"%output \(output\), result 0, element \(.*\): expected \d+, got \d+ ", told)


def test_a_result_of_another_shape_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unflatten(graph: Graph, ledger: Ledger) -> Graph:
        (value,) = graph.outputs()
        graph.set_inputs("output", graph.inputs(value.node))
        return graph

    planted_pass(monkeypatch, unflatten)
    told = refusal(make(lambda m, x: x.flatten(2), (2, 3, 4, 5)))
    assert "%output (output), result 0: expected shape (2, 3, 20), got (2, 3, 4, 5)" in told


def test_results_agree_but_for_roundings() -> None:
    exact = torch.tensor([0.0, 1.0, -3.0, torch.nan, torch.inf], dtype=torch.float64)
    assert validate.agree(exact * (1 + 1e-15), exact) and not validate.agree(exact[1:], exact)
    for at in range(len(exact)):
        other = exact.clone()
        other[at] = 0.5
        assert not validate.agree(other, exact) and not validate.agree(exact, other)
    zeros = torch.zeros(3, dtype=torch.float64)
    assert validate.agree(zeros, -zeros) and not validate.agree(zeros + 1e-9, zeros)


def test_how_far_a_right_pass_is_off_is_told() -> None:
    """Folding rounds in another order, in fp64."""
    validation = Validation()
    graph = nets.captured(*make(lambda m, x: m.norm(m.conv(x)), IMAGE, norm=nn.BatchNorm2d(4),
                                conv=nn.Conv2d(IMAGE[1], 4, 3)))  # fmt: skip
    passes.run_passes(graph, Ledger(), validation=validation)
    errors = {check.name: check.error for check in validation.checks}
    assert 0 < errors["fold_batch_norm"] <= RELATIVE and errors["drop_identities"] == 0


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.relu(m.conv(x)).sqrt().log1p() + x.mean(),
        lambda m, x: m.conv(x.log()) * x.rsqrt(),
        lambda m, x: m.conv(x) / (x[:, :1] - x[:, :1]),
        lambda m, x: F.max_pool2d(torch.relu(m.conv(x)), 2, return_indices=True),
        lambda m, x: torch.logcumsumexp(torch.relu(m.conv(x)), 1),
    ],
    ids=["finite", "finite where positive", "never finite", "whole numbers", "torch op"],
)
@pytest.mark.parametrize("batch", [None, (1, 64)])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_right_passes_pass(function: Any, batch: Any, dtype: torch.dtype | None) -> None:
    module, inputs = make(function, IMAGE, conv=nn.Conv2d(IMAGE[1], IMAGE[1], 3, padding=1))
    validation = Validation()
    graph = nets.captured(module, inputs, batch)
    graph.goal = CompileTarget(targets.parse("reference"), dtype)
    passes.run_passes(graph, Ledger(), fallback="torch", validation=validation)
    checks = {check.name: check for check in validation.checks}
    assert list(checks) == [*passes.NAMES[:-2], "choose_dtype", *passes.NAMES[-2:]]
    assert all(check.error <= RELATIVE and check.problem is None for check in checks.values())
    assert checks["fuse_epilogues"].changed and checks["choose_layout"].changed
    assert not checks["lower_batch_norm"].changed
    assert (checks["choose_dtype"].changed > 0) is (dtype is not None)
