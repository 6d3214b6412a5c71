"""Runs plans: memory for a batch, and one runner per kind of target.

- reference: the graph, node by node, by torch ops;
- interpreter: the plan's kernels on the CPU;
- cuda: the plan's kernels compiled for this GPU, captured once per batch into a CUDA graph.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch

from ..errors import KernelError, TargetUnavailableError
from ..kernels import execute, interpreter, offline
from ..kernels.op import Launch, Ref
from ..kernels.targets import Target
from .evaluate import call_torch, evaluate
from .ir import Graph, Value
from .plan import KernelStep, Place, Plan, Step, TorchStep

GRAPHS_KEPT = 8
"""CUDA graphs kept under a dynamic batch; the least recently used one goes first."""

QUEUEING_CYCLES = 50_000_000
"""About 30 ms: longer than the host takes to queue the launches of any network of the zoo."""

Observer = Callable[[Step, torch.Tensor], None]


class Runner(Protocol):
    """What an executable needs of a target."""

    def run(self, inputs: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
        """The outputs, owned by the caller."""
        ...


class Memory:
    """Every buffer of a plan as a flat tensor, for one batch on one device."""

    def __init__(self, plan: Plan, constants: dict[str, torch.Tensor], batch: int) -> None:
        self.batch = batch
        device = next(iter(constants.values())).device if constants else torch.device("cpu")
        self._flat: dict[str, torch.Tensor] = {}
        arenas = {
            kind: torch.empty(plan.arena_bytes_at(kind, batch), dtype=torch.uint8, device=device)
            for kind in ("arena", "fixed")
        }
        for name, buffer in plan.buffers.items():
            if buffer.kind == "constant":
                self._flat[name] = constants[name]
            elif buffer.kind in arenas:
                start = buffer.offset_at(batch)
                piece = arenas[buffer.kind][start : start + buffer.bytes_at(batch)]
                self._flat[name] = piece.view(buffer.dtype)
            else:
                count = buffer.bytes_at(batch) // buffer.dtype.itemsize
                make = torch.zeros if buffer.kind == "zeroed" else torch.empty
                self._flat[name] = make(count, dtype=buffer.dtype, device=device)

    def flat(self, name: str) -> torch.Tensor:
        """The whole buffer."""
        return self._flat[name]

    def view(self, place: Place) -> torch.Tensor:
        """The logical tensor at a place."""
        operand = place.operand
        shape = operand.spec.at(self.batch)
        flat = self._flat[place.buffer]
        # An explicit storage offset counts from the start of the arena, not of the buffer.
        start = flat.storage_offset() + operand.offset
        return torch.as_strided(flat, shape, operand.strides, start)


def constants_on(plan: Plan, device: torch.device) -> dict[str, torch.Tensor]:
    """The plan's packed constants on a device."""
    return {name: tensor.to(device) for name, tensor in plan.constants.items()}


def run_torch_step(step: TorchStep, memory: Memory) -> None:
    """A fallback step: tensors in torch's own layout in, results copied to their places."""
    tensors = [memory.view(place).contiguous() for place in step.inputs]
    results = call_torch(step.call, tensors)
    for place, result in zip(step.outputs, results, strict=True):
        memory.view(place).copy_(result)


class ReferenceRunner:
    """The optimised graph by torch ops, with a snapshot of the weights."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph.copy()
        self._graph.tensors = {name: t.detach().clone() for name, t in graph.tensors.items()}

    def run(self, inputs: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
        with torch.no_grad():
            values = evaluate(self._graph, inputs)
        return [values[value].contiguous().clone() for value in self._graph.outputs()]

    def value(self, inputs: Sequence[torch.Tensor], node: str) -> torch.Tensor:
        """The first output of one node."""
        with torch.no_grad():
            return evaluate(self._graph, inputs)[Value(node)]


class InterpreterRunner:
    """The plan's kernels on the CPU."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._constants = constants_on(plan, torch.device("cpu"))
        self._memory: Memory | None = None

    def run(
        self, inputs: Sequence[torch.Tensor], batch: int, observe: Observer | None = None
    ) -> list[torch.Tensor]:
        """The outputs; `observe` sees each step's first output right after it ran."""
        plan = self._plan
        if self._memory is None or self._memory.batch != batch:
            self._memory = Memory(plan, self._constants, batch)
        memory = self._memory
        for port, tensor in zip(plan.inputs, inputs, strict=True):
            memory.view(port.place).copy_(tensor)
        for step in plan.steps:
            self._run_step(step, memory)
            if observe is not None:
                observe(step, memory.view(first_output(step)).clone())
        return [memory.view(port.place).clone() for port in plan.outputs]

    def _run_step(self, step: Step, memory: Memory) -> None:
        if isinstance(step, TorchStep):
            run_torch_step(step, memory)
            return
        with interpreter.interpreting():
            for launch in step.launches:
                execute.interpret(launch, _tensors_of(step, memory), memory.batch)


def first_output(step: Step) -> Place:
    """Where the step's first result lies."""
    if isinstance(step, TorchStep):
        return step.outputs[0]
    return Place(step.buffers[Ref("output", 0)], step.problem.output)


