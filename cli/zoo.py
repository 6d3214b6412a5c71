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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import zoo
from . import models, output, zoo_layers
from . import options as shared

if TYPE_CHECKING:
    from rich.table import Table
    from torch import nn

    from ..compiler.graph.ir import Graph

FIGURES = Path(__file__).with_name("zoo_figures.json")


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "zoo", help="list the models",
        description="Lists the models of the zoo: input, parameters, multiply-accumulates of the "
        "convolutions and linear layers, and bytes of all activations (the results of all ops), "
        "for one float32 image. One model by itself is also shown layer by layer.",
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="only these; one: its layers")
    parser.add_argument("--measure", action="store_true",
                        help="capture the models now (a minute or two for all)")


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    rows = figures(options.names or zoo.names(), options.measure)
    alone = len(options.names) == 1
    if alone:
        rows[0] = {**rows[0], "layers": layers(options.names[0])}
    if options.json:
        output.print_json(rows)
    else:
        output.say(_table(rows), *([zoo_layers.table(rows[0]["layers"])] if alone else []))
    return 0


def figures(names: Sequence[str], measured: bool) -> list[dict[str, Any]]:
    """For each model {name, input_shape, parameters, macs, activation_bytes}.

    measured: captures the models rather than reading the recorded figures.

    Raises: InvalidInputError, with the nearest names, for an unknown model.
    """
    entries = [zoo.entry(name) for name in names]
    recorded = {} if measured else {row["name"]: row for row in json.loads(FIGURES.read_text())}
    for entry in entries:
        if entry.name not in recorded:
            with output.working(f"capturing {entry.name}"):
                recorded[entry.name] = measure(entry.name)
    return [recorded[entry.name] for entry in entries]


def measure(name: str) -> dict[str, Any]:
    """One row, from the graph captured at batch 1 in float32."""
    from ..compiler.plan.lower import activation_bytes

    model, graph = _captured(name)
    return {
        "name": name,
        "input_shape": list(zoo.entry(name).input_shape),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "macs": sum(zoo_layers.macs(graph, node) for node in graph.nodes()),
        "activation_bytes": activation_bytes(graph),
    }


def layers(name: str) -> list[dict[str, Any]]:
    """The model's layers, as `zoo_layers.layers` tells them.

    Raises: InvalidInputError, with the nearest names, for an unknown model.
    """
    with output.working(f"capturing {zoo.entry(name).name}"):
        model, graph = _captured(name)
    return zoo_layers.layers(graph, model)


def _captured(name: str) -> tuple[nn.Module, Graph]:
    import torch

    from ..compiler.capture.capture import capture

    with torch.device("meta"):
        model = models.build(name)
    # Weights with whatever memory holds: capture asks for data, nothing here depends on it.
    model = model.to_empty(device="cpu")
    return model, capture(model, (models.zeros(name, 1),))


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    headings = ("model", ">input", ">parameters", ">MACs", ">activations", "source")
    cells = [
        (
            row["name"],
            "x".join(map(str, row["input_shape"])),
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:,.1f} M",
            output.readable_size(row["activation_bytes"]),
            zoo.entry(row["name"]).summary,
        )
        for row in rows
    ]
    return output.table(headings, cells)
