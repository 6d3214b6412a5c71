"""Saved executables for the sub-commands: what goes with one, and its facts."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..errors import InvalidInputError
from . import inputs, networks, output
from . import options as shared

if TYPE_CHECKING:
    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.artifact.program import Program
    from ..compiler.artifact.read import Artifact
    from ..compiler.run.executable import Executable, Kernel
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

    Raises: InvalidInputError where its only tensor is not an image.
    """
    model = artifact.document.model
    specs = [port.spec for port in artifact.programs[0].inputs]
    entry = inputs.entry_of(f"'{artifact.path}'", model, specs)
    if model in zoo.names():
        return replace(zoo.entry(model), input_shape=entry.input_shape)  # Larger where it slides.
    return entry


def replanned(artifact: Artifact, program: Program) -> Executable:
    """A program's graph, planned again for the target it was planned for."""
    from ..compiler.artifact.load import planned
    from ..kernels.contract import targets

    return planned(artifact, program, targets.parse(program.target), program.target)


def loaded(
    options: argparse.Namespace, batch: int | None = None
) -> tuple[LoadedExecutable, tuple[Any, ...], dict[str, Any]]:
    """The file's network on this machine, and zeros as its inputs, as many images as were asked
    for, or as the largest batch it was compiled for."""
    from ..compiler.artifact.load import load

    with output.working(f"loading {options.name} for {device(options)}"):
        executable = load(options.name, device(options))
    most = executable.plan.batches[1]
    return executable, *networks.placed(executable, min(batch or most, most))


def code_of(artifact: Artifact, program: Program, name: str, kind: str) -> tuple[Kernel, str]:
    """The launch of that name, and its code: the file's own machine code ("sass") and "ptx", which
    is compiled again where the file has none, as newer generations do not need it.

    Raises: InvalidInputError with the near names.
    """
    from ..kernels.devices import offline

    executable = replanned(artifact, program)
    kernel = executable.kernel(name)
    at = [each.name for each in executable.kernels].index(kernel.name)
    image = program.images[program.calls[at].image] if program.calls else None
    if image is not None and kind == "sass":
        return kernel, offline.disassembled(artifact.code(image.cubin), kernel.name)
    if image is not None and kind == "ptx" and image.ptx is not None:
        return kernel, artifact.code(image.ptx).decode("utf-8", "replace")
    return kernel, kernel.code(kind)


def largest_batch(program: Program) -> int:
    shape = program.inputs[0].spec.shape
    return program.batches[1] if program.batch or not shape else shape[0]


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
