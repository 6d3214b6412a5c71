"""The Hopper core in a file proves itself on a device before anything relies on it there.

Only the emulator has run that core: a wrong order of its barriers would hang a GPU. A file brings
no compiler and, where Triton is missing, no reference to compare with; it brings for each launch of
the core a twin, the launch of the plain core that reads and writes the same. When the file is
loaded, each kernel of the core computes one launch of the network on random numbers and its own
weights, at the least batch of its program in which its blocks take several tiles, in a process of
its own that is ended when it hangs. Where its results are not its twin's, to the rounding of a few
last places, the twin takes its place, with a warning. Verdicts are kept in the cache folder, by
kernel, device and driver.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from ... import settings
from ...kernels.devices.entries import read_entry, write_entry
from ..graph.memory import BufferSlice, Memory
from ..run.workers import Handler, WorkerError, WorkerProcess
from . import device as gpu
from .program import READ, WRITE, Argument, Call, Image, Program
from .read import Artifact, open_artifact

LOG = logging.getLogger("convloom")
FOLDER = "checks"
TIMEOUT_S = 60.0
"""One launch of both; what takes longer hangs."""
ROUNDS = 2
"""Tiles that each block takes at least, where the batches of the program have so many."""
ROUNDOFF = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8, torch.float32: 2.0**-11}
"""Of one result; products of fp32 are those of tf32 here."""
PLACES = 4.0
"""How many of these, of a result and of the rms of all, two right kernels may be apart: they round
the same sum once, after the same stages, and add it up in another order."""


def trusted(
    artifact: Artifact,
    program: Program,
    connect: Callable[[Callable[[], Handler]], Any] = WorkerProcess,
) -> Program:
    """The program with twins in the place of what must not be used on the current device; all of
    them where the Hopper core is switched off."""
    if not program.twins:
        return program
    if settings.core() == settings.PLAIN:
        return _with_twins(program, program.twins)
    at, device = artifact.programs.index(program), torch.cuda.current_device()
    child = connect(partial(comparing, str(artifact.path), at, device))
    verdicts: dict[int, str | None] = {}
    refused = []
    try:
        for position, twin in enumerate(program.twins):
            number = own_call(program, twin).image
            image, step = program.images[number], program.steps[twin.step]
            if number not in verdicts:
                verdicts[number] = reason = _verdict(image, child, position)
                if reason is not None:
                    LOG.warning(
                        "'%s': the untried kernel of %s (%s) is not used: %s",
                        artifact.path, step.name, image.entry, reason,
                    )  # fmt: skip
            if verdicts[number] is not None:
                refused.append(twin)
    finally:
        child.close()
    return _with_twins(program, refused)


def _with_twins(program: Program, twins: Sequence[Call]) -> Program:
    """The program with some twins in their place."""
    by_step = {twin.step: twin for twin in twins}
    return replace(program, calls=tuple(by_step.get(call.step, call) for call in program.calls))


def own_call(program: Program, twin: Call) -> Call:
    """The launch that a twin stands for."""
    return next(call for call in program.calls if call.step == twin.step)


def _verdict(image: Image, child: Any, position: int) -> str | None:
    """Why a kernel must not be used here, or None: what is on disk, or what its process says."""
    name, driver = torch.cuda.get_device_name(), gpu.cuda_driver()
    version = gpu.call(driver, "cuDriverGetVersion")
    key = hashlib.sha256(repr((image, name, version)).encode()).hexdigest()
    path = settings.read().cache_dir / FOLDER / f"{key}.json"
    known: Any = read_entry(path)
    if known is None:
        try:
            known = {"wrong": child.ask(position, TIMEOUT_S)}
        except WorkerError as error:
            known = {"wrong": f"{error.kind}: {error}"}
            if error.kind == "error":  # It could not be run, which the next time it may.
                return f"its self-check on {name} could not be run: {error}"
        write_entry(path, known)
    wrong = known.get("wrong")
    return None if wrong is None else f"its self-check on {name} failed: {wrong}"


# In the process of its own.


def comparing(path: str, at: int, device: int) -> Handler:
    """Compares launches of a file's program with their twins, by the positions of these."""
    torch.cuda.set_device(device)
    artifact, driver = open_artifact(path), gpu.cuda_driver()
    program = artifact.programs[at]
    constants = gpu.upload(program, artifact.tensors, torch.device("cuda", device))
    torch.cuda.current_stream()
    kernels = gpu.load_kernels(driver, program, artifact.code, by_ptx=False)
    stream = torch.cuda.current_stream
    return partial(
        difference, driver, program, kernels, constants, lambda: int(stream().cuda_stream)
    )


def difference(
    driver: Any,
    program: Program,
    kernels: Sequence[Any],
    constants: Mapping[str, torch.Tensor],
    stream: Callable[[], int],
    position: int,
) -> str | None:
    """Why the results of a launch are not those of its twin, or None."""
    twin = program.twins[position]
    own = own_call(program, twin)
    memory = Memory(program, constants, _batch(program, own))
    random = torch.Generator().manual_seed(position)
    for argument in own.arguments:
        if argument.kind == READ and program.buffers[argument.buffer].kind != "constant":
            whole = memory.flat(argument.buffer)
            whole.copy_(torch.randn(whole.shape, generator=random))
    written = [argument for argument in own.arguments if argument.kind == WRITE]
    found: list[list[torch.Tensor]] = []
    for call in (own, twin):
        for argument in written:
            memory.flat(argument.buffer).fill_(float("nan"))
        for _, start in gpu.bind(driver, replace(program, calls=(call,)), kernels, memory, stream):
            start()
        found.append([_result(memory, argument) for argument in written])
    for mine, right in zip(*found, strict=True):
        if (reason := _compared(mine.double(), right.double(), ROUNDOFF[mine.dtype])) is not None:
            return reason
    return None


def _result(memory: Memory, argument: Argument) -> torch.Tensor:
    assert argument.operand is not None, "every write says where"
    return memory.view(BufferSlice(argument.buffer, argument.operand)).to("cpu", copy=True)


def _batch(program: Program, call: Call) -> int:
    """The least batch in which every block takes several tiles, or the largest there is."""
    low, high = max(program.batches[0], 1), program.batches[1]
    grid = replace(call.grid, most=None)
    wanted = ROUNDS * (call.grid.most or 0) + 1
    return next((n for n in range(low, high) if grid.programs_at(n) >= wanted), high)


def _compared(mine: torch.Tensor, right: torch.Tensor, roundoff: float) -> str | None:
    finite = right.isfinite()
    rms = right[finite].square().mean().sqrt().nan_to_num()
    allowed = PLACES * roundoff * (right.abs() + rms)
    same = ((mine - right).abs() <= allowed) | (mine == right) | (mine.isnan() & right.isnan())
    if bool(same.all()):
        return None
    wrong = tuple((~same).nonzero()[0].tolist())
    return (
        f"{int((~same).sum()):,} of {same.numel():,} results differ from the plain core's, the "
        f"first at {wrong}: {float(mine[wrong]):.6g} instead of {float(right[wrong]):.6g}"
    )
