"""Networks for the sub-commands, compiled as the options ask."""

from __future__ import annotations

import argparse
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import InvalidInputError
from . import inputs, output
from . import options as shared
from .networks import SEED

if TYPE_CHECKING:
    import torch

    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.explain.report import Report
    from ..compiler.graph.ir import Graph
    from ..compiler.plan.plan import Plan
    from ..compiler.run.executable import Executable
    from ..zoo import ZooModel
    from .networks import Network


def warn_of_random_weights(network: Network) -> None:
    """Says on stderr that the answers of a model with random weights mean nothing."""
    if network.is_random:
        hint = "--weights digits" if network.name in inputs.DIGIT_MODELS else "--weights FILE"
        text = f"the weights are random (seed {SEED}), so the classes mean nothing; pass {hint}"
        output.say(text, stderr=True)


def compile_model(
    network: Network, options: argparse.Namespace, batch: int | tuple[int, int] | None
) -> Executable:
    """The network compiled for `batch` images (None: for its example's), or for any number in a
    range.

    Raises: ConvloomError for an unknown target or pass, and as compiling does.
    """
    bounds = batch if isinstance(batch, tuple) else None
    most = batch[1] if isinstance(batch, tuple) else batch
    return compile_for(network, most, options, dynamic_batch=bounds)


def compile_for(
    network: Network, batch: int | None, options: argparse.Namespace, **more: Any
) -> Executable:
    """The network compiled for `batch` images; more: as `api.executable_for` takes it."""
    from ..compiler.api import executable_for

    example, keywords = network.example(batch)
    choices = {"kwargs": keywords, **_choices(options), **more}
    # Under CONVLOOM_DEBUG the compiler prints: never into the JSON that a command answers with.
    with redirect_stdout(sys.stderr):
        return executable_for(network.model, example, **choices)


def lower_for(
    network: Network, batch: int | None, options: argparse.Namespace, **more: Any
) -> tuple[Graph, Plan, Report]:
    """The network as it would be compiled for `batch` images, without code; more: as
    `api.lowered` takes it."""
    from ..compiler.api import lowered

    example, keywords = network.example(batch)
    choices = {"kwargs": keywords, **_choices(options), **more}
    with redirect_stdout(sys.stderr):
        return lowered(network.model, example, **choices)


def placed(executable: Executable) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Zeros as inputs of an executable, where it takes them: larger images under `--slide`."""
    import torch

    specs, place = [port.spec for port in executable.inputs], executable.place
    return executable.interface.placed(
        [torch.zeros(spec.shape, dtype=spec.dtype, device=place) for spec in specs]
    )


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

    arguments, keywords = executable.interface.placed([x.to(executable.place)])
    y = executable(*arguments, **keywords)
    if not isinstance(y, torch.Tensor):
        raise InvalidInputError(
            f"expected a model that returns one tensor, this one returns a {type(y).__name__}; "
            "call it in Python"
        )
    return y.cpu()
