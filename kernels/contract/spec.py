"""What is known of a tensor before it exists: logical shape, dtype, memory layout, batch.

Shapes are torch's logical ones (N, C, H, W for images, N, C, D, H, W for volumes). The layout says
how they lie in memory: `DENSE` is row-major in the logical order, `NHWC` (ranks 4 and 5) puts the
channels innermost, as `torch.channels_last` and `torch.channels_last_3d` do. Inside a compiled
graph every rank-4 activation is NHWC, and so are volumes from the first op on that works on them.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

import torch

MEMORY_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
"""Torch's names for `NHWC`, by rank."""

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Layout(enum.Enum):
    """How a logical tensor lies in memory."""

    DENSE = "dense"
    NHWC = "nhwc"

    def order(self, rank: int) -> tuple[int, ...]:
        """Logical dimensions from the outermost to the innermost in memory."""
        if self is Layout.NHWC:
            return (0, *range(2, rank), 1)
        return tuple(range(rank))


def outermost(strides: tuple[int, ...]) -> int:
    """Which dimension has the largest stride; of several the first."""
    return strides.index(max(strides))


@dataclass(frozen=True)
class TensorSpec:
    """Logical shape, dtype and layout of one tensor.

    `batch` is None for a tensor of fixed size. Otherwise the first dimension is a multiple of the
    batch, `shape` is that of the largest batch the plan serves, and `batch` is that largest batch.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout = Layout.DENSE
    batch: int | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def size_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def at(self, batch: int) -> tuple[int, ...]:
        """The shape when the batch is `batch`."""
        if self.batch is None:
            return self.shape
        return (self.shape[0] // self.batch * batch, *self.shape[1:])

    def with_(self, **changes: object) -> TensorSpec:
        """A copy with some fields replaced."""
        return replace(self, **changes)  # type: ignore[arg-type]

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.")
        dims = [str(extent) for extent in self.shape]
        if self.batch is not None:
            multiple = self.shape[0] // self.batch
            dims[0] = "N" if multiple == 1 else f"{multiple}N"
        suffix = " nhwc" if self.layout is Layout.NHWC else ""
        return f"{name}[{', '.join(dims)}]{suffix}"


def strides_of(spec: TensorSpec, pitch: int | None = None) -> tuple[int, ...]:
    """Element strides in logical order; `pitch` is the distance of rows of the innermost dim.

    A channel slice of an NHWC buffer, or a column slice of a dense one, keeps the pitch of the
    whole buffer.
    """
    order = spec.layout.order(spec.rank)
    strides = [0] * spec.rank
    step = 1
    for position, dim in enumerate(reversed(order)):
        strides[dim] = step
        step *= spec.shape[dim]
        if position == 0 and pitch is not None:
            step = pitch
    return tuple(strides)


@dataclass(frozen=True)
class Operand:
    """A tensor argument of a kernel: a spec and where it lies inside its buffer.

    pitch: elements from one row of the innermost dimension to the next.
    offset: elements from the start of the buffer to the first element.
    """

    spec: TensorSpec
    pitch: int
    offset: int = 0

    @staticmethod
    def dense(spec: TensorSpec) -> Operand:
        """The operand that owns its whole buffer."""
        if spec.rank == 0:
            return Operand(spec, 1)
        return Operand(spec, spec.shape[spec.layout.order(spec.rank)[-1]])

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def strides(self) -> tuple[int, ...]:
        return strides_of(self.spec, self.pitch)

    @property
    def extent(self) -> int:
        """Elements from the start of the buffer to one past the last element touched."""
        last = sum((size - 1) * step for size, step in zip(self.shape, self.strides, strict=True))
        return self.offset + last + 1


def rows_and_columns(spec: TensorSpec) -> tuple[int, int]:
    """The tensor as a matrix: all but the innermost dimension in memory, and the innermost."""
    if spec.rank == 0:
        return 1, 1
    columns = spec.shape[spec.layout.order(spec.rank)[-1]]
    return spec.numel // max(columns, 1), columns


def as_layout(tensor: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The same logical tensor, contiguous in the given layout."""
    if layout is Layout.NHWC:
        return tensor.contiguous(memory_format=MEMORY_FORMATS[tensor.dim()])
    return tensor.contiguous()
