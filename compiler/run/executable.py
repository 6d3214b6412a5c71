"""The compiled module: a callable with its plan, its ledger and its kernels open to inspection."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from ...errors import InvalidInputError, KernelError, near_names
from ...kernels.contract.cost_model import Resources
from ...kernels.contract.epilogue import FunctionName, GeneratedFunction, flat, named
from ...kernels.contract.op import Launch
from ...kernels.contract.targets import Target
from ...kernels.devices import offline
from ..evaluation.evaluate import evaluate, relative_error
from ..explain.report import Report
from ..graph.interface import Interface, Port, empty_outputs
from ..graph.ir import Graph, Value
from ..plan.plan import KernelStep, Plan, Step
from .runtime import CudaRunner, Observer, Runner, StepRunner, compile_requests


@dataclass(frozen=True)
class Kernel:
    """One launch of the plan, for people: what it computes and what the compiler made of it."""

    name: str
    ops: tuple[str, ...]
    module_path: str
    step: KernelStep
    launch: Launch
    request: offline.CompileRequest | None

    def source(self) -> str:
        """The Triton source: the kernel and the functions that it is given."""
        return "\n".join(self.source_parts())

    def source_parts(self) -> tuple[str, str]:
        """The two parts of `source`: what is this kernel's own, and what others may share."""
        import inspect

        functions, constants = [], []
        for name, value in flat(named(self.launch.constexprs)).items():
            if isinstance(value, (GeneratedFunction, FunctionName)):
                functions.append(f"# {name}\n{value.source}")
            else:
                constants.append(f"{name}={value}")
        own = "\n".join([f"# {self.name}: {', '.join(constants)}", *functions])
        return own, inspect.getsource(self.launch.kernel.fn)

    def report(self) -> offline.KernelReport:
        """Registers, spills, shared memory and instruction mix.

        Raises: KernelError where the target has no machine code.
        """
        return offline.report(self._compiled_request())

    def known_resources(self) -> Resources | None:
        """Registers, spills and shared memory where it has been compiled before, here."""
        return offline.known_resources(self.request) if self.request else None

    def code(self, kind: str) -> str:
        """Its "source", "ptx" or "sass"."""
        return {"source": self.source, "ptx": self.ptx, "sass": self.sass}[kind]()

    def ptx(self) -> str:
        """PTX text."""
        return str(offline.compile_request(self._compiled_request()).asm["ptx"])

    def sass(self) -> str:
        """Disassembled machine code."""
        return offline.disassembly(offline.compile_request(self._compiled_request()))

    def _compiled_request(self) -> offline.CompileRequest:
        if self.request is None:
            raise KernelError(
                f"kernel {self.name}: the interpreter has no machine code; compile with "
                "target='cuda:sm_90' (no GPU needed) to see it"
            )
        return self.request


def kernels_of(plan: Plan) -> tuple[Kernel, ...]:
    """Every launch of a plan, in order; nothing is compiled for it."""
    requests = iter(compile_requests(plan, plan.target) if plan.target.is_gpu else ())
    kernels = []
    for step in (step for step in plan.steps if isinstance(step, KernelStep)):
        for at, launch in enumerate(step.launches, 1):
            name = step.name if len(step.launches) == 1 else f"{step.name}.{at}"
            request = next(requests, None)
            kernels.append(Kernel(name, step.origins, step.module_path, step, launch, request))
    return tuple(kernels)


Saver = Callable[[str | Path, tuple["Executable", ...], str], None]
"""What writes executables into a file, with the model in words."""
Loader = Callable[[bytes], Any]
"""What makes an executable of such a file's bytes."""


