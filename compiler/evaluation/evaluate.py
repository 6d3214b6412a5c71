"""Evaluates a graph node by node with torch ops: the meaning that every kernel is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...kernels.contract.epilogue import apply_reference
from ...kernels.contract.spec import TensorSpec
from ...kernels.movement.movement import Relayout
from ..graph.ir import CONSTANT, INPUT, OUTPUT, Graph, Node, Value
from ..graph.torch_call import BatchNumber, Slot, TorchCall

HALVES = (torch.float16, torch.bfloat16)


def call_torch(call: TorchCall, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Runs a kept ATen call on its tensors."""

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, BatchNumber):
            slot, rows = call.rows
            return leaf.at(tensors[slot].shape[0] // rows)
        return tensors[leaf.index] if isinstance(leaf, Slot) else leaf

    arguments, keywords = pytree.tree_map(fill, (call.arguments, dict(call.keywords)))
    result = call.target(*arguments, **keywords)
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def evaluate_node(
    node: Node, tensors: tuple[torch.Tensor, ...], graph: Graph, keep_dtype: bool = False
) -> tuple[torch.Tensor, ...]:
    """The node's outputs from its inputs; `keep_dtype` ignores casts between floats, and what
    becomes one becomes fp64 (for fp64 evaluation).

    As in kernels, halves are computed with in fp32: the caller rounds what is stored, once.
    """
    if isinstance(node.attributes, TorchCall):
        return call_torch(node.attributes, tensors)
    tensors = tuple(t.float() if t.dtype in HALVES else t for t in tensors)
    own = len(graph.own_inputs(node))
    after = own + len(graph.operands(node))
    inputs = list(tensors[:own])
    if node.prologue:
        inputs[0] = apply_reference(node.prologue, inputs[0], tensors[after:])
    attributes = node.attributes
    if keep_dtype and isinstance(attributes, Relayout) and attributes.dtype.is_floating_point:
        attributes = Relayout(attributes.layout, torch.float64)
    values = node.definition.reference(attributes, *inputs)
    values = values if isinstance(values, tuple) else (values,)
    values = (apply_reference(node.epilogue, values[0], tensors[own:after]), *values[1:])
    return tuple(v.double() if keep_dtype and v.is_floating_point() else v for v in values)


def evaluate(
    graph: Graph, inputs: Sequence[torch.Tensor], dtype: torch.dtype | None = None
) -> dict[Value, torch.Tensor]:
    """Every value of the graph.

    inputs: one tensor per graph input. dtype: None follows the specs; torch.float64 computes all in
    fp64, whatever the specs say.
    """
    known: dict[Value, torch.Tensor] = {}
    arguments = iter(inputs)
    batch = batch_of(graph, inputs)
    for node in graph.nodes():
        if node.op == OUTPUT:
            continue
        if node.op in (INPUT, CONSTANT):
            tensor = next(arguments) if node.op == INPUT else graph.tensors[node.name].detach()
            is_float = node.spec.dtype.is_floating_point
            tensor = tensor.to(dtype if dtype and is_float else node.spec.dtype)
            known[Value(node.name)] = rows_of(tensor, node.spec, batch)
            continue
        tensors = tuple(known[value] for value in graph.inputs(node.name))
        results = evaluate_node(node, tensors, graph, keep_dtype=dtype is not None)
        for index, result in enumerate(results):
            stored = result if dtype is not None else result.to(node.outputs[index].dtype)
            known[Value(node.name, index)] = rows_of(stored, node.outputs[index], batch)
    return known


def batch_of(graph: Graph, inputs: Sequence[torch.Tensor]) -> int:
    """The batch of a call (1 where it is fixed)."""
    for node, tensor in zip(graph.graph_inputs(), inputs, strict=True):
        if node.spec.batch is not None:
            return tensor.shape[0] * node.spec.batch // node.spec.shape[0]
    return 1


def rows_of(tensor: torch.Tensor, spec: TensorSpec, batch: int) -> torch.Tensor:
    """A tensor at the batch of a call: what follows from constants is that of the largest."""
    return tensor if spec.batch is None else tensor[: spec.at(batch)[0]]


def relative_error(y: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest absolute error where the exact value is finite, relative to the rms there."""
    if y.shape != exact.shape:
        return float("inf")
    finite = exact.isfinite()
    if not finite.any():
        return 0.0
    true = exact[finite].double()
    rms = true.square().mean().sqrt().clamp_min(1e-30)
    return ((y[finite].double() - true).abs().nan_to_num(torch.inf, torch.inf).max() / rms).item()
