"""Chains that read an earlier value of their own: x·sigmoid(x) written out, x·g·n + b + x."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.graph.ir import Graph
from convloom.compiler.graph.ledger import Ledger
from convloom.compiler.graph.verify import verify
from convloom.compiler.passes import LABELS
from convloom.compiler.passes.diamonds import LABEL, RULE, fuse_diamonds
from convloom.errors import GraphError
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.epilogue import Access, Stage
from torch import nn

from . import nets

Function = Callable[[Any, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """A layer and a function of its result, with two parameters per channel."""

    def __init__(self, function: Function, layer: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer or nn.Conv2d(16, 16, 3, padding=1)
        self.function = function
        self.g, self.b = (nn.Parameter(torch.randn(16, 1, 1)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, self.layer(x))


DIAMONDS: dict[str, Function] = {
    "silu": lambda m, v: v * (1 / (1 + torch.exp(-v))),
    "mish": lambda m, v: v * torch.tanh(torch.log(1 + torch.exp(v))),
    "squareplus": lambda m, v: (v + torch.sqrt(v * v + 4)) / 2,
    "scaled and shifted": lambda m, v: v * m.g * 2 + m.b + v,
    "on the right": lambda m, v: v - (m.g - v) * 2,
    "twice": lambda m, v: v + v,
    "one in another": lambda m, v: v * (1 - (v + torch.tanh(v))),
    "an inner value read twice": lambda m, v: torch.tanh(v) * (torch.tanh(v) - v),
    "one behind another": lambda m, v: (v + torch.tanh(v)) * torch.sigmoid(v + torch.tanh(v)),
}


def compiled(function: Function, **options: Any) -> tuple[Any, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    net, x = Net(function).eval(), torch.randn(2, 16, 7, 5)
    return convloom.compile(net, (x,), target="interpreter", **options), net, x


def convolutions(exe: Any) -> list[Any]:
    return [node for node in exe.graph.compute_nodes() if node.op not in ("relayout", "stem_input")]


@pytest.mark.parametrize("name", DIAMONDS)
@pytest.mark.interpreter
def test_a_diamond_behind_a_convolution_is_its_epilogue(name: str) -> None:
    exe, net, x = compiled(DIAMONDS[name])
    (conv,) = convolutions(exe)
    assert any(stage.back is not None for stage in conv.epilogue)
    torch.testing.assert_close(exe(x), net(x), rtol=1e-4, atol=1e-5)


def _read_inside(m: Any, v: torch.Tensor) -> torch.Tensor:
    inner = torch.tanh(v)
    return torch.cat((v * inner, inner), 1)


NEAR: dict[str, Function] = {
    "the inner value is read elsewhere": _read_inside,
    "something else than a function stands between": lambda m, v: v + torch.softmax(v, 1),
    "the value is smaller than the result": lambda m, v: (
        torch.tanh(v.mean((2, 3), keepdim=True)) * v.mean((2, 3), keepdim=True) + v
    ),
}


MASKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "of a mask": lambda k: k ^ (k & ~k),
    "with another": lambda k: (k | ~(k & (k ^ True))) & k,
    "as numbers": lambda k: k.float() * 2 + k.float(),
}


@pytest.mark.parametrize("target", ["interpreter", "reference"])
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.interpreter
def test_what_is_chained_of_masks_is_a_mask(name: str, target: str) -> None:
    module, inputs = nets.make(lambda m, x: MASKS[name](x > 0), (2, 3, 5))
    exe = convloom.compile(module, inputs, target=target)
    assert torch.equal(exe(*inputs), module(*inputs))


@pytest.mark.parametrize("name", NEAR)
@pytest.mark.interpreter
def test_what_is_no_diamond_is_right_all_the_same(name: str) -> None:
    exe, net, x = compiled(NEAR[name])
    assert not any(
        stage.back is not None
        for node in exe.graph.compute_nodes()
        for stage in node.epilogue
        if node.spec.shape == (2, 16, 7, 5)
    )
    torch.testing.assert_close(exe(x), net(x), rtol=1e-4, atol=1e-5)


def test_a_diamond_can_be_forbidden() -> None:
    exe, _, _ = compiled(DIAMONDS["twice"], forbid=(LABEL,))
    assert LABELS.all[RULE] == LABEL
    (refused,) = [event for event in exe.ledger.events if event.rule == RULE]
    assert refused.reason == f"forbidden by forbid={LABEL!r}" and not refused.accepted
    assert not any(stage.back is not None for node in exe.graph.nodes() for stage in node.epilogue)


def test_the_pass_stands_before_the_fusion_of_epilogues() -> None:
    names = [step.name for step in convloom.compiler.passes.PASSES]
    assert names.index(fuse_diamonds.__name__) + 1 == names.index("fuse_epilogues")


@pytest.mark.interpreter
def test_a_file_keeps_what_a_stage_reads() -> None:
    exe, _, x = compiled(DIAMONDS["squareplus"])
    loaded = convloom.load(io.BytesIO(exe.to_bytes()))
    assert torch.equal(loaded(x), exe(x))


class Heads(nn.Module):
    """Two convolutions of one tensor, each with an activation written out."""

    def __init__(self, first: Function, second: Function) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.first, self.second = first, second

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.first(self, self.a(x)), self.second(self, self.b(x))


@pytest.mark.parametrize("names", [("silu", "silu"), ("silu", "mish"), ("twice", "squareplus")])
@pytest.mark.interpreter
def test_merged_convolutions_keep_their_diamonds(names: tuple[str, str]) -> None:
    torch.manual_seed(0)
    net, x = Heads(*(DIAMONDS[name] for name in names)).eval(), torch.randn(2, 16, 5, 4)
    exe = convloom.compile(net, (x,), target="interpreter", force=("siblings",))
    for ours, theirs in zip(exe(x), net(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    (merged,) = [node for node in exe.graph.compute_nodes() if node.op == "conv2d"]
    limited = [stage for stage in merged.epilogue if stage.channels is not None]
    assert bool(limited) == (names[0] != names[1])


class Shortcut(nn.Module):
    """A sum of two convolutions of which the first result is read again."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        v = self.a(x)
        return (v + self.b(y)) * v


