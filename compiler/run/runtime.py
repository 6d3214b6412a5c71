"""Runs plans: one runner per kind of target.

- reference: the graph, node by node, by torch ops;
- interpreter: the plan's kernels on the CPU;
- emulator: what the plan's kernels are compiled to, on the CPU;
- cuda: the plan's kernels compiled for this GPU, captured once per batch into a CUDA graph.

Threads: runners that have buffers hold a lock while they run, rather than buffers for each thread:
an arena is the memory that a network needs, and a GPU gains nothing from two of its calls at once.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch

from ... import progress
from ...errors import KernelError, TargetUnavailableError
from ...kernels import registry
from ...kernels.contract import targets
from ...kernels.contract.op import Launch, Ref
from ...kernels.contract.targets import EMULATED, INTERPRETER, REFERENCE, Target
from ...kernels.devices import emulator, execute, interpreter, offline
from ...kernels.devices.language import forkable_lock
from ..evaluation.evaluate import call_torch, evaluate
from ..graph.ir import Graph
from ..graph.memory import BufferSlice, Memory, on_cpu
from ..plan.branches import schedule
from ..plan.plan import KernelStep, Plan, Step, TorchStep
from ..plan.streams import Action
from .cuda_graphs import GraphRunner

Observer = Callable[[Step, torch.Tensor], None]


class Runner(Protocol):
    """What an executable needs of a target."""

    def run(self, inputs: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
        """The outputs, owned by the caller."""


def constants_on(plan: Plan, device: torch.device) -> dict[str, torch.Tensor]:
    return {name: tensor.to(device) for name, tensor in plan.constants.items()}


def run_torch_step(step: TorchStep, memory: Memory) -> None:
    """A fallback step: tensors in torch's own layout in, results copied to their places."""
    tensors = [memory.view(place).contiguous() for place in step.inputs]
    results = call_torch(step.call, tensors)
    for place, result in zip(step.outputs, results, strict=True):
        memory.view(place).copy_(result)


class ReferenceRunner:
    """The optimised graph by torch ops. Threads run side by side: there is nothing that they share
    but constants."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph

    @on_cpu
    def run(self, inputs: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
        with torch.no_grad():
            values = evaluate(self._graph, inputs)
        return [values[value].contiguous().clone() for value in self._graph.outputs()]


class StepRunner(ABC):
    """The plan's kernels on the CPU, step by step; one thread at a time, the others wait."""

    by: str
    """What runs them, in a word."""
    around: Callable[[], AbstractContextManager[Any]] = staticmethod(nullcontext)
    """Around all steps of a call."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = forkable_lock()
        self._constants = constants_on(plan, torch.device("cpu"))
        self._memory: Memory | None = None

    @on_cpu
    def run(
        self, inputs: Sequence[torch.Tensor], batch: int, observe: Observer | None = None
    ) -> list[torch.Tensor]:
        """The outputs; `observe` sees each step's first output right after it ran."""
        with self._lock:
            return self._run(inputs, batch, observe)

    def time_steps(self, inputs: Sequence[torch.Tensor], batch: int) -> list[tuple[str, float]]:
        """(step, microseconds) for each step, by the wall clock."""
        ends: list[tuple[str, float]] = [("", time.perf_counter())]
        self.run(inputs, batch, lambda step, _: ends.append((step.name, time.perf_counter())))
        return [(name, (end - start) * 1e6) for (_, start), (name, end) in pairwise(ends)]

    def _run(
        self, inputs: Sequence[torch.Tensor], batch: int, observe: Observer | None
    ) -> list[torch.Tensor]:
        plan = self._plan
        # Not kept where the call does not end (an error, an interruption, a fork() in between):
        # what kernels expect to be zero may not be.
        memory, self._memory = self._memory, None
        if memory is None or memory.batch != batch:
            memory = Memory(plan, self._constants, batch)
        for port, tensor in zip(plan.inputs, inputs, strict=True):
            memory.view(port.place).copy_(tensor)
        with self.around():
            for done, step in enumerate(plan.steps):
                progress.tell("kernels", done, len(plan.steps))
                self._run_step(step, memory)
                if observe is not None:
                    observe(step, memory.view(first_output(step)).clone())
        outputs = [memory.view(port.place).clone() for port in plan.outputs]
        self._memory = memory
        return outputs

    def _run_step(self, step: Step, memory: Memory) -> None:
        if isinstance(step, TorchStep):
            run_torch_step(step, memory)
            return
        for launch in step.launches:
            self._launch(step, launch, memory)

    @abstractmethod
    def _launch(self, step: KernelStep, launch: Launch, memory: Memory) -> None:
        """Runs one launch of a step."""


class InterpreterRunner(StepRunner):
    by, around = "interpreter", staticmethod(interpreter.interpreting)

    def _launch(self, step: KernelStep, launch: Launch, memory: Memory) -> None:
        execute.interpret(launch, _tensors_of(step, memory), memory.batch)


