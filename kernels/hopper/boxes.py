"""Boxes of pixels: how many an image takes, and how the copy engine sees the input of a
convolution, so that a box of output pixels reads a box of it for each tap of the filter.

With stride 2, x is seen as (N, H/2, 2, W/2, 2·pitch): row and column of a tap have a parity, which
chooses in the dimensions of 2, and are then neighbours as with stride 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..contract import epilogue as ep
from ..contract.op import Config, Operand, Problem, Ref, TmaDescriptor, X
from ..tile.conv_geometry import infer

ALIGNMENT = 16
"""Bytes: of the first element and of every pitch."""
MOST_WASTE = 1.5
BOXES_TRIED = 2
"""Of each number of pixels, those that pad least."""


GROUPED = 32
"""Channels of a block of several groups, as `convolution/grouped.py` packs their weights. With 64
the zeros double the products and plain Triton's 128x64 tiles need 194 registers; with 16 the weight
tiles are too small for 128-bit copies."""


class Pool(NamedTuple):
    """What becomes of windows of 2x2 pixels, or of all, of a convolution's result, which has height
    P and width Q. stages: applied before; maximum: whether the largest is taken, else the sum;
    overhangs: whether some windows have members outside."""

    P: int
    Q: int
    stages: Any
    maximum: bool
    overhangs: bool


class Pixels(NamedTuple):
    """The box of pixels that a tile is: images, rows and columns, powers of two; how many pixels it
    is from one row to the next (W where an image follows the other, N·W where a row of all images
    follows the other); how many boxes of an image lie below and beside each other; what is made of
    windows of side x side pixels, 0 for the mean of all; whether results leave in boxes; and how
    many channels of a tile a group of warps finishes at a time."""

    N: int
    H: int
    W: int
    row: int
    down: int = 1
    across: int = 1
    side: int = 1
    pool: Pool | None = None
    copied: bool = False
    columns: int = 0


def box_of(tile: Config) -> tuple[int, int, int]:
    """Images, rows and columns of a configuration that reads boxes."""
    return tile["BOX_N"], tile["BOX_H"], tile["BOX_W"]


def at_once(tile: Config, side: int, turns: bool) -> int:
    """How many channels a group of warps finishes at a time: 64 results of a thread, with twice as
    many of which gelu keeps 272 bytes on the stack; in turns, beside 128 sums, 32: silu kept 8.
    Windows and images are put together by exchange, for 64 channels in `core.END_BYTES`."""
    most = 64 * 128 // (tile["BLOCK_M"] // (1 if turns else 2))
    if side != 1:
        most = min(most, 64)
    elif turns and tile["BLOCK_N"] == 128:
        most //= 2
    return min(tile["BLOCK_N"], most)


def filter_of(problem: Problem) -> Any:
    """The convolution that is computed, also where more is made of its result (`conv_pool`)."""
    return getattr(problem.attributes, "conv", problem.attributes)


def side(problem: Problem) -> int:
    """Of the windows of pixels that become one result; 0 where all of an image do."""
    return {"conv_pool": 2, "conv_mean": 0}.get(problem.op, 1)


def size(problem: Problem) -> tuple[int, int, int]:
    """Images, rows and columns of the convolution's result, before more is made of it."""
    n, *_, p, q = (*problem.output.shape, 1, 1)[:4]
    if side(problem) > 0:
        return n, side(problem) * p, side(problem) * q
    (result,) = infer(filter_of(problem), (problem.inputs[0].spec, problem.inputs[1].spec))
    return n, result.shape[2], result.shape[3]


