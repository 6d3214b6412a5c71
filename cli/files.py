"""Saved executables for the sub-commands: what goes with one, and its facts."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..errors import InvalidInputError
from . import options as shared

if TYPE_CHECKING:
    from ..compiler.artifact.program import Program
    from ..compiler.artifact.read import Artifact
    from ..zoo import ZooModel


def device(options: argparse.Namespace) -> str:
    """The device that `--target` means for a file; the GPU where there is one, else the CPU."""
    target = shared.target(options)
    return "cuda" if target.startswith("cuda") else target


def pick(artifact: Artifact, options: argparse.Namespace) -> Program:
    """The program of `--target`, or the file's first.

    Raises: InvalidInputError where the file has none.
    """
    for program in artifact.programs:
        if options.target in (None, program.target):
            return program
    raise InvalidInputError(
        f"--target {options.target}: '{artifact.path}' holds {artifact.holds()}"
    )


def pictured(artifact: Artifact) -> ZooModel:
    """What images have to become for the file's network: its model's, or any of that shape.

    Raises: InvalidInputError where its only input is no image.
    """
    model = artifact.document.model
    inputs = artifact.programs[0].inputs
    shape = inputs[0].spec.shape
    if len(inputs) != 1 or len(shape) != 4:
        raise InvalidInputError(
            f"'{artifact.path}': expected a network of one image, it takes "
            f"{', '.join(str(port.spec) for port in inputs)}; load it in Python"
        )
    image = (shape[1], shape[2], shape[3])
    if model in zoo.names():
        return replace(zoo.entry(model), input_shape=image)  # Larger where it slides.
    return zoo.ZooModel(model, "", image, 0, "")


def facts(artifact: Artifact) -> dict[str, Any]:
    """What a file says of itself."""
    return {
        "file": str(artifact.path),
        "sha256": artifact.sha256,
        "model": artifact.document.model,
        "versions": dict(artifact.document.versions),
        "programs": [
            {
                "target": program.target,
                "batch": list(program.batch) if program.batch else None,
                "inputs": [str(port.spec) for port in program.inputs],
                "outputs": [str(port.spec) for port in program.outputs],
                "kernels": len(program.images),
                "launches": len(program.calls),
                "summary": dict(program.summary),
            }
            for program in artifact.programs
        ],
        "weights_bytes": artifact.size_bytes("safetensors"),
        "machine_code_bytes": artifact.size_bytes("cubin"),
        "ptx_bytes": artifact.size_bytes("ptx"),
    }
