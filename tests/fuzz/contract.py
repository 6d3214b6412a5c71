"""What every executable promises, checked on one network.

Always: shapes, dtypes, values and the places of NaN and Inf against fp64; inputs untouched; results
that share no memory with inputs, weights, each other or the executable (they are overwritten, and
all must stay as it was). Besides, as the case says, one or several of CHECKS, and one pass left
out. `grammar.py` says which share of the seeds is held to what.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import convloom
import torch
from convloom.compiler import api
from convloom.compiler.graph.ir import Graph
from convloom.compiler.passes import PASSES, parallel_convs
from convloom.errors import ConvloomError
from convloom.kernels.contract import tolerance
from torch import nn

from .. import nets
from ..harness import INTERPRETED, Interpreter
from .program import Program, merged

CHECKS = (AGAIN, OTHER, UNFUSED, BATCHES) = ("again", "other", "unfused", "batches")
"""The same bits a second time; other inputs, which leave earlier results alone; the same values
without passes; an executable for a range of batches, called with three of them."""
OPTIONAL = tuple(step.name for step in PASSES if not step.required)
BATCH_RANGE = (1, 4)
NOISE_RUNS = 3
ROUNDINGS = 4.0
"""Unit roundoffs of noise on every value, where a result is questioned."""


class BrokenError(AssertionError):
    """A promise that was not kept. kind: which one, for the shrinker to hold on to."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind


@dataclass(frozen=True)
class Case:
    """A network and how it is called. special: NaN and Inf in the inputs; strided: inputs that are
    not contiguous; checks: of CHECKS; without: a pass that is also left out; dynamic: the batch may
    vary."""

    program: Program
    seed: int = 0
    dtype: torch.dtype | None = None
    special: bool = False
    strided: bool = False
    checks: tuple[str, ...] = (AGAIN,)
    without: str | None = None
    dynamic: bool = True

    def source(self) -> str:
        """A module that runs the case: `PYTHONPATH=. python FILE` in the root of the project."""
        options = (f"seed={self.seed}, dtype={self.dtype}, special={self.special}, "
                   f"strided={self.strided}, checks={self.checks}, without={self.without!r}, "
                   f"dynamic={self.dynamic}")  # fmt: skip
        shapes = ", ".join(str(shape) for _, shape in self.program.inputs)
        return "\n".join(
            [
                "import torch",
                "import torch.nn.functional as F",
                "from tests.fuzz.contract import check_module",
                "from torch import nn",
                "",
                "",
                self.program.source(),
                "",
                'if __name__ == "__main__":',
                f"    check_module(Net(), [{shapes}], {options})",
                "",
            ]
        )

    def module(self) -> nn.Module:
        """The network with its seeded weights."""
        return nets.randomise(self.program.build(), self.seed)

    def inputs(self, again: int = 0) -> tuple[torch.Tensor, ...]:
        """The tensors it is called with; other ones for every `again`."""
        shapes = [shape for _, shape in self.program.inputs]
        return self.drawn(shapes, self.seed + 7919 * again, self.strided)

    def drawn(
        self, shapes: list[tuple[int, ...]], seed: int, strided: bool = False
    ) -> tuple[torch.Tensor, ...]:
        """Seeded inputs, rounded to what is computed in: of two that are equal then, fp64 takes the
        same one as the larger."""
        return make_inputs(shapes, seed, self.special, strided, self.dtype)

    @property
    def range(self) -> tuple[int, int] | None:
        """The batches it is compiled for."""
        return BATCH_RANGE if BATCHES in self.checks and self.dynamic else None


def make_inputs(
    shapes: list[tuple[int, ...]],
    seed: int,
    special: bool = False,
    strided: bool = False,
    dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, ...]:
    """Seeded inputs, some with a NaN and both infinities, some that are slices or transposed.

    dtype: what their values are rounded to; the tensors are fp32."""
    chosen = random.Random(seed)
    made = []
    for drawn in nets.inputs_of(*shapes, seed=seed):
        x = drawn if dtype is None else drawn.to(dtype).float()
        if special:
            for value in (float("nan"), float("inf"), float("-inf")):
                x.view(-1)[chosen.randrange(x.numel())] = value
        made.append(_strided(x, chosen.randrange(4)) if strided else x)
    return tuple(made)


