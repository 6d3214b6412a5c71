"""An expansion and the reduction of its result on sm_90, with or without a convolution in front, in
one kernel whose warps do different things.

    t = F(conv2d(x, w1))   where there is one in front, else x; rounded, and nowhere stored
    y = E(t · w2ᵀ)         stored; E usually adds the residual and applies the activation
    z = G(y · w3ᵀ)         stored; y is rounded first, as it is stored

x: (N, H, W, C), or by parity (`boxes.py`); w1: (MIDDLE, R·S, C); w2: (E, MIDDLE); w3: (O, E); y and
z: (N, P, Q, E) and (N, P, Q, O); half precision with fp32 sums. As `kernel.py`, whose groups share
tiles and whose programs stay. A tile has all channels of its pixels: t waits in shared memory, and
the wide channels pass by in blocks of y.block_shape[3], for each of which
- the product with a block of w2 gives sums, and these, with the residual that has arrived at one of
  the group's PLACES for results, a block of y;
- it is left where the residual was, whence a box of it goes to memory, and whence the product with
  a block of w3 reads it, which is added to the sums of z.
That product and the next block's first one are under way together: each group waits once for a
block, and multiplies while the other one finishes. z leaves through the same places, in as wide
parts. Weights that have a slot for each block are read once and stay.

`x_full`, `x_empty`: of a tile's pixels, whose slot is free when the last block's sums are complete;
or of a tap and its weights, as in `kernel.py`. `full`, `empty` of w2 and of w3: of a block's.
`ready[place]`: what was there has left and has been multiplied, and the residual has arrived;
`written[place]`: its results are there. The warp that carries knows of the products by order: a
group that has written a block has waited for the product of the block before.
"""

from __future__ import annotations