def _tensors_of(step: KernelStep, memory: Memory) -> Callable[[Ref], torch.Tensor]:
    return lambda ref: memory.flat(step.buffers[ref])


def dtype_of(plan: Plan, step: KernelStep) -> Callable[[Ref], torch.dtype]:
    """What each tensor argument of a step points to."""
    return lambda ref: plan.buffers[step.buffers[ref]].dtype


def compile_requests(plan: Plan, target: Target) -> list[offline.CompileRequest]:
    """One request per launch of the plan, in order."""
    return [offline.request(launch, dtype_of(plan, step), target) for step, launch in plan.kernels]


class CudaRunner:
    """The plan compiled for this GPU; one CUDA graph per batch that has been seen."""

    def __init__(self, plan: Plan, target: Target) -> None:
        self._plan = plan
        self._constants = constants_on(plan, torch.device("cuda", torch.cuda.current_device()))
        requests = compile_requests(plan, target)
        offline.compile_all(requests)
        self._compiled = [offline.compile_request(wanted) for wanted in requests]
        self._graphs: OrderedDict[int, _CapturedPlan] = OrderedDict()

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", torch.cuda.current_device())

    def run(self, inputs: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
        captured = self._graphs.pop(batch, None) or self._capture(batch)
        self._graphs[batch] = captured
        while len(self._graphs) > GRAPHS_KEPT:
            self._graphs.popitem(last=False)
        return captured.replay(inputs)

    def _capture(self, batch: int) -> _CapturedPlan:
        """The plan in memory of its own for a batch.

        Raises: KernelError where the GPU has not enough memory; what was taken is given back.
        """
        try:
            memory = Memory(self._plan, self._constants, batch)
            return _CapturedPlan(self._plan, self._compiled, memory)
        except torch.OutOfMemoryError as error:
            kept = len(self._graphs)
            self._graphs.clear()
            torch.cuda.empty_cache()
            raise KernelError(
                f"batch {batch} needs more GPU memory than there is: {error}; {kept} other batches "
                "kept by this executable were dropped, call it again or with a smaller batch"
            ) from error

    def time_steps(self, inputs: Sequence[torch.Tensor], batch: int) -> list[tuple[str, float]]:
        """(step, microseconds) for each step launched by itself, outside the CUDA graph."""
        memory = Memory(self._plan, self._constants, batch)
        fresh = _CapturedPlan(self._plan, self._compiled, memory)
        return fresh.time_steps(inputs)


class _CapturedPlan:
    """A plan bound to memory, recorded into a CUDA graph."""

    def __init__(self, plan: Plan, compiled: Sequence[Any], memory: Memory) -> None:
        self._plan, self._memory = plan, memory
        self._actions = _bind(plan, compiled, memory)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        # Modules load, and torch ops of fallback steps warm up, outside the capture.
        with torch.cuda.stream(stream):
            for _, action in self._actions:
                action()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            for _, action in self._actions:
                action()

    def _load(self, inputs: Sequence[torch.Tensor]) -> None:
        for port, tensor in zip(self._plan.inputs, inputs, strict=True):
            self._memory.view(port.place).copy_(tensor)

    def replay(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self._load(inputs)
        self._graph.replay()
        return [self._memory.view(port.place).clone() for port in self._plan.outputs]

    def time_steps(self, inputs: Sequence[torch.Tensor]) -> list[tuple[str, float]]:
        self._load(inputs)
        count = len(self._actions) + 1
        make: Any = torch.cuda.Event
        events = [make(enable_timing=True) for _ in range(count)]
        # The GPU waits until every launch is queued: otherwise the host's own time is measured.
        torch.cuda._sleep(QUEUEING_CYCLES)  # type: ignore[no-untyped-call]
        events[0].record()
        for (_, action), event in zip(self._actions, events[1:], strict=True):
            action()
            event.record()
        torch.cuda.synchronize()
        return [
            (name, before.elapsed_time(after) * 1e3)
            for (name, _), before, after in zip(self._actions, events, events[1:], strict=False)
        ]


def _bind(
    plan: Plan, compiled: Sequence[Any], memory: Memory
) -> list[tuple[str, Callable[[], None]]]:
    """One call without arguments per launch, in order."""
    actions: list[tuple[str, Callable[[], None]]] = []
    remaining = iter(compiled)
    for step in plan.steps:
        if isinstance(step, TorchStep):
            actions.append((step.name, partial(run_torch_step, step, memory)))
            continue
        for launch in step.launches:
            tensor_of = _tensors_of(step, memory)
            action = bind_launch(launch, next(remaining), tensor_of, memory.batch)
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
    start = compiled[grid]
    return lambda: start(*ordered)


class CrossCompiledRunner:
    """A plan compiled for a GPU that is not here: it can be inspected, not run."""

    def __init__(self, plan: Plan) -> None:
        self._target = plan.target
        offline.compile_all(compile_requests(plan, plan.target))

    def run(self, inputs: Sequence[torch.Tensor], batch: int) -> list[torch.Tensor]:
        raise TargetUnavailableError(
            f"this executable was compiled for {self._target.name} and cannot run here: no such "
            "GPU. Compile with target='interpreter' to run the same kernels on the CPU"
        )
