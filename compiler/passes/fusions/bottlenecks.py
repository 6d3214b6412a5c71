"""Fuses the 1x1 convolutions of residual bottlenecks with their neighbours (`conv_chain`).

The graph is cut after the reduction of the *next* block: 3x3, expansion, residual, activation and
the next reduction are one kernel, and nothing is computed twice. Where the channels are too many
for the 3x3 to keep all of them in one tile, the expansion and the next reduction still are one.
Where a stage begins, the 1x1 convolution of the shortcut takes the place of the residual; either
it or the expansion may be the one that does the adding.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from ....kernels.fused.chains.conv_chain import ConvChain
from ....kernels.tile.conv_geometry import Conv2d
from ...fusion import estimate, refusals
from ...fusion.estimate import Fused
from ...fusion.pattern import Call, Match, NearMiss, Rule, Var
from ...fusion.rules import example
from ...graph.ir import Graph, Node, Value
from .pool_fusions import is_1x1
from .shortcuts import Joined, adder_of, adds_only_constants, join, sum_reason

LARGEST = 256
LARGEST_WITH_FRONT = 128
"""Channels of t and z that fit one tile, with and without a convolution in front."""


def _is_larger(graph: Graph, node: Node) -> bool:
    return not is_1x1(graph, node)


def _is_plain(graph: Graph, node: Node) -> bool:
    """Whether it multiplies every pixel: beside a shortcut only such a one can be the expansion."""
    return is_1x1(graph, node) and node.attributes == Conv2d()


def _shape_reason(graph: Graph, found: Match) -> str | None:
    """What the kernel cannot express."""
    for name in ("expand", "reduce"):
        node = found.nodes.get(name)
        if node is not None and (reason := refusals.not_plain_1x1(node)) is not None:
            return reason
    for name, reason_of in (
        ("front", _front_reason), ("shortcut", _shortcut_reason), ("reduce", _reduce_reason)
    ):  # fmt: skip
        if name in found.nodes and (reason := reason_of(graph, found, found.nodes[name])):
            return reason
    return None


def _front_reason(graph: Graph, found: Match, front: Node) -> str | None:
    assert isinstance(front.attributes, Conv2d)
    if front.attributes.groups != 1:
        groups = front.attributes.groups
        return (
            f"{front.name} is grouped: with all its channels in one tile it would be a dense "
            f"product, {groups} times the work"
        )
    if front.prologue:
        return refusals.has_prologue(front)
    channels = graph.spec(graph.own_inputs(front)[1]).shape[1]
    return f"{front.name} reads {channels} channels, not at least 16" if channels < 16 else None


def _shortcut_reason(graph: Graph, found: Match, shortcut: Node) -> str | None:
    assert isinstance(shortcut.attributes, Conv2d)
    if any(shortcut.attributes.padding):
        return f"the shortcut {shortcut.name} is padded; the kernel reads it without a border"
    return sum_reason(graph, found)


def _reduce_reason(graph: Graph, found: Match, reduce: Node) -> str | None:
    for value in graph.operands(reduce):
        if not graph.is_constant(value):
            return f"{reduce.name} adds the computed tensor {value}; the kernel adds only constants"
    return None


def _guard(graph: Graph, found: Match) -> str | None:
    if (reason := _shape_reason(graph, found)) is not None:
        return reason
    if estimate.dtype_of(graph, found.root.spec) is torch.float32:
        return "float32 needs too many registers; float16 and bfloat16 are fused"
    limit = LARGEST_WITH_FRONT if "front" in found.nodes else LARGEST
    narrow = [found.nodes["reduce"].spec.shape[1]] if "reduce" in found.nodes else []
    middle = graph.spec(graph.own_inputs(found.nodes["expand"])[0]).shape[1]
    if max(middle, *narrow, 0) > limit:
        return f"{max(middle, *narrow, 0)} channels do not fit one tile (at most {limit})"
    return None


def _build(graph: Graph, found: Match) -> Fused:
    """The chain's attributes and inputs, in the order of its slots."""
    front, expand, reduce, shortcut = (
        found.nodes.get(name) for name in ("front", "expand", "reduce", "shortcut")
    )
    assert expand is not None
    wide, joined = expand, Joined(expand.epilogue, graph.operands(expand))
    if shortcut is not None:
        wide, joined = adder_of(graph, found)[0], join(graph, found)
    inputs: list[Value] = [graph.own_inputs(front or expand)[0]]
    if front is not None:
        inputs += [graph.own_inputs(front)[1], *graph.operands(front)]
    inputs.append(graph.own_inputs(expand)[1])
    if shortcut is not None:
        inputs += graph.own_inputs(shortcut)
    sums = {len(inputs): joined.added} if joined.added else {}
    inputs += joined.operands
    if reduce is not None:
        inputs += [graph.own_inputs(reduce)[1], *graph.operands(reduce)]
    attributes = ConvChain(
        front=_geometry(front),
        after_front=front.epilogue if front is not None else (),
        after_expand=joined.stages,
        has_reduce=reduce is not None,
        after_reduce=reduce.epilogue if reduce is not None else (),
        shortcut=_geometry(shortcut),
    )
    results = {wide.name: 0} | ({reduce.name: 1} if reduce is not None else {})
    return Fused("conv_chain", attributes, tuple(inputs), results, sums=sums)


