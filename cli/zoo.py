"""`convloom zoo`: the models, and what each of them asks for.

Parameters, MACs and activation memory follow from the captured graph. Capturing every model takes
torch.export a minute or two, so the figures are kept in `zoo_figures.json`, which this very command
wrote (`convloom zoo --measure --json`); a model that is not in it is measured. The layers of one
model (`convloom zoo NAME`) are captured each time.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..errors import InvalidInputError
from . import networks, output
from . import options as shared

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor, nn

    from ..compiler.graph.ir import Graph, Node
    from .networks import Network

FIGURES = Path(__file__).with_name("zoo_figures.json")
PRODUCTS = ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d", "linear")
NOTHING = argparse.Namespace()
VIEWS = ("identity", "reshape")
"""What moves nothing: dropout at inference, flatten."""


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "zoo", help="list the models",
        description="Lists the models of the zoo, or others: input, parameters, "
        "multiply-accumulates of the convolutions and linear layers, and bytes of all activations "
        "(the results of all ops), for one float32 image. One model by itself is also shown layer "
        "by layer.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*",
                        help=f"only these; one: its layers. {shared.MODEL}")
    shared.add_input(parser)
    parser.add_argument("--measure", action="store_true",
                        help="capture the models now (a minute or two for all)")


def run(options: argparse.Namespace) -> int:
    if options.shapes and not options.names:
        raise InvalidInputError("--input: expected the NAME of a model too")
    rows = figures(options.names or zoo.names(), options.measure, options)
    alone = len(options.names) == 1
    if alone:
        rows[0] = {**rows[0], "layers": layers(options.names[0], options)}
    tables = [_table(rows), *([_layer_table(rows[0]["layers"])] if alone else [])]
    output.answer(options, rows, *tables)
    return 0


def figures(
    names: Sequence[str], measured: bool, options: argparse.Namespace = NOTHING
) -> list[dict[str, Any]]:
    """For each model {name, input_shape, parameters, macs, activation_bytes}.

    measured: captures the models rather than reading the recorded figures.

    Raises: InvalidInputError, with the nearest names, for an unknown model.
    """
    for name in names:  # Names that nobody knows, before anything is captured.
        if name not in zoo.names():
            networks.find(name, options)
    is_new = measured or bool(getattr(options, "shapes", None))
    recorded = {} if is_new else {row["name"]: row for row in json.loads(FIGURES.read_text())}
    for name in names:
        if name not in recorded:
            with output.working(f"capturing {name}"):
                recorded[name] = measure(name, options)
    return [recorded[name] for name in names]


def measure(name: str, options: argparse.Namespace = NOTHING) -> dict[str, Any]:
    """One row, from the graph captured at batch 1 in float32."""
    from ..compiler.plan.lower import activation_bytes

    network, graph = _captured(name, options)
    return {
        "name": name,
        "input_shape": list(network.tensors()[0].shape[1:]),
        "parameters": sum(_sizes(network.model).values()),
        "macs": sum(macs(graph, node) for node in graph.nodes()),
        "activation_bytes": activation_bytes(graph),
    }


def layers(name: str, options: argparse.Namespace = NOTHING) -> list[dict[str, Any]]:
    """The model's layers, as `layers_of` tells them.

    Raises: InvalidInputError, with the nearest names, for an unknown model.
    """
    with output.working(f"capturing {name}"):
        network, graph = _captured(name, options)
    return layers_of(graph, network.model)


def _captured(name: str, options: argparse.Namespace) -> tuple[Network, Graph]:
    from ..compiler.capture.capture import capture

    network = networks.find(name, options, build=_unfilled)
    example, keywords = network.example(network.batch())
    return network, capture(network.model, example, keywords=keywords)


def _unfilled(name: str, *_: Any) -> nn.Module:
    """A model of the zoo whose weights are whatever memory holds: capture asks for data, nothing
    here depends on it."""
    import torch

    with torch.device("meta"):
        model = networks.zoo_model(name)
    return model.to_empty(device="cpu")


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    headings = ("model", ">input", ">parameters", ">MACs", ">activations", "source")
    cells = [
        (
            row["name"],
            "x".join(map(str, row["input_shape"])),
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:,.1f} M",
            output.readable_size(row["activation_bytes"]),
            zoo.entry(row["name"]).summary if row["name"] in zoo.names() else "",
        )
        for row in rows
    ]
    return output.table(headings, cells)


# Layers.


def layers_of(graph: Graph, model: nn.Module) -> list[dict[str, Any]]:
    """The captured graph's layers in order: {layer, ops, output, parameters, macs, output_bytes}.

    A layer is one call of a module, or what a module does between the calls of its own; its output
    is that of its last op. Ops that move nothing (flatten, dropout at inference) are no layers.
    A parameter is counted where it is first read.
    """
    from ..compiler.graph.ledger import Ledger, op_name
    from ..compiler.passes.recognise import recognise_composites

    graph = recognise_composites(graph.copy(), Ledger())
    reachable = graph.nodes_reachable_from_inputs()
    owned = _parameters(graph, model, reachable)
    nodes = [node for node in graph.compute_nodes() if node.name in reachable]
    rows = []
    for path, group in groupby(nodes, key=lambda node: node.module_path):
        members = list(group)
        ops = [op_name(node) for node in members if node.op not in VIEWS]
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


def _parameters(graph: Graph, model: nn.Module, reachable: set[str]) -> dict[str, int]:
    """How many parameters each node is the first to read."""
    from ..compiler.graph.ir import CONSTANT

    sizes = _sizes(model)
    position = {node.name: at for at, node in enumerate(graph.nodes())}
    owned: dict[str, int] = {}
    for node in graph.nodes():
        if node.op != CONSTANT or node.module_path not in sizes:
            continue
        readers = _readers(graph, node.name, reachable)
        if readers:
            first = min(readers, key=position.__getitem__)
            owned[first] = owned.get(first, 0) + sizes[node.module_path]
    return owned


def _sizes(model: nn.Module) -> dict[str, int]:
    """The parameters by name; the weights of an ONNX file are buffers."""
    held: dict[str, Tensor] = {**dict(model.named_parameters())} or dict(model.named_buffers())
    return {name: tensor.numel() for name, tensor in held.items() if tensor.is_floating_point()}


def _readers(graph: Graph, constant: str, reachable: set[str]) -> set[str]:
    """Who reads a constant, or what was prepared from it alone."""
    ahead, found = [constant], set()
    while ahead:
        for reader in graph.net.succ[ahead.pop()]:
            if reader in reachable:
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


def _layer_table(rows: Sequence[dict[str, Any]]) -> Table:
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
