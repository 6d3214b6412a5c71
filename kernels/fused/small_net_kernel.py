"""The kernel of `small_net.py`: the layers of one image, one after the other, then its classes."""

from __future__ import annotations

import triton
import triton.language as tl

from .conv_pool import pool_tile
from .head_kernel import classify


@triton.jit
def layer(
    x,
    w,
    y,
    image,
    extras,
    GEOMETRY: tl.constexpr,
    STAGES: tl.constexpr,
    MOVED: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One convolution and its pooling for one image, to the end."""
    H: tl.constexpr = GEOMETRY[0]
    WIDTH: tl.constexpr = GEOMETRY[1]
    C: tl.constexpr = GEOMETRY[2]
    K: tl.constexpr = GEOMETRY[3]
    P: tl.constexpr = GEOMETRY[4]
    Q: tl.constexpr = GEOMETRY[5]
    POOLED_P: tl.constexpr = GEOMETRY[6]
    POOLED_Q: tl.constexpr = GEOMETRY[7]
    R: tl.constexpr = GEOMETRY[8]
    S: tl.constexpr = GEOMETRY[9]
    STRIDE_H: tl.constexpr = GEOMETRY[10]
    STRIDE_W: tl.constexpr = GEOMETRY[11]
    TOP: tl.constexpr = GEOMETRY[12]
    LEFT: tl.constexpr = GEOMETRY[13]
    DILATION_H: tl.constexpr = GEOMETRY[14]
    DILATION_W: tl.constexpr = GEOMETRY[15]
    X_PITCH: tl.constexpr = GEOMETRY[16]
    X_OFFSET: tl.constexpr = GEOMETRY[17]
    Y_OFFSET: tl.constexpr = GEOMETRY[18]
    MAXIMUM: tl.constexpr = GEOMETRY[19]
    BY_TAP: tl.constexpr = GEOMETRY[20]
    columns = tl.arange(0, BLOCK_N)
    windows: tl.constexpr = POOLED_P * POOLED_Q
    first = image * windows
    for start in range(0, windows, BLOCK_M // 4):
        pool_tile(
            x, w, y, first + start, first + windows, columns, columns < K, extras,
            H, WIDTH, C, P, Q, POOLED_P, POOLED_Q, R, S, STRIDE_H, STRIDE_W, TOP, LEFT,
            DILATION_H, DILATION_W, X_PITCH, X_OFFSET, K, Y_OFFSET, MAXIMUM,
            None, STAGES, MOVED, PRECISION, WIDE, BY_TAP, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    # The next layer reads what other threads of this program wrote.
    tl.debug_barrier()


@triton.jit
def small_net_kernel(
    x,
    v1,
    v2,
    v3,
    y,
    between,
    extras,
    m,
    LAYERS: tl.constexpr,
    GEOMETRY1: tl.constexpr,
    GEOMETRY2: tl.constexpr,
    GEOMETRY3: tl.constexpr,
    STAGES1: tl.constexpr,
    STAGES2: tl.constexpr,
    STAGES3: tl.constexpr,
    MOVED1: tl.constexpr,
    MOVED2: tl.constexpr,
    MOVED3: tl.constexpr,
    COLUMNS1: tl.constexpr,
    COLUMNS2: tl.constexpr,
    COLUMNS3: tl.constexpr,
    HEAD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    image = tl.program_id(0)
    if WIDE:
        image = image.to(tl.int64)
    layer(
        x, v1, between, image, extras, GEOMETRY1, STAGES1, MOVED1, PRECISION, WIDE,
        BLOCK_PIXELS, COLUMNS1, BLOCK_DEPTH,
    )  # fmt: skip
    if LAYERS > 1:
        layer(
            between, v2, between, image, extras, GEOMETRY2, STAGES2, MOVED2, PRECISION, WIDE,
            BLOCK_PIXELS, COLUMNS2, BLOCK_DEPTH,
        )  # fmt: skip
    if LAYERS > 2:
        layer(
            between, v3, between, image, extras, GEOMETRY3, STAGES3, MOVED3, PRECISION, WIDE,
            BLOCK_PIXELS, COLUMNS3, BLOCK_DEPTH,
        )  # fmt: skip
    # A matrix product takes 16 rows at least; this image is the first of them.
    index = tl.arange(0, HEAD.M)
    classify(between, y, extras, image + index, index < 1, HEAD)
