"""Shared by the tests of ops: draws problems, makes tensors, runs them, compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from convloom.compiler.tuning.bench import float_dtype
from convloom.kernels.contract import tolerance
from convloom.kernels.contract.epilogue import Epilogue, Stage, apply_reference, makes_boolean
from convloom.kernels.contract.op import NONE, Attributes, Config, Launch, Op, Problem, Ref
from convloom.kernels.contract.scalars import BY_NAME
from convloom.kernels.contract.spec import FLOAT_DTYPES, Layout, Operand, TensorSpec, as_layout
from convloom.kernels.contract.targets import EMULATOR, INTERPRETER, Target, parse
from convloom.kernels.devices import emulator, execute, interpreter
from convloom.kernels.normalisation.scan import Scan
from hypothesis import strategies as st

from .domain import Domain

# ---------------------------------------------------------------------------------- drawing


@dataclass(frozen=True)
class Case:
    """One draw of an op's domain: its attributes and the specs of its inputs."""

    op: Op
    attributes: Attributes
    specs: tuple[TensorSpec, ...]

    def __repr__(self) -> str:
        return f"{self.op.name}({self.attributes}) of {', '.join(map(str, self.specs))}"

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return self.op.infer(self.attributes, self.specs)

    def tensors(self, seed: int = 0) -> tuple[torch.Tensor, ...]:
        """Inputs with uniform values from the domain's range."""
        low, high = self.op.input_range
        drawn = tuple(
            make_tensor(spec, seed + index, low, high) for index, spec in enumerate(self.specs)
        )
        return self.op.prepare(self.attributes, drawn)


def case_of(op: Op, domain: Domain, draw: Any, dtype: torch.dtype = torch.float32) -> Case | None:
    """The case behind one draw of a domain, or None where the draw is impossible."""
    built = domain.build(draw)
    return built and Case(op, built[0], with_dtype(op, built[1], dtype))


def cases(op: Op, domain: Domain, dtype: torch.dtype = torch.float32) -> st.SearchStrategy[Case]:
    """A strategy over the plain ranges of the op's domain."""
    ranges = {name: st.sampled_from(list(values)) for name, values in domain.ranges.items()}
    drawn = st.fixed_dictionaries(ranges).map(lambda draw: case_of(op, domain, draw, dtype))
    return drawn.filter(lambda case: case is not None)  # type: ignore[return-value]


dtypes = st.sampled_from(FLOAT_DTYPES)
seeds = st.integers(0, 999).map(lambda seed: seed * 10)
pads = st.sampled_from((0, 0, 3))


def with_dtype(op: Op, specs: tuple[TensorSpec, ...], dtype: torch.dtype) -> tuple[TensorSpec, ...]:
    """The float specs in another dtype."""
    return tuple(s.with_(dtype=dtype) if s.dtype.is_floating_point else s for s in specs)


# Stages that do not magnify the error of what they are applied to.
UNARY_STAGES = (
    "relu", "leaky_relu", "clamp", "sigmoid", "tanh", "silu", "gelu", "hardsigmoid", "hardswish",
    "abs", "neg",
)  # fmt: skip
BINARY_STAGES = ("add", "sub", "mul", "maximum", "minimum")
AGAIN = ("add", "maximum", "minimum")
"""Those that may read an earlier value of the chain: a difference to it, or a product, is less
exact than its factors."""


@st.composite
def stages(draw: Any, output: TensorSpec) -> tuple[Stage, tuple[TensorSpec, ...]]:
    """One stage of an epilogue with the spec of its operand, if it reads one.

    Operands are full, per channel, per sample, or any other shape that broadcasts.
    """
    name = draw(st.sampled_from((*UNARY_STAGES, *BINARY_STAGES, *BINARY_STAGES)))
    if BY_NAME[name].operands == 1:
        return Stage(name, draw(st.sampled_from(BY_NAME[name].examples))), ()
    reverse = draw(st.booleans())
    if draw(st.integers(0, 4)) == 0:
        return Stage(name, literal=draw(st.sampled_from((-1.5, 0.0, 0.25))), reverse=reverse), ()
    return Stage(name, reverse=reverse), (draw(operand_specs(output)),)


