"""3x3 filters with stride 1 on sm_90: three vertical taps out of one shared tile.

As `kernel.py`, whose groups share tiles, but a slot of x holds PIXELS.H + 2 rows, each of all
PIXELS.N images, for the filter's column s: tap (r, s) multiplies the rows from r on. Of x that is
(H + 2) / (3 H) as many bytes out of the L2 cache and into shared memory. Weights have slots of
their own; with RESIDENT they are read once by each program and stay (64 to 64 channels: 72 kB).

A row of a slot, PIXELS.row pixels of TILE.K channels, is a multiple of 1,024 bytes, where the
swizzle repeats. Boxes are powers of two: the rows arrive as a box of H and a box of 2.

Several groups of few channels are one block of 32 channels, as in `convolution/grouped.py`: a tile
reads those channels of x that it writes of y.
"""

from __future__ import annotations

from .gluon import (
    fence_async_shared,
    gl,
    jit,
    load_box,
    mbarrier,
    seen_as,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from .kernel import after, barriers, carry, finish, places, tile_corner, way_out


@jit
def produce_halo(
    x, more, w, x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles,
    IMAGE: gl.constexpr, WINDOW: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr,
    OUTPUT: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, RESIDENT: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """The warp that copies."""
    H: gl.constexpr = PIXELS.H
    blocks: gl.constexpr = (IMAGE.C + TILE.K - 1) // TILE.K
    if RESIDENT:
        mbarrier.expect(w_full.index(0), 9 * blocks * w.block_type.nbytes)
        for part in range(9 * blocks):
            load_box(
                w, [0, part // blocks, part % blocks * TILE.K], w_full.index(0), w_ring.index(part)
            )
    slot = 0
    phase = 1
    w_slot = 0
    w_phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, p, q, column = tile_corner(tile, PIXELS, TILE, OUTPUT)
        top = p - WINDOW.top
        for step in range(3 * blocks):
            s = step % 3
            start = step // 3 * TILE.K
            mbarrier.wait(x_empty.index(slot), phase)
            arrived = x_full.index(slot)
            mbarrier.expect(arrived, x.block_type.nbytes + more.block_type.nbytes)
            rows = slot * (H + 2)
            channel = start if GROUP == 0 else column
            load_box(
                x, [top, n, q + s - WINDOW.left, channel], arrived,
                seen_as(x_ring.index(rows), x.block_shape, x.layout),
            )  # fmt: skip
            load_box(
                more, [top + H, n, q + s - WINDOW.left, channel], arrived,
                seen_as(x_ring.index(rows + H), more.block_shape, more.layout),
            )  # fmt: skip
            slot, phase = after(slot, phase, STAGES)
            if not RESIDENT:
                for r in range(3):
                    mbarrier.wait(w_empty.index(w_slot), w_phase)
                    mbarrier.expect(w_full.index(w_slot), w.block_type.nbytes)
                    load_box(
                        w, [column, r * 3 + s, start], w_full.index(w_slot), w_ring.index(w_slot)
                    )
                    w_slot, w_phase = after(w_slot, w_phase, SLOTS)


@jit
def consume_halo(
    y, residual, extras, source, x_ring, w_ring, x_full, x_empty, w_full, w_empty, ends, tiles, m,
    IMAGE: gl.constexpr, WINDOW: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr,
    OUTPUT: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, RESIDENT: gl.constexpr,
    GROUP: gl.constexpr, LAYOUT: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply and finish the pixels from WHO·TILE.M/2 on of every tile."""
    M: gl.constexpr = TILE.M // 2
    N: gl.constexpr = TILE.N
    K: gl.constexpr = TILE.K
    bits: gl.constexpr = x_ring.dtype.primitive_bitwidth
    sums: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 256 // bits]
    )
    blocks: gl.constexpr = (IMAGE.C + K - 1) // K
    slot = 0
    phase = 0
    w_slot = 0
    w_phase = 0
    parity = 0
    if RESIDENT:
        mbarrier.wait(w_full.index(0), 0)
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, p, q, column = tile_corner(tile, PIXELS, TILE, OUTPUT)
        acc = gl.zeros([M, N], gl.float32, sums)
        before = 0
        w_before = 0
        for step in range(3 * blocks):
            mbarrier.wait(x_full.index(slot), phase)
            for r in gl.static_range(3):
                if RESIDENT:
                    w_slot = (r * 3 + step % 3) * blocks + step // 3
                else:
                    mbarrier.wait(w_full.index(w_slot), w_phase)
                row = slot * (PIXELS.H + 2) + r + WHO * (PIXELS.H // 2)
                a = seen_as(x_ring.index(row), [M, K], LAYOUT)
                b = w_ring.index(w_slot).reshape([N, K]).permute((1, 0))
                acc = warpgroup_mma(a, b, acc, precision=TILE.precision, is_async=True)
                acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
                # Only this product is under way: what those before it read has been read.
                if r == 0:
                    mbarrier.arrive(x_empty.index(before), count=1, pred=step > 0)
                if not RESIDENT:
                    mbarrier.arrive(w_empty.index(w_before), count=1, pred=(step > 0) | (r > 0))
                    w_before = w_slot
                    w_slot, w_phase = after(w_slot, w_phase, SLOTS)
            before = slot
            slot, phase = after(slot, phase, STAGES)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(x_empty.index(before), count=1)
        if not RESIDENT:
            mbarrier.arrive(w_empty.index(w_before), count=1)
        if GROUP > 0:
            acc = own_group(
                acc, source, n, p, q, column, m, IMAGE, WINDOW, PIXELS, TILE, OUTPUT, GROUP,
                WHO * M,
            )  # fmt: skip
        finish(
            acc, y, residual, extras, ends, parity, n, p, q, column, m, PIXELS, TILE, OUTPUT,
            WHO * M, WHO,
        )  # fmt: skip
        parity ^= 1


@jit
def own_group(
    acc, source, n, p, q, column, m,
    IMAGE: gl.constexpr, WINDOW: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr,
    OUTPUT: gl.constexpr, GROUP: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """The sums of a tile; where there is NaN among them, which zero times infinity may have made,
    added up again of each channel's own group alone."""
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = TILE.N
    x, w = source
    rows, live = places(acc, n, p, q, m, PIXELS.H, PIXELS.W, PIXELS.row, TILE, OUTPUT, FIRST)
    within = gl.arange(0, N, layout=gl.SliceLayout(0, acc.type.layout))
    again = gl.max(gl.max((acc != acc).to(gl.int32), axis=1), axis=0)
    if again > 0:
        image = rows // (OUTPUT.P * OUTPUT.Q) * IMAGE.H
        top = (rows // OUTPUT.Q % OUTPUT.P).to(gl.int32) - WINDOW.top
        left = (rows % OUTPUT.Q).to(gl.int32) - WINDOW.left
        acc = gl.zeros([M, N], gl.float32, acc.type.layout)
        for at in range(again * 9 * GROUP):
            i = top + at // GROUP // 3
            j = left + at // GROUP % 3
            there = live & (i >= 0) & (i < IMAGE.H) & (j >= 0) & (j < IMAGE.W)
            channel = within // GROUP * GROUP + at % GROUP
            start = ((image + i) * IMAGE.W + j) * IMAGE.row_stride + IMAGE.offset + column
            a = gl.load(x + start[:, None] + channel[None, :], mask=there[:, None], other=0.0)
            b = gl.load(w + ((column + within) * 9 + at // GROUP) * TILE.K + channel)
            acc += a.to(gl.float32) * b.to(gl.float32)[None, :]
    return acc


@jit
def halo_kernel(
    x, more, w, residual, y, x_all, w_all, extras, m,
    IMAGE: gl.constexpr, WINDOW: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr,
    OUTPUT: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr, RESIDENT: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """m counts images; x and more are read in boxes of rows, images, columns and channels. SLOTS:
    of the weights; with RESIDENT all of them have one. GROUP: channels of each group, of which a
    tile has several, whose weights are zero for each other; x_all and w_all are the same tensors
    then. 0 where all channels are one group."""
    source = (x_all, w_all)
    H: gl.constexpr = PIXELS.H
    column_tiles: gl.constexpr = (OUTPUT.K + TILE.N - 1) // TILE.N
    tiles = gl.cdiv(m, PIXELS.N) * (PIXELS.down * PIXELS.across * column_tiles)
    bits: gl.constexpr = x.dtype.primitive_bitwidth
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout(
        swizzle_byte_width=TILE.K * bits // 8, element_bitwidth=bits, rank=2
    )
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES * (H + 2), PIXELS.row, TILE.K], LAYOUT)
    w_ring = gl.allocate_shared_memory(w.dtype, [SLOTS] + w.block_shape, w.layout)
    x_full, x_empty = barriers(STAGES, 1, 2)
    w_full, w_empty = barriers(1 if RESIDENT else SLOTS, 1, 2)
    ends = way_out(y, PIXELS, TILE)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume_halo, (
                y, residual, extras, source, x_ring, w_ring, x_full, x_empty, w_full, w_empty, ends,
                tiles, m, IMAGE, WINDOW, PIXELS, TILE, OUTPUT, STAGES, SLOTS, RESIDENT, GROUP,
                LAYOUT, 0,
            )),
            (consume_halo, (
                y, residual, extras, source, x_ring, w_ring, x_full, x_empty, w_full, w_empty, ends,
                tiles, m, IMAGE, WINDOW, PIXELS, TILE, OUTPUT, STAGES, SLOTS, RESIDENT, GROUP,
                LAYOUT, 1,
            )),
            (produce_halo, (
                x, more, w, x_ring, w_ring, x_full, x_empty, w_full, w_empty, tiles, IMAGE, WINDOW,
                PIXELS, TILE, OUTPUT, STAGES, SLOTS, RESIDENT, GROUP,
            )),
            (carry, (y, residual, ends, tiles, PIXELS, TILE, OUTPUT, False)),
        ],
        [4, 1, 1],
        [240, 24, 24],  # As in `kernel.py`.
    )  # fmt: skip