from .gluon import (
    fence_async_shared,
    gl,
    jit,
    load_box,
    mbarrier,
    store_box,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from .kernel import after, barriers, columns_of, leave, load_tap, multiply, part_corner, tile_corner


@jit
def produce_chain(
    x, w1, w2, w3, first, weights, tiles,
    FRONT: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr,
    SLOTS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies."""
    N: gl.constexpr = w2.block_shape[0]
    BLOCKS: gl.constexpr = (OUTPUT.K + N - 1) // N
    x_ring, w1_ring, _t, x_full, x_empty = first
    w2_ring, w2_full, w2_empty, w3_ring, w3_full, w3_empty = weights
    slot = 0
    phase = 1
    x_slot = 0
    x_phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, p, q, _ = tile_corner(tile, PIXELS, TILE, OUTPUT)
        if FRONT is None:
            mbarrier.wait(x_empty.index(x_slot), x_phase)
            mbarrier.expect(x_full.index(x_slot), x.block_type.nbytes)
            load_box(x, [n, p, q, 0], x_full.index(x_slot), x_ring.index(x_slot))
            x_slot, x_phase = after(x_slot, x_phase, SLOTS)
        else:
            for tap in range(FRONT.window.R * FRONT.window.S):
                for start in range(0, FRONT.image.C, TILE.K):
                    mbarrier.wait(x_empty.index(x_slot), x_phase)
                    load_tap(
                        x, w1, n, p, q, 0, tap, start, x_full.index(x_slot), x_ring.index(x_slot),
                        w1_ring.index(x_slot), FRONT.image, FRONT.window,
                    )  # fmt: skip
                    x_slot, x_phase = after(x_slot, x_phase, SLOTS)
        if BLOCKS != STAGES or tile == gl.program_id(0):
            for column in range(0, OUTPUT.K, N):
                mbarrier.wait(w2_empty.index(slot), phase)
                mbarrier.expect(w2_full.index(slot), w2.block_type.nbytes)
                load_box(w2, [column, 0], w2_full.index(slot), w2_ring.index(slot))
                mbarrier.wait(w3_empty.index(slot), phase)
                mbarrier.expect(w3_full.index(slot), w3.block_type.nbytes)
                load_box(w3, [0, column], w3_full.index(slot), w3_ring.index(slot))
                slot, phase = after(slot, phase, STAGES)


@jit
def carry_chain(
    y, z, residual, ends, tiles,
    PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr, NARROW: gl.constexpr,
    PLACES: gl.constexpr,
):  # fmt: skip
    """The warp that moves blocks of y and parts of z out, and residuals in behind them."""
    out, ready, written = ends
    N: gl.constexpr = y.block_shape[3]
    BLOCKS: gl.constexpr = (OUTPUT.K + N - 1) // N
    PARTS: gl.constexpr = BLOCKS + NARROW // N
    first = gl.program_id(0)
    stride = gl.num_programs(0)
    count = gl.cdiv(tiles - first, stride) * PARTS
    for item in range(count + PLACES - 1):
        leaving = item - (PLACES - 1)
        for who in gl.static_range(2):
            if leaving >= 0:
                place = who * PLACES + leaving % PLACES
                a, b, c, _ = part_corner(
                    first + leaving // PARTS * stride, who, y, PIXELS, TILE, OUTPUT
                )
                mbarrier.wait(written.index(place), leaving // PLACES % 2)
                part = leaving % PARTS
                if part < BLOCKS:
                    store_box(y, [a, b, c, part * N], out.index(place))
                else:
                    store_box(z, [a, b, c, (part - BLOCKS) * N], out.index(place))
            if item < count:
                # The block before has left: of two groups that are one behind the other.
                tma.store_wait(pendings=2)
                place = who * PLACES + item % PLACES
                arrived = ready.index(place)
                part = item % PARTS
                if residual is None:
                    mbarrier.arrive(arrived, count=1)
                elif part < BLOCKS:
                    a, b, c, _ = part_corner(
                        first + item // PARTS * stride, who, y, PIXELS, TILE, OUTPUT
                    )
                    mbarrier.expect(arrived, residual.block_type.nbytes)
                    load_box(residual, [a, b, c, part * N], arrived, out.index(place))
                else:
                    mbarrier.arrive(arrived, count=1)
    tma.store_wait(pendings=0)


@jit
def consume_chain(
    residual, extras, first, weights, ends, tiles, m,
    FRONT: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr,
    Z: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, PLACES: gl.constexpr,
    WHO: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply and finish the pixels from WHO·TILE.M/2 on of every tile."""
    M: gl.constexpr = TILE.M // 2
    FIRST: gl.constexpr = WHO * M
    w2_ring, w2_full, w2_empty, w3_ring, w3_full, w3_empty = weights
    N: gl.constexpr = w2_ring.shape[1]
    MIDDLE: gl.constexpr = w2_ring.shape[2]
    NARROW: gl.constexpr = w3_ring.shape[1]
    BLOCKS: gl.constexpr = (OUTPUT.K + N - 1) // N
    STAY: gl.constexpr = BLOCKS == STAGES
    wide_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    narrow_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])
    x_ring, _w1, t_places, x_full, x_empty = first
    out, ready, written = ends
    slot = 0
    phase = 0
    x_slot = 0
    x_phase = 0
    place = 0
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, p, q, _ = tile_corner(tile, PIXELS, TILE, OUTPUT)
        if FRONT is None:
            mbarrier.wait(x_full.index(x_slot), x_phase)
            t = x_ring.index(x_slot).reshape([TILE.M, MIDDLE]).slice(FIRST, M)
        else:
            t = t_places.index(WHO)
            x_slot, x_phase = make_front(
                t, extras, first, x_slot, x_phase, n, p, q, m, FRONT, PIXELS, TILE, SLOTS, FIRST
            )
        total = warpgroup_mma_init(gl.zeros([M, NARROW], gl.float32, narrow_sums))
        before = 0
        for block in range(BLOCKS):
            mbarrier.wait(w2_full.index(slot), phase)
            acc = gl.zeros([M, N], gl.float32, wide_sums)
            acc = warpgroup_mma(t, w2_ring.index(slot).permute((1, 0)), acc, is_async=True)
            acc, added = warpgroup_mma_wait(num_outstanding=0, deps=(acc, total))
            if not STAY:
                mbarrier.arrive(w2_empty.index(slot), count=1)
                mbarrier.arrive(w3_empty.index(before), count=1, pred=block > 0)
            if FRONT is None:
                mbarrier.arrive(x_empty.index(x_slot), count=1, pred=block == BLOCKS - 1)
            here = WHO * PLACES + place
            mbarrier.wait(ready.index(here), parity)
            wide = out.index(here).reshape([M, N])
            leave(acc, residual, wide, extras, n, p, q, block * N, m, PIXELS, TILE, OUTPUT, FIRST)
            fence_async_shared()
            mbarrier.arrive(written.index(here), count=1)
            mbarrier.wait(w3_full.index(slot), phase)
            total = warpgroup_mma(wide, w3_ring.index(slot).permute((1, 0)), added, is_async=True)
            before = slot
            slot, phase = after(slot, phase, STAGES)
            place, parity = after(place, parity, PLACES)
        added = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        if STAY:
            phase = 0
        else:
            mbarrier.arrive(w3_empty.index(before), count=1)
        if FRONT is None:
            x_slot, x_phase = after(x_slot, x_phase, SLOTS)
        parts = columns_of(added, N)
        for part in gl.static_range(NARROW // N):
            here = WHO * PLACES + place
            mbarrier.wait(ready.index(here), parity)
            narrow = out.index(here)
            leave(parts[part], None, narrow, extras, n, p, q, part * N, m, PIXELS, TILE, Z, FIRST)
            fence_async_shared()
            mbarrier.arrive(written.index(here), count=1)
            place, parity = after(place, parity, PLACES)


@jit
def make_front(
    t, extras, first, slot, phase, n, p, q, m,
    FRONT: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr, SLOTS: gl.constexpr,
    FIRST: gl.constexpr,
):  # fmt: skip
    """Leaves a group's pixels of t for its products, and says which slot is next."""
    x_ring, w1_ring, _, full, empty = first
    TAPS: gl.constexpr = FRONT.window.R * FRONT.window.S * -(-FRONT.image.C // TILE.K)
    acc, before, slot, phase = multiply(
        x_ring, w1_ring, full, empty, slot, phase, TAPS, t.shape[1], TILE, SLOTS, t.shape[0], FIRST
    )
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(empty.index(before), count=1)
    leave(acc, None, t, extras, n, p, q, 0, m, PIXELS, TILE, FRONT.output, FIRST)
    fence_async_shared()
    return slot, phase


@jit
def chain_kernel(
    x, w1, w2, w3, residual, y, z, extras, m,
    FRONT: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr,
    Z: gl.constexpr, SLOTS: gl.constexpr, STAGES: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """m counts images. FRONT: the convolution in front, None where x is t, and w1 too. OUTPUT is y;
    residual: in boxes as y, None where there is none, or where it is among `extras`. SLOTS: of
    pixels, and of w1; STAGES: of w2 and of w3; PLACES: of each group."""
    NARROW: gl.constexpr = w3.block_shape[0]
    tiles = gl.cdiv(m, PIXELS.N) * (PIXELS.down * PIXELS.across)
    x_ring = gl.allocate_shared_memory(x.dtype, [SLOTS] + x.block_shape, x.layout)
    x_full, x_empty = barriers(SLOTS, 1, 2)
    first = (x_ring, None, None, x_full, x_empty)
    if FRONT is not None:
        w1_ring = gl.allocate_shared_memory(w1.dtype, [SLOTS] + w1.block_shape, w1.layout)
        t = gl.allocate_shared_memory(x.dtype, [2, TILE.M // 2, w2.block_shape[1]], w2.layout)
        first = (x_ring, w1_ring, t, x_full, x_empty)
    w2_ring = gl.allocate_shared_memory(w2.dtype, [STAGES] + w2.block_shape, w2.layout)
    w3_ring = gl.allocate_shared_memory(w3.dtype, [STAGES] + w3.block_shape, w3.layout)
    w2_full, w2_empty = barriers(STAGES, 1, 2)
    w3_full, w3_empty = barriers(STAGES, 1, 2)
    weights = (w2_ring, w2_full, w2_empty, w3_ring, w3_full, w3_empty)
    out = gl.allocate_shared_memory(y.dtype, [2 * PLACES] + y.block_shape, y.layout)
    ready, written = barriers(2 * PLACES, 1, 1)
    ends = (out, ready, written)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume_chain, (
                residual, extras, first, weights, ends, tiles, m, FRONT, PIXELS, TILE, OUTPUT, Z,
                SLOTS, STAGES, PLACES, 0,
            )),
            (consume_chain, (
                residual, extras, first, weights, ends, tiles, m, FRONT, PIXELS, TILE, OUTPUT, Z,
                SLOTS, STAGES, PLACES, 1,
            )),
            (produce_chain, (
                x, w1, w2, w3, first, weights, tiles, FRONT, PIXELS, TILE, OUTPUT, SLOTS, STAGES,
            )),
            (carry_chain, (
                y, z, residual, ends, tiles, PIXELS, TILE, OUTPUT, NARROW, PLACES,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],  # As in `kernel.py`.
    )  # fmt: skip