@st.composite
def operand_specs(draw: Any, output: TensorSpec) -> TensorSpec:
    """The spec of a tensor that broadcasts against the output."""
    rank = output.rank
    kept = {
        "full": range(rank),
        "channel": [1],
        "sample": [0, 1],
        "any": [dim for dim in range(rank) if draw(st.booleans())],
    }[draw(st.sampled_from(("full", "channel", "sample", "any")))]
    shape = tuple(size if dim in kept else 1 for dim, size in enumerate(output.shape))
    leading = next((dim for dim, size in enumerate(shape) if size != 1), rank)
    shape = shape[draw(st.sampled_from((0, leading))) :]
    nhwc = len(shape) == 4 and draw(st.sampled_from((True, True, False)))
    dtype = torch.float32 if output.dtype is torch.bool else output.dtype
    return TensorSpec(shape, dtype, Layout.NHWC if nhwc else Layout.DENSE)


@st.composite
def epilogues(
    draw: Any, output: TensorSpec, longest: int = 3
) -> tuple[Epilogue, tuple[TensorSpec, ...]]:
    """A chain of stages for an output, and the specs of the operands it reads."""
    chain = draw(st.lists(stages(output), min_size=1, max_size=longest))
    for at, (stage, _) in enumerate(chain):
        if stage.operands and stage.name in AGAIN and not draw(st.integers(0, 3)):
            chain[at] = replace(stage, back=draw(st.integers(0, at))), ()
    return tuple(s for s, _ in chain), tuple(spec for _, specs in chain for spec in specs)


# ---------------------------------------------------------------------------------- tensors


def make_tensor(spec: TensorSpec, seed: int, low: float, high: float) -> torch.Tensor:
    """A logical tensor with uniform values, contiguous in the spec's layout."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(spec.shape, generator=generator, dtype=torch.float64)
    if spec.dtype is torch.bool:
        return as_layout(values < 0.5, spec.layout)
    values = values * (high - low) + low
    return as_layout(values.to(spec.dtype), spec.layout)


def make_integers(spec: TensorSpec, seed: int, low: float, high: float) -> torch.Tensor:
    """A logical tensor of whole numbers between the bounds and of magnitude at most 4."""
    generator = torch.Generator().manual_seed(seed)
    least, most = max(-4, -int(-low // 1)), min(4, int(high // 1))
    values = torch.randint(least, most + 1, spec.shape, generator=generator)
    return as_layout(values.to(spec.dtype), spec.layout)


def with_special_values(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """The tensor with NaN, infinities and zeros of both signs in some places; indices are kept."""
    if not tensor.dtype.is_floating_point:
        return tensor
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, -0.0])
    chosen = special[torch.randint(0, len(special), tensor.shape, generator=generator)]
    hit = torch.rand(tensor.shape, generator=generator) < 0.15
    layout = torch.preserve_format
    return torch.where(hit, chosen.to(tensor.dtype), tensor).clone(memory_format=layout)


# ---------------------------------------------------------------------------------- running


def place(spec: TensorSpec, pad: int = 0) -> Operand:
    """The operand of a tensor; `pad` widens the pitch and shifts the start, as those of a slice of
    a larger buffer along its innermost dimension are."""
    dense = Operand.dense(spec)
    if pad and spec.rank >= 2:
        return Operand(spec, dense.pitch + 2 * pad, pad)
    return dense


def problem_for(
    op: Op,
    attributes: Any,
    specs: tuple[TensorSpec, ...],
    epilogue: Epilogue = (),
    operands: tuple[TensorSpec, ...] = (),
    pad: int = 0,
) -> Problem:
    """The problem whose tensors, constants excepted, are padded by `pad`."""
    packs = op.packs(attributes)
    outputs = list(op.infer(attributes, specs))
    if makes_boolean(epilogue, outputs[0].dtype):
        outputs[0] = outputs[0].with_(dtype=torch.bool)
    elif outputs[0].dtype is torch.bool:
        outputs[0] = outputs[0].with_(dtype=torch.float32)
    return Problem(
        op.name,
        attributes,
        tuple(place(spec, 0 if index in packs else pad) for index, spec in enumerate(specs)),
        tuple(place(spec, pad) for spec in outputs),
        epilogue,
        tuple(place(spec, pad) for spec in operands),
    )


def buffer_for(operand: Operand, logical: torch.Tensor | None) -> torch.Tensor:
    """The flat buffer of an operand: NaN where nothing may be read, `logical` where it lies."""
    dtype = operand.spec.dtype
    size = max(operand.extent, operand.offset, 1) + 64
    buffer = tolerance.fill_untouched(torch.empty(size, dtype=dtype))
    if logical is not None and operand.spec.numel:
        view_of(buffer, operand).copy_(logical)
    return buffer


def view_of(buffer: torch.Tensor, operand: Operand) -> torch.Tensor:
    """The operand's logical tensor inside its flat buffer."""
    return torch.as_strided(buffer, operand.shape, operand.strides, operand.offset)