def _geometry(node: Node | None) -> Conv2d | None:
    if node is None:
        return None
    assert isinstance(node.attributes, Conv2d)
    return node.attributes


@dataclass(frozen=True)
class Links:
    """Which links a chain has besides its expansion.

    shortcut: which term of the sum it is, as the epilogues tell them apart: the first is the one
    that adds; None for a chain that adds what somebody else computed, or nothing.
    """

    front: bool
    reduce: bool
    shortcut: Literal["first", "second"] | None = None


def _pattern(links: Links) -> Call:
    before = FRONT if links.front else Var("t")
    product = ("conv2d", before, Var("w2"))
    beside = ("conv2d", Var("s"), Var("ws"))
    kept = links.reduce
    if links.shortcut is None:
        wide = Call(*product, name="expand", kept=kept, where=is_1x1)
    elif links.shortcut == "second":
        added = Call(*beside, name="shortcut", where=_is_added_1x1)
        wide = Call(*product, name="expand", kept=kept, where=_is_plain, operand=added)
    else:
        added = Call(*product, name="expand", where=_is_added_plain)
        wide = Call(*beside, name="shortcut", kept=kept, where=is_1x1, operand=added)
    if not links.reduce:
        return wide
    return Call("conv2d", wide, Var("w3"), name="reduce", where=is_1x1)


def _is_added_1x1(graph: Graph, node: Node) -> bool:
    return is_1x1(graph, node) and adds_only_constants(graph, node)


def _is_added_plain(graph: Graph, node: Node) -> bool:
    return _is_plain(graph, node) and adds_only_constants(graph, node)


