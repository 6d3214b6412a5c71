"""Zoo models for the sub-commands: built with seeded weights, compiled as the options ask."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..errors import InvalidInputError
from . import inputs, output
from . import options as shared

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.explain.report import Report
    from ..compiler.graph.ir import Graph
    from ..compiler.plan.plan import Plan
    from ..compiler.run.executable import Executable
    from ..zoo import ZooModel

SEED = 0


def build(name: str, weights: str | None = None, classes: int | None = None) -> nn.Module:
    """The zoo model, ready for inference; without a weight file its weights are seeded.

    classes: how many classes it tells apart (None: as many as the model of the zoo).

    Raises: InvalidInputError for an unknown name, ArtifactError for unusable weights.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        options = {} if classes is None else {"num_classes": classes}
        return zoo.build(name, weights=weights, **options).eval()


def warn_of_random_weights(name: str) -> None:
    """Says on stderr that the answers of a model without a weight file mean nothing."""
    hint = "--weights digits" if name in inputs.DIGIT_MODELS else "--weights FILE"
    text = f"the weights are random (seed {SEED}), so the classes mean nothing; pass {hint}"
    output.say(text, stderr=True)


def zeros(name: str, batch: int) -> torch.Tensor:
    """An example of the input of a zoo model, (N, C, H, W) float32.

    Raises: InvalidInputError for an unknown name.
    """
    import torch

    return torch.zeros(batch, *zoo.entry(name).input_shape)


def compile_model(
    options: argparse.Namespace, batch: int | tuple[int, int], weights: str | None
) -> Executable:
    """The zoo model `options.name`, compiled for `batch` images, or for any number in a range.

    Raises: ConvloomError for an unknown model, target or pass, or unusable weights.
    """
    bounds = batch if isinstance(batch, tuple) else None
    example = zeros(options.name, batch[1] if isinstance(batch, tuple) else batch)
    shared.target(options)
    model = build(options.name, weights)
    return compile_for(model, example, options, dynamic_batch=bounds)


def compile_for(
    model: nn.Module, example: torch.Tensor, options: argparse.Namespace, **more: Any
) -> Executable:
    """The model compiled for inputs like `example`; more: as `api.executable_for` takes it."""
    from ..compiler.api import executable_for

    # Under CONVLOOM_DEBUG the compiler prints: never into the JSON that a command answers with.
    with redirect_stdout(sys.stderr):
        return executable_for(model, (example,), **{**_choices(options), **more})


def lower_model(options: argparse.Namespace, batch: int) -> tuple[Graph, Plan, Report]:
    """The zoo model `options.name` as it would be compiled for `batch` images, without code.

    Raises: ConvloomError as `compile_model` does.
    """
    example = zeros(options.name, batch)
    return lower_for(build(options.name), example, options)


def lower_for(
    model: nn.Module, example: torch.Tensor, options: argparse.Namespace, **more: Any
) -> tuple[Graph, Plan, Report]:
    """The model as it would be compiled for inputs like `example`, without code; more: as
    `api.lowered` takes it."""
    from ..compiler.api import lowered

    with redirect_stdout(sys.stderr):
        return lowered(model, (example,), **{**_choices(options), **more})


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of a compilation."""
    return {
        "target": shared.target(options),
        "dtype": shared.dtype(options),
        "precision": options.precision,
        "passes": shared.passes(options),
        "fallback": options.fallback,
        "force": options.force,
        "forbid": options.forbid,
        "slide": getattr(options, "slide", None),
    }


def seen(entry: ZooModel, options: argparse.Namespace) -> ZooModel:
    """The model with the images that it takes: larger ones than its own under `--slide`."""
    size = getattr(options, "slide", None)
    return entry if size is None else replace(entry, input_shape=(entry.input_shape[0], *size))


def run(executable: Executable | LoadedExecutable, x: torch.Tensor) -> torch.Tensor:
    """The executable's only output, on the CPU; moves the input to the GPU where it must be."""
    import torch

    y = executable(x.to(executable.place))
    if not isinstance(y, torch.Tensor):
        raise InvalidInputError(f"expected a model of one output, got {type(y).__name__}")
    return y.cpu()
