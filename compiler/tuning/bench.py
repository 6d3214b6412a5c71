"""A problem with tensors to run it on, its exact result, and the verdict on a configuration's.

A configuration is verified before it may win: against the op's reference in fp64, by the tolerance
that the tests use (`kernels/contract/tolerance.py`); and it may write nothing outside its outputs.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...kernels import registry
from ...kernels.contract import tolerance
from ...kernels.contract.epilogue import apply_reference
from ...kernels.contract.op import Config, Launch, Problem, Ref
from ...kernels.contract.spec import Operand, TensorSpec, as_layout
from ...kernels.contract.targets import INTERPRETER
from ...kernels.devices import execute, interpreter

SLACK = 64
"""Elements after the end of each buffer, where nothing may be written."""
OPERAND_RANGE = (-1.5, 1.5)
CHUNK = 1 << 24
"""Elements that are compared at a time, so that fp64 copies of large results fit in memory."""
Buffers = dict[Ref, torch.Tensor]
"""Flat tensors by the argument they are."""
INTERPRETER_RUNS = 3
INTERPRETER_SPENT_S = 2.0
"""Once a configuration has run for so long in all, it is not run again."""


@dataclass(frozen=True)
class Trial:
    """What a configuration did. wrong: why its result is not the reference's, and then no times.

    time_us: median with a cold L2 cache; spread_us: 10th to 90th percentile; warm_us: with a warm
    one, None where there is no such thing.
    """

    wrong: str | None = None
    time_us: float = math.nan
    spread_us: float = math.nan
    warm_us: float | None = None


def float_dtype(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    floats = (tensor.dtype for tensor in tensors if tensor.dtype.is_floating_point)
    return next(floats, torch.float32)


class Bench:
    """The tensors of one problem on a device, at its largest batch, and what must come out."""

    def __init__(self, problem: Problem, device: torch.device, seed: int = 0) -> None:
        self.problem, self.device = problem, device
        self.op = registry.get(problem.op)
        batches = (o.spec.batch for o in (*problem.inputs, *problem.outputs))
        self.batch = next((batch for batch in batches if batch is not None), 1)
        self._packs = self.op.packs(problem.attributes)
        generator = torch.Generator(device).manual_seed(seed)
        low, high = self.op.input_range

        def draw(spec: TensorSpec, low: float, high: float) -> torch.Tensor:
            values = torch.rand(spec.shape, generator=generator, device=device)
            is_mask = spec.dtype is torch.bool
            drawn = values < 0.5 if is_mask else (values * (high - low) + low).to(spec.dtype)
            return as_layout(drawn, spec.layout)

        self.inputs = tuple(
            self._weight(draw(operand.spec, -1.0, 1.0))
            if slot in self._packs
            else draw(operand.spec, low, high)
            for slot, operand in enumerate(problem.inputs)
        )
        self.inputs = self.op.prepare(problem.attributes, self.inputs)
        self.operands = tuple(draw(o.spec, *OPERAND_RANGE) for o in problem.operands)
        self.before = tuple(draw(o.spec, *OPERAND_RANGE) for o in problem.prologue_operands)
        self._exact = self._reference(torch.float64)
        self._eager = self._eager_reference()
        bare = replace(problem, epilogue=(), operands=())
        flops = self.op.cost(bare).flops
        self._depth = max(1, flops // max(1, 2 * problem.output.spec.numel))

    @staticmethod
    def _weight(values: torch.Tensor) -> torch.Tensor:
        """Scaled so that results are as large as inputs: chains of products stay inside fp16."""
        fan_in = values[0].numel() if values.dim() > 1 else 1
        return values * math.sqrt(3.0 / fan_in)

    # The exact result.

    def _reference(self, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        problem = self.problem
        first, *others = self.inputs
        if problem.prologue:
            # Kernels round the prologue's result to the input's dtype once.
            before = tuple(t.double() for t in self.before)
            exact = apply_reference(problem.prologue, first.double(), before)
            first = exact.to(first.dtype)

        def cast(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            return tuple(t.to(dtype) if t.dtype.is_floating_point else t for t in tensors)

        with torch.no_grad():
            values = self.op.reference(problem.attributes, *cast((first, *others)))
            values = values if isinstance(values, tuple) else (values,)
            last = apply_reference(problem.epilogue, values[0], cast(self.operands))
        return (last, *values[1:])

    def _eager_reference(self) -> tuple[torch.Tensor, ...]:
        """PyTorch's own result in the compute dtype; where it has no kernel for that on this
        device, its fp32 result rounded."""
        try:
            results = self._reference(float_dtype(self.inputs))
        except NotImplementedError:
            results = self._reference(torch.float32)
        pairs = zip(results, self.problem.outputs, strict=True)
        return tuple(result.to(operand.spec.dtype) for result, operand in pairs)

    # Memory.

    def buffers(self) -> Buffers:
        """Flat buffers of their own for every tensor; the outputs' hold NaN."""
        problem, flat = self.problem, Buffers()
        tensors = {"input": self.inputs, "operand": self.operands, "prologue": self.before}
        for kind, group in problem.groups.items():
            for index, operand in enumerate(group):
                tensor = tensors[kind][index] if kind in tensors else None
                pack = self._packs.get(index) if kind == "input" else None
                if pack is not None and tensor is not None:
                    flat[Ref(kind, index)] = pack(problem.attributes, tensor).clone()
                else:
                    flat[Ref(kind, index)] = self._flat(operand, tensor)
        return flat

    def _flat(self, operand: Operand, tensor: torch.Tensor | None) -> torch.Tensor:
        size = max(operand.extent, operand.offset, 1) + SLACK
        dtype = operand.spec.dtype
        flat = torch.zeros(size, dtype=dtype, device=self.device)
        if tensor is None:
            return tolerance.fill_untouched(flat)
        _view(flat, operand).copy_(tensor)
        return flat

    def arguments(
        self, launches: Sequence[Launch], buffers: Buffers
    ) -> list[tuple[Launch, Buffers]]:
        """Each launch with its tensors: the buffers, and scratch memory of its own."""
        return [(each, {**buffers, **execute.scratch(each, self.device)}) for each in launches]

    # The verdict.

    def wrong(self, buffers: Buffers) -> str | None:
        """What is wrong with the outputs in the buffers, in words, or None."""
        for index, operand in enumerate(self.problem.outputs):
            flat = buffers[Ref("output", index)]
            result = _view(flat, operand).clone()
            tolerance.fill_untouched(_view(flat, operand))
            if not tolerance.is_untouched(flat).all():
                return f"output {index}: something outside of it was written"
            reason = self._compared(result, self._exact[index], self._eager[index])
            if reason is not None:
                return f"output {index}: {reason}"
        return None

    def _compared(
        self, result: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor
    ) -> str | None:
        if result.shape != exact.shape or result.numel() <= CHUNK:
            return tolerance.compare(result, exact, eager, self._depth)
        parts = -(-result.numel() // CHUNK)
        pieces = (torch.chunk(each, min(parts, result.shape[0])) for each in (result, exact, eager))
        for at, (one, truth, peer) in enumerate(zip(*pieces, strict=True)):
            if (reason := tolerance.compare(one, truth, peer, self._depth)) is not None:
                return f"part {at} of {parts}: {reason}"
        return None


def runs_to_verify(launches: Sequence[Launch]) -> int:
    """Two where launches leave scratch memory behind as they must find it: a kernel that does not
    is wrong the second time."""
    return 2 if any(launch.scratch for launch in launches) else 1


def _view(flat: torch.Tensor, operand: Operand) -> torch.Tensor:
    """The operand's logical tensor inside its flat buffer."""
    return torch.as_strided(flat, operand.shape, operand.strides, operand.offset)


class InterpreterBackend:
    """Runs configurations in the interpreter: numerics are verified as on a GPU; the times are what
    the interpreter costs."""

    device = "interpreter"
    driver = ""

    def __init__(self) -> None:
        self._bench: Bench | None = None

    def trial(self, problem: Problem, config: Config) -> Trial:
        """The verdict and the median of up to three runs by the wall clock."""
        bench = self._bench
        if bench is None or bench.problem != problem:
            bench = self._bench = Bench(problem, torch.device("cpu"))
        launches = bench.op.launches(problem, config, INTERPRETER)
        buffers = bench.buffers()
        bound = bench.arguments(launches, buffers)
        times = [_interpreted_us(bound, bench.batch) for _ in range(runs_to_verify(launches))]
        if (reason := bench.wrong(buffers)) is not None:
            return Trial(wrong=reason)
        while len(times) < INTERPRETER_RUNS and sum(times) < INTERPRETER_SPENT_S * 1e6:
            times.append(_interpreted_us(bound, bench.batch))
        return Trial(None, statistics.median(times), max(times) - min(times))


def _interpreted_us(bound: Sequence[tuple[Launch, Buffers]], batch: int) -> float:
    started = time.perf_counter()
    with interpreter.interpreting():
        for launch, tensors in bound:
            execute.interpret(launch, tensors.__getitem__, batch)
    return (time.perf_counter() - started) * 1e6


def handler_of(device: Any) -> Callable[[Any], Any]:
    """What a child answers with a backend: None asks for its `device` and `driver`, as records call
    them; (problem, config) for a trial, which raises ConvloomError where it cannot be built or
    launched, and PoisonedError where the process must end because of it."""

    def handle(request: Any) -> Any:
        if request is None:
            return device.device, device.driver
        return device.trial(*request)

    return handle
