"""Batch normalisation with running statistics is y = s·x + t per channel; both are constants.

    s = weight / sqrt(var + eps),   t = bias − mean·s                      (Ioffe & Szegedy, 2015)

`fold_batch_norm` multiplies s into the weight of the convolution or linear layer before it and adds
t to its bias. `lower_batch_norm` turns what is left into two pointwise stages.
"""

from __future__ import annotations

import torch

from ...kernels.contract.epilogue import Stage
from ...kernels.convolution.conv_phases import ConvTranspose2d
from ...kernels.movement.pointwise import Pointwise
from ...kernels.normalisation.batch_norm import BatchNorm
from ..fusion.pattern import Call, Match, Rule, absorb, apply_rules
from ..fusion.rules import PRODUCTS
from ..graph.ir import Graph, Node, Value
from ..graph.ledger import Ledger

LOWER = "batch_norm(x) => s*x + t"


def scale_and_shift(graph: Graph, node: Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(s, t) in fp64, each of shape (C,), or None where a statistic is not a constant."""
    attributes = node.attributes.expect(BatchNorm)
    values = graph.own_inputs(node)[1:]
    if not all(map(graph.is_constant, values)):
        return None
    tensors = [graph.constant(value).double() for value in values]
    mean, variance = tensors[-2:]
    scale = torch.rsqrt(variance + attributes.eps)
    if attributes.has_weight:
        scale = scale * tensors[0]
    shift = -mean * scale
    if attributes.has_bias:
        shift = shift + tensors[int(attributes.has_weight)]
    return scale, shift


def _why_not(graph: Graph, found: Match) -> str | None:
    producer, node = found.nodes["producer"], found.root
    if scale_and_shift(graph, node) is None:
        return f"the statistics of {node.name} are not constants of the module"
    weight = graph.own_inputs(producer)[1]
    if not graph.is_constant(weight):
        return f"the weight of {producer.name} is not a constant of the module"
    if len(graph.uses(weight)) > 1:
        readers = ", ".join(sorted(reader for reader, _ in graph.uses(weight)))
        return f"the weight is shared by {readers}; folding would change it for all of them"
    stages = producer.epilogue
    is_bias = len(stages) == 1 and stages[0] == Stage("add")
    if stages and not (is_bias and graph.is_constant(graph.operands(producer)[0])):
        return f"{producer.name} has more than a bias: {', '.join(map(str, stages))}"
    if producer.op == "linear" and producer.spec.rank != 2:
        return f"{producer.name} has rank {producer.spec.rank}; linear layers are folded at rank 2"
    return None


def _fold(graph: Graph, found: Match) -> Value:
    producer, node = found.nodes["producer"], found.root
    both = scale_and_shift(graph, node)
    assert both is not None
    scale, bias = both
    x, weight = graph.own_inputs(producer)
    scaled = _scaled(producer, graph.constant(weight).double(), scale)
    if producer.epilogue:
        bias = bias + graph.constant(graph.operands(producer)[0]).double().reshape(-1) * scale
    trailing = [1] * (node.spec.rank - 2)
    dtype = graph.spec(weight).dtype
    new_weight = graph.add_constant(scaled, weight.node, dtype)
    new_bias = graph.add_constant(bias.reshape(-1, *trailing), f"{node.name}_shift", dtype)
    inputs = (x, new_weight, new_bias, *graph.operands(node))
    return absorb(graph, found, producer.name, inputs, epilogue=(Stage("add"), *node.epilogue))


def _scaled(producer: Node, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The weight with every output channel times its scale."""
    ones = [1] * (w.dim() - 1)
    if not isinstance(producer.attributes, ConvTranspose2d):
        return w * scale.reshape(-1, *ones)
    # (C, K/G, ...): a group's input channels share its output channels.
    groups = producer.attributes.groups
    grouped = w.reshape(groups, -1, *w.shape[1:])
    return (grouped * scale.reshape(groups, 1, -1, *ones[1:])).reshape(w.shape)


FOLD_RULES = (
    Rule(
        "batch_norm(heavy(x, w) + b) => heavy(x, s*w) + (s*b + t)",
        Call("batch_norm", first=Call(PRODUCTS, name="producer")),
        _fold,
        _why_not,
    ),
)


def fold_batch_norm(graph: Graph, ledger: Ledger) -> Graph:
    """Folds batch_norm into the convolution or linear layer that alone feeds it.

    Refused where the layer's result or its weight is used elsewhere, or where something already
    stands between them.
    """
    return apply_rules(graph, FOLD_RULES, ledger)


def lower_batch_norm(graph: Graph, ledger: Ledger) -> Graph:
    """Replaces each remaining batch_norm with constant statistics by mul and add per channel."""
    for node in graph.nodes():
        if node.op != "batch_norm" or (both := scale_and_shift(graph, node)) is None:
            continue
        trailing = [1] * (node.spec.rank - 2)
        scale, shift = (
            graph.add_constant(part.reshape(-1, *trailing), f"{node.name}_{name}", node.spec.dtype)
            for part, name in zip(both, ("scale", "shift"), strict=True)
        )
        x = graph.own_inputs(node)[0]
        scaled = graph.add("mul", (x, scale), Pointwise(), like=[node])
        inputs = (scaled, shift, *graph.operands(node))
        shifted = graph.add("add", inputs, Pointwise(), epilogue=node.epilogue, like=[node])
        graph.redirect(Value(node.name), shifted)
        ledger.accept(LOWER, [node], shifted.node)
        graph.remove([node.name])
    return graph
