"""A convolution as a part of a kernel: the loop over filter taps and channel blocks, added to an
accumulator that the caller owns.

    acc[m, j] += sum_{r,s,c} x[n, c, p·sh − top + r·dh, q·sw − left + s·dw] w[columns[j], c, r, s]

where row m of the tile is output pixel (n, p, q). Weights are packed (K, R·S·C), groups are not
supported. One loop, flattened over taps and channel blocks: that is what Triton's pipeliner turns
into asynchronous copies.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from ..contract.spec import Operand, TensorSpec

if TYPE_CHECKING:
    from .conv_geometry import Conv2d

Geometry = tuple[int, ...]
"""(H, W, C, P, Q, R, S, stride h, stride w, top, left, dilation h, dilation w, pitch of x, offset
of x): a tuple, because a kernel that holds several convolutions takes one of these for each."""


def geometry(attributes: Conv2d, x: Operand, w: TensorSpec, y: TensorSpec) -> Geometry:
    """What `add_convolution` needs to know of a convolution at compile time."""
    _, c, h, width = x.shape
    _, _, r, s = w.shape
    top, _, left, _ = attributes.padding
    return (
        h, width, c, y.shape[2], y.shape[3], r, s,
        *attributes.stride, top, left, *attributes.dilation, x.pitch, x.offset,
    )  # fmt: skip


@triton.jit
def load_pixels(x, rows, row_mask, channels, channel_mask, GEOMETRY: tl.constexpr):
    """The input tile of a 1x1 convolution without padding at the given output pixels."""
    H: tl.constexpr = GEOMETRY[0]
    WIDTH: tl.constexpr = GEOMETRY[1]
    P: tl.constexpr = GEOMETRY[3]
    Q: tl.constexpr = GEOMETRY[4]
    p = rows // Q % P * GEOMETRY[7]
    q = rows % Q * GEOMETRY[8]
    pixel = (rows // (P * Q) * H + p) * WIDTH + q
    tile = x + GEOMETRY[14] + (pixel * GEOMETRY[13])[:, None] + channels[None, :]
    return tl.load(tile, mask=row_mask[:, None] & channel_mask[None, :], other=0.0)


@triton.jit
def add_convolution(
    acc,
    x,
    w,
    rows,
    row_mask,
    columns,
    column_mask,
    GEOMETRY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc plus the convolution's product at the given output pixels and channels."""
    H: tl.constexpr = GEOMETRY[0]
    WIDTH: tl.constexpr = GEOMETRY[1]
    C: tl.constexpr = GEOMETRY[2]
    P: tl.constexpr = GEOMETRY[3]
    Q: tl.constexpr = GEOMETRY[4]
    R: tl.constexpr = GEOMETRY[5]
    S: tl.constexpr = GEOMETRY[6]
    PITCH: tl.constexpr = GEOMETRY[13]
    blocks: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    image = rows // (P * Q)
    top = (rows // Q % P).to(tl.int32) * GEOMETRY[7] - GEOMETRY[9]
    left = (rows % Q).to(tl.int32) * GEOMETRY[8] - GEOMETRY[10]
    corner = (image * H + top) * WIDTH + left
    # Rows past the end get a position that no tap brings inside the image: one mask serves both.
    top = tl.where(row_mask, top, -1048576)
    depth = tl.arange(0, BLOCK_K)
    x_tile = (corner * PITCH)[:, None] + depth[None, :]
    w_tile = w + (columns * (R * S * C))[:, None] + depth[None, :]
    for step in range(R * S * blocks):
        # A single tap has nothing to divide: its mask then leaves the loop.
        tap = step // blocks if R * S > 1 else 0
        start = (step % blocks if R * S > 1 else step) * BLOCK_K
        r = tap // S * GEOMETRY[11]
        s = tap % S * GEOMETRY[12]
        inside = ((top + r).to(tl.uint32, bitcast=True) < H) & (
            (left + s).to(tl.uint32, bitcast=True) < WIDTH
        )
        a_mask = inside[:, None]
        b_mask = column_mask[:, None]
        if C % BLOCK_K != 0:
            a_mask = a_mask & (start + depth < C)[None, :]
            b_mask = b_mask & (start + depth < C)[None, :]
        x_step = x + GEOMETRY[14] + ((r * WIDTH + s) * PITCH + start)
        a = tl.load(x_step + x_tile, mask=a_mask, other=0.0)
        b = tl.load(w_tile + (tap * C + start), mask=b_mask, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision=PRECISION)
    return acc
