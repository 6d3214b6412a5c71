"""Boxes of pixels: how many an image takes, and how the copy engine sees the input of a
convolution, so that a box of output pixels reads a box of it for each tap of the filter.

With stride 2, x is seen as (N, H/2, 2, W/2, 2·pitch): row and column of a tap have a parity, which
chooses in the dimensions of 2, and are then neighbours as with stride 1.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

from ..contract.op import Config, Problem, TmaDescriptor, X
from ..contract.spec import Operand
from ..tile.geometry import Output

ALIGNMENT = 16
"""Bytes: of the first element and of every pitch."""
MOST_WASTE = 1.5
BOXES_TRIED = 2
"""Of each number of pixels, those that pad least."""


class Pixels(NamedTuple):
    """The box of pixels that a tile is: images, rows and columns, powers of two."""

    N: int
    H: int
    W: int

    @staticmethod
    def of(tile: Config) -> Pixels:
        """Of a configuration that reads boxes."""
        return Pixels(tile["BOX_N"], tile["BOX_H"], tile["BOX_W"])

    def of_image(self, output: Output) -> int:
        """How many of them an image of an output takes."""
        return -(-output.P // self.H) * -(-output.Q // self.W)


def waste(problem: Problem, box: tuple[int, int, int]) -> float:
    """How many pixels boxes of (images, rows, columns) compute for each one that there is."""
    n, _, p, q = problem.output.shape
    computed = 1
    for extent, size in zip((n, p, q), box, strict=True):
        computed *= -(-extent // size) * size
    return computed / max(n * p * q, 1)


def boxes(problem: Problem, pixels: int, most_images: int = 1 << 30) -> list[tuple[int, int, int]]:
    """Boxes of that many pixels, and of at most so many images, that pad little, the best first."""
    powers = [1 << bit for bit in range(pixels.bit_length())]
    every = [
        (pixels // (high * wide), high, wide)
        for high, wide in itertools.product(powers, powers)
        if high * wide <= pixels <= most_images * high * wide
    ]
    # Of equal ones that of fewest images: the boxes of neighbouring taps overlap most.
    every.sort(key=lambda box: (waste(problem, box), box[0], -box[2]))
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
    attributes: Any = problem.attributes
    _, _, h, width = problem.inputs[0].shape
    if attributes.groups != 1:
        return f"TMA: {attributes.groups} groups; boxes hold channels of one"
    if attributes.stride not in ((1, 1), (2, 2)):
        return f"TMA: stride {attributes.stride}; boxes are made for (1, 1) and (2, 2)"
    if attributes.stride == (2, 2) and (h % 2 or width % 2):
        return f"TMA: an image of {h}x{width} has no halves for stride 2"
    return None


def view(problem: Problem, box: tuple[int, int, int], block_k: int) -> TmaDescriptor:
    """The input of a convolution, read in boxes of (images, rows, columns) by so many channels."""
    attributes: Any = problem.attributes
    x = problem.inputs[0]
    n, c, h, width = x.shape
    pitch = x.pitch
    if attributes.stride == (1, 1):
        shape: tuple[int, ...] = (n, h, width, c)
        strides: tuple[int, ...] = (h * width * pitch, width * pitch, pitch, 1)
        read: tuple[int, ...] = (*box, block_k)
    else:
        shape = (n, h // 2, 2, width // 2, pitch + c)
        strides = (h * width * pitch, 2 * width * pitch, width * pitch, 2 * pitch, 1)
        read = (box[0], box[1], 1, box[2], block_k)
    return TmaDescriptor(X, shape, strides, read, x.offset, x.spec.batch)
