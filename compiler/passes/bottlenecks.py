"""Fuses the 1x1 convolutions of residual bottlenecks with their neighbours (`conv_chain`).

The graph is cut after the reduction of the *next* block: 3x3, expansion, residual, activation and
the next reduction are one kernel, and nothing is computed twice. Where the channels are too many
for the 3x3 to keep all of them in one tile, the expansion and the next reduction still are one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ...kernels.conv2d import Conv2d
from ...kernels.conv_chain import ConvChain
from .. import estimate
from ..fusions import example
from ..ir import Graph, Node, Value
from ..pattern import Call, Fused, Match, NearMiss, Rule, Var

LARGEST = 256
LARGEST_WITH_FRONT = 128
"""Channels of t and z that fit one tile, with and without a convolution in front."""


def _is_1x1(graph: Graph, node: Node) -> bool:
    return graph.spec(graph.own_inputs(node)[1]).shape[2:] == (1, 1)


def _is_larger(graph: Graph, node: Node) -> bool:
    return not _is_1x1(graph, node)


def _shape_reason(graph: Graph, found: Match) -> str | None:
    """What the kernel cannot express."""
    for name in ("expand", "reduce"):
        node = found.nodes.get(name)
        if node is not None and node.attributes != Conv2d():
            return f"{node.name} is not dense with stride 1 and no padding: {node.attributes}"
        if node is not None and node.prologue:
            return f"{node.name} has a prologue"
    front = found.nodes.get("front")
    if front is not None:
        assert isinstance(front.attributes, Conv2d)
        if front.attributes.groups != 1:
            return f"{front.name} is grouped"
        if front.prologue:
            return f"{front.name} has a prologue"
        weight = graph.spec(graph.own_inputs(front)[1])
        if weight.shape[1] < 16:
            return f"{front.name} reads only {weight.shape[1]} channels"
    reduce = found.nodes.get("reduce")
    if reduce is not None:
        for value in graph.operands(reduce):
            if not graph.is_constant(value):
                return f"{reduce.name} adds the computed tensor {value}"
    return None


def _guard(graph: Graph, found: Match) -> str | None:
    if (reason := _shape_reason(graph, found)) is not None:
        return reason
    if estimate.dtype_of(graph, found.root.spec) is torch.float32:
        return "fp32 products need three times the registers of half precision"
    limit = LARGEST_WITH_FRONT if "front" in found.nodes else LARGEST
    narrow = [found.nodes["reduce"].spec.shape[1]] if "reduce" in found.nodes else []
    middle = graph.spec(graph.own_inputs(found.nodes["expand"])[0]).shape[1]
    if max(middle, *narrow, 0) > limit:
        return f"{max(middle, *narrow, 0)} channels do not fit one tile (at most {limit})"
    return None


def _build(graph: Graph, found: Match) -> Fused:
    """The chain's attributes and inputs, in the order of its slots."""
    front, expand = found.nodes.get("front"), found.nodes["expand"]
    reduce = found.nodes.get("reduce")
    inputs: list[Value] = [graph.own_inputs(front or expand)[0]]
    for node in (front, expand, reduce):
        if node is not None:
            inputs += [graph.own_inputs(node)[1], *graph.operands(node)]
    front_attributes = front.attributes if front is not None else None
    assert front_attributes is None or isinstance(front_attributes, Conv2d)
    attributes = ConvChain(
        front=front_attributes,
        after_front=front.epilogue if front is not None else (),
        after_expand=expand.epilogue,
        has_reduce=reduce is not None,
        after_reduce=reduce.epilogue if reduce is not None else (),
    )
    results = {expand.name: 0} | ({reduce.name: 1} if reduce is not None else {})
    return Fused("conv_chain", attributes, tuple(inputs), results)


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


def _x_chain() -> Any:
    layers = {"c": nn.Conv2d(16, 32, 1), "d": nn.Conv2d(32, 16, 1)}

    def run(m: Any, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(m["c"](t) + x)
        return y, torch.relu(m["d"](y))

    module, inputs = example(run, (2, 16, 6, 5), (2, 32, 6, 5), **layers)
    return module.half(), tuple(x.half() for x in inputs)


def _back_to_back() -> Any:
    layers = {"b": nn.Conv2d(16, 16, 3, padding=1), "c": nn.Conv2d(16, 32, 1)}
    module, inputs = example(
        lambda m, x: torch.relu(m["c"](torch.relu(m["b"](x)))), (2, 16, 6, 5), **layers
    )
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
RULES = (
    Rule(
        "conv1x1(y = conv1x1(conv(x))) => conv_chain(x) giving y and the reduction",
        Call(
            "conv2d",
            Call("conv2d", FRONT, Var("w2"), name="expand", kept=True, where=_is_1x1),
            Var("w3"),
            name="reduce",
            where=_is_1x1,
        ),
        example=lambda: _bottleneck(front=True, reduce=True),
        guard=_guard,
        near_misses=NEAR_MISSES,
        label="rotated-bottleneck",
        build=_build,
    ),
    Rule(
        "conv1x1(y = conv1x1(t)) => conv_chain(t) giving y and the reduction",
        Call(
            "conv2d",
            Call("conv2d", Var("t"), Var("w2"), name="expand", kept=True, where=_is_1x1),
            Var("w3"),
            name="reduce",
            where=_is_1x1,
        ),
        example=_x_chain,
        guard=_guard,
        near_misses=(NearMiss(_wide_chain, "do not fit one tile"),),
        label="expand-reduce",
        build=_build,
    ),
    Rule(
        "conv1x1(conv(x)) => conv_chain(x)",
        Call("conv2d", FRONT, Var("w2"), name="expand", where=_is_1x1),
        example=_back_to_back,
        guard=_guard,
        label="conv-1x1",
        build=_build,
    ),
)

