"""The kernel of `small_net.py`: the layers of one image, one after the other, then its classes."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..tile.engine import compute_tile
from ..tile.finish import Finish
from ..tile.geometry import Output, Tile
from ..tile.source import Source
from ..tile.space import Space
from .head_kernel import classify


class Layer(NamedTuple):
    """A convolution and its pooling, as the tile engine takes them; a tile has all channels."""

    space: Space
    source: Source
    finish: Finish
    output: Output
    tile: Tile


@triton.jit
def layer(x, w, y, image, extras, LAYER: tl.constexpr):
    """One convolution and its pooling for one image, to the end."""
    columns = tl.arange(0, LAYER.tile.N)
    units: tl.constexpr = LAYER.space.down * LAYER.space.across
    first = image * units
    for start in range(0, units, LAYER.space.per_tile):
        compute_tile(
            x, w, x, w, y, y, y, 0, 0, first + start, first + units, columns,
            columns < LAYER.output.K, extras, LAYER.space, LAYER.source, None, None, LAYER.finish,
            LAYER.output, LAYER.tile, 1, False,
        )  # fmt: skip
    # The next layer reads what other threads of this program wrote.
    tl.debug_barrier()


@triton.jit
def small_net_kernel(
    x,
    v1,
    v2,
    v3,
    w1,
    w2,
    w3,
    y,
    between,
    extras,
    m,
    LAYER1: tl.constexpr,
    LAYER2: tl.constexpr,
    LAYER3: tl.constexpr,
    LAST_OFFSET: tl.constexpr,
    C: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    Y_PITCH: tl.constexpr,
    Y_OFFSET: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LINK1: tl.constexpr,
    LINK2: tl.constexpr,
    LINK3: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_1: tl.constexpr,
    BLOCK_2: tl.constexpr,
    BLOCK_3: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    image = tl.program_id(0)
    if WIDE:
        image = image.to(tl.int64)
    layer(x, v1, between, image, extras, LAYER1)
    if LAYER2 is not None:
        layer(between, v2, between, image, extras, LAYER2)
    if LAYER3 is not None:
        layer(between, v3, between, image, extras, LAYER3)
    # A matrix product takes 16 rows at least; this image is the first of them.
    index = tl.arange(0, BLOCK_M)
    classify(
        between, w1, w2, w3, y, extras, image + index, index < 1, C, 1, K1, K2, K3,
        C, LAST_OFFSET, Y_PITCH, Y_OFFSET, False, SOFTMAX, LINK1, LINK2, LINK3, EPILOGUE,
        PRECISION, BLOCK_1, BLOCK_2, BLOCK_3, BLOCK_M, BLOCK_K, 1,
    )  # fmt: skip
