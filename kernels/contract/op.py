"""What an op is to the rest of convloom: one frozen record of functions, made by the op's file.

An op's file holds, top to bottom: the maths, attributes, `infer`, `reference`, the kernels, the
tuning space with its legality and its default, the launches, the cost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch

from .aten import Arguments as Arguments
from .aten import Builder as Builder
from .aten import Capture as Capture
from .attributes import Attributes as Attributes
from .epilogue import Epilogue as Epilogue
from .epilogue import GeneratedFunction as GeneratedFunction
from .spec import Operand as Operand
from .spec import TensorSpec as TensorSpec
from .spec import outermost, rows_and_columns
from .targets import Target as Target

NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Problem:
    """One op application as a kernel sees it.

    inputs: the op's own arguments; operands: the tensors its epilogue reads, in stage order;
    prologue: stages applied to the first input while it is read, with `prologue_operands`.
    precision: how fp32 matrix products are computed, "ieee" (fp32-accurate) or "tf32".
    """

    op: str
    attributes: Attributes
    inputs: tuple[Operand, ...]
    outputs: tuple[Operand, ...]
    epilogue: Epilogue = ()
    operands: tuple[Operand, ...] = ()
    prologue: Epilogue = ()
    prologue_operands: tuple[Operand, ...] = ()
    precision: str = "ieee"

    @property
    def output(self) -> Operand:
        return self.outputs[0]

    @property
    def groups(self) -> dict[str, tuple[Operand, ...]]:
        """Every tensor by the kind of the `Ref` to it."""
        return {
            "input": self.inputs,
            "output": self.outputs,
            "operand": self.operands,
            "prologue": self.prologue_operands,
        }

    @cached_property
    def is_wide(self) -> bool:
        """Whether some tensor cannot be indexed by 32-bit offsets."""
        return any(operand.extent >= 2**31 for group in self.groups.values() for operand in group)


@dataclass(frozen=True)
class Config:
    """One choice of tile sizes and compiler options for a problem."""

    blocks: tuple[tuple[str, int], ...]
    num_warps: int = 4
    num_stages: int = 1

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.blocks)
        return f"{sizes} warps={self.num_warps} stages={self.num_stages}"


def config(num_warps: int = 4, num_stages: int = 1, **blocks: int) -> Config:
    """A `Config` from keywords."""
    return Config(tuple(blocks.items()), num_warps, num_stages)


@dataclass(frozen=True)
class Ref:
    """A tensor argument of a launch: the problem's `kind` ("input", "output", "operand",
    "prologue"), or the launch's "scratch", number `index`."""

    kind: str
    index: int = 0


@dataclass(frozen=True)
class Scratch:
    """Memory that the programs of one launch exchange, in elements at the largest batch.

    zeroed: it is zero before the first launch, and every launch leaves it so; the scratch of other
    launches may be the same memory.
    """

    dtype: torch.dtype
    elements: int
    zeroed: bool = False


