"""`convloom.load`: a file as a callable; on a GPU without compiling and without Triton."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ...errors import ArtifactError, InvalidInputError, TargetUnavailableError
from ...kernels.contract import targets
from ...kernels.contract.targets import INTERPRETER, REFERENCE, Target
from ..graph.interface import Interface, Port, empty_outputs
from ..run.cuda_graphs import GraphRunner
from . import device as gpu
from . import twins
from .program import Program
from .read import Artifact, open_artifact

if TYPE_CHECKING:
    from ..explain.report import Report
    from ..run.executable import Executable

DEVICES = ("cuda", *(each.name for each in (INTERPRETER, REFERENCE, *targets.EMULATED)))
Part = tuple[Program, "GraphRunner | Executable"]


def load(
    path: str | Path | IO[bytes], device: str | None = None, *, recompile: bool = False
) -> LoadedExecutable:
    """The executable in a file that `Executable.save` or `convloom compile -o` wrote.

    path: a name, or a file that is open for reading bytes.

    device: "cuda" runs the file's machine code on this machine's GPU; "interpreter", "reference"
    and "emulator:sm_90" plan its graph again, the last one compiles it too, and run it on the CPU.
    None is what the file was made for: "cuda" where it holds machine code, else the interpreter or
    the reference. recompile: where the file has no code for this GPU, its graph is compiled here
    (takes Triton).

    The result can be pickled: the path and the device are, and whoever unpickles it loads the file.

    Raises: ArtifactError for a damaged or a stranger's file, before anything of it is loaded onto a
    device; TargetUnavailableError where the device, cuda-bindings or code for this GPU is missing.
    """
    if device is not None and device not in DEVICES:
        raise TargetUnavailableError(
            f"device: expected None, {', '.join(DEVICES)}, got {str(device)!r}"
        )
    if hasattr(path, "read"):
        return load_bytes(path.read(), device, recompile)
    artifact = open_artifact(path)
    device = device or _made_for(artifact)
    if device == "cuda":
        capability = gpu.capability_here(artifact)
        try:
            programs, by_ptx = gpu.pick(artifact, capability)
        except TargetUnavailableError:
            if not recompile:
                raise
            target = targets.nearest(capability)
        else:
            used = [twins.trusted(artifact, each) for each in programs]
            loaded: list[Part] = [(each, gpu.runner(artifact, each, by_ptx)) for each in used]
            return LoadedExecutable(artifact, device, targets.parse(programs[0].target), loaded)
    else:
        target = targets.parse(device)
    # The device's programs, else those of the first target: their graphs stand for the network.
    own, first = target.compiled_as, artifact.programs[0].target
    source = own if any(program.target == own for program in artifact.programs) else first
    parts: list[Part] = [
        (program, planned(artifact, program, target, device))
        for program in artifact.programs
        if program.target == source
    ]
    return LoadedExecutable(artifact, device, target, parts)


def load_bytes(data: bytes, device: str | None = None, recompile: bool = False) -> LoadedExecutable:
    """The executable in the bytes of a file, which it keeps. Raises: as `load` does."""
    with tempfile.NamedTemporaryFile(suffix=".loom") as file:
        file.write(data)
        file.flush()
        loaded = load(file.name, device, recompile=recompile)
    loaded.data = data
    return loaded


def _made_for(artifact: Artifact) -> str:
    if any(program.architecture for program in artifact.programs):
        return "cuda"
    names = {program.target for program in artifact.programs}
    return INTERPRETER.name if INTERPRETER.name in names else REFERENCE.name


def planned(artifact: Artifact, program: Program, target: Target, device: str) -> Executable:
    """A program's graph, planned for a target in the file's configurations and run on a device; for
    a GPU of another generation, or none ("cuda:sm_90"), it is there to be looked at."""
    try:
        from ..run.executable import Executable
        from ..run.runtime import runner_for
        from .graphs import lower_again, read_graph
        from .write import save
    except ModuleNotFoundError as error:
        raise TargetUnavailableError(
            f"'{artifact.path}' on {device} needs the package {error.name}, which is not "
            f"installed: pip install {error.name}; without it a file runs only on a GPU that it "
            "has kernels for"
        ) from error

    data = artifact.graphs[program.graph]
    graph = read_graph(data, program, artifact.tensors, target, artifact.path)
    plan = lower_again(graph, program, target, artifact.path)
    ledger = ledger_of(artifact, program)
    runner = runner_for(graph, plan, target, device)
    return Executable(graph, plan, ledger, runner, (save, load_bytes))


class LoadedExecutable:
    """A file's network on one device; call it like the module.

    Inputs are not modified; outputs belong to the caller. Where the file has several ranges of
    batches, each call goes to the program whose range its batch is in.
    """

    def __init__(
        self, artifact: Artifact, device: str, target: Target, parts: Sequence[Part]
    ) -> None:
        self.artifact, self.device, self.target = artifact, device, target
        self._parts = list(parts)
        self.data: bytes | None = None
        program = parts[0][0]
        bounds = None
        if program.batch is not None:
            ranges = [each.batches for each, _ in parts]
            bounds = min(low for low, _ in ranges), max(high for _, high in ranges)
        self.interface = Interface(program.inputs, program.interface.structure, bounds)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The module's outputs, in the module's own structure.

        Raises: InvalidInputError for the wrong number, structure, rank, shape, dtype or device,
        another constant, or a batch that the file has no program for.
        """
        tensors = self.interface.flatten(inputs, keywords)
        batch = self.interface.check(tensors, self.place)
        _, part = self._part(batch)
        if batch == 0:
            return self.interface.unflatten(empty_outputs(self.plan.outputs, self.place))
        if isinstance(part, GraphRunner):
            return self.interface.unflatten(part.run(tensors, batch))
        return part(*inputs, **keywords)

    def __reduce__(self) -> tuple[Any, ...]:
        recompile = bool(self.executables)
        if self.data is not None:
            return load_bytes, (self.data, self.device, recompile)
        return partial(load, str(self.path), self.device, recompile=recompile), ()

    @property
    def path(self) -> Path:
        return self.artifact.path.absolute()

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Name and spec of each tensor that a call takes, in order."""
        return self.plan.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Name and spec of each tensor that a call returns, in order."""
        return self.plan.outputs

    @property
    def programs(self) -> tuple[Program, ...]:
        """What was loaded of the file, one per range of batches."""
        return tuple(program for program, _ in self._parts)

    @property
    def plan(self) -> Program:
        """The program of the largest batches: `plan.to_text()`, `plan.steps`, `plan.calls`."""
        return self._parts[-1][0]

    @property
    def executables(self) -> tuple[Executable, ...]:
        """The executables behind a device that kernels were planned for again."""
        return tuple(part for _, part in self._parts if not isinstance(part, GraphRunner))

    @property
    def summary(self) -> dict[str, int]:
        """Counts: convs, kernels, torch_fallbacks, arena_bytes, activation_bytes."""
        return dict(self.plan.summary)

    @cached_property
    def ledger(self) -> Report:
        """The account of the compilation that was saved."""
        return ledger_of(self.artifact, self.plan)

    def explain(self) -> str:
        """The ledger as text, under the summary."""
        return explain(self.artifact, self.plan)

    def profile(self, *inputs: Any, **keywords: Any) -> list[tuple[str, float]]:
        """(step, microseconds) in order; each step is run by itself once. The ledger keeps them."""
        tensors = self.interface.flatten(inputs, keywords)
        batch = self.interface.check(tensors, self.place, at_least=1)
        program, part = self._part(batch)
        if not isinstance(part, GraphRunner):
            times = part.profile(*inputs, **keywords)
            self.ledger = part.ledger
            return times
        times = part.time_steps(tensors, batch)
        ledger = ledger_of(self.artifact, program)
        self.ledger = ledger.with_launches(times, torch.cuda.get_device_name())
        return times

    @property
    def place(self) -> torch.device:
        """Where inputs must be and outputs are."""
        if self.device == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _part(self, batch: int) -> Part:
        for program, part in self._parts:
            low, high = program.batches
            if program.batch is None or low <= batch <= high:
                return program, part
        held = ", ".join("{} to {}".format(*program.batches) for program in self.programs)
        raise InvalidInputError(
            f"inputs: expected a batch that '{self.path}' was compiled for ({held}), got {batch}"
        )


def ledger_of(artifact: Artifact, program: Program) -> Report:
    """The ledger of a program.

    Raises: ArtifactError where it is none.
    """
    from ..explain.report import Report

    return Report.from_json(artifact.ledgers[program.account], f"ledger of {artifact.path}")


def explain(artifact: Artifact, program: Program) -> str:
    """A program's ledger as text, under its summary."""
    ledger = ledger_of(artifact, program)
    try:
        return ledger.explain(artifact.document.model, dict(program.summary))
    except KeyError as error:
        raise ArtifactError(f"'{artifact.path}' is damaged: no {error} in its summary") from error
