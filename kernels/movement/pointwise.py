"""Pointwise ops: y = f(x) or y = f(a, b) with broadcasting, and every chain of them.

One kernel walks the output in memory order; everything it reads and computes is a generated chain
whose first stage loads the first tensor. The same kernel therefore also copies, casts, permutes,
expands and slices (`movement.py`): those are loads with other strides.

Source of the idea (a scalar jit function lifted to any rank and stride): FlagGems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract import op, programmatic_launch
from ..contract.op import Attributes, Config, Launch, Problem, Ref, Y, operand_refs, power_of_two
from ..contract.scalars import BY_NAME
from ..contract.spec import FLOAT_DTYPES, MEMORY_FORMATS, Layout, TensorSpec
from ..contract.targets import Target
from ..tile.geometry import Output, Tile
from ..tile.space import output_tile


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
    y, extras, m, COLUMN_STRIDE: tl.constexpr, ROW_OFFSET: tl.constexpr,
    OUTPUT: tl.constexpr, TILE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    M: tl.constexpr = TILE.M
    N: tl.constexpr = TILE.N
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    acc = tl.zeros((M, N), tl.float32)
    programmatic_launch.grid_dependency_wait(PDL)
    acc = OUTPUT.epilogue(acc, rows, columns, row_mask, column_mask, extras)
    acc = tl.broadcast_to(acc, (M, N))
    address = y + OUTPUT.offset + ROW_OFFSET(rows)[:, None] + (columns * COLUMN_STRIDE)[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(address, acc.to(y.dtype.element_ty), mask=mask)


LOAD = ep.Stage("load")


def launch_chain(
    problem: Problem,
    tile: Config,
    sizes: tuple[int, ...],
    written: ep.Access,
    reads: tuple[ep.Access, ...],
    stages: ep.Epilogue,
    refs: tuple[Ref, ...],
) -> Launch:
    """The launch that stores the chain `stages`, whose operands are `refs` read as `reads`, over
    the output or a part of it: its extents in memory order, and how they are stored.

    It is made here and not by `tile_launch`: rows lie anywhere, and the tile is cut to the sizes.
    """
    batch = problem.output.spec.batch
    keep_first = batch is not None
    strides = (written.strides, *(read.strides for read in reads))
    sizes, strides = ep.collapse(sizes, strides, keep_first)
    if len(sizes) == 1 and keep_first:
        sizes, strides = (*sizes, 1), tuple((*steps, 0) for steps in strides)
    reads = tuple(
        replace(read, strides=steps) for steps, read in zip(strides[1:], reads, strict=True)
    )
    rows, columns = math.prod(sizes[:-1]), sizes[-1]
    elements = tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"]
    block_columns = min(tile["BLOCK_COLUMNS"], power_of_two(columns))
    block_rows = max(1, min(elements // block_columns, power_of_two(rows)))
    chain = ep.generate(stages, reads, sizes, name="chain")
    return Launch(
        kernel=pointwise_kernel,
        pointers={"y": Y},
        extras=refs,
        rows=rows,
        batch=batch,
        block_rows=block_rows,
        columns=-(-columns // block_columns),
        constexprs={
            "COLUMN_STRIDE": strides[0][-1],
            # Where rows lie only this tells.
            "ROW_OFFSET": ep.row_offset_function(sizes[:-1], strides[0][:-1]),
            "OUTPUT": Output(1, 1, columns, 0, written.offset, chain),
            "TILE": Tile(block_rows, block_columns, wide=problem.is_wide),
            "PDL": False,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def launch_reads(
    problem: Problem,
    tile: Config,
    reads: tuple[ep.Access, ...],
    stages: ep.Epilogue,
    refs: tuple[Ref, ...] | None = None,
) -> Launch:
    """The launch over the whole output: `stages` on the inputs, or on some (`refs`), then the
    problem's epilogue."""
    out = problem.output.spec
    inputs = refs or tuple(Ref("input", index) for index in range(len(reads)))
    operands = tuple(ep.access(operand, out) for operand in problem.operands)
    return launch_chain(
        problem, tile, ep.memory_sizes(out), ep.access(problem.output, out), (*reads, *operands),
        (*stages, *problem.epilogue), (*inputs, *operand_refs(problem)),
    )  # fmt: skip


