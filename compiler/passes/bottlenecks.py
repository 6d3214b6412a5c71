"""Fuses the 1x1 convolutions of residual bottlenecks with their neighbours (`conv_chain`).

The graph is cut after the reduction of the *next* block: 3x3, expansion, residual, activation and
the next reduction are one kernel, and nothing is computed twice. Where the channels are too many
for the 3x3 to keep all of them in one tile, the expansion and the next reduction still are one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ...kernels import machine, registry, targets
from ...kernels.conv2d import Conv2d
from ...kernels.conv_chain import ConvChain
from ...kernels.op import Attributes, Problem
from ...kernels.spec import Layout, Operand, TensorSpec
from ...kernels.targets import Target
from ..fusions import example
from ..ir import Graph, Node, Value
from ..ledger import Ledger
from ..pattern import Call, Match, NearMiss, Rule, Var, apply_rules

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
    goal = graph.goal
    dtype = (goal.dtype if goal else None) or found.root.spec.dtype
    if dtype is torch.float32:
        return "fp32 products need three times the registers of half precision"
    limit = LARGEST_WITH_FRONT if "front" in found.nodes else LARGEST
    narrow = [found.nodes["reduce"].spec.shape[1]] if "reduce" in found.nodes else []
    middle = graph.spec(graph.own_inputs(found.nodes["expand"])[0]).shape[1]
    if max(middle, *narrow, 0) > limit:
        return f"{max(middle, *narrow, 0)} channels do not fit one tile (at most {limit})"
    return _fits_and_pays(graph, found, dtype)


def _fits_and_pays(graph: Graph, found: Match, dtype: torch.dtype) -> str | None:
    """Whether the kernel fits the machine (sm_90 where the target is no GPU) and should be faster.

    Off the GPU only the fit is asked: there the fused kernel is run to be verified.
    """
    attributes, inputs = _assemble(graph, found)
    fused = _problem(graph, "conv_chain", attributes, inputs, dtype)
    goal = graph.goal
    target = goal.target if goal and goal.target.is_gpu else targets.parse("cuda:sm_90")
    op = registry.get("conv_chain")
    if (reason := op.legal(fused, op.default(fused, target), target)) is not None:
        return reason
    if goal is None or not goal.target.is_gpu:
        return None
    together_us = machine.modelled_time_us(op, fused, target)
    links = [found.nodes[name] for name in ("front", "expand", "reduce") if name in found.nodes]
    apart_us = sum(_time_us(graph, node, dtype, target) for node in links)
    if together_us < apart_us:
        return None
    return f"modelled {together_us:.1f} us together, {apart_us:.1f} us apart on {target.name}"


def _time_us(graph: Graph, node: Node, dtype: torch.dtype, target: Target) -> float:
    own, operands = graph.own_inputs(node), graph.operands(node)
    problem = _problem(graph, node.op, node.attributes, own, dtype)
    others = tuple(Operand.dense(_as_operand_spec(graph.spec(v), dtype)) for v in operands)
    problem = replace(problem, epilogue=node.epilogue, operands=others)
    return machine.modelled_time_us(node.definition, problem, target)


def _problem(
    graph: Graph, op: str, attributes: Attributes, inputs: tuple[Value, ...], dtype: torch.dtype
) -> Problem:
    specs = tuple(_as_operand_spec(graph.spec(value), dtype) for value in inputs)
    outputs = tuple(
        _as_operand_spec(spec, dtype) for spec in registry.get(op).infer(attributes, specs)
    )
    placed, results = map(Operand.dense, specs), map(Operand.dense, outputs)
    return Problem(op, attributes, tuple(placed), tuple(results))


def _as_operand_spec(spec: TensorSpec, dtype: torch.dtype) -> TensorSpec:
    return spec.with_(dtype=dtype, layout=Layout.NHWC if spec.rank == 4 else Layout.DENSE)


def _assemble(graph: Graph, found: Match) -> tuple[ConvChain, tuple[Value, ...]]:
    """The chain's attributes and inputs, in the order of its slots."""
    front, expand = found.nodes.get("front"), found.nodes["expand"]
    reduce = found.nodes.get("reduce")
    inputs: list[Value] = [graph.own_inputs(front or expand)[0]]
    links = [node for node in (front, expand, reduce) if node is not None]
    for node in links:
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
    return attributes, tuple(inputs)


def fuse_chain(graph: Graph, found: Match) -> Value:
    """One conv_chain node for the whole match."""
    attributes, inputs = _assemble(graph, found)
    links = [found.nodes[name] for name in ("expand", "front", "reduce") if name in found.nodes]
    made = graph.add("conv_chain", inputs, attributes, like=links)
    graph.redirect(Value(found.nodes["expand"].name), Value(made.node, 0))
    result = made
    if "reduce" in found.nodes:
        result = Value(made.node, 1)
        graph.redirect(Value(found.nodes["reduce"].name), result)
    graph.remove(node.name for node in links)
    return result


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
CHAIN_RULES = (
    Rule(
        "conv1x1(y = conv1x1(conv(x))) => conv_chain(x) giving y and the reduction",
        Call(
            "conv2d",
            Call("conv2d", FRONT, Var("w2"), name="expand", kept=True, where=_is_1x1),
            Var("w3"),
            name="reduce",
            where=_is_1x1,
        ),
        fuse_chain,
        lambda: _bottleneck(front=True, reduce=True),
        _guard,
        NEAR_MISSES,
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
        fuse_chain,
        _x_chain,
        _guard,
        (NearMiss(_wide_chain, "do not fit one tile"),),
    ),
)
PAIR_RULES = (
    Rule(
        "conv1x1(conv(x)) => conv_chain(x)",
        Call("conv2d", FRONT, Var("w2"), name="expand", where=_is_1x1),
        fuse_chain,
        _back_to_back,
        _guard,
    ),
)


def fuse_bottlenecks(graph: Graph, ledger: Ledger) -> Graph:
    """Fuses expansions with the next reduction, and both with the convolution before them.

    Chains that end in a reduction are looked for in the whole graph first: a convolution fused with
    its expansion alone could no longer take the reduction along.
    """
    return apply_rules(apply_rules(graph, CHAIN_RULES, ledger), PAIR_RULES, ledger)
