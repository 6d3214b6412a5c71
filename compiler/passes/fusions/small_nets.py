"""Makes one kernel of a whole small network (`small_net`): convolutions that pool their own
results, and the classifier behind them.

Runs on what other fusions have made, so that it need not know how a convolution takes its pooling
in or linear layers become a head.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ....kernels.fused import links, small_net
from ....kernels.fused.conv_pool import ConvPool
from ....kernels.fused.small_net import SmallNet
from ...fusion import partition
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Match, NearMiss, Rule
from ...fusion.rules import example
from ...graph.ir import Graph, Node, Value
from ...graph.ledger import Ledger
from .heads import LAYERS, as_head

LABEL = "small-net"
MOST_INTERPRETED = 8
"""Images that the interpreter is given one after the other."""


def _layers(found: Match) -> list[Node]:
    """The convolutions, in the order of the data."""
    names = sorted(name for name in found.nodes if name.startswith("layer"))
    return [found.nodes[name] for name in names]


def _parts(graph: Graph, found: Match) -> tuple[SmallNet, tuple[Value, ...]]:
    """Attributes and inputs of the whole."""
    layers = _layers(found)
    inputs = [graph.own_inputs(layers[0])[0]]
    attributes = []
    for node in layers:
        assert isinstance(node.attributes, ConvPool)
        attributes.append(node.attributes)
        inputs += graph.own_inputs(node)[1:]
    head, last = as_head(graph, found.root)
    return SmallNet(tuple(attributes), head), (*inputs, *last[1:])


def _guard(graph: Graph, found: Match) -> str | None:
    for node in _layers(found):
        if node.epilogue:
            return f"{node.name} goes on after its pooling"
    root = found.root
    if root.prologue:
        return f"{root.name} has a prologue"
    if graph.goal is not None and not graph.goal.target.is_gpu:
        images = root.spec.shape[0]
        if images > MOST_INTERPRETED:
            return f"off the GPU {images} images would be computed one after the other"
    attributes, inputs = _parts(graph, found)
    own = links.tensors(attributes.links, inputs)
    for name in links.weights(attributes.head.chain):
        if not graph.is_constant(own[name]):
            return f"a weight of {root.name} is computed"
    return small_net.unsupported(attributes, tuple(graph.spec(value) for value in inputs))


def _build(graph: Graph, found: Match) -> Fused:
    attributes, inputs = _parts(graph, found)
    return Fused("small_net", attributes, inputs, {found.root.name: 0})


def _pattern(layers: int) -> Call:
    """A classifier behind that many convolutions."""
    conv: Call | None = None
    for number in range(layers):
        conv = Call("conv_pool", first=conv, name=f"layer{number}")
    return Call(LAYERS, first=Call("flatten_pixels", conv))


def _equation(layers: int) -> str:
    inner = "x"
    for _ in range(layers):
        inner = f"conv_pool({inner}, w)"
    return f"head(flatten({inner})) => small_net(x, ...)"


class _Net(nn.Module):
    """LeNet-like: convolutions, each with its pooling, and two linear layers."""

    def __init__(
        self, layers: int, channels: int = 8, hidden: int = 12, after: Any = None
    ) -> None:
        super().__init__()
        self.after = after
        widths = [1, *(channels for _ in range(layers))]
        self.convs = nn.ModuleList(nn.Conv2d(*pair, 3, padding=1) for pair in pairwise(widths))
        pixels = (16 >> layers) ** 2
        self.fc1, self.fc2 = nn.Linear(channels * pixels, hidden), nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = nn.functional.max_pool2d(conv(x).relu(), 2)
            x = self.after(x) if self.after else x
        result: Tensor = self.fc2(self.fc1(x.flatten(1)).relu())
        return result


def _example(layers: int, **changes: Any) -> Any:
    net = _Net(layers, **changes)
    return example(lambda m, x: m["net"](x), (2, 1, 16, 16), net=net)


def _rule(layers: int, near_misses: tuple[NearMiss, ...] = ()) -> Rule:
    return Rule(
        _equation(layers),
        _pattern(layers),
        build=_build,
        guard=_guard,
        example=partial(_example, layers),
        near_misses=near_misses,
        label=LABEL,
    )


RULES = (
    _rule(3),
    _rule(
        2,
        (
            NearMiss(lambda: _example(2, channels=72), "do not fit one tile"),
            NearMiss(lambda: _example(2, channels=64, hidden=500), "do not fit a multiprocessor"),
            NearMiss(lambda: _example(2, after=torch.tanh), "goes on after its pooling"),
        ),
    ),
    _rule(1),
)
"""The longest first: of equal savings the earlier rule is taken."""


def fuse_small_nets(graph: Graph, ledger: Ledger) -> Graph:
    """Joins the layers of a small network where that saves time on the goal's machine."""
    return partition.choose(graph, RULES, ledger)
