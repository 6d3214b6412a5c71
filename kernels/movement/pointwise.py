"""Pointwise ops: y = f(x) or y = f(a, b) with broadcasting, and every chain of them.

One kernel walks the output in memory order; everything it reads and computes is a generated chain
whose first stage loads the first tensor. The same kernel therefore also copies, casts, permutes,
expands and slices (`movement.py`): those are loads with other strides.

Source of the idea (a scalar jit function lifted to any rank and stride): FlagGems.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract import programmatic_launch
from ..contract.op import (
    Attributes,
    Builder,
    Capture,
    Config,
    Cost,
    Domain,
    Launch,
    Op,
    Problem,
    Ref,
    config,
    operand_refs,
    power_of_two,
    tensor_bytes,
)
from ..contract.scalars import SCALARS, Scalar
from ..contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from ..contract.targets import Target


@dataclass(frozen=True)
class Pointwise(Attributes):
    """The literals of one application; see `epilogue.Stage`."""

    parameters: tuple[float, ...] = ()
    literal: float | None = None
    reverse: bool = False

    def __eq__(self, other: object) -> bool:
        """Unlike numbers, zeros of different signs differ."""
        if not isinstance(other, Pointwise):
            return NotImplemented
        return self.reverse == other.reverse and ep.same_numbers(
            (*self.parameters, self.literal), (*other.parameters, other.literal)
        )


@triton.jit
def pointwise_kernel(
    y,
    extras,
    m,
    COLUMNS: tl.constexpr,
    OFFSET: tl.constexpr,
    COLUMN_STRIDE: tl.constexpr,
    ROW_OFFSET: tl.constexpr,
    CHAIN: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
):
    column_tiles: tl.constexpr = (COLUMNS + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS
    program = tl.program_id(0)
    rows = program // column_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % column_tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_mask = rows < m
    column_mask = columns < COLUMNS
    if WIDE:
        rows = rows.to(tl.int64)
        columns = columns.to(tl.int64)
    acc = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    programmatic_launch.wait(PDL)
    acc = CHAIN(acc, rows, columns, row_mask, column_mask, extras)
    programmatic_launch.release(PDL)
    acc = tl.broadcast_to(acc, (BLOCK_ROWS, BLOCK_COLUMNS))
    address = y + OFFSET + ROW_OFFSET(rows)[:, None] + (columns * COLUMN_STRIDE)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


LOAD = ep.Stage("load")


@dataclass(frozen=True)
class Walk:
    """What one pointwise launch goes over: a tensor, or a part of one.

    sizes: its extents in memory order; written: how they are stored; batch as in `TensorSpec`.
    """

    sizes: tuple[int, ...]
    written: ep.Access
    batch: int | None
    output: int = 0

    @staticmethod
    def over(problem: Problem, output: int = 0) -> Walk:
        """All of one output."""
        operand = problem.outputs[output]
        spec = operand.spec
        return Walk(ep.memory_sizes(spec), ep.access(operand, spec), spec.batch, output)


def launch_chain(
    problem: Problem,
    tile: Config,
    walk: Walk,
    reads: tuple[ep.Access, ...],
    stages: ep.Epilogue,
    refs: tuple[Ref, ...],
) -> Launch:
    """The launch that stores the chain `stages`, whose operands are `refs` read as `reads`."""
    keep_first = walk.batch is not None
    strides = (walk.written.strides, *(read.strides for read in reads))
    sizes, strides = ep.collapse(walk.sizes, strides, keep_first)
    if len(sizes) == 1 and keep_first:
        sizes, strides = (*sizes, 1), tuple((*steps, 0) for steps in strides)
    reads = tuple(
        ep.Access(steps, read.offset, read.label)
        for steps, read in zip(strides[1:], reads, strict=True)
    )
    rows, columns = math.prod(sizes[:-1]), sizes[-1]
    elements = tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"]
    block_columns = min(tile["BLOCK_COLUMNS"], power_of_two(columns))
    block_rows = max(1, min(elements // block_columns, power_of_two(rows)))
    return Launch(
        kernel=pointwise_kernel,
        pointers={"y": Ref("output", walk.output)},
        extras=refs,
        rows=rows,
        batch=walk.batch,
        block_rows=block_rows,
        columns=-(-columns // block_columns),
        constexprs={
            "COLUMNS": columns,
            "OFFSET": walk.written.offset,
            "COLUMN_STRIDE": strides[0][-1],
            "ROW_OFFSET": ep.row_offset_function(sizes[:-1], strides[0][:-1]),
            "CHAIN": ep.generate(stages, reads, sizes, name="chain"),
            "WIDE": problem.is_wide,
            "PDL": False,
            "BLOCK_ROWS": block_rows,
            "BLOCK_COLUMNS": block_columns,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def launch_reads(
    problem: Problem, tile: Config, reads: tuple[ep.Access, ...], stages: ep.Epilogue
) -> Launch:
    """The launch over the whole output: `stages` on the inputs, then the problem's epilogue."""
    out = problem.output.spec
    inputs = tuple(Ref("input", index) for index in range(len(reads)))
    operands = tuple(ep.access(operand, out) for operand in problem.operands)
    return launch_chain(
        problem,
        tile,
        Walk.over(problem),
        (*reads, *operands),
        (*stages, *problem.epilogue),
        (*inputs, *operand_refs(problem)),
    )


