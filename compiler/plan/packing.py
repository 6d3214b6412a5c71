"""Constants as kernels read them: in their dtype, packed as their op wants them, each once."""

from __future__ import annotations

from typing import Protocol

import torch

from ...kernels.contract.spec import Operand
from ..graph.ir import Graph, Node, Value
from ..graph.memory import Buffer, BufferSlice


class Constants(Protocol):
    """A graph, and what has been made of its constants: tensors and their buffers, by name."""

    graph: Graph
    constants: dict[str, torch.Tensor]
    buffers: dict[str, Buffer]


def constant_place(state: Constants, value: Value, dtype: torch.dtype) -> BufferSlice:
    """Where a constant lies, dense and in a dtype."""
    spec = state.graph.spec(value).with_(dtype=dtype)
    short = str(dtype).removeprefix("torch.")
    name = f"{value.node}.{short}"
    if name not in state.buffers:
        tensor = state.graph.constant(value).detach()
        state.constants[name] = _own(tensor.to(dtype).contiguous().reshape(-1), tensor)
        state.buffers[name] = Buffer(name, "constant", dtype, spec.size_bytes)
    return BufferSlice(name, Operand.dense(spec))


def packed_place(state: Constants, value: Value, node: Node, slot: int) -> BufferSlice:
    """Where a constant lies as the op of a node packs it for one of its inputs."""
    graph = state.graph
    compute = graph.spec(value).dtype
    short = str(compute).removeprefix("torch.")
    tensor = graph.constant(value).detach()
    pack = node.definition.packs(node.attributes)[slot]
    packed = pack(node.attributes, tensor.to(compute))
    # The order may depend on the attributes: nodes that share a weight may want it differently.
    base = name = f"{value.node}.{node.op}{slot}.{short}"
    copies = 1
    while name in state.constants and not torch.equal(state.constants[name], packed):
        copies += 1
        name = f"{base}.{copies}"
    if name not in state.buffers:
        packed = state.constants[name] = _own(packed, tensor)
        size_bytes = packed.numel() * packed.element_size()
        state.buffers[name] = Buffer(name, "constant", packed.dtype, size_bytes)
    return BufferSlice(name, Operand.dense(graph.spec(value).with_(dtype=compute)))


def _own(packed: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """What was made of a constant, in memory of its own."""
    return packed.clone() if packed.data_ptr() == tensor.data_ptr() else packed
