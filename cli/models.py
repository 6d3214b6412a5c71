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
    from ..compiler.evaluation.validate import Validation
    from ..compiler.explain.report import Report
    from ..compiler.graph.ir import Graph
    from ..compiler.plan.plan import Plan
    from ..compiler.run.executable import Executable
    from ..zoo import ZooModel

SEED = 0
NAME_HELP = "a model of the zoo (see `convloom zoo`)"


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
    output.console(stderr=True).print(
        f"the weights are random (seed {SEED}), so the classes mean nothing; pass {hint}"
    )


def compile_model(
    options: argparse.Namespace, batch: int | tuple[int, int], weights: str | None
) -> Executable:
    """The zoo model `options.name`, compiled for `batch` images, or for any number in a range.

    Raises: ConvloomError for an unknown model, target or pass, or unusable weights.
    """
    import torch

    entry = zoo.entry(options.name)
    target = shared.target(options)
    model = build(entry.name, weights)
    bounds = batch if isinstance(batch, tuple) else None
    example = torch.zeros(batch[1] if isinstance(batch, tuple) else batch, *entry.input_shape)
    return compile_for(model, example, target=target, options=options, dynamic_batch=bounds)


def compile_for(
    model: nn.Module,
    example: torch.Tensor,
    *,
    target: str,
    options: argparse.Namespace,
    dynamic_batch: tuple[int, int] | None = None,
    validation: Validation | None = None,
) -> Executable:
    """The model compiled for inputs like `example`, or for a range of batches of such images;
    `validation` watches the passes."""
    from ..compiler.api import executable_for

    # Under CONVLOOM_DEBUG the compiler prints: never into the JSON that a command answers with.
    with redirect_stdout(sys.stderr):
        return executable_for(
            model, (example,), target=target, dynamic_batch=dynamic_batch, validation=validation,
            **_choices(options),
        )  # fmt: skip


def lower_model(options: argparse.Namespace, batch: int) -> tuple[Graph, Plan, Report]:
    """The zoo model `options.name` as it would be compiled for `batch` images, without code.

    Raises: ConvloomError as `compile_model` does.
    """
    import torch

    entry = zoo.entry(options.name)
    target = shared.target(options)
    example = torch.zeros(batch, *entry.input_shape)
    return lower_for(build(entry.name), example, target=target, options=options)


def lower_for(
    model: nn.Module,
    example: torch.Tensor,
    *,
    target: str,
    options: argparse.Namespace,
    validation: Validation | None = None,
) -> tuple[Graph, Plan, Report]:
    """The model as it would be compiled for inputs like `example`, without code; `validation`
    watches the passes."""
    from ..compiler.api import lowered

    with redirect_stdout(sys.stderr):
        return lowered(
            model, (example,), target=target, validation=validation, **_choices(options)
        )


def _choices(options: argparse.Namespace) -> dict[str, Any]:
    """What the options say of a compilation, beside its target."""
    return {
        "dtype": shared.dtype(options),
        "precision": options.precision,
        "passes": shared.passes(options),
        "fallback": options.fallback,
        "force": options.force,
        "forbid": options.forbid,
        "slide": slide(options),
    }


def slide(options: argparse.Namespace) -> tuple[int, int] | None:
    """`--slide`, where the sub-command has it."""
    size: tuple[int, int] | None = getattr(options, "slide", None)
    return size


def seen(entry: ZooModel, options: argparse.Namespace) -> ZooModel:
    """The model with the images that it takes: larger ones than its own under `--slide`."""
    size = slide(options)
    return entry if size is None else replace(entry, input_shape=(entry.input_shape[0], *size))


def run(executable: Executable | LoadedExecutable, x: torch.Tensor) -> torch.Tensor:
    """The executable's only output, on the CPU; moves the input to the GPU where it must be."""
    import torch

    y = executable(x.to(executable.place))
    if not isinstance(y, torch.Tensor):
        raise InvalidInputError(f"expected a model of one output, got {type(y).__name__}")
    return y.cpu()