def infer(
    name: str, attributes: Pointwise, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """The broadcast shape; the layout of the input that has it."""
    count = 1 + stage_of(name, attributes).takes_operand
    if len(inputs) != count:
        raise InvalidInputError(f"{name}: expected {count} tensors, got {len(inputs)}")
    try:
        shape = tuple(torch.broadcast_shapes(*(spec.shape for spec in inputs)))
    except RuntimeError as error:
        listed = " and ".join(map(str, inputs))
        raise InvalidInputError(f"{name}: {listed} do not broadcast together") from error
    dtype = inputs[0].dtype
    for spec in inputs[1:]:
        dtype = torch.promote_types(dtype, spec.dtype)
    batch = next((spec.batch for spec in inputs if spec.batch is not None), None)
    layouts = {spec.layout for spec in inputs if spec.rank == len(shape)}
    nhwc = len(shape) in MEMORY_FORMATS and Layout.NHWC in layouts
    layout = Layout.NHWC if nhwc else Layout.DENSE
    return (TensorSpec(shape, dtype, layout, batch),)


def stage_of(name: str, attributes: Pointwise) -> ep.Stage:
    """The op application as a stage of a chain."""
    return ep.Stage(name, attributes.parameters, attributes.literal, attributes.reverse)


def _reference(name: str, attributes: Pointwise, *tensors: torch.Tensor) -> torch.Tensor:
    return ep.apply_reference((stage_of(name, attributes),), tensors[0], tensors[1:])


def _launches(name: str, problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    assert isinstance(problem.attributes, Pointwise)
    out = problem.output.spec
    reads = tuple(ep.access(operand, out) for operand in problem.inputs)
    stages = (LOAD, stage_of(name, problem.attributes))
    return (launch_reads(problem, tile, reads, stages),)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Tiles of 512 to 4096 elements; wide ones suit contiguous tensors, square ones transposes."""
    for elements in (512, 1024, 2048, 4096):
        for columns in (32, 64, 256, 1024, 4096):
            if columns <= elements:
                yield config(4, 1, BLOCK_ROWS=elements // columns, BLOCK_COLUMNS=columns)


def default(problem: Problem, target: Target) -> Config:
    """A row of 2048 elements, 16 per thread: one 128-bit access per 8 halves.

    In the interpreter, which pays per program, about a million elements.
    """
    if target.name == "interpreter":
        return config(1, 1, BLOCK_ROWS=1, BLOCK_COLUMNS=1 << 20)
    return config(4, 1, BLOCK_ROWS=1, BLOCK_COLUMNS=2048)


def cost(problem: Problem) -> Cost:
    """One operation per element and stage; each tensor touched once."""
    read, written = tensor_bytes(problem)
    return Cost(problem.output.spec.numel * (1 + len(problem.epilogue)), read, written)


def _domain(scalar: Scalar) -> Domain:
    def build(draw: Mapping[str, Any]) -> tuple[Pointwise, tuple[TensorSpec, ...]] | None:
        shape = tuple(draw["shape"])
        layout = Layout.NHWC if len(shape) == 4 else Layout.DENSE
        spec = TensorSpec(shape, torch.float32, layout)
        parameters = draw["parameters"]
        if scalar.operands == 1:
            return Pointwise(parameters), (spec,)
        kind = draw["operand"]
        if kind == "literal":
            return Pointwise(parameters, 1.5, draw["reverse"]), (spec,)
        if kind == "channel":
            other = TensorSpec((shape[1], *(1 for _ in shape[2:])), torch.float32)
        elif kind == "sample":
            smaller = (*shape[:2], *(1 for _ in shape[2:]))
            other = TensorSpec(smaller, torch.float32, layout)
        else:
            other = spec
        return Pointwise(parameters, None, draw["reverse"]), (spec, other)

    return Domain(
        ranges={
            "shape": ((1, 1), (3, 10), (2, 5, 7), (1, 3, 9, 8), (2, 16, 5, 1), (2, 33, 3, 4)),
            "operand": ("full", "channel", "sample", "literal"),
            "reverse": (False, True),
            "parameters": scalar.examples,
        },
        build=build,
        range=scalar.range,
    )


def _unary(name: str, parameters: tuple[float, ...] = ()) -> Capture:
    def capture(g: Builder, x: Any) -> Any:
        return g.apply(name, (x,), Pointwise(parameters))

    return capture


def _identity(g: Builder, x: Any, **_: Any) -> Any:
    """Of indices, which no kernel reads, the indices themselves."""
    return g.apply("identity", (x,), Pointwise()) if g.spec(x).dtype.is_floating_point else x


def _is_value(value: Any) -> bool:
    return not isinstance(value, (int, float, bool)) and value is not None


def _binary(name: str) -> Capture:
    def capture(g: Builder, a: Any, b: Any, alpha: float = 1.0) -> Any:
        if alpha != 1 and _is_value(b):
            b = g.apply("mul", (b,), Pointwise(literal=float(alpha)))
        elif alpha != 1:
            b = b * alpha
        if not _is_value(b):
            return g.apply(name, (a,), Pointwise(literal=float(b)))
        if not _is_value(a):
            return g.apply(name, (b,), Pointwise(literal=float(a), reverse=True))
        return g.apply(name, (a, b), Pointwise())

    return capture


def _reversed_sub(g: Builder, a: Any, b: Any, alpha: float = 1.0) -> Any:
    if alpha != 1:
        a = g.apply("mul", (a,), Pointwise(literal=float(alpha)))
    if _is_value(b):
        return g.apply("sub", (b, a), Pointwise())
    return g.apply("sub", (a,), Pointwise(literal=float(b), reverse=True))


def _div(g: Builder, a: Any, b: Any, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        return g.refuse(f"division with rounding_mode={rounding_mode!r}; only true division is")
    return _binary("div")(g, a, b)


def _addcmul(op: str) -> Capture:
    """x + value * (a op b), rounded once: the product of halves may overflow where the sum does
    not."""

    def capture(g: Builder, x: Any, a: Any, b: Any, *, value: float = 1.0) -> Any:
        factors, batch = [a, b], g.spec(x).batch
        shapes = [g.spec(factor).shape for factor in factors]
        shape = tuple(torch.broadcast_shapes(*shapes, g.spec(x).shape))
        if torch.broadcast_shapes(*shapes) != shape:
            # Stages do not enlarge a tensor, and a batch cannot be expanded to.
            wide = [at for at, factor in enumerate(factors) if g.spec(factor).batch == batch]
            if not wide:
                product = g.apply(op, factors, Pointwise())
                return _binary("add")(g, x, product, alpha=value)
            factors[wide[0]] = _expand(g, factors[wide[0]], shape)
        scale = (ep.Stage("mul", literal=float(value)),) if value != 1 else ()
        return g.apply(op, (*factors, x), Pointwise(), (*scale, ep.Stage("add")))

    return capture


def _pow(g: Builder, a: Any, b: Any) -> Any:
    shortcuts = {2.0: "square", 0.5: "sqrt", -0.5: "rsqrt", 1.0: "identity"}
    if not _is_value(b) and float(b) in shortcuts:
        return g.apply(shortcuts[float(b)], (a,), Pointwise())
    return _binary("pow")(g, a, b)


def _clamp(g: Builder, x: Any, low: Any = None, high: Any = None) -> Any:
    if _is_value(low):
        x, low = g.apply("maximum", (x, low), Pointwise()), None
    if _is_value(high):
        x, high = g.apply("minimum", (x, high), Pointwise()), None
    if low is None and high is None:
        return x
    infinity = float("inf")
    bounds = (-infinity if low is None else float(low), infinity if high is None else float(high))
    return g.apply("clamp", (x,), Pointwise(bounds))


def _hardtanh(g: Builder, x: Any, low: float = -1.0, high: float = 1.0) -> Any:
    return g.apply("clamp", (x,), Pointwise((float(low), float(high))))


def _leaky_relu(g: Builder, x: Any, slope: float = 0.01) -> Any:
    return g.apply("leaky_relu", (x,), Pointwise((float(slope),)))


def _prelu(g: Builder, x: Any, slope: Any) -> Any:
    spec = g.spec(x)
    if g.spec(slope).numel > 1 and spec.rank > 2:
        shape = (g.spec(slope).numel, *(1 for _ in range(spec.rank - 2)))
        slope = g.apply("reshape", (slope,), _reshape(shape))
    return g.apply("prelu", (x, slope), Pointwise())


def _reshape(shape: Sequence[int]) -> Attributes:
    from .rearrangement import Reshape

    return Reshape(tuple(shape))


def _expand(g: Builder, x: Any, shape: tuple[int, ...]) -> Any:
    from .rearrangement import Expand

    old = g.spec(x).shape
    missing = len(shape) - len(old)
    new = (-1 if at >= missing and old[at - missing] == size else size
           for at, size in enumerate(shape))  # fmt: skip
    return g.apply("expand", (x,), Expand(tuple(new)))


def _elu(
    g: Builder, x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0
) -> Any:
    return g.apply("elu", (x,), Pointwise((float(alpha), float(scale), float(input_scale))))


def _celu(g: Builder, x: Any, alpha: float = 1.0) -> Any:
    return g.apply("celu", (x,), Pointwise((float(alpha),)))


def _gelu(g: Builder, x: Any, approximate: str = "none") -> Any:
    return g.apply("gelu" if approximate == "none" else "gelu_tanh", (x,), Pointwise())


def _softplus(g: Builder, x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    return g.apply("softplus", (x,), Pointwise((float(beta), float(threshold))))


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)
UNARY_NAMES = (
    "relu", "sigmoid", "tanh", "silu", "hardsigmoid", "hardswish", "mish", "sqrt", "rsqrt", "exp",
    "log", "abs", "neg", "sign",
)  # fmt: skip
BINARY_NAMES = {
    "add": "add", "sub": "sub", "mul": "mul", "maximum": "maximum", "minimum": "minimum",
}  # fmt: skip


def _captures() -> dict[str, dict[str, Capture]]:
    """aten overloads by the scalar they become."""
    table: dict[str, dict[str, Capture]] = {scalar.name: {} for scalar in SCALARS}
    for name in UNARY_NAMES:
        table[name][f"aten.{name}.default"] = _unary(name)
    for name in BINARY_NAMES:
        overload = "default" if name in ("maximum", "minimum") else "Tensor"
        table[name][f"aten.{name}.{overload}"] = _binary(name)
        if overload == "Tensor":
            table[name][f"aten.{name}.Scalar"] = _binary(name)
    table["sub"]["aten.rsub.Scalar"] = _reversed_sub
    table["sub"]["aten.rsub.Tensor"] = _reversed_sub
    for overload in ("Tensor", "Scalar", "Tensor_mode", "Scalar_mode"):
        table["div"][f"aten.div.{overload}"] = _div
    table["div"]["aten.reciprocal.default"] = lambda g, x: _binary("div")(g, 1.0, x)
    for overload in ("Tensor_Scalar", "Tensor_Tensor", "Scalar"):
        table["pow"][f"aten.pow.{overload}"] = _pow
    table["add"]["aten.addcmul.default"] = _addcmul("mul")
    table["add"]["aten.addcdiv.default"] = _addcmul("div")
    table["square"]["aten.square.default"] = _unary("square")
    for name in ("clamp.default", "clamp.Tensor"):
        table["clamp"][f"aten.{name}"] = _clamp
    table["clamp"]["aten.clamp_min.default"] = _clamp
    table["clamp"]["aten.clamp_max.default"] = lambda g, x, high: _clamp(g, x, None, high)
    table["clamp"]["aten.hardtanh.default"] = _hardtanh
    table["clamp"]["aten.relu6.default"] = _unary("clamp", (0.0, 6.0))
    table["leaky_relu"]["aten.leaky_relu.default"] = _leaky_relu
    table["prelu"]["aten.prelu.default"] = _prelu
    table["elu"]["aten.elu.default"] = _elu
    table["elu"]["aten.selu.default"] = _unary("elu", SELU)
    table["celu"]["aten.celu.default"] = _celu
    table["gelu"]["aten.gelu.default"] = _gelu
    table["softplus"]["aten.softplus.default"] = _softplus
    for name in ("clone", "detach", "alias", "contiguous", "lift_fresh_copy"):
        table["identity"][f"aten.{name}.default"] = _identity
    return table


def _make_ops() -> tuple[Op, ...]:
    captures = _captures()
    return tuple(
        Op(
            name=scalar.name,
            attributes=Pointwise,
            infer=partial(infer, scalar.name),
            reference=partial(_reference, scalar.name),
            launches=partial(_launches, scalar.name),
            configs=configs,
            default=default,
            cost=cost,
            domain=_domain(scalar),
            aten=captures[scalar.name],
            follows=True,
        )
        for scalar in SCALARS
    )


OPS = _make_ops()