def launch_parts(
    problem: Problem,
    tile: Config,
    sizes: tuple[int, ...],
    read: tuple[int, ...],
    of_output: Callable[[Sequence[int]], tuple[int, ...]],
) -> Launch:
    """One copy by parts of the output's dimensions, in memory order, then the epilogue. read: the
    input's stride of every part; of_output: the parts' strides from those of the dimensions."""
    x, out = problem.inputs[0], problem.output
    order = out.spec.layout.order(out.spec.rank)

    def by_part(operand: ep.Access) -> ep.Access:
        strides = [stride for _, stride in sorted(zip(order, operand.strides, strict=True))]
        return replace(operand, strides=of_output(strides))

    operands = (by_part(ep.access(operand, out.spec)) for operand in problem.operands)
    return launch_chain(
        problem, tile, sizes, ep.Access(of_output(out.strides), out.offset),
        (ep.Access(read, x.offset, str(x.spec)), *operands), (LOAD, *problem.epilogue),
        (Ref("input", 0), *operand_refs(problem)),
    )  # fmt: skip


def infer(
    name: str, attributes: Pointwise, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """The broadcast shape; the layout of the input that has it."""
    count = 1 + stage_of(name, attributes).operands
    if len(inputs) != count:
        raise InvalidInputError(f"{name}: expected {count} tensors, got {len(inputs)}")
    try:
        shape = tuple(torch.broadcast_shapes(*(spec.shape for spec in inputs)))
    except RuntimeError as error:
        listed = " and ".join(map(str, inputs))
        raise InvalidInputError(f"{name}: {listed} do not broadcast together") from error
    dtype = _dtype_of_result(name, attributes, inputs)
    batch = next((spec.batch for spec in inputs if spec.batch is not None), None)
    layouts = {spec.layout for spec in inputs if spec.rank == len(shape)}
    nhwc = len(shape) in MEMORY_FORMATS and Layout.NHWC in layouts
    layout = Layout.NHWC if nhwc else Layout.DENSE
    return (TensorSpec(shape, dtype, layout, batch),)


def _dtype_of_result(
    name: str, attributes: Pointwise, inputs: tuple[TensorSpec, ...]
) -> torch.dtype:
    """As torch has it: that of the floats which are computed with, of those that have dimensions
    where some do; float32 where booleans alone stand for numbers."""
    scalar = BY_NAME[name]
    whole = [
        spec for spec in inputs if spec.dtype not in (*FLOAT_DTYPES, torch.float64, torch.bool)
    ]
    if whole and (scalar.boolean or scalar.conditions):
        raise InvalidInputError(
            f"{name}: expected floats or booleans, got {whole[0]}; convert it with .float()"
        )
    if scalar.boolean:
        return torch.bool
    last = scalar.operands - 1
    conditions = {last - at if attributes.reverse else at for at in scalar.conditions}
    numbers = [spec for at, spec in enumerate(inputs) if at not in conditions]
    floats = [spec for spec in numbers if spec.dtype is not torch.bool]
    shaped = [spec.dtype for spec in floats if spec.rank] or [spec.dtype for spec in floats]
    return reduce(torch.promote_types, shaped) if shaped else torch.float32


def stage_of(name: str, attributes: Pointwise) -> ep.Stage:
    """The op application as a stage of a chain."""
    return ep.Stage(name, attributes.parameters, attributes.literal, attributes.reverse)


def reference(name: str, attributes: Pointwise, *tensors: torch.Tensor) -> torch.Tensor:
    return ep.apply_reference((stage_of(name, attributes),), tensors[0], tensors[1:])


def launches(name: str, problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    out = problem.output.spec
    reads = tuple(ep.access(operand, out) for operand in problem.inputs)
    stages = (LOAD, stage_of(name, problem.attributes.expect(Pointwise)))
    return (launch_reads(problem, tile, reads, stages),)


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """Tiles of 512 to 4096 elements; wide ones suit contiguous tensors, square ones transposes."""
    return op.tiles_of((512, 1024, 2048, 4096), (32, 64, 256, 1024, 4096))


def default(problem: Problem, target: Target) -> Config:
    """A row of 2048 elements, 16 per thread: one 128-bit access per 8 halves.

    In the interpreter, which pays per program, about a million elements.
    """
    if target.name == "interpreter":
        return op.config(1, 1, BLOCK_ROWS=1, BLOCK_COLUMNS=1 << 20)
    return op.config(4, 1, BLOCK_ROWS=1, BLOCK_COLUMNS=2048)


copying = partial(op.Op, configs=configs, default=default)
"""An op that copies by the pointwise kernel, whose tuning space it shares."""


@op.counted
def cost(problem: Problem) -> int:
    """One operation per element and stage."""
    return problem.output.spec.numel * (1 + len(problem.epilogue))
