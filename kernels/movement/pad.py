"""pad: a border around a tensor, or a crop where a side's width is negative.

With i = o − before for every dimension at once, y[o] = x[i] where i lies inside x, and elsewhere

    constant   value                          0 0 | a b c d | 0 0
    reflect    x[−i], x[2(L − 1) − i]         c b | a b c d | c b    widths below L
    replicate  x[0], x[L − 1]                 a a | a b c d | d d
    circular   x[i + L], x[i − L]             c d | a b c d | a b    widths up to L

A crop on one side and a border on the other are a border, then a crop, but for circular ones, where
torch crops first and repeats what is left.

x: rank 1 to 5 in any layout -> y: the same layout, each dimension `before + size + after` long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from ...errors import InvalidInputError
from ..contract.op import Arguments, Attributes, Builder, Config, Launch, Op, Problem, Target
from ..contract.spec import TensorSpec
from ..tile.finish import put
from ..tile.geometry import tile_launch
from ..tile.space import output_tile

MOST_DIMENSIONS = 5
MODES = ("constant", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Pad(Attributes):
    """Elements added before and after each logical dimension (negative: removed), how they are
    found, and their value where that is constant."""

    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    value: float = 0.0
    mode: str = "constant"

    @property
    def sides(self) -> list[int]:
        """As torch wants them: before and after of the last dimension, then of the one before."""
        pairs = zip(reversed(self.before), reversed(self.after), strict=True)
        return [width for pair in pairs for width in pair]


def check_border(name: str, mode: str, x: TensorSpec, dim: int, before: int, after: int) -> None:
    """Raises InvalidInputError where a border needs elements that dimension `dim` of x lacks."""
    cropped = x.shape[dim] + min(before, 0) + min(after, 0)
    most = {"reflect": x.shape[dim] - 1, "circular": cropped}.get(mode)
    if most is not None and max(before, after) > most:
        raise InvalidInputError(
            f"{name}: mode {mode!r} can add at most {most} to dimension {dim} of {x}, got "
            f"({before}, {after})"
        )


def infer(attributes: Pad, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    before, after, mode = attributes.before, attributes.after, attributes.mode
    if mode not in MODES:
        raise InvalidInputError(f"pad: unknown mode {mode!r}; there are {', '.join(MODES)}")
    if not 1 <= x.rank <= MOST_DIMENSIONS:
        raise InvalidInputError(f"pad: expected 1 to {MOST_DIMENSIONS} dimensions, got {x}")
    if not len(before) == len(after) == x.rank:
        raise InvalidInputError(f"pad: {attributes} does not give both sides of each dim of {x}")
    if x.batch is not None and (x.rank == 1 or before[0] or after[0]):
        raise InvalidInputError(f"pad: the batch dimension of {x} cannot be padded")
    if mode != "constant":
        if x.rank == 1:
            raise InvalidInputError(f"pad: mode {mode!r} needs two dimensions or more, got {x}")
        fixed = _unpadded(x.rank)
        if any((*before[:fixed], *after[:fixed])):
            raise InvalidInputError(
                f"pad: mode {mode!r} leaves the first {fixed} of {x.rank} dimensions alone, as in "
                f"torch; got {attributes}"
            )
        for dim in range(x.rank):
            check_border("pad", mode, x, dim, before[dim], after[dim])
    sizes = tuple(zip(before, x.shape, after, strict=True))
    shape = tuple(low + size + high for low, size, high in sizes)
    # Torch crops before it pads with a constant.
    crops = (min(low, 0) + size + min(high, 0) for low, size, high in sizes)
    if min(shape) < 1 or (mode == "constant" and min(crops) < 0):
        raise InvalidInputError(f"pad: {attributes} leaves nothing of {x}")
    return (x.with_(shape=shape),)


def _unpadded(rank: int) -> int:
    """Leading dimensions that torch does not pad but with a constant: it pads at most three."""
    return max(1, rank - 3)


def reference(attributes: Pad, x: torch.Tensor) -> torch.Tensor:
    if attributes.mode == "constant":
        return F.pad(x, attributes.sides, value=attributes.value)
    return F.pad(x, attributes.sides[: 2 * (x.dim() - _unpadded(x.dim()))], attributes.mode)


@triton.jit
def correction(index, SIZE: tl.constexpr, MODE: tl.constexpr):
    """What leads from an index outside 0 ... SIZE − 1 to the one whose element stands there; zero
    inside."""
    if MODE == "reflect":
        result = tl.maximum(-2 * index, 0) + tl.minimum(2 * (SIZE - 1) - 2 * index, 0)
    elif MODE == "replicate":
        result = tl.maximum(-index, 0) + tl.minimum(SIZE - 1 - index, 0)
    else:
        result = tl.where(index < 0, SIZE, 0) - tl.where(index >= SIZE, SIZE, 0)
    return result


class Sides(NamedTuple):
    """The dimensions in memory order, of which all but the last make up the rows: their sizes in x
    and y, what is added before them, whether an index may leave x, and their strides in x."""

    sizes: tuple[int, ...]
    outputs: tuple[int, ...]
    before: tuple[int, ...]
    is_open: tuple[bool, ...]
    strides: tuple[int, ...]


@triton.jit
def pad_kernel(
    x, y, extras, m, DIMS: tl.constexpr, SIDES: tl.constexpr, X_OFFSET: tl.constexpr,
    MODE: tl.constexpr, VALUE: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    rows_inside = row_mask
    columns_inside = column_mask
    inner = columns - SIDES.before[DIMS - 1]
    if SIDES.is_open[DIMS - 1]:
        if MODE == "constant":
            columns_inside = (inner >= 0) & (inner < SIDES.sizes[DIMS - 1])
        else:
            inner = inner + correction(inner, SIDES.sizes[DIMS - 1], MODE)
    rest = rows
    source = tl.zeros_like(rows)
    for dim in tl.static_range(DIMS - 2, -1, -1):
        # The outermost dimension may be the batch of this call: it is bounded by m alone.
        index = rest if dim == 0 else rest % SIDES.outputs[dim]
        rest = rest // SIDES.outputs[dim]
        index = index - SIDES.before[dim]
        if SIDES.is_open[dim]:
            if MODE == "constant":
                rows_inside = rows_inside & (index >= 0) & (index < SIDES.sizes[dim])
            else:
                index = index + correction(index, SIDES.sizes[dim], MODE)
        source += index * SIDES.strides[dim]
    inside = rows_inside[:, None] & columns_inside[None, :]
    value = tl.load(x + X_OFFSET + source[:, None] + inner[None, :], mask=inside, other=0.0)
    acc = value.to(tl.float32)
    if MODE == "constant":
        acc = tl.where(inside, acc, VALUE)
    put(acc, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes = problem.attributes.expect(Pad)
    x, out = problem.inputs[0], problem.output
    order = out.spec.layout.order(out.spec.rank)

    def in_memory(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[dim] for dim in order)

    before, after = in_memory(attributes.before), in_memory(attributes.after)
    sizes, strides, offset = in_memory(x.shape), in_memory(x.strides), x.offset
    if attributes.mode == "circular":
        low, high = (tuple(max(-width, 0) for width in side) for side in (before, after))
        sizes = tuple(size - a - b for size, a, b in zip(sizes, low, high, strict=True))
        offset += sum(a * stride for a, stride in zip(low, strides, strict=True))
        before = tuple(max(width, 0) for width in before)
    is_open = tuple(low > 0 or high > 0 for low, high in zip(before, after, strict=True))
    constexprs = {
        "DIMS": len(order), "SIDES": Sides(sizes, in_memory(out.shape), before, is_open, strides),
        "X_OFFSET": offset, "MODE": attributes.mode, "VALUE": float(attributes.value),
    }  # fmt: skip
    return (tile_launch(problem, tile, pad_kernel, constexprs=constexprs),)


def _capture(g: Builder, a: Arguments) -> Any:
    """Sides are torch's: before and after of the last dimension, then of the one before it, ..."""
    spec, mode, value = g.spec(a.self), a.get("mode", "constant"), float(a.value or 0.0)
    if not 1 <= spec.rank <= MOST_DIMENSIONS:
        return g.refuse(f"padding of a rank-{spec.rank} tensor; ranks 1 to {MOST_DIMENSIONS} are")
    if not any(a.pad):
        return a.self
    missing = [0] * (spec.rank - len(a.pad) // 2)
    before = (*missing, *reversed([int(width) for width in a.pad[0::2]]))
    after = (*missing, *reversed([int(width) for width in a.pad[1::2]]))
    return g.apply("pad", (a.self,), Pad(before, after, value, mode))


OP = Op(
    "pad", Pad, infer, reference, launches,
    aten={"aten.pad.default": _capture, "aten.constant_pad_nd.default": _capture},
)  # fmt: skip
