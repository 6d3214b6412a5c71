"""One model of the zoo layer by layer, as textbooks and papers tabulate it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from . import output

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from ..compiler.graph.ir import Graph, Node

PRODUCTS = ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d", "linear")
VIEWS = ("identity", "reshape")
"""What moves nothing: dropout at inference, flatten."""


def layers(graph: Graph, model: nn.Module) -> list[dict[str, Any]]:
    """The captured graph's layers in order: {layer, ops, output, parameters, macs, output_bytes}.

    A layer is one call of a module, or what a module does between the calls of its own; its output
    is that of its last op. Ops that move nothing (flatten, dropout at inference) are no layers.
    A parameter is counted where it is first read.
    """
    from ..compiler.graph.ledger import Ledger
    from ..compiler.passes.recognise import recognise_composites

    graph = recognise_composites(graph.copy(), Ledger())
    fed = graph.fed()
    owned = _parameters(graph, model, fed)
    nodes = [node for node in graph.compute_nodes() if node.name in fed]
    rows = []
    for path, group in groupby(nodes, key=lambda node: node.module_path):
        members = list(group)
        ops = [_op(node) for node in members if node.op not in VIEWS]
        if not ops:
            continue
        spec = members[-1].spec
        rows.append(
            {
                "layer": path,
                "ops": list(dict.fromkeys(ops)),
                "output": list(spec.shape[1:]),
                "parameters": sum(owned.get(node.name, 0) for node in members),
                "macs": sum(macs(graph, node) for node in members),
                "output_bytes": spec.numel * spec.dtype.itemsize,
            }
        )
    return rows


def _op(node: Node) -> str:
    """The op; of a call without a kernel the aten op."""
    return node.op if node.is_compute else str(node.attributes)


def _parameters(graph: Graph, model: nn.Module, fed: set[str]) -> dict[str, int]:
    """How many parameters each node is the first to read."""
    from ..compiler.graph.ir import CONSTANT

    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    position = {node.name: at for at, node in enumerate(graph.nodes())}
    owned: dict[str, int] = {}
    for node in graph.nodes():
        if node.op != CONSTANT or node.module_path not in sizes:
            continue
        readers = _readers(graph, node.name, fed)
        if readers:
            first = min(readers, key=position.__getitem__)
            owned[first] = owned.get(first, 0) + sizes[node.module_path]
    return owned


def _readers(graph: Graph, constant: str, fed: set[str]) -> set[str]:
    """Who reads a constant, or what was prepared from it alone."""
    ahead, found = [constant], set()
    while ahead:
        for reader in graph.net.succ[ahead.pop()]:
            if reader in fed:
                found.add(reader)
            else:
                ahead.append(reader)
    return found


def macs(graph: Graph, node: Node) -> int:
    """Multiply-accumulates of a convolution or linear layer, 0 for anything else."""
    from ..kernels.contract.op import Problem
    from ..kernels.contract.spec import Operand

    if node.op not in PRODUCTS:
        return 0
    inputs = [graph.spec(value) for value in graph.own_inputs(node)]
    operands = tuple(map(Operand.dense, inputs))
    outputs = tuple(map(Operand.dense, node.outputs))
    problem = Problem(node.op, node.attributes, operands, outputs)
    return node.definition.cost(problem).flops // 2


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The layers and their sums, for one float32 image."""
    headings = ("layer", "ops", ">output", ">parameters", ">MACs", ">output bytes")
    numbers = ("parameters", "macs", "output_bytes")
    shown = output.table(headings, [
        (row["layer"], " ".join(row["ops"]), "x".join(map(str, row["output"])),
         *(f"{row[key]:,}" if row[key] or key == "output_bytes" else "" for key in numbers))
        for row in rows
    ])
    shown.show_footer = True
    shown.columns[0].footer = f"{len(rows)} layers"
    for column, key in zip(shown.columns[3:], numbers, strict=True):
        column.footer = f"{sum(row[key] for row in rows):,}"
    return shown