class Executable:
    """What `convloom.compile` returns; call it like the module.

    Weights are those of the moment of compilation. Inputs are not modified; outputs belong to the
    caller.

    Any number of threads may call it: it has one set of buffers, so their calls run one after the
    other (`runtime.py`; only the reference target, which has no buffers, runs them side by side).
    """

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        ledger: Report,
        runner: Runner,
        files: tuple[Saver, Loader],
    ) -> None:
        self.graph, self.plan, self.ledger = graph, plan, ledger
        ledger.plan = plan
        self._runner, (self._saver, self._loader) = runner, files
        self.interface = Interface(plan.inputs, plan.structure, plan.batch)

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """The module's outputs, in the module's own structure.

        NumPy's arrays are taken for tensors; constants must be those of the example.

        Raises: InvalidInputError for the wrong number, structure, rank, shape, dtype or device, or
        another constant; TargetUnavailableError where the target is not this machine.
        """
        tensors = self.interface.flatten(inputs, keywords)
        batch = self.interface.check(tensors, self.place)
        if batch == 0:
            return self.interface.unflatten(empty_outputs(self.plan.outputs, self.place))
        return self.interface.unflatten(self._runner.run(tensors, batch))

    def __copy__(self, memo: Any = None) -> Executable:
        """The same plan, weights and buffers: nothing of them is the caller's to change."""
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    __deepcopy__ = __copy__

    def __reduce__(self) -> tuple[Any, ...]:
        """As a file, of which whoever unpickles it loads the bytes."""
        return self._loader, (self.to_bytes(),)

    def __repr__(self) -> str:
        inputs, outputs = (
            ", ".join(f"{port.name} {port.spec}" for port in ports)
            for ports in (self.inputs, self.outputs)
        )
        count = len(self.plan.kernels)
        return (
            f"<Executable of {self.graph.name} for {self.target.name}: {count} kernel(s), "
            f"({inputs}) -> ({outputs})>"
        )

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Name and spec of each tensor that a call takes, in order."""
        return self.plan.inputs

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Name and spec of each tensor that a call returns, in order."""
        return self.plan.outputs

    @property
    def target(self) -> Target:
        return self.plan.target

    @property
    def place(self) -> torch.device:
        """Where inputs must be and outputs are."""
        runner = self._runner
        return runner.device if isinstance(runner, CudaRunner) else torch.device("cpu")

    def save(self, path: str | Path | IO[bytes], *others: Executable, model: str = "") -> None:
        """Writes a file that `convloom.load` reads, whole or not at all (`artifact/`).

        path: a name, or a file that is open for writing bytes. others: the same module compiled for
        other targets or ranges of batches, for the same file.
        model: what it is of, in words; by default the class of the module.

        Raises: ArtifactError where something cannot be in a file: torch fallbacks, outputs in
        containers other than tuple, list and dict, executables that do not belong together.
        """
        if isinstance(path, str | Path):
            self._saver(path, (self, *others), model)
        else:
            path.write(self.to_bytes(*others, model=model))

    def to_bytes(self, *others: Executable, model: str = "") -> bytes:
        """What `save` would write, which `convloom.load(io.BytesIO(...))` reads."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{self.graph.name}.loom"
            self._saver(path, (self, *others), model)
            return path.read_bytes()

    # Inspection.

    @property
    def has_steps(self) -> bool:
        """Whether steps can be watched one by one: in the interpreter and the emulator."""
        return isinstance(self._runner, StepRunner)

    @property
    def summary(self) -> dict[str, int]:
        """Counts: convs, kernels, torch_fallbacks, arena_bytes, activation_bytes."""
        return self.plan.summary()

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Every launch, in order."""
        return kernels_of(self.plan)

    def kernel(self, name: str) -> Kernel:
        """The launch of that name.

        Raises: InvalidInputError with the near names.
        """
        kernels = {kernel.name: kernel for kernel in self.kernels}
        if name not in kernels:
            raise InvalidInputError(f"no kernel named {name!r}; {near_names(name, kernels)}")
        return kernels[name]

    def summary_line(self) -> str:
        """The launches of every op alone and of the plan, which `compile` logs."""
        return self.ledger.summary_line(self.summary)

    def explain(self) -> str:
        """The ledger as text, under the summary; with measured times after `profile`."""
        return self.ledger.explain(self.graph.name, self.summary)

    def profile(self, *inputs: Any, **keywords: Any) -> list[tuple[str, float]]:
        """(step, microseconds) in order; each step is run by itself once. The ledger keeps them.

        On a GPU by CUDA events outside the CUDA graph; in the interpreter and the emulator by the
        wall clock, where it says what these cost and nothing about a GPU.
        """
        tensors = self.interface.flatten(inputs, keywords)
        batch = self.interface.check(tensors, self.place, at_least=1)
        if isinstance(self._runner, CudaRunner):
            where = torch.cuda.get_device_name()
        elif isinstance(self._runner, StepRunner):
            where = f"the {self._runner.by}, not a GPU"
        else:
            raise KernelError(f"target {self.target.name} has no steps that could be timed")
        times = self._runner.time_steps(tensors, batch)
        where += f", batch {batch}" if self.plan.batch is not None else ""
        self.ledger = self.ledger.with_launches(times, where)
        return times

    def errors(self, *inputs: Any, **keywords: Any) -> list[StepError]:
        """Per step: the kernels' and torch's own largest error against fp64, relative to the rms.

        The kernels run in the interpreter or the emulator; torch evaluates the same fused graph in
        the plan's dtype.
        """
        tensors, batch, runner = self._watched(inputs, keywords)
        with torch.no_grad():
            exact = evaluate(self.graph, tensors, torch.float64)
            eager = evaluate(self.graph, tensors)
        rows: list[StepError] = []

        def observe(step: Step, output: torch.Tensor) -> None:
            value = Value(step.name)
            if (truth := exact.get(value)) is not None:
                ours, theirs = relative_error(output, truth), relative_error(eager[value], truth)
                rows.append(StepError(step.name, step.module_path, ours, theirs))

        runner.run(tensors, batch, observe)
        return rows

    def watch(
        self, inputs: Sequence[Any], observe: Observer, keywords: Mapping[str, Any] = {}
    ) -> None:
        """Runs, and shows every step with its first output right after it ran.

        Raises: InvalidInputError as a call does; KernelError where the target has no steps.
        """
        tensors, batch, runner = self._watched(inputs, keywords)
        runner.run(tensors, batch, observe)

    def _watched(
        self, inputs: Sequence[Any], keywords: Mapping[str, Any]
    ) -> tuple[list[torch.Tensor], int, StepRunner]:
        tensors = self.interface.flatten(tuple(inputs), keywords)
        batch = self.interface.check(tensors, self.place, at_least=1)
        if not isinstance(self._runner, StepRunner):
            raise KernelError("errors per step are measured in the interpreter and the emulator")
        return tensors, batch, self._runner


@dataclass(frozen=True)
class StepError:
    """Largest error of one step's output against fp64, divided by the output's rms."""

    step: str
    module_path: str
    compiled: float
    eager: float