class EmulatorRunner(StepRunner):
    """Compiles the kernels for a GPU and emulates what they became (`kernels/emulator/`)."""

    by = "emulator"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        offline.compile_all(compile_requests(plan, plan.target))

    def _launch(self, step: KernelStep, launch: Launch, memory: Memory) -> None:
        tensor_of, places = _tensors_of(step, memory), registry.get(step.op).places(step.problem)
        emulator.run(launch, tensor_of, memory.batch, self._plan.target, places)


def first_output(step: Step) -> BufferSlice:
    if isinstance(step, TorchStep):
        return step.outputs[0]
    return BufferSlice(step.buffers[Ref("output", 0)], step.problem.output)


def _tensors_of(step: KernelStep, memory: Memory) -> Callable[[Ref], torch.Tensor]:
    return lambda ref: memory.flat(step.buffers[ref])


def dtype_of(plan: Plan, step: KernelStep) -> Callable[[Ref], torch.dtype]:
    """What each tensor argument of a step points to."""
    return lambda ref: plan.buffers[step.buffers[ref]].dtype


def compile_requests(plan: Plan, target: Target) -> list[offline.CompileRequest]:
    """One request per launch of the plan, in order."""
    return [offline.request(launch, dtype_of(plan, step), target) for step, launch in plan.kernels]


class CudaRunner(GraphRunner):
    """The plan compiled for this GPU; one CUDA graph per batch that has been seen."""

    def __init__(self, plan: Plan, target: Target) -> None:
        device = torch.device("cuda", torch.cuda.current_device())
        requests = compile_requests(plan, target)
        offline.compile_all(requests)
        compiled = [offline.compile_request(request) for request in requests]
        bind = partial(bind_plan, plan, compiled)
        super().__init__(plan, constants_on(plan, device), bind, schedule(plan))


def bind_plan(plan: Plan, compiled: Sequence[Any], memory: Memory) -> list[Action]:
    """One call without arguments per launch, in order."""
    actions: list[Action] = []
    remaining = iter(compiled)
    for step in plan.steps:
        if isinstance(step, TorchStep):
            actions.append((step.name, partial(run_torch_step, step, memory)))
            continue
        for launch, code in zip(step.launches, remaining, strict=False):
            action = bind_launch(launch, code, _tensors_of(step, memory), memory.batch)
            actions.append((step.name, action))
    return actions


def bind_launch(
    launch: Launch, compiled: Any, tensor_of: Callable[[Ref], torch.Tensor], batch: int
) -> Callable[[], None]:
    """The launch of a compiled kernel on tensors of this GPU, as a call without arguments.

    Raises: KernelError for a tensor that is not aligned as the kernel was compiled for.
    """
    arguments = execute.bind(launch, tensor_of, batch)
    for name, tensor in arguments.items():
        if isinstance(tensor, torch.Tensor) and tensor.data_ptr() % 16:
            kernel = launch.kernel.fn.__name__
            raise KernelError(f"{kernel}: argument {name} is not aligned to 16 bytes")
    arguments.update(launch.constexprs)
    ordered = [arguments[name] for name in launch.kernel.arg_names]
    grid = launch.grid_at(batch)
    if 0 in grid:  # An empty tensor: a device refuses to launch nothing.
        return lambda: None
    # The launcher starts a cluster in the place of each.
    start = compiled[(grid[0] // launch.cluster, *grid[1:])]
    return lambda: start(*ordered)


class CrossCompiledRunner:
    """A plan compiled for a GPU that is not here: it can be inspected, not run."""

    def __init__(self, plan: Plan) -> None:
        self._target = plan.target
        offline.compile_all(compile_requests(plan, plan.target))

    def run(self, inputs: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
        same = [each.name for each in EMULATED if each.compiled_as == self._target.name]
        more = "".join(f", or with target='{name}' to run what they became" for name in same)
        raise TargetUnavailableError(
            f"this executable was compiled for {self._target.name} and cannot run here: no such "
            "GPU. Compile with target='interpreter' to run the same kernels on the CPU"
            f"{more}"
        )


@on_cpu
def runner_for(graph: Graph, plan: Plan, chosen: Target, target: str) -> Runner:
    """What runs a plan; `target` is the user's word for `chosen`: "cuda" is this machine's GPU."""
    if chosen is REFERENCE:
        return ReferenceRunner(graph)
    if chosen is INTERPRETER:
        return InterpreterRunner(plan)
    if chosen.is_emulated:
        return EmulatorRunner(plan)
    capability = targets.local_capability()
    here = capability is not None and targets.nearest(capability) is chosen
    if target == "cuda" or here:
        return CudaRunner(plan, chosen)
    return CrossCompiledRunner(plan)
