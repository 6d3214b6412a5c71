"""Whether a file is what this convloom makes of its graphs, in the file's configurations.

The checks of a file prove that a plan harms nobody's memory, not that it computes its network: a
plan and its manifest can be written anew by anyone. Here the whole file is made again from its
graphs, machine code included where this version of Triton made it, and every byte is compared.
What remains on trust then is what nothing else follows from: the graphs with their weights and
names, the ledgers, and what the file says of itself (model, versions). Takes Triton, not a GPU;
`convloom doctor FILE` does it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

from ...errors import ConvloomError
from ...kernels.contract import targets
from ...kernels.devices.kernel_hash import TRITON_VERSION
from . import archive, tensors
from .graphs import lower_again, read_graph
from .program import Program
from .read import Artifact
from .write import Writing, oldest_of, rank


def compares_code(artifact: Artifact) -> bool:
    """Whether machine code can be compared: another compiler would make other code."""
    launched = any(program.calls for program in artifact.programs)
    return not launched or dict(artifact.document.versions).get("triton") == TRITON_VERSION


@contextmanager
def nothing_compiled_yet() -> Iterator[None]:
    """Inside the block nothing is taken from the cache of compiled kernels: who could write there
    could make it agree with a file. The process's environment is changed for so long."""
    before = os.environ.get("CONVLOOM_CACHE_DIR")
    with tempfile.TemporaryDirectory(prefix="convloom-") as folder:
        os.environ["CONVLOOM_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["CONVLOOM_CACHE_DIR"]
            if before is not None:
                os.environ["CONVLOOM_CACHE_DIR"] = before


def differences(artifact: Artifact) -> list[str]:
    """What is not as it would be made here: first program by program, then member by member; empty
    where all is."""
    told, writing = [], Writing()
    ranked = {rank(targets.parse(each.target), each.batch): each for each in artifact.programs}
    oldest = oldest_of(targets.parse(ranked[place].target) for place in sorted(ranked))
    for place in sorted(ranked):
        program = ranked[place]
        with_ptx = targets.parse(program.target) == oldest
        try:
            derived = _derived(artifact, program, writing, with_ptx)
        except ConvloomError as error:
            told.append(f"{program.target}: {error}")
        else:
            told += [f"{program.target}: {what}" for what in _compared(artifact, program, derived)]
    return told or list(_other_members(artifact, writing))


def _derived(artifact: Artifact, program: Program, writing: Writing, with_ptx: bool) -> Program:
    target, path = targets.parse(program.target), artifact.path
    graph = read_graph(artifact.graphs[program.graph], program, artifact.tensors, target, path)
    plan = lower_again(graph, program, target, path)
    return writing.add(graph, plan, artifact.ledgers[program.account], with_ptx)


def _compared(artifact: Artifact, program: Program, derived: Program) -> Iterator[str]:
    if not compares_code(artifact):
        derived, program = _without_code(derived), _without_code(program)
    for item in fields(Program):
        if getattr(derived, item.name) != getattr(program, item.name):
            yield f"its {_SHOWN.get(item.name, item.name)} are not those of its graph"


def _other_members(artifact: Artifact, writing: Writing) -> Iterator[str]:
    """What differs although all programs are alike: contents under an old name, what nobody uses,
    the order of things."""
    document = artifact.document
    _, members = writing.file(document.model, document.versions)
    for name in sorted({*members, *artifact.archive.members} - {"manifest.json"}):
        is_code = name.startswith("kernels/") or name == "plan.json"
        if is_code and not compares_code(artifact):
            continue
        if name not in members or name not in artifact.archive.members:
            yield f"'{name}' is {'not there' if name in members else 'of no program'}"
        elif archive.digest(members[name]) != archive.digest([artifact.archive.members[name]]):
            yield f"'{name}' is not what its graphs give{_ABOUT.get(name, '')}"


_SHOWN = {"calls": "launches", "images": "kernels", "buffer_list": "buffers"}
_ABOUT = {tensors.MEMBER: ": tensors that are named by other contents, or that nobody uses"}


def _without_code(program: Program) -> Program:
    """The program with each launch's kernel by its name alone."""
    every = (*program.calls, *program.twins)
    steps = tuple(
        replace(step, line=f"{step.line} {[program.images[c.image].entry for c in calls]}")
        for at, step in enumerate(program.steps)
        for calls in [[call for call in every if call.step == at]]
    )
    calls, twins = (
        tuple(replace(call, image=0) for call in calls)
        for calls in (program.calls, program.twins)
    )
    return replace(program, images=(), calls=calls, twins=twins, steps=steps)
