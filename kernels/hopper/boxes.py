"""Boxes of pixels: how many an image takes, and how the copy engine sees the input of a
convolution, so that a box of output pixels reads a box of it for each tap of the filter.

With stride 2, x is seen as (N, H/2, 2, W/2, 2·pitch): row and column of a tap have a parity, which
chooses in the dimensions of 2, and are then neighbours as with stride 1.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

from ..contract.op import Config, Operand, Problem, TmaDescriptor, X

ALIGNMENT = 16
"""Bytes: of the first element and of every pitch."""
MOST_WASTE = 1.5
BOXES_TRIED = 2
"""Of each number of pixels, those that pad least."""


class Pool(NamedTuple):
    """What becomes of windows of 2x2 pixels of a convolution's result, which has height P and width
    Q. stages: applied before; maximum: whether the largest is taken, else the sum; overhangs:
    whether some windows have members outside."""

    P: int
    Q: int
    stages: Any
    maximum: bool
    overhangs: bool


class Pixels(NamedTuple):
    """The box of pixels that a tile is: images, rows and columns, powers of two; how many pixels it
    is from one row to the next (W where an image follows the other, N·W where a row of all images
    follows the other); how many boxes of an image lie below and beside each other; and what is made
    of windows of side x side pixels."""

    N: int
    H: int
    W: int
    row: int
    down: int = 1
    across: int = 1
    side: int = 1
    pool: Pool | None = None


def box_of(tile: Config) -> tuple[int, int, int]:
    """Images, rows and columns of a configuration that reads boxes."""
    return tile["BOX_N"], tile["BOX_H"], tile["BOX_W"]


def filter_of(problem: Problem) -> Any:
    """The convolution that is computed, also where more is made of its result (`conv_pool`)."""
    return getattr(problem.attributes, "conv", problem.attributes)


def side(problem: Problem) -> int:
    """Of the windows of pixels that become one result."""
    return 1 if filter_of(problem) is problem.attributes else 2


def waste(problem: Problem, box: tuple[int, int, int]) -> float:
    """How many pixels boxes of (images, rows, columns) compute for each one that there is."""
    n, _, p, q = problem.output.shape
    there = n, side(problem) * p, side(problem) * q
    computed = (-(-pixels // size) * size for pixels, size in zip(there, box, strict=True))
    return math.prod(computed) / max(math.prod(there), 1)


def splits_windows(problem: Problem, box: tuple[int, int, int], by_rows: bool) -> bool:
    """Whether half of a box, which a group of warps finishes, holds parts of windows."""
    n, high, wide = box
    row = n * wide if by_rows else wide
    return side(problem) > 1 and (high < 2 or wide < 2 or 4 * row > math.prod(box))


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


def misaligned(x: Operand, w_pitch: int) -> str | None:
    """Why x, or a weight with rows of so many elements, cannot be read in boxes, or None."""
    parts = {"the start of x": x.offset, "the pitch of x": x.pitch, "the pitch of w": w_pitch}
    for what, elements in parts.items():
        if (size := elements * x.spec.dtype.itemsize) % ALIGNMENT:
            return f"TMA: {what}, {size} bytes, is not a multiple of {ALIGNMENT}"
    return None


def refusal(problem: Problem) -> str | None:
    """Why the input of a convolution cannot be read in boxes, whatever their form, or None."""
    attributes = filter_of(problem)
    _, _, h, width = problem.inputs[0].shape
    if attributes.groups != 1:
        return f"TMA: {attributes.groups} groups; boxes hold channels of one"
    if attributes.stride not in ((1, 1), (2, 2)):
        return f"TMA: stride {attributes.stride}; boxes are made for (1, 1) and (2, 2)"
    if attributes.stride == (2, 2) and (h % 2 or width % 2):
        return f"TMA: an image of {h}x{width} has no halves for stride 2"
    return None


def view(
    problem: Problem, box: tuple[int, int, int], block_k: int, by_rows: bool = False
) -> TmaDescriptor:
    """The input of a convolution, read in boxes of (images, rows, columns) by so many channels.
    by_rows: with rows as the first dimension and images as the second, for stride 1."""
    attributes = filter_of(problem)
    x = problem.inputs[0]
    n, c, h, width = x.shape
    pitch = x.pitch
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    read: tuple[int, ...]
    if by_rows:
        shape = (h, n, width, c)
        strides = (width * pitch, h * width * pitch, pitch, 1)
        read = (box[1], box[0], box[2], block_k)
    elif attributes.stride == (1, 1):
        shape = (n, h, width, c)
        strides = (h * width * pitch, width * pitch, pitch, 1)
        read = (*box, block_k)
    else:
        shape = (n, h // 2, 2, width // 2, pitch + c)
        strides = (h * width * pitch, 2 * width * pitch, width * pitch, 2 * pitch, 1)
        read = (box[0], box[1], 1, box[2], block_k)
    return TmaDescriptor(X, shape, strides, read, x.offset, x.spec.batch)