def _strided(x: torch.Tensor, way: int) -> torch.Tensor:
    """The same numbers, stored otherwise."""
    if way == 0:
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if way == 1:
        wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"))
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if way == 2:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    whole = torch.full((3, *x.shape), float("nan"))
    whole[1] = x
    return whole[1]


def check(case: Case, device: Interpreter = INTERPRETED) -> set[str]:
    """The ops that the case's graphs hold, captured and fused.

    Raises: BrokenError for the first promise that is not kept.
    """
    return _Checks(case, case.module(), device).run()


def together(cases: Sequence[Case]) -> Case:
    """Several cases of one dtype and batch as one."""
    first = cases[0]
    special = any(case.special for case in cases)
    return replace(first, program=merged([case.program for case in cases]), special=special,
                   strided=any(case.strided for case in cases),
                   dynamic=all(case.dynamic for case in cases))  # fmt: skip


def grouped(cases: Iterable[Case]) -> list[list[Case]]:
    """Cases of one batch and the same checks, as those that can be one network."""
    groups: dict[Any, list[Case]] = {}
    for case in cases:
        groups.setdefault((case.dtype, case.special, case.range), []).append(case)
    return list(groups.values())


def check_many(cases: Iterable[Case], device: Interpreter = INTERPRETED) -> set[str]:
    """`check` of many cases of one batch, as few networks; where one is broken, of each by itself.

    Raises: BrokenError with the network that breaks a promise, as a module.
    """
    ops: set[str] = set()
    for group in grouped(cases):
        whole = together(group)
        try:
            ops |= check(whole, device)
        except BrokenError as error:
            for case in group:
                check_one(case, device)
            raise BrokenError(error.kind, f"{error}\n{whole.source()}") from error
    return ops


def check_one(case: Case, device: Interpreter = INTERPRETED) -> set[str]:
    """`check`, telling the seed and the module."""
    try:
        return check(case, device)
    except BrokenError as error:
        raise BrokenError(error.kind, f"seed {case.seed}: {error}\n{case.source()}") from error


def check_module(module: nn.Module, shapes: list[tuple[int, ...]], **options: Any) -> None:
    """Checks a network that was printed. Raises: BrokenError."""
    inputs = tuple((f"x{at}", shape) for at, shape in enumerate(shapes))
    case = Case(Program(inputs, (), (), ()), **options)
    _Checks(case, nets.randomise(module, case.seed)).run()


