"""`convloom run NAME INPUT`: one forward pass on an image or an array, through the kernels of a
model that is compiled now or was saved before."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import files, inputs, models, networks, output
from . import options as shared

if TYPE_CHECKING:
    import torch

    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.run.executable import Executable
    from ..zoo import ZooModel
    from .networks import Network

TOP = 5


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "run", shared.compile_options(batch=False, slide=True),
        help="run a model on an image or an array",
        description="Compiles a model, runs it on an image file or a .npy array, and prints "
        "the five likeliest classes by index, or writes the output to a .npy file.",
    )
    parser.add_argument("name", metavar="NAME", help=shared.MODEL_OR_FILE)
    parser.add_argument("input", metavar="INPUT", type=Path,
        help="an image, or a .npy file; digit.png comes with convloom")
    shared.add_weights(parser)
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the output as .npy")


def run(options: argparse.Namespace) -> int:
    """Runs the model and prints or writes its output."""
    saved = shared.is_file(options.name)
    entry, x, executable, network = _loaded(options) if saved else _compiled(options)
    with output.working(f"running {entry.name}"):
        y = models.run(executable, x)
    if options.output is not None:
        output.write_file(options.output, lambda file: _save(file, y))
    best = _best_classes(y)
    if options.json:
        output.print_json({
            "model": entry.name,
            "target": executable.target.name,
            "input_shape": list(x.shape),
            "output_shape": list(y.shape),
            "output": str(options.output) if options.output else None,
            "top": best,
        })
        return 0
    if network is not None:
        models.warn_of_random_weights(network)
    if options.output is not None:
        output.say(f"wrote {tuple(y.shape)} to {options.output}")
    else:
        output.say(*_result_lines(y, best))
    return 0


def _compiled(
    options: argparse.Namespace,
) -> tuple[ZooModel, torch.Tensor, Executable, Network]:
    target = shared.target(options)
    network = networks.find(options.name, options, options.weights)
    entry = network.pictured("run")
    x = inputs.read_input(inputs.present(options.input), models.seen(entry, options))
    with output.working(f"compiling {network.name} for {target}"):
        executable = models.compile_for(network, len(x), options)
    return entry, x.to(executable.inputs[0].spec.dtype), executable, network


def _loaded(
    options: argparse.Namespace,
) -> tuple[ZooModel, torch.Tensor, LoadedExecutable, None]:
    from ..compiler.artifact.load import load

    shared.refuse_choices(options)
    device = files.device(options)
    with output.working(f"loading {options.name} for {device}"):
        executable = load(options.name, device)
    entry = files.pictured(executable.artifact)
    x = inputs.read_input(inputs.present(options.input), entry)
    return entry, x.to(executable.inputs[0].spec.dtype), executable, None


def _save(file: Any, y: torch.Tensor) -> None:
    import numpy as np

    np.save(file, y.float().numpy())


def _best_classes(y: torch.Tensor) -> list[list[dict[str, float]]] | None:
    """For each image the likeliest classes; None where the output is not one score per class."""
    if y.dim() != 2:
        return None
    best = y.float().softmax(1).topk(min(TOP, y.shape[1]))
    return [
        [{"class": index, "probability": share} for index, share in zip(*image, strict=True)]
        for image in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def _result_lines(y: torch.Tensor, best: list[list[dict[str, float]]] | None) -> list[str]:
    if best is None:
        return [
            f"output {tuple(y.shape)} from {y.min():.4g} to {y.max():.4g}, mean {y.mean():.4g}; "
            "pass --output FILE.npy to keep it"
        ]
    lines = []
    for index, classes in enumerate(best):
        lines += [f"image {index}"] if len(best) > 1 else []
        lines += [f"  class {each['class']:>4}  {each['probability']:7.2%}" for each in classes]
    return lines
