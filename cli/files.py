"""Saved executables for the sub-commands: what goes with one, and its facts."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .. import zoo
from ..errors import InvalidInputError
from . import inputs, output
from . import options as shared

if TYPE_CHECKING:
    from ..compiler.artifact.load import LoadedExecutable
    from ..compiler.artifact.program import Image, Program
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
    import torch

    from ..compiler.artifact.load import load

    with output.working(f"loading {options.name} for {device(options)}"):
        executable = load(options.name, device(options))
    program = executable.plan
    batch = min(batch or program.batches[1], program.batches[1])
    tensors = [
        torch.zeros(port.spec.at(batch) if port.spec.batch else port.spec.shape,
                    dtype=port.spec.dtype, device=executable.place)
        for port in executable.inputs
    ]  # fmt: skip
    arguments, keywords = program.interface.placed(tensors)
    return executable, arguments, keywords


@dataclass(frozen=True)
class SavedKernel:
    """One launch of a program: machine code and PTX are those of the file."""

    artifact: Artifact
    kernel: Kernel
    image: Image | None

    @property
    def name(self) -> str:
        return self.kernel.name

    @property
    def ops(self) -> tuple[str, ...]:
        return self.kernel.ops

    def source(self) -> str:
        """The Triton source that this convloom compiles for it."""
        return self.kernel.source()

    def ptx(self) -> str:
        """PTX text; compiled again where the file has none, which newer generations do not need."""
        if self.image is None or self.image.ptx is None:
            return self.kernel.ptx()
        return self.artifact.code(self.image.ptx).decode("utf-8", "replace")

    def sass(self) -> str:
        """Disassembled machine code."""
        from ..kernels.devices import offline

        if self.image is None:
            return self.kernel.sass()
        return offline.disassembled(self.artifact.code(self.image.cubin), self.name)


def kernel_in(artifact: Artifact, program: Program, name: str) -> SavedKernel:
    """The launch of that name. Raises: InvalidInputError with the near names."""
    executable = replanned(artifact, program)
    kernel = executable.kernel(name)
    at = [each.name for each in executable.kernels].index(kernel.name)
    image = program.images[program.calls[at].image] if program.calls else None
    return SavedKernel(artifact, kernel, image)


def largest_batch(program: Program) -> int:
    """The most images of a call."""
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
