"""`convloom zoo`: the models, and what each of them asks for.

Parameters, MACs and activation memory follow from the captured graph. Capturing every model takes
torch.export a minute or two, so the figures are kept in `zoo_figures.json`, which this very command
wrote (`convloom zoo --measure --json`); a model that is not in it is measured.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import zoo
from . import models, output
from .options import json_option

if TYPE_CHECKING:
    from ..compiler.ir import Graph, Node
    from .options import SubParsers

FIGURES = Path(__file__).with_name("zoo_figures.json")
PRODUCTS = ("conv2d", "conv3d", "conv_transpose2d", "conv_transpose3d", "linear")


def configure(commands: SubParsers) -> None:
    """Adds the sub-command."""
    parser = commands.add_parser(
        "zoo",
        help="list the models",
        description="Lists the models of the zoo: input, parameters, multiply-accumulates of the "
        "convolutions and linear layers, and bytes of all activations, for one float32 image.",
        parents=[json_option()],
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these models")
    parser.add_argument(
        "--measure", action="store_true", help="capture the models now (a minute or two for all)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    rows = figures(options.names or zoo.names(), options.measure)
    if options.json:
        output.print_json(rows)
    else:
        _print_table(rows)
    return 0


def figures(names: Sequence[str], measured: bool) -> list[dict[str, Any]]:
    """For each model {name, input_shape, parameters, macs, activation_bytes}.

    measured: captures the models rather than reading the recorded figures.

    Raises: InvalidInputError, with the nearest names, for an unknown model.
    """
    entries = [zoo.entry(name) for name in names]
    recorded = {} if measured else {row["name"]: row for row in json.loads(FIGURES.read_text())}
    rows = []
    for entry in entries:
        if entry.name in recorded:
            rows.append(recorded[entry.name])
            continue
        with output.working(f"capturing {entry.name}"):
            rows.append(measure(entry.name))
    return rows


def measure(name: str) -> dict[str, Any]:
    """One row, from the graph captured at batch 1 in float32."""
    import torch

    from ..compiler.capture import capture
    from ..compiler.lower import activation_bytes

    entry = zoo.entry(name)
    with torch.device("meta"):
        model = models.build(name)
    # Weights with whatever memory holds: capture asks for data, nothing here depends on it.
    model = model.to_empty(device="cpu")
    graph = capture(model, (torch.zeros(1, *entry.input_shape),))
    return {
        "name": name,
        "input_shape": list(entry.input_shape),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": sum(_macs(graph, node) for node in graph.nodes()),
        "activation_bytes": activation_bytes(graph),
    }


def _macs(graph: Graph, node: Node) -> int:
    """Multiply-accumulates of a convolution or linear layer, 0 for anything else."""
    from ..kernels.op import Problem
    from ..kernels.spec import Operand

    inputs = [graph.spec(value) for value in graph.own_inputs(node)]
    if node.op in PRODUCTS:
        operands = tuple(map(Operand.dense, inputs))
        outputs = tuple(map(Operand.dense, node.outputs))
        problem = Problem(node.op, node.attributes, operands, outputs)
        return node.definition.cost(problem).flops // 2
    return 0


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table("model", "input", "parameters", "MACs", "activations", "source")
    for column in table.columns[1:5]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row["name"],
            "x".join(map(str, row["input_shape"])),
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:,.1f} M",
            output.readable_size(row["activation_bytes"]),
            zoo.entry(row["name"]).summary,
        )
    output.console().print(table)