class Interpreter:
    """Where launches run: here in the interpreter. `gpu_device.py` has the GPU."""

    name = "interpreter"
    """As `convloom.compile` calls it."""
    target: Target = INTERPRETER
    """What configurations are chosen for."""
    place = torch.device("cpu")

    def run(
        self,
        launch: Launch,
        tensor_of: Callable[[Ref], torch.Tensor],
        batch: int,
        places: Mapping[Ref, Operand] = NONE,
    ) -> None:
        """One launch on tensors of `place`, to its end. places: where they lie in their buffers."""
        with interpreter.interpreting():
            execute.interpret(launch, tensor_of, batch)


class Emulator(Interpreter):
    """What launches are compiled to for a generation of GPUs, on the CPU.

    seed: of the order in which blocks run.
    """

    def __init__(self, generation: str, seed: int = 0) -> None:
        self.name = EMULATOR + generation
        self.target = parse(self.name)
        self.seed = seed

    def run(
        self,
        launch: Launch,
        tensor_of: Callable[[Ref], torch.Tensor],
        batch: int,
        places: Mapping[Ref, Operand] = NONE,
    ) -> None:
        emulator.run(launch, tensor_of, batch, self.target, places, self.seed)


INTERPRETED = Interpreter()


def run_interpreted(
    op: Op, problem: Problem, tensors: tuple[torch.Tensor, ...], *others: Any, **more: Any
) -> tuple[torch.Tensor, ...]:
    """`run_on` the interpreter."""
    return run_on(INTERPRETED, op, problem, tensors, *others, **more)


def run_on(
    device: Interpreter,
    op: Op,
    problem: Problem,
    tensors: tuple[torch.Tensor, ...],
    operands: tuple[torch.Tensor, ...] = (),
    tile: Config | None = None,
    batch: int = 1,
    wide: bool = False,
    before: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, ...]:
    """The problem's outputs by its own kernels on a device, in memory of the CPU.

    batch: of this call, where the problem has one; all of the output is returned, NaN where nothing
    was written. wide: with 64-bit offsets even though the tensors are small. before: the operands
    of the prologue.

    Also asserts that nothing outside the outputs was written.
    """
    tile = tile or op.default(problem, device.target)
    buffers = {
        ref: tensor.to(device.place)
        for ref, tensor in buffers_for(op, problem, tensors, operands, before).items()
    }
    for launch in op.launches(problem, tile, device.target):
        launch = widened(launch) if wide else launch
        exchanged = execute.scratch(launch, device.place)
        for _ in range(2 if exchanged else 1):  # What must be left zeroed is used again.
            device.run(launch, {**buffers, **exchanged}.__getitem__, batch, op.places(problem))
    return tuple(
        written(op, operand, buffers[Ref("output", index)].cpu())
        for index, operand in enumerate(problem.outputs)
    )


def buffers_for(
    op: Op,
    problem: Problem,
    tensors: tuple[torch.Tensor, ...],
    operands: tuple[torch.Tensor, ...] = (),
    before: tuple[torch.Tensor, ...] = (),
) -> dict[Ref, torch.Tensor]:
    """Flat buffers of every tensor argument, on the CPU."""
    buffers: dict[Ref, torch.Tensor] = {}
    for index, (operand, tensor) in enumerate(zip(problem.inputs, tensors, strict=True)):
        if (pack := op.packs(problem.attributes).get(index)) is not None:
            buffers[Ref("input", index)] = pack(problem.attributes, tensor)
        else:
            buffers[Ref("input", index)] = buffer_for(operand, tensor)
    for kind, placed, given in (
        ("operand", problem.operands, operands),
        ("prologue", problem.prologue_operands, before),
        ("output", problem.outputs, (None,) * len(problem.outputs)),
    ):
        for index, (operand, value) in enumerate(zip(placed, given, strict=True)):
            buffers[Ref(kind, index)] = buffer_for(operand, value)
    return buffers


def written(op: Op, operand: Operand, buffer: torch.Tensor) -> torch.Tensor:
    """The output in its buffer, beyond which nothing may have been written."""
    # As bytes: copied as booleans, what nobody wrote would become true.
    copy = buffer.view(torch.uint8).clone().view(buffer.dtype)
    result = view_of(copy, operand)
    tolerance.fill_untouched(view_of(buffer, operand))
    assert tolerance.is_untouched(buffer).all(), f"{op.name} wrote outside its output"
    return result