@dataclass(frozen=True)
class TmaDescriptor:
    """A tensor argument that is moved in boxes through a TMA descriptor (sm_90 and later).

    shape, strides: in elements, of the tensor inside its buffer; the last stride is 1. box: what is
    copied at a time; of what reaches outside zero is read, and nothing written. offset: of the
    first element. batch: the batch for which `shape` holds, where a dimension scales with it: the
    outermost one in memory.
    """

    ref: Ref
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    offset: int = 0
    batch: int | None = None

    def shape_at(self, batch: int) -> tuple[int, ...]:
        """The shape when the batch is `batch`."""
        if self.batch is None:
            return self.shape
        at = outermost(self.strides)
        return (*self.shape[:at], self.shape[at] // self.batch * batch, *self.shape[at + 1 :])


class BatchExtent(int):
    """A size at the largest batch that is another one at smaller batches. batch: the largest."""

    batch: int

    def __new__(cls, size: int, batch: int) -> BatchExtent:
        extent = super().__new__(cls, size)
        extent.batch = batch
        return extent


INT32_MAX = 2**31 - 1
X, W, Y = Ref("input", 0), Ref("input", 1), Ref("output", 0)


@dataclass(frozen=True)
class Launch:
    """One kernel launch, before buffers have addresses.

    The kernel takes the pointers and the boxes by name, the tuple `extras`, the number of rows `m`
    (the only size that may vary between calls) and compile-time constants. The grid is
    `ceil(m / block_rows) * columns` programs in one dimension, one for each tile; with
    `most_programs` at most so many, which compute more than one tile then.

    rows: `m` at the largest batch; it scales with the batch when `batch` is not None.
    l2_bytes, instructions: for the cost model, of one program: what it moves between the L2 cache
    and its multiprocessor in its loop, re-reads included; instructions of all its threads beside
    matrix products and their operand loads; steps of its main loop, one after the other;
    step_instructions: what each warp issues in a step beside the products. combine_bytes: what the
    program that adds up a split sum reads. Where a kernel multiplies other blocks than its tile's:
    shared_traffic: bytes of shared memory that products read and copies write; shared_held,
    registers: what a program holds of it, and a thread of those. cluster: programs next to each
    other that are a cluster, each of which is given cluster_bytes of shared memory beside those
    that the compiler asks for. hides_ends: a program multiplies
    one tile while it finishes another. Where the copy engine moves what the end of a tile reads and
    writes: end_shared: bytes that threads exchange with shared memory instead; end_instructions:
    what each warp issues for that.
    """

    kernel: Any
    pointers: Mapping[str, Ref]
    rows: int
    block_rows: int
    columns: int
    constexprs: Mapping[str, Any]
    extras: tuple[Ref, ...] = ()
    batch: int | None = None
    num_warps: int = 4
    num_stages: int = 1
    l2_bytes: int = 0
    instructions: int = 0
    steps: int = 0
    step_instructions: int = 0
    shared_traffic: int = 0
    shared_held: int = 0
    registers: int = 0
    combine_bytes: int = 0
    cluster: int = 1
    cluster_bytes: int = 0
    scratch: tuple[Scratch, ...] = ()
    boxes: Mapping[str, TmaDescriptor] = field(default_factory=lambda: NONE)
    most_programs: int | None = None
    hides_ends: bool = False
    end_shared: int = 0
    end_instructions: int = 0

    @property
    def too_large(self) -> str | None:
        """Why no GPU can index it, in words: rows and programs are counted in 32 bits."""
        tiles = -(-self.rows // self.block_rows)
        if tiles * self.block_rows > INT32_MAX:
            return f"{self.rows:,} rows (tiles of {self.block_rows}), more than {INT32_MAX:,}"
        if tiles * self.columns > INT32_MAX:
            return f"{tiles * self.columns:,} programs, more than {INT32_MAX:,}"
        return None

    def m_at(self, batch: int) -> int:
        """The number of rows when the batch is `batch`."""
        return self.rows if self.batch is None else self.rows // self.batch * batch

    def tiles_at(self, batch: int) -> int:
        """The number of tiles when the batch is `batch`."""
        return -(-self.m_at(batch) // self.block_rows) * self.columns

    def grid_at(self, batch: int) -> tuple[int, int, int]:
        """The launch grid when the batch is `batch`."""
        tiles = self.tiles_at(batch)
        return (tiles if self.most_programs is None else min(tiles, self.most_programs), 1, 1)


def operand_refs(problem: Problem) -> tuple[Ref, ...]:
    """The epilogue's operands as a launch's `extras`."""
    return tuple(Ref("operand", index) for index in range(len(problem.operands)))


@dataclass(frozen=True)
class Cost:
    """What a problem asks of the machine at the largest batch, whatever the kernel.

    flops: floating-point operations (1 multiply-add = 2); bytes_read, bytes_written: each tensor
    element once.
    """

    flops: int
    bytes_read: int
    bytes_written: int

    @property
    def size_bytes(self) -> int:
        return self.bytes_read + self.bytes_written


def power_of_two(value: int) -> int:
    """The smallest power of two that is at least `value` (and at least 1)."""
    return 1 << max(0, value - 1).bit_length()


def tile_config(rows: int, columns: int, target: Target, elements: int = 2048) -> Config:
    """BLOCK_ROWS x BLOCK_COLUMNS for a memory-bound kernel, 16 elements per thread by default.

    The interpreter pays per program, so there one program covers as much as memory allows.
    """
    if target.name == "interpreter":
        block_columns = min(power_of_two(columns), 4096)
        block_rows = min(power_of_two(rows), max(1, (1 << 20) // block_columns))
    else:
        block_columns = min(power_of_two(columns), elements if rows == 1 else 128)
        block_rows = min(power_of_two(rows), max(1, elements // block_columns))
    return config(4, 1, BLOCK_ROWS=block_rows, BLOCK_COLUMNS=block_columns)


def tiles_of(results: Sequence[int], columns: Sequence[int]) -> Iterator[Config]:
    """Tiles of so many results, so many of them side by side, for four warps."""
    for elements in results:
        for width in columns:
            if width <= elements:
                yield config(4, 1, BLOCK_ROWS=elements // width, BLOCK_COLUMNS=width)


def matrix_tiles(problem: Problem, target: Target) -> Iterator[Config]:
    """512 to 4096 results per program, in wide or in square tiles: the tuning space of a
    memory-bound op."""
    return tiles_of((512, 1024, 2048, 4096), (32, 64, 128, 512))


def matrix_tile(problem: Problem, target: Target) -> Config:
    """2048 results of a memory-bound op, 16 per thread, at most 128 of them along the columns."""
    return tile_config(*rows_and_columns(problem.output.spec), target)


def either(
    applies: Callable[[Problem], bool], one: Mapping[str, Any], other: Mapping[str, Any]
) -> dict[str, Any]:
    """`configs`, `default` and `legal` of an op: those of `one` where it applies, else those of
    the other. Every tile can run where no `legal` is given."""

    def of(name: str, usual: Any = None) -> Callable[..., Any]:
        return lambda problem, *rest: (one if applies(problem) else other).get(name, usual)(
            problem, *rest
        )

    return {
        "configs": of("configs"), "default": of("default"),
        "legal": of("legal", lambda problem, tile, target: None),
    }  # fmt: skip


def counted(operations: Callable[[Problem], int]) -> Callable[[Problem], Cost]:
    """The cost of an op that touches each tensor once and computes so many operations."""

    def cost(problem: Problem) -> Cost:
        read = (*problem.inputs, *problem.operands, *problem.prologue_operands)
        moved = (sum(each.spec.size_bytes for each in group) for group in (read, problem.outputs))
        return Cost(operations(problem), *moved)

    return cost


movement_cost = counted(lambda problem: 0)


Pack = Callable[[Any, torch.Tensor], torch.Tensor]
"""`pack(attributes, tensor)`: a constant as the kernel wants it in memory."""


@dataclass(frozen=True)
class Op:
    """An op as a name with interpretations. What its file computes with comes first and in this
    order, as far as the file says it; the rest is given by name.

    infer(attributes, inputs): the output specs; raises InvalidInputError for impossible geometry.
    reference(attributes, *tensors): the output tensor(s) by torch, without the epilogue.
    configs / default / legal: the tuning space, its no-search choice, and why a config is refused;
    without them those of a memory-bound kernel, tiles of the output's rows and columns.
    crowded: why a config is expected to need more registers than there are. Only the compiler
    knows, so such configs are legal, but come last; a fusion that has no others is not made.
    launches(problem, config, target): the kernels to run, in order.
    packs(attributes): for inputs that must be constants, how their tensor lies in memory.
    factors: inputs that its matrix products take as they are: constants among them keep their
    dtype, where any other that is not packed is read as fp32.
    input_range: where the tuner and the tests draw the elements of inputs from.
    prepare(attributes, tensors): drawn tensors as valid inputs, where not all are (indices).
    takes_epilogue / takes_prologue: whether pointwise stages may be fused into the op.
    images: rank-4 tensors are NHWC for this op; False means it wants dense memory.
    integers: results may be int64 or booleans: the op makes whole numbers (below 2^24) or moves
    them, or decides.
    follows: its kernel reads tensors in any layout, and a result of rank 4 lies as the first input.
    writes_any: its kernel writes a result in any layout, so that it lies as its readers want it.
    aten: capture functions by the ATen overload that becomes this op. batched: what those calls do
    in words ("pooling"), where they need the batch dimension that torch lets images go without; how
    many dimensions an image has is in their names (`max_pool2d`).
    """

    name: str
    attributes: type[Attributes]
    infer: Callable[[Any, tuple[TensorSpec, ...]], tuple[TensorSpec, ...]]
    reference: Callable[..., Any]
    launches: Callable[[Problem, Config, Target], tuple[Launch, ...]]
    cost: Callable[[Problem], Cost] = movement_cost
    configs: Callable[[Problem, Target], Iterator[Config]] = matrix_tiles
    default: Callable[[Problem, Target], Config] = matrix_tile
    legal: Callable[[Problem, Config, Target], str | None] = lambda problem, config, target: None
    crowded: Callable[[Problem, Config, Target], str | None] = lambda problem, config, target: None
    aten: Mapping[str, Capture] = field(default_factory=lambda: NONE)
    batched: str = ""
    packs: Callable[[Any], Mapping[int, Pack]] = lambda attributes: {}
    factors: tuple[int, ...] = ()
    input_range: tuple[float, float] = (-2.0, 2.0)
    prepare: Callable[[Any, tuple[torch.Tensor, ...]], tuple[torch.Tensor, ...]] = (
        lambda attributes, tensors: tensors
    )
    takes_epilogue: bool = True
    takes_prologue: bool = False
    images: bool = True
    integers: bool = False
    follows: bool = False
    writes_any: bool = False

    def places(self, problem: Problem) -> dict[Ref, Operand]:
        """Where a problem's tensors lie in their buffers; those that the op packs own theirs."""
        packed = self.packs(problem.attributes)
        return {
            Ref(kind, index): operand
            for kind, operands in problem.groups.items()
            for index, operand in enumerate(operands)
            if kind != "input" or index not in packed
        }
