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
            columns < LAYER.output.K, extras, LAYER.space, LAYER.source, None, LAYER.finish,
            LAYER.output, LAYER.tile, 1, False,
        )  # fmt: skip
    # The next layer reads what other threads of this program wrote.
    tl.debug_barrier()


@triton.jit
def small_net_kernel(
    x, v1, v2, v3, y, between, extras, m, LAYER1: tl.constexpr, LAYER2: tl.constexpr,
    LAYER3: tl.constexpr, HEAD: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(0)
    if WIDE:
        image = image.to(tl.int64)
    layer(x, v1, between, image, extras, LAYER1)
    if LAYER2 is not None:
        layer(between, v2, between, image, extras, LAYER2)
    if LAYER3 is not None:
        layer(between, v3, between, image, extras, LAYER3)
    # A matrix product takes 16 rows at least; this image is the first of them.
    index = tl.arange(0, HEAD.tile.M)
    classify(between, y, extras, image + index, index < 1, m, HEAD)