def waste(problem: Problem, box: tuple[int, int, int]) -> float:
    """How many pixels boxes of (images, rows, columns) compute for each one that there is."""
    there = size(problem)
    computed = (-(-pixels // each) * each for pixels, each in zip(there, box, strict=True))
    return math.prod(computed) / max(math.prod(there), 1)


def splits_windows(problem: Problem, box: tuple[int, int, int], by_rows: bool) -> bool:
    """Whether half of a box, which a group of warps finishes, holds parts of windows or images."""
    n, high, wide = box
    row = n * wide if by_rows else wide
    if side(problem) == 0:
        _, p, q = size(problem)
        return by_rows or n < 2 or high < p or wide < q
    return side(problem) > 1 and (high < 2 or wide < 2 or 4 * row > math.prod(box))


def half(box: tuple[int, int, int], by_rows: bool = False) -> tuple[int, int, int]:
    """Of a box of pixels what one of two groups finishes."""
    n, h, w = box
    if n > 1 and not by_rows:
        return n // 2, h, w
    return (n, h // 2, w) if h > 1 else (n, h, w // 2)


def boxes(problem: Problem, pixels: int, by_rows: bool = False) -> list[tuple[int, int, int]]:
    """Boxes of that many pixels that pad little, the best first. by_rows: in which a row of all
    images follows the other, each of another height."""
    powers = [1 << bit for bit in range(pixels.bit_length())]
    every = [
        (pixels // (high * wide), high, wide)
        for high, wide in itertools.product(powers, powers)
        if high * wide <= pixels
    ]
    every = [box for box in every if not splits_windows(problem, box, by_rows)]
    # Of equal ones that of fewest images: the boxes of neighbouring taps overlap most.
    every.sort(key=lambda box: (waste(problem, box), -box[1] * by_rows, box[0], -box[2]))
    if by_rows:
        every = [box for at, box in enumerate(every) if box[1] not in {b[1] for b in every[:at]}]
    return [box for box in every[:BOXES_TRIED] if waste(problem, box) <= MOST_WASTE]


def misaligned(x: Operand, w_pitch: int = 0) -> str | None:
    """Why x, or a weight with rows of so many elements, cannot be read in boxes, or None."""
    parts = {"the start of x": x.offset, "the pitch of x": x.pitch, "the pitch of w": w_pitch}
    for what, elements in parts.items():
        if (size := elements * x.spec.dtype.itemsize) % ALIGNMENT:
            return f"TMA: {what}, {size} bytes, is not a multiple of {ALIGNMENT}"
    return None


def whole(y: Operand, operands: Sequence[Operand]) -> list[int] | None:
    """Which operands of y's epilogue have an element for each result; None unless results and
    these, one at most, can be moved in the same boxes."""
    sizes = ep.memory_sizes(y.spec)
    reads = [ep.access(operand, y.spec) for operand in operands]
    found = [at for at, read in enumerate(reads) if read.is_full(sizes)]
    for each in (y, *(operands[at] for at in found)):
        strides = ep.access(replace(y, pitch=each.pitch), y.spec).strides
        walked = ep.access(each, y.spec).strides
        if each.spec.dtype is not y.spec.dtype or walked != strides or misaligned(each):
            return None
    return found if len(found) < 2 else None


def groups(problem: Problem) -> int:
    """Of channels, that share no products; 1 where all do."""
    return int(getattr(filter_of(problem), "groups", 1))


def _fill_blocks(problem: Problem) -> bool:
    """Whether groups of as many channels of x and of y are packed as whole blocks of GROUPED."""
    k, per_group = problem.inputs[1].shape[:2]
    even = k == groups(problem) * per_group and problem.op == "conv2d"
    return even and per_group > 1 and GROUPED % per_group == k % GROUPED == 0 < GROUPED - per_group


def refusal(problem: Problem) -> str | None:
    """Why the input of a convolution cannot be read in boxes, whatever their form, or None."""
    attributes = filter_of(problem)
    _, _, h, width = problem.inputs[0].shape
    if (count := groups(problem)) != 1 and not _fill_blocks(problem):
        return f"TMA: {count} groups; boxes hold channels of one, or {GROUPED} of several"
    if attributes.stride not in ((1, 1), (2, 2)):
        return f"TMA: stride {attributes.stride}; boxes are made for (1, 1) and (2, 2)"
    if attributes.stride == (2, 2) and (h % 2 or width % 2):
        return f"TMA: an image of {h}x{width} has no halves for stride 2"
    return None


def described(
    ref: Ref, tensor: Operand, size: tuple[int, int, int], box: tuple[int, int, int],
    columns: tuple[int, int], by_rows: bool,
) -> TmaDescriptor:  # fmt: skip
    """A tensor of so many (images, rows, columns), in boxes of so many. columns: channels of the
    tensor and of a box; by_rows: with rows as the first dimension and images as the second."""
    (n, h, width), (channels, read), pitch = size, columns, tensor.pitch
    first, second = (n, h * width * pitch, box[0]), (h, width * pitch, box[1])
    if by_rows:
        first, second = second, first
    every = (first, second, (width, pitch, box[2]), (channels, 1, read))
    shape, strides, boxed = zip(*every, strict=True)
    return TmaDescriptor(ref, shape, strides, boxed, tensor.offset, tensor.spec.batch)


def view(
    problem: Problem, box: tuple[int, int, int], block_k: int, by_rows: bool = False
) -> TmaDescriptor:
    """The input of a convolution, read in boxes of (images, rows, columns) by so many channels;
    by_rows, as `described`, for stride 1."""
    x = problem.inputs[0]
    n, c, h, width = x.shape
    pitch = x.pitch
    if filter_of(problem).stride == (1, 1):
        return described(X, x, (n, h, width), box, (c, block_k), by_rows)
    shape = (n, h // 2, 2, width // 2, pitch + c)
    strides = (h * width * pitch, 2 * width * pitch, width * pitch, 2 * pitch, 1)
    read = (box[0], box[1], 1, box[2], block_k)
    return TmaDescriptor(X, shape, strides, read, x.offset, x.spec.batch)