def _bottleneck(*, front: bool, reduce: bool, **changes: Any) -> Any:
    channels, mid = 32, 16
    layers: dict[str, nn.Module] = {
        "a": nn.Conv2d(channels, mid, 1),
        "b": nn.Conv2d(mid, mid, changes.get("filter", 3), padding=changes.get("filter", 3) // 2,
                       groups=changes.get("groups", 1)),
        "c": nn.Conv2d(mid, channels, 1),
        "d": nn.Conv2d(channels, mid, 1, stride=changes.get("stride", 1)),
        "e": nn.Conv2d(mid, mid, 3, padding=1, stride=changes.get("stride", 1)),
    }  # fmt: skip

    def run(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = torch.relu(m["a"](x))
        t = torch.relu(m["b"](t)) if front else torch.relu(m["e"](t)).tanh().square()
        y = torch.relu(m["c"](t) + x) if "stride" not in changes else torch.relu(m["c"](t))
        return y, (torch.relu(m["d"](y)) if reduce else y)

    module, inputs = example(run, (2, channels, 6, 5), **layers)
    if changes.get("dtype", torch.float16) is torch.float16:
        return module.half(), tuple(x.half() for x in inputs)
    return module, inputs


def _x_chain(before: Any = None, between: Any = None, beside: bool = False) -> Any:
    """An expansion and the reduction behind it; before, between: what else their inputs pass."""
    layers = {"c": nn.Conv2d(16, 32, 1), "d": nn.Conv2d(32, 16, 1)}

    def run(m: Any, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = m["c"](before(t) if before else t) + x
        y = y if between else torch.relu(y)
        z = m["d"](between(y) if between else y)
        return y, torch.relu(z + t if beside else z)

    module, inputs = example(run, (2, 16, 6, 5), (2, 32, 6, 5), **layers)
    return module.half(), tuple(x.half() for x in inputs)


def _back_to_back() -> Any:
    layers = {"b": nn.Conv2d(16, 16, 3, padding=1), "c": nn.Conv2d(16, 32, 1)}
    module, inputs = example(
        lambda m, x: torch.relu(m["c"](torch.relu(m["b"](x)))), (2, 16, 6, 5), **layers
    )
    return module.half(), tuple(x.half() for x in inputs)


def _stage_start(links: Links, padding: int = 0) -> Any:
    """The first block of a stage; the order of the sum decides which convolution adds."""
    layers: dict[str, nn.Module] = {
        "b": nn.Conv2d(16, 16, 3, padding=1),
        "c": nn.Conv2d(16, 32, 1),
        "s": nn.Conv2d(24, 32, 1, stride=2, padding=padding),
        "d": nn.Conv2d(32, 16, 1),
    }

    def run(m: Any, x: torch.Tensor, r: torch.Tensor) -> Any:
        t = torch.relu(m["b"](x)) if links.front else x
        terms = (m["s"](r), m["c"](t)) if links.shortcut == "first" else (m["c"](t), m["s"](r))
        y = torch.relu(terms[0] + terms[1])
        return (y, torch.relu(m["d"](y))) if links.reduce else y

    shapes = (2, 16, 6, 5), (2, 24, 12 - 2 * padding, 10 - 2 * padding)
    module, inputs = example(run, *shapes, **layers)
    return module.half(), tuple(x.half() for x in inputs)


def _wide_chain() -> Any:
    layers = {"c": nn.Conv2d(512, 64, 1), "d": nn.Conv2d(64, 16, 1)}
    module, inputs = example(lambda m, x: m["d"](m["c"](x)), (1, 512, 2, 2), **layers)
    return module.half(), tuple(x.half() for x in inputs)


FRONT = Call("conv2d", Var("x"), Var("w1"), name="front", where=_is_larger)
NEAR_MISSES = (
    NearMiss(lambda: _bottleneck(front=True, reduce=True, dtype=torch.float32), "registers"),
    NearMiss(lambda: _bottleneck(front=True, reduce=True, stride=2), "with stride 1"),
    NearMiss(lambda: _bottleneck(front=True, reduce=True, groups=4), "grouped"),
)
STAGE_START = Links(True, True, "second")


def _rule(label: str, name: str, links: Links, **changes: Any) -> Rule:
    options = {"example": partial(_stage_start, links), **changes}
    return Rule(name, _pattern(links), guard=_guard, label=label, build=_build, **options)


RULES = (
    _rule(
        "rotated-bottleneck",
        "conv1x1(y = conv1x1(conv(x))) => conv_chain(x) giving y and the reduction",
        Links(True, True),
        example=lambda: _bottleneck(front=True, reduce=True),
        near_misses=NEAR_MISSES,
    ),
    _rule(
        "rotated-bottleneck",
        "conv1x1(y = conv1x1(conv(x)) + conv1x1(s)) => conv_chain(x, s) giving y and the reduction",
        STAGE_START,
        near_misses=(NearMiss(lambda: _stage_start(STAGE_START, padding=1), "is padded"),),
    ),
    _rule(
        "rotated-bottleneck",
        "conv1x1(y = conv1x1(s) + conv1x1(conv(x))) => conv_chain(x, s) giving y and the reduction",
        Links(True, True, "first"),
    ),
    _rule(
        "expand-reduce",
        "conv1x1(y = conv1x1(t)) => conv_chain(t) giving y and the reduction",
        Links(False, True),
        example=_x_chain,
        near_misses=(
            NearMiss(_wide_chain, "do not fit one tile"),
            NearMiss(lambda: _x_chain(before=torch.tanh), "has a prologue"),
            NearMiss(lambda: _x_chain(between=torch.tanh), "has a prologue"),
            NearMiss(lambda: _x_chain(beside=True), "adds the computed tensor"),
        ),
    ),
    _rule(
        "expand-reduce",
        "conv1x1(y = conv1x1(t) + conv1x1(s)) => conv_chain(t, s) giving y and the reduction",
        Links(False, True, "second"),
    ),
    _rule(
        "expand-reduce",
        "conv1x1(y = conv1x1(s) + conv1x1(t)) => conv_chain(t, s) giving y and the reduction",
        Links(False, True, "first"),
    ),
    _rule(
        "conv-1x1",
        "conv1x1(conv(x)) => conv_chain(x)",
        Links(True, False),
        example=_back_to_back,
    ),
    _rule(
        "conv-1x1",
        "conv1x1(conv(x)) + conv1x1(s) => conv_chain(x, s)",
        Links(True, False, "second"),
    ),
    _rule(
        "conv-1x1",
        "conv1x1(s) + conv1x1(conv(x)) => conv_chain(x, s)",
        Links(True, False, "first"),
    ),
)
