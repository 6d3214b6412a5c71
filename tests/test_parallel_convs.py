"""Parallel convolutions of one tensor, added up: RepVGG's form in training and its deployed one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
from convloom import zoo
from convloom.compiler.api import lowered
from convloom.compiler.graph.ir import Graph
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.passes import parallel_convs, run_passes
from convloom.kernels.contract.epilogue import Stage
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from . import nets

IMAGE = (2, 6, 9, 8)


def merged(module: nn.Module, inputs: Any) -> tuple[Graph, Ledger]:
    ledger = Ledger()
    return run_passes(nets.captured(module, inputs), ledger), ledger


def reasons(ledger: Ledger) -> list[str]:
    events = [event for event in ledger.events if event.rule == parallel_convs.RULE]
    return [event.reason for event in events if not event.accepted]


def convolutions(graph: Graph) -> int:
    return sum(node.op == "conv2d" for node in graph.nodes())


def layers(**changes: Any) -> dict[str, nn.Module]:
    """A 3x3 and a 1x1 convolution and a normalisation of 6 channels; changes: of the 1x1."""
    options = {"kernel_size": 1, "stride": 1, "groups": 1, **changes}
    return {
        "large": nn.Conv2d(6, 6, 3, padding=1),
        "small": nn.Conv2d(6, 6, **options),
        "norm": nn.BatchNorm2d(6),
    }


@given(seed=st.integers(0, 10**6))
def test_any_sum_of_branches_keeps_its_value(seed: int) -> None:
    draw = random.Random(seed)
    groups, stride = draw.choice([1, 1, 2, 6]), draw.choice([1, 1, 2])
    dilation, size = draw.choice([1, 1, 2]), draw.choice([3, 5])
    parts: dict[str, nn.Module] = {}
    for at in range(draw.randint(2, 4)):
        r = draw.choice([1, 1, 3, size])
        conv = nn.Conv2d(6, 6, r, stride, r // 2 * dilation, dilation, groups, draw.random() < 0.5)
        parts[f"p{at}"] = nn.Sequential(conv, nn.BatchNorm2d(6)) if draw.random() < 0.5 else conv
    if stride == 1 and draw.random() < 0.6:
        parts["identity"] = nn.BatchNorm2d(6)
    if draw.random() < 0.3:
        parts["other"] = nn.Sequential(nn.Conv2d(6, 6, 1, stride), nn.Sigmoid())
    order = draw.sample(list(parts), len(parts))
    is_left = [draw.random() < 0.5 for _ in order]

    def function(m: Any, x: torch.Tensor) -> torch.Tensor:
        total = getattr(m, order[0])(x)
        for name, left in zip(order[1:], is_left, strict=False):
            y = getattr(m, name)(x)
            total = total + y if left else y + total
        return torch.relu(total)

    module, inputs = nets.make(function, IMAGE, seed=seed, **parts)
    before = nets.captured(module, inputs)
    after, _ = merged(module, inputs)
    nets.assert_same_meaning(before, after, inputs)
    nets.forget(module)


def test_a_layer_of_every_kind_becomes_one_convolution() -> None:
    for groups in (1, 2, 6):
        module, inputs = nets.make(
            lambda m, x: torch.relu(m.large(x) + m.small(x) + m.norm(x)),
            IMAGE,
            **{**layers(groups=groups), "large": nn.Conv2d(6, 6, 3, padding=1, groups=groups)},
        )
        graph, ledger = merged(module, inputs)
        assert convolutions(graph) == 1 and len(graph.compute_nodes()) <= 3
        assert reasons(ledger) == []
        exe = convloom.compile(module, inputs, target="interpreter")
        nets.check(exe(*inputs), module, inputs)


def test_filters_of_one_grid_are_added_at_their_places() -> None:
    """A 3x3 with a dilation of 2 and a 1x1; a 5x5 and a 3x3 off its centre."""
    module, inputs = nets.make(
        lambda m, x: m.wide(x) + m.point(x) + (m.five(x) + m.corner(x)),
        IMAGE,
        wide=nn.Conv2d(6, 6, 3, padding=2, dilation=2),
        point=nn.Conv2d(6, 6, 1),
        five=nn.Conv2d(6, 6, 5, padding=2),
        corner=nn.Sequential(nn.ZeroPad2d((2, 0, 2, 0)), nn.Conv2d(6, 6, 3)),
    )
    before = nets.captured(module, inputs)
    graph, _ = merged(module, inputs)
    nets.assert_same_meaning(before, graph, inputs)
    assert convolutions(graph) < 4


@pytest.mark.parametrize(
    ("function", "changes", "reason"),
    [
        (lambda m, x: m.large(x) + m.small(x), {"groups": 2}, "has groups 2, conv2d has 1"),
        (
            lambda m, x: m.large(x[:, :, ::2, ::2]) + m.small(x) + m.large(x)[:, :, ::2, ::2],
            {"stride": 2},
            None,
        ),
        (
            lambda m, x: m.large(x) + torch.relu(m.small(x)) + m.small(x),
            {},
            None,
        ),
        (
            lambda m, x: m.large(x) + m.small(x),
            {"kernel_size": (1, 5), "padding": (0, 2)},
            "reads pixels that",
        ),
        (
            lambda m, x: m.large(x) + m.small(x),
            {"kernel_size": 3, "padding": 2, "dilation": 2},
            "reads pixels that",
        ),
        (lambda m, x: m.large(x) + (m.small(x) + m.table), {}, None),
    ],
)
def test_branches_that_are_no_one_convolution(
    function: Callable[..., Any], changes: dict[str, Any], reason: str | None
) -> None:
    module, inputs = nets.make(function, IMAGE, **layers(**changes))
    module.register_buffer("table", torch.randn(6, 9, 8))
    before = nets.captured(module, inputs)
    graph, ledger = merged(module, inputs)
    nets.assert_same_meaning(before, graph, inputs)
    if reason is not None:
        assert any(reason in text for text in reasons(ledger)), reasons(ledger)
        assert convolutions(graph) + sum(node.op == "conv_sum" for node in graph.nodes()) >= 1
    nets.forget(module)


def test_a_stride_leaves_out_pixels_that_a_normalisation_keeps() -> None:
    module, inputs = nets.make(
        lambda m, x: m.large(x) + m.norm(x),
        (2, 6, 1, 1),
        large=nn.Conv2d(6, 6, 3, 2, 1),
        norm=nn.BatchNorm2d(6),
    )
    _, ledger = merged(module, inputs)
    assert any("keeps every pixel, conv2d has stride (2, 2)" in text for text in reasons(ledger))


def test_a_normalisation_with_more_behind_it_stays() -> None:
    module, inputs = nets.make(lambda m, x: m.large(x) + m.norm(x), IMAGE, **layers())
    graph = nets.captured(module, inputs).copy()
    norm = next(node for node in graph.nodes() if node.op == "batch_norm")
    graph.update(norm.name, epilogue=(Stage("relu"),))
    ledger = Ledger()
    after = parallel_convs.merge_parallel_convolutions(graph.copy(), ledger)
    assert any("more than scale and shift each channel" in text for text in reasons(ledger))
    nets.assert_same_meaning(graph, after, inputs)


def test_a_constant_for_every_pixel_is_no_bias() -> None:
    """It stays outside: it may ride on the convolution already when the graph is asked."""
    module, inputs = nets.make(lambda m, x: m.large(x) + m.small(x), IMAGE, **layers())
    graph = nets.captured(module, inputs).copy()
    conv = next(node for node in graph.nodes() if node.op == "conv2d")
    table = graph.add_constant(torch.randn(6, 9, 8), "table", torch.float32)
    graph.set_inputs(conv.name, (*graph.own_inputs(conv), table))
    ledger = Ledger()
    after = parallel_convs.merge_parallel_convolutions(graph.copy(), ledger)
    assert any("more than convolve with constants" in text for text in reasons(ledger))
    nets.assert_same_meaning(graph, after, inputs)


def test_an_inner_result_that_is_read_stays() -> None:
    def function(m: Any, x: torch.Tensor) -> Any:
        y = m.small(x)
        return m.large(x) + y, y

    module, inputs = nets.make(function, IMAGE, **layers())
    graph, _ = merged(module, inputs)
    assert parallel_convs.RULE not in {rule for node in graph.nodes() for rule in node.rules}
    exe = convloom.compile(module, inputs, target="interpreter")
    for got, expected in zip(exe(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_pixels_beside_a_cross_are_not_read() -> None:
    """0 * Inf is NaN: a 3x3 filter around a 1x3 and a 3x1 would spread it to the corners."""
    module, (x,) = nets.make(
        lambda m, x: m.row(x) + m.column(x),
        IMAGE,
        row=nn.Conv2d(6, 6, (1, 3), padding=(0, 1)),
        column=nn.Conv2d(6, 6, (3, 1), padding=(1, 0)),
    )
    x[0, 2, 4, 4] = float("inf")
    exe = convloom.compile(module, (x,), target="interpreter")
    assert torch.equal(exe(x).isfinite(), module(x).isfinite())


def test_the_user_may_forbid_it() -> None:
    module, inputs = nets.make(lambda m, x: m.large(x) + m.small(x), IMAGE, **layers())
    exe = convloom.compile(module, inputs, target="interpreter", forbid=[parallel_convs.LABEL])
    assert parallel_convs.RULE not in {rule for node in exe.graph.nodes() for rule in node.rules}
    exe = convloom.compile(module, inputs, target="interpreter", force=[parallel_convs.LABEL])
    assert [kernel.step.op for kernel in exe.kernels].count("conv2d") == 1


def test_weights_are_added_up_in_double_precision() -> None:
    """In fp32 the small filter would be lost beside the large one, and return when it is taken
    off."""
    module, (x,) = nets.make(
        lambda m, x: m.large(x) + m.small(x) + m.less(x), IMAGE,
        **layers(bias=False), less=nn.Conv2d(6, 6, 3, padding=1),
    )  # fmt: skip
    for name, scale in (("large", 1e9), ("less", -1e9)):
        nn.init.constant_(getattr(module, name).weight, scale)
        nn.init.zeros_(getattr(module, name).bias)
    exe = convloom.compile(module, (x,), target="interpreter")
    torch.testing.assert_close(exe(x), module.small(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_repvgg_in_training_form_has_the_kernels_of_its_deployed_form(dtype: Any) -> None:
    x = torch.randn(32, 3, 224, 224)
    for name in ("repvgg_a0", "repvgg_a0_deploy"):
        _, plan, _ = lowered(zoo.build(name).eval(), (x,), target="cuda:sm_90", dtype=dtype)
        assert plan.summary()["kernels"] == 24
