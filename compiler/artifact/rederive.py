"""Whether a file is what this convloom makes of its graph, in the file's configurations.

The checks of a file prove that a plan harms nobody's memory, not that it computes its network: a
plan and its manifest can be written anew by anyone. Here the plan is made again from the graph, and
where the file was made with this version of Triton its machine code too, and all of it is compared.
What remains on trust then is the graph and its weights, which no native code is in. Takes Triton,
not a GPU; `convloom doctor FILE` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace

from ...errors import ConvloomError
from ...kernels.contract import targets
from ...kernels.devices.kernel_hash import TRITON_VERSION
from .graphs import lower_again, read_graph
from .program import Call, Program
from .read import Artifact
from .tensors import Pool
from .write import program_of


def compares_code(artifact: Artifact) -> bool:
    """Whether machine code can be compared: another compiler would make other code."""
    return dict(artifact.document.versions).get("triton") == TRITON_VERSION


def differences(artifact: Artifact) -> list[str]:
    """What is not as it would be made here, program by program; empty where all is."""
    told = []
    for program in artifact.programs:
        try:
            told += [f"{program.target}: {what}" for what in _of_program(artifact, program)]
        except ConvloomError as error:
            told.append(f"{program.target}: {error}")
    return told


def _of_program(artifact: Artifact, program: Program) -> Iterator[str]:
    target = targets.parse(program.target)
    graph = read_graph(artifact.graphs[program.graph], artifact.tensors, target, artifact.path)
    plan = lower_again(graph, program, target, artifact.path)
    with_ptx = any(image.ptx is not None for image in program.images)
    derived = program_of(plan, Pool(), {}, with_ptx)
    derived = replace(derived, graph=program.graph, account=program.account)
    if not compares_code(artifact):
        derived, program = _without_code(derived), _without_code(program)
    for item in fields(Program):
        if getattr(derived, item.name) != getattr(program, item.name):
            yield f"its {_SHOWN.get(item.name, item.name)} are not those of its graph"


_SHOWN = {"calls": "launches", "images": "kernels", "buffer_list": "buffers"}


def _without_code(program: Program) -> Program:
    """The program with each launch's kernel by its name alone."""

    def named(call: Call) -> Call:
        return replace(call, image=0)

    steps = tuple(
        replace(step, line=f"{step.line} {[program.images[c.image].entry for c in calls]}")
        for at, step in enumerate(program.steps)
        for calls in [[call for call in program.calls if call.step == at]]
    )
    return replace(program, images=(), calls=tuple(map(named, program.calls)), steps=steps)