class _Checks:
    """One network, its truth and its compilations; torch.export runs once."""

    def __init__(self, case: Case, module: nn.Module, device: Interpreter = INTERPRETED) -> None:
        self.case, self.module, self.device = case, module, device
        self.ops: set[str] = set()

    def run(self) -> set[str]:
        example = self.case.inputs()
        try:
            with nets.exporting_once():
                exe, *others = [self.compile(example, passes) for _, passes in self.ways()]
        finally:
            nets.forget(self.module)
        inputs = self.placed(example)
        result = self.promises(exe, inputs, "fused")
        if OTHER in self.case.checks:
            self.later_calls(exe, result)
        if self.case.range is not None:
            self.batches(exe)
        for (name, _), other in zip(self.ways()[1:], others, strict=True):
            self.value(name, self.call(other, inputs, name), inputs)
        return self.ops

    def placed(self, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """The inputs on the device, with their strides."""
        where = self.device.place
        if where.type == "cpu":
            return inputs
        return tuple(
            torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=where).copy_(x)
            for x in inputs
        )

    def ways(self) -> list[tuple[str, Any]]:
        """How it is compiled: a name, and the passes."""
        ways: list[tuple[str, Any]] = [("fused", "default")]
        if UNFUSED in self.case.checks:
            ways.append(("passes='none'", "none"))
        if (left := self.case.without) is not None:
            ways.append((f"without {left}", tuple(name for name in OPTIONAL if name != left)))
        return ways

    def compile(self, inputs: tuple[torch.Tensor, ...], passes: Any) -> Any:
        options: dict[str, Any] = {"dtype": self.case.dtype, "dynamic_batch": self.case.range}
        if self.case.special:
            # Inf * a + Inf * b may be NaN where Inf * (a + b) is not.
            options["forbid"] = [parallel_convs.LABEL]
        try:
            exe = convloom.compile(self.module, inputs, target=self.device.name,
                                   tuning="heuristic", passes=passes, **options)  # fmt: skip
        except ConvloomError as error:
            raise BrokenError(f"compile: {type(error).__name__}", str(error)) from error
        except Exception as error:
            raise BrokenError(f"compile crashed: {type(error).__name__}", repr(error)) from error
        if exe.plan.summary()["torch_fallbacks"]:
            raise BrokenError("fallback", exe.explain())
        self.ops |= ops_of(exe.graph)
        return exe

    def call(self, exe: Any, inputs: tuple[torch.Tensor, ...], name: str) -> Any:
        try:
            return exe(*inputs)
        except Exception as error:
            kind = f"{name}: call crashed: {type(error).__name__}"
            raise BrokenError(kind, repr(error)) from error

    def promises(self, exe: Any, inputs: tuple[torch.Tensor, ...], name: str) -> list[torch.Tensor]:
        """The results, overwritten, when all that is promised of one executable holds."""
        kept = [x.clone() for x in inputs]
        weights = [tensor.clone() for tensor in self.module.state_dict().values()]
        results = nets.tensors_of(self.call(exe, inputs, name))
        copies = [tensor.clone() for tensor in results]
        same(f"{name}: inputs changed", inputs, kept)
        if len({tensor.untyped_storage().data_ptr() for tensor in results}) < len(results):
            raise BrokenError(f"{name}: aliasing", "two results share memory")
        self.value(name, copies, inputs)
        for tensor in results:
            tensor.fill_(float("nan"))
        same(f"{name}: inputs changed with results", inputs, kept)
        same(f"{name}: weights changed", list(self.module.state_dict().values()), weights)
        if AGAIN not in self.case.checks:
            return results
        again = nets.tensors_of(self.call(exe, inputs, name))
        same(f"{name}: other bits the second time", again, copies)
        return again

    def later_calls(self, exe: Any, result: list[torch.Tensor]) -> None:
        """Other inputs are computed rightly and leave earlier results alone."""
        copies = [tensor.clone() for tensor in result]
        others = self.placed(replace(self.case, strided=not self.case.strided).inputs(again=1))
        self.value("other inputs", self.call(exe, others, "other inputs"), others)
        same("a later call changed results", result, copies)

    def batches(self, exe: Any) -> None:
        """The largest and the smallest batch."""
        for batch in reversed(BATCH_RANGE):
            shapes = [(batch, *shape[1:]) for _, shape in self.case.program.inputs]
            images = self.placed(self.case.drawn(shapes, self.case.seed + batch))
            self.value(f"batch {batch}", self.call(exe, images, f"batch {batch}"), images)

    def value(self, name: str, result: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        """Shapes, dtypes, values, NaN and Inf. Boundaries keep the module's dtype."""
        results = [tensor.cpu() for tensor in nets.tensors_of(result)]
        inputs = tuple(x.cpu() for x in inputs)
        truth = nets.Truth(self.module, inputs, self.case.dtype)
        if len(results) != len(truth.exact):
            raise BrokenError(f"{name}: results", f"{len(results)}, not {len(truth.exact)}")
        for at, (got, exact, eager) in enumerate(
            zip(results, truth.exact, truth.eager, strict=True)
        ):
            if got.dtype is not torch.float32:
                raise BrokenError(f"{name}: dtype", f"result {at} is {got.dtype}")
            found = tolerance.compare(got.to(truth.dtype), exact, eager, truth.depth)
            if found is not None and found[0] in "N+-":
                # Which pixels a resizing reads depends on how its ratio is rounded: where fp64 or
                # eager has no number, eager's kind will do.
                numbers = exact.isfinite() & eager.isfinite()
                exact = torch.where(numbers, exact, eager.to(exact.dtype))
                found = tolerance.compare(got.to(truth.dtype), exact, eager, truth.depth)
            if found is not None and found.startswith("element"):
                peer = self.noisy(inputs, at, exact, truth.dtype)
                found = tolerance.compare(got.to(truth.dtype), exact, peer, truth.depth)
            if found is not None:
                words = found.split()[0] if found[0] in "N+-" else "value"
                kind = words if not found.startswith("shape") else "shape"
                raise BrokenError(f"{name}: {kind}", f"result {at}: {found}")

    def noisy(
        self, inputs: tuple[torch.Tensor, ...], at: int, exact: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        """What a result may be when every value on the way, and every weight, is rounded otherwise:
        eager's one way of rounding says too little about an ill-conditioned network (a difference
        of equal values, the sign of nearly zero)."""
        worst = torch.zeros_like(exact)
        for seed in range(NOISE_RUNS):
            module, noise = copy.deepcopy(self.module), Noise(tolerance.UNIT_ROUNDOFF[dtype], seed)
            noise.change(module)
            with noise:
                got = nets.run(module, inputs, torch.float64)[at]
            worst = torch.maximum(worst, (got - exact).abs().nan_to_num(0.0, 0.0, 0.0))
        return (exact + worst).to(dtype)


def ops_of(graph: Graph) -> set[str]:
    """The ops of a graph, and the functions in their epilogues."""
    nodes = list(graph.nodes())
    stages = (stage.name for node in nodes for stage in (*node.prologue, *node.epilogue))
    return {node.op for node in nodes} | set(stages)


def ops_in(cases: Iterable[Case]) -> set[str]:
    """What `check_many` of these cases returns, without running them."""
    ops: set[str] = set()
    for group in grouped(cases):
        whole = together(group)
        checks = _Checks(whole, whole.module())
        with nets.exporting_once():
            for _, passes in checks.ways():
                graph, _, _ = api.lowered(checks.module, whole.inputs(), target="interpreter",
                                          dtype=whole.dtype, passes=passes)  # fmt: skip
                ops |= ops_of(graph)
        nets.forget(checks.module)
    return ops


class Noise(torch.overrides.TorchFunctionMode):
    """Multiplies and shifts what every torch function returns by a few roundings."""

    def __init__(self, unit: float, seed: int) -> None:
        super().__init__()
        self.unit = ROUNDINGS * unit
        self.generator = torch.Generator().manual_seed(seed)

    def change(self, module: nn.Module) -> None:
        """Rounds weights otherwise, as folding a normalisation does."""
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.empty_like(tensor).uniform_(-1.0, 1.0, generator=self.generator)
                tensor.mul_(1.0 + self.unit * noise)

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        is_number = isinstance(result, torch.Tensor) and result.dtype is torch.float64
        if not is_number or name in UNROUNDED or not result.numel():
            return result
        with torch._C.DisableTorchFunction():
            finite = result.nan_to_num(0.0, 0.0, 0.0).abs().max()
            noise = torch.empty_like(result).uniform_(-1.0, 1.0, generator=self.generator)
            return result + (result.nan_to_num(0.0, 0.0, 0.0).abs() + finite) * noise * self.unit


UNROUNDED = frozenset(
    ("to", "double", "__get__", "clone", "detach", "relu", "abs", "neg", "maximum", "minimum")
)


def same(kind: str, got: Any, expected: Any) -> None:
    """Asserts equal bits. Raises: BrokenError of that kind."""
    for at, (a, b) in enumerate(zip(got, expected, strict=True)):
        if not torch.equal(a.contiguous().view(-1).view(torch.uint8),
                           b.contiguous().view(-1).view(torch.uint8)):  # fmt: skip
            raise BrokenError(kind, f"tensor {at}")
