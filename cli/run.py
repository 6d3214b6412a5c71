"""`convloom run NAME INPUT`: one forward pass on an image or an array, through the kernels of a
model that is compiled now or was saved before; or with `--random` how long calls take."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from . import files, inputs, networks, output
from . import options as shared

if TYPE_CHECKING:
    import torch

    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.run.executable import Executable
    from ..zoo import ZooModel
    from .networks import Network

TOP = 5
WARMUP, ITERATIONS = 10, 100
PERCENTILES = (50, 90, 99)


def configure(commands: shared.SubParsers) -> None:
    parser = shared.command(
        commands, run, "run", shared.compile_options(batch=False, slide=True),
        help="run a model on an image or an array, or time its calls",
        description="Compiles a model, runs it on an image file or a .npy array, and prints "
        "the five likeliest classes by index, or writes the output to a .npy file. With --random "
        "it runs on random numbers and prints how long a call takes: from inputs on the device to "
        "outputs there.",
    )
    parser.add_argument("name", metavar="NAME", help=shared.MODEL_OR_FILE)
    given = parser.add_argument("input", metavar="[INPUT]", type=Path,
                                help="an image, or a .npy file; digit.png comes with convloom")
    given.required = False  # With nargs="?" it could not stand behind options.
    shared.add_weights(parser)
    parser.add_argument("--output", metavar="FILE", type=Path, help="write the output as .npy")
    add = parser.add_argument_group("latency").add_argument
    add("--random", action="store_true", help="random numbers in place of INPUT; time the calls")
    add("--batch", metavar="N", type=shared.positive,
        help="images per call (default: the model's own, or 1; of a file its largest)")
    add("--warmup", metavar="N", type=shared.positive, default=WARMUP,
        help=f"calls before those that are timed (default: {WARMUP})")
    add("--iterations", metavar="N", type=shared.positive, default=ITERATIONS,
        help=f"calls that are timed (default: {ITERATIONS})")


def run(options: argparse.Namespace) -> int:
    """Runs the model and prints or writes its output, or how long calls take."""
    if options.random != (options.input is None) or (options.random and options.output):
        raise InvalidInputError(
            f"run {options.name}: expected INPUT, an image or a .npy file, or --random without "
            "INPUT and --output"
        )
    import numpy as np

    if options.random:
        return _time_calls(options)
    if options.batch is not None:
        raise InvalidInputError("--batch: expected with --random only; INPUT says how many it has")
    saved = shared.is_file(options.name)
    entry, x, executable, network = _loaded(options) if saved else _compiled(options)
    with output.working(f"running {entry.name}"):
        y = networks.run(executable, x)
    if options.output is not None:
        output.write_file(options.output, lambda file: np.save(file, y.float().numpy()))
    best = _best_classes(y)
    if network is not None and not options.json:
        networks.warn_of_random_weights(network)
    written = [f"wrote {tuple(y.shape)} to {options.output}"] if options.output else None
    found = {
        "model": entry.name,
        "target": executable.target.name,
        "input_shape": list(x.shape),
        "output_shape": list(y.shape),
        "output": str(options.output) if options.output else None,
        "top": best,
    }
    output.answer(options, found, *([] if options.json else written or _result_lines(y, best)))
    return 0


def _time_calls(options: argparse.Namespace) -> int:
    """Calls with random numbers, one after the other, and how long each takes."""
    import numpy as np
    import torch
    from torch.utils import _pytree as pytree

    executable: Executable | LoadedExecutable
    if shared.is_file(options.name):
        shared.refuse_choices(options, "batch")
        executable, x, keywords = files.loaded(options, options.batch)
    else:
        network = networks.find(options.name, options, options.weights)
        target = shared.target(options)
        batch = network.batch(options.batch)
        with output.working(f"compiling {network.name} for {target}, batch {batch}"):
            executable = networks.compile_for(network, batch, options)
        x, keywords = networks.placed(executable)
    on_gpu = executable.place.type == "cuda"
    tensors = list(filter(torch.is_tensor, pytree.tree_leaves((x, keywords))))
    generator = torch.Generator(executable.place).manual_seed(networks.SEED)
    for each in tensors:
        fill = each.normal_ if each.dtype.is_floating_point else each.random_
        fill(generator=generator)
    with output.working(f"running {options.name}") as work:
        times_ms = []
        for at in range(options.warmup + options.iterations):
            work.what = f"running {options.name}, {at} of {options.warmup + options.iterations}"
            started = time.perf_counter()
            executable(*x, **keywords)
            if on_gpu:
                torch.cuda.synchronize()
            times_ms.append((time.perf_counter() - started) * 1e3)
    timed = np.array(times_ms[options.warmup :])
    shape = tensors[0].shape
    found: dict[str, Any] = {
        "model": options.name,
        "target": executable.target.name,
        "timed_on": torch.cuda.get_device_name() if on_gpu else "the CPU, not a GPU",
        "input_shapes": [list(x.shape) for x in tensors],
        "warmup": options.warmup,
        "iterations": options.iterations,
        "latency_ms": {
            **{f"p{each}": float(np.percentile(timed, each)) for each in PERCENTILES},
            "least": float(timed.min()), "most": float(timed.max()), "mean": float(timed.mean()),
        },
        "images_per_s": shape[0] / float(timed.mean()) * 1e3 if shape else None,
    }  # fmt: skip
    cells = [f"{value:,.3f}" for value in found["latency_ms"].values()]
    shapes = ", ".join(str(tuple(x.shape)) for x in tensors)
    output.answer(
        options, found, output.table([f">{name} ms" for name in found["latency_ms"]], [cells]),
        f"{options.name} on {found['timed_on']}, target {found['target']}, inputs {shapes}: "
        f"{options.iterations} calls after {options.warmup}",
    )  # fmt: skip
    return 0


def _compiled(options: argparse.Namespace) -> tuple[ZooModel, torch.Tensor, Executable, Network]:
    target = shared.target(options)
    network = networks.find(options.name, options, options.weights)
    entry = network.pictured("run")
    x = inputs.read_input(inputs.present(options.input), networks.seen(entry, options))
    with output.working(f"compiling {network.name} for {target}"):
        executable = networks.compile_for(network, len(x), options)
    return entry, x.to(executable.inputs[0].spec.dtype), executable, network


def _loaded(options: argparse.Namespace) -> tuple[ZooModel, torch.Tensor, LoadedExecutable, None]:
    shared.refuse_choices(options)
    executable, *_ = files.loaded(options)
    entry = files.pictured(executable.artifact)
    x = inputs.read_input(inputs.present(options.input), entry)
    return entry, x.to(executable.inputs[0].spec.dtype), executable, None


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
