"""Whether a file's plan is what this convloom makes of its graph, in the file's configurations.

The checks of a file prove that a plan harms nobody's memory, not that it computes its network: a
plan and its manifest can be written anew by anyone. Here the plan is made again from the graph and
compared, field by field; what remains on trust is the machine code and the weights. Takes Triton,
not a GPU; `convloom doctor FILE` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ...errors import ConvloomError
from ...kernels import targets
from ..plan import Plan
from .graphs import lower_again, read_graph
from .program import Program, nest_of
from .read import Artifact
from .tensors import Pool
from .write import calls_of, signature_of, steps_of


def differences(artifact: Artifact) -> list[str]:
    """What is not as it would be made here, program by program; empty where all is."""
    found = []
    for program in artifact.programs:
        try:
            found += [f"{program.target}: {what}" for what in _of_program(artifact, program)]
        except ConvloomError as error:
            found.append(f"{program.target}: {error}")
    return found


def _of_program(artifact: Artifact, program: Program) -> Iterator[str]:
    target = targets.parse(program.target)
    graph = read_graph(artifact.graphs[program.graph], artifact.tensors, target, artifact.path)
    plan = lower_again(graph, program, target, artifact.path)
    images = [call.image for call in program.calls]
    wanted = replace(
        program,
        inputs=plan.inputs,
        outputs=plan.outputs,
        arguments=nest_of(plan.structure.arguments),
        result=nest_of(plan.structure.result),
        buffer_list=tuple(plan.buffers.values()),
        constants=_constants(plan),
        steps=steps_of(plan),
        calls=calls_of(plan, images) if len(images) == len(plan.kernels) else (),
        summary=tuple(sorted(plan.summary().items())),
    )
    for name in ("inputs", "outputs", "steps", "summary", "constants"):
        if getattr(wanted, name) != getattr(program, name):
            yield f"its {name} are not those of its graph"
    if wanted.buffer_list != program.buffer_list:
        yield "its buffers are not those of its graph"
    if target.is_gpu and wanted.calls != program.calls:
        yield "its launches are not those of its graph"
    elif target.is_gpu:
        yield from _of_images(program, plan)


def _constants(plan: Plan) -> tuple[tuple[str, str], ...]:
    pool = Pool()
    return tuple(
        (name, pool.add(plan.constants[name]))
        for name, buffer in plan.buffers.items()
        if buffer.kind == "constant"
    )


def _of_images(program: Program, plan: Plan) -> Iterator[str]:
    """Whether the kernels are launched as those of the plan are; their code is not looked at."""
    for call, (step, launch) in zip(program.calls, plan.kernels, strict=True):
        image = program.images[call.image]
        entry: Any = launch.kernel.fn.__name__
        wanted = (entry, launch.num_warps, signature_of(plan, step, launch))
        if (image.entry, image.num_warps, image.signature) != wanted:
            yield f"step {step.name} runs {image.entry}, its graph asks for {entry}"
