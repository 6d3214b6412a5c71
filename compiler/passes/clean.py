"""Passes that only tidy: identities, equal computations, dead nodes, constant subgraphs."""

from __future__ import annotations

from typing import Any

import torch

from ...kernels.movement import movement, rearrangement
from ...kernels.pooling.pool_window import AdaptivePool2d
from ..evaluation.evaluate import evaluate_node
from ..graph.ir import CONSTANT, INPUT, OUTPUT, TORCH, Graph, Node, Value
from ..graph.ledger import Ledger
from .squeezes import sink_squeezes


def drop_identities(graph: Graph, ledger: Ledger) -> Graph:
    """Removes nodes whose result is their input: clone, dropout in eval, detach, alias, views to
    the same shape, and those that undo each other (`squeezes.py`).

    After it no identity node is left, except one the caller gets straight from an input.
    """
    graph = sink_squeezes(graph, ledger)
    for node in graph.nodes():
        if node.is_compute and not node.epilogue and _is_identity(graph, node):
            (source,) = graph.inputs(node.name)
            graph.redirect(Value(node.name), source)
            graph.remove([node.name])
            ledger.accept("identity(x) => x", [node], source.node)
    return graph


def _is_identity(graph: Graph, node: Node) -> bool:
    if node.op == "identity":
        return True
    attributes = node.attributes
    if isinstance(attributes, (rearrangement.Reshape, rearrangement.Expand)):
        return graph.spec(graph.inputs(node.name)[0]).shape == node.spec.shape
    if isinstance(attributes, AdaptivePool2d):
        return graph.spec(graph.inputs(node.name)[0]).shape == node.spec.shape
    if isinstance(attributes, movement.Permute):
        return attributes.dims == tuple(range(len(attributes.dims)))
    if isinstance(attributes, movement.Relayout):
        source = graph.spec(graph.inputs(node.name)[0])
        return (source.layout, source.dtype) == (node.spec.layout, node.spec.dtype)
    return False


def fold_constants(graph: Graph, ledger: Ledger) -> Graph:
    """Evaluates nodes that depend on constants only, in fp64; calls without a kernel too, such as
    the standardisation of a weight.

    After it every compute node depends on an input. A folded tensor keeps fp64 until it is packed.
    """
    known: dict[Any, tuple[Value, ...]] = {}
    for node in graph.nodes():
        values = graph.inputs(node.name)
        # A call may have no inputs at all (`eye`).
        folds = node.op == TORCH or (node.is_compute and values)
        if not folds or not all(map(graph.is_constant, values)):
            continue
        # A layer called twice folds its weight once: equal nodes that read it are then still equal.
        alike = (node.op, node.attributes, node.epilogue, values)
        key = alike if node.is_compute else node.name
        if key not in known:
            known[key] = tuple(
                graph.add_constant(result, node.name, spec.dtype, spec.batch)
                for result, spec in zip(_exact_results(graph, node), node.outputs, strict=True)
            )
        for index, folded in enumerate(known[key]):
            origins = (*graph.node(folded.node).origins, *node.origins)
            graph.update(folded.node, origins=origins, module_path=node.module_path)
            graph.redirect(Value(node.name, index), folded)
        graph.remove([node.name])
        into = next(filter(graph.uses, known[key]), known[key][0])
        ledger.accept("f(constants) => constant", [node], into.node)
    return eliminate_dead_nodes(graph, ledger)


def _exact_results(graph: Graph, node: Node) -> tuple[torch.Tensor, ...]:
    """A node's outputs on fp64 copies of its constants; without values where one has none."""
    tensors = [graph.constant(value) for value in graph.inputs(node.name)]
    exact = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    if any(tensor.is_meta for tensor in tensors):
        exact = [tensor.to("meta") for tensor in exact]
    return evaluate_node(node, tuple(exact), graph, keep_dtype=True)


def eliminate_common_subexpressions(graph: Graph, ledger: Ledger) -> Graph:
    """Unifies nodes that apply the same op to the same values."""
    seen: dict[Any, str] = {}
    for node in graph.nodes():
        if not node.is_compute:
            continue
        key = (node.op, node.attributes, node.epilogue, node.prologue, graph.inputs(node.name))
        first = seen.setdefault(key, node.name)
        if first == node.name:
            continue
        for index in range(len(node.outputs)):
            graph.redirect(Value(node.name, index), Value(first, index))
        kept = graph.node(first)
        graph.update(first, origins=(*kept.origins, *node.origins))
        ledger.accept("f(x), f(x) => one f(x)", [node], first)
        graph.remove([node.name])
    return graph


def eliminate_dead_nodes(graph: Graph, ledger: Ledger) -> Graph:
    """Removes what no output depends on; inputs stay, they are the signature."""
    for node in reversed(graph.nodes()):
        if node.op in (INPUT, OUTPUT) or graph.net.out_degree(node.name):
            continue
        if node.op not in (CONSTANT, TORCH):
            ledger.accept("unused f(x) => nothing", [node], "")
        graph.remove([node.name])
    return graph