@pytest.mark.interpreter
def test_a_sum_that_is_read_again_without_its_shortcut_is_no_shared_sum() -> None:
    torch.manual_seed(0)
    net, x, y = Shortcut().eval(), torch.randn(2, 16, 5, 4), torch.randn(2, 16, 5, 4)
    exe = convloom.compile(net, (x, y), target="interpreter")
    reasons = [event.reason for event in exe.ledger.events if not event.accepted]
    assert any("reads again what it was before it added" in str(reason) for reason in reasons)
    torch.testing.assert_close(exe(x, y), net(x, y), rtol=1e-4, atol=1e-5)


def test_sums_that_are_read_again_are_not_reordered() -> None:
    reads, sizes = (Access((0, 1), 0), Access((8, 1), 0)), (4, 8)
    sums = (Stage("add"), Stage("add"))
    plain = ep.generate((*sums, Stage("mul", back=2)), reads, sizes).source
    again = ep.generate((*sums, Stage("mul", back=1)), reads, sizes).source
    assert plain.index("operand1 =") < plain.index("operand0 =")
    assert again.index("operand0 =") < again.index("operand1 =")
    assert "earlier0 = acc" in plain and "earlier1 = acc" in again


def test_a_chain_may_not_read_what_was_before_it() -> None:
    exe, _, _ = compiled(DIAMONDS["twice"])
    (conv,) = convolutions(exe)
    exe.graph.update(conv.name, epilogue=(*conv.epilogue[:-1], Stage("add", back=7)))
    with pytest.raises(GraphError, match="a stage reads what there was before the first"):
        verify(exe.graph)


def test_no_diamond_copies_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a network of many takes as many times as long as one of few, not its square."""
    copies: list[str] = []
    copy = Graph.copy

    def counted(graph: Graph) -> Graph:
        copies.append(graph.name)
        return copy(graph)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            x = torch.relu(x)
            x = x * torch.sigmoid(x * 2)
        return x

    graph = nets.captured(*nets.make(forward, (2, 3)))
    monkeypatch.setattr(Graph, "copy", counted)
    chains = [node for node in fuse_diamonds(graph, Ledger()).nodes() if node.epilogue]
    assert len(chains) == 5 and not copies