def widened(launch: Launch) -> Launch:
    """The launch with 64-bit offsets."""
    changed: dict[str, Any] = dict(launch.constexprs)
    if (tile := changed.get("TILE")) is not None:
        changed["TILE"] = tile._replace(wide=True)
    else:
        assert "WIDE" in changed, f"{launch.kernel.fn.__name__} has no 64-bit offsets"
        changed["WIDE"] = True
    return replace(launch, constexprs=changed)


def is_wide(launch: Launch) -> bool:
    """Whether its offsets have 64 bits."""
    tile = launch.constexprs.get("TILE")
    return bool(launch.constexprs["WIDE"] if tile is None else tile.wide)


# -------------------------------------------------------------------------------- comparing


def expected(
    op: Op,
    problem: Problem,
    tensors: tuple[torch.Tensor, ...],
    operands: tuple[torch.Tensor, ...] = (),
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, ...]:
    """The reference in another dtype, epilogue included."""
    widened = (t.to(dtype) if t.dtype.is_floating_point else t for t in tensors)
    values = op.reference(problem.attributes, *widened)
    values = values if isinstance(values, tuple) else (values,)
    last = apply_reference(
        problem.epilogue,
        values[0],
        tuple(t.to(dtype) if t.dtype.is_floating_point else t for t in operands),
    )
    return (last, *values[1:])


def eager(
    op: Op,
    problem: Problem,
    tensors: tuple[torch.Tensor, ...],
    operands: tuple[torch.Tensor, ...] = (),
) -> tuple[torch.Tensor, ...]:
    """PyTorch's own result in the inputs' dtype; where it has no kernel for that dtype on the CPU,
    its fp32 result rounded."""
    dtype = float_dtype(tensors)
    try:
        results = expected(op, problem, tensors, operands, dtype)
    except NotImplementedError:
        results = expected(op, problem, tensors, operands, torch.float32)
        results = tuple(r.to(dtype) if r.dtype.is_floating_point else r for r in results)
    return tuple(
        r.to(out.spec.dtype) if out.spec.dtype in FLOAT_DTYPES else r
        for r, out in zip(results, problem.outputs, strict=True)
    )


def check(
    op: Op,
    problem: Problem,
    tensors: tuple[torch.Tensor, ...],
    operands: tuple[torch.Tensor, ...] = (),
    tile: Config | None = None,
) -> None:
    """Asserts that the interpreted kernels agree with the fp64 reference within the tolerance."""
    results = run_interpreted(op, problem, tensors, operands, tile)
    compare(op, problem, results, tensors, operands)


def compare(
    op: Op,
    problem: Problem,
    results: tuple[torch.Tensor, ...],
    tensors: tuple[torch.Tensor, ...],
    operands: tuple[torch.Tensor, ...] = (),
    peers: tuple[torch.Tensor, ...] | None = None,
    fewest: int = 0,
) -> None:
    """Asserts that results agree with the fp64 reference within the tolerance.

    peers: what stands for PyTorch's own results. fewest: of finite results, of fewer only where the
    others are is compared: their size says nothing about that of the terms that were added.
    """
    exact = expected(op, problem, tensors, operands)
    peers = peers or own_results(op, problem, tensors, operands)
    depth = reduction_length(op, problem)
    for result, truth, peer in zip(results, exact, peers, strict=True):
        report = (
            tolerance.special_values(result, truth)
            if int(truth.isfinite().sum()) < fewest
            else tolerance.compare(result, truth, peer, depth)
        )
        assert report is None, f"{op.name}({problem.attributes}): {report}"


def own_results(
    op: Op, problem: Problem, tensors: tuple[torch.Tensor, ...], operands: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """PyTorch's in the problem's precision; in TF32, its fp32 ones for operands cut to that."""
    if problem.precision == "tf32":
        return expected(op, problem, tuple(map(as_tf32, tensors)), operands, torch.float32)
    return eager(op, problem, tensors, operands)


TF32_MASK = -0x2000
"""As an int32: all but the 13 bits of an fp32 mantissa that TF32 has not."""


def as_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as tensor cores see a TF32 operand: cut, not rounded."""
    if tensor.dtype is not torch.float32:
        return tensor
    kept = (tensor.view(torch.int32) & TF32_MASK).view(torch.float32)
    return torch.where(tensor.isfinite(), kept, tensor)


def reduction_length(op: Op, problem: Problem) -> int:
    """How many terms one output sums, from the op's own operation count; a scan shares its sums."""
    if isinstance(problem.attributes, Scan):
        return problem.inputs[0].shape[problem.attributes.dim]
    cost = op.cost(replace(problem, epilogue=(), operands=()))
    return max(1, cost.flops // max(1, 2 * problem.output.spec.numel))
