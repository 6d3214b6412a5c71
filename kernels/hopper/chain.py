"""An expansion and the reduction of its result on sm_90, in one kernel whose warps do different
things.

    y = E(t · w2ᵀ)      stored; E usually adds the residual and applies the activation
    z = G(y · w3ᵀ)      stored; y is rounded first, as it is stored

t: (N, H, W, MIDDLE); w2: (E, MIDDLE); w3: (O, E); y: (N, H, W, E); z: (N, H, W, O); half precision
with fp32 sums. As `kernel.py`, whose groups share tiles and whose programs stay. A tile has all
channels of its pixels: t waits in shared memory, and the wide channels pass by in blocks of
y.block_shape[3], for each of which
- the product with a block of w2 gives sums, and these, with the residual that has arrived at one of
  the group's PLACES for results, a block of y;
- it is left where the residual was, whence a box of it goes to memory, and whence the product with
  a block of w3 reads it, which is added to the sums of z.
That product and the next block's first one are under way together: each group waits once for a
block, and multiplies while the other one finishes. z leaves through the same places, in as wide
parts.

`t_full`, `t_empty`: of a tile's pixels, whose slot is free when the last block's sums are complete.
`full[slot]`, `empty[slot]` of w2 and of w3. `ready[place]`: its block before has left and has been
multiplied, and the residual is there; `written[place]`: its results are. The warp that carries
knows of the products by order: a group that has written a block has waited for the product of the
block before.
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
from .kernel import part_corner, places, tile_corner


@jit
def produce_chain(
    t, w2, w3, t_ring, t_bars, w2_ring, w2_bars, w3_ring, w3_bars, tiles,
    PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr, T_SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies."""
    N: gl.constexpr = w2.block_shape[0]
    t_full, t_empty = t_bars
    w2_full, w2_empty = w2_bars
    w3_full, w3_empty = w3_bars
    slot = 0
    phase = 1
    t_slot = 0
    t_phase = 1
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, p, q, _ = tile_corner(tile, PIXELS, TILE, OUTPUT)
        mbarrier.wait(t_empty.index(t_slot), t_phase)
        mbarrier.expect(t_full.index(t_slot), t.block_type.nbytes)
        load_box(t, [n, p, q, 0], t_full.index(t_slot), t_ring.index(t_slot))
        t_slot += 1
        if t_slot == T_SLOTS:
            t_slot = 0
            t_phase ^= 1
        for column in range(0, OUTPUT.K, N):
            mbarrier.wait(w2_empty.index(slot), phase)
            mbarrier.expect(w2_full.index(slot), w2.block_type.nbytes)
            load_box(w2, [column, 0], w2_full.index(slot), w2_ring.index(slot))
            mbarrier.wait(w3_empty.index(slot), phase)
            mbarrier.expect(w3_full.index(slot), w3.block_type.nbytes)
            load_box(w3, [0, column], w3_full.index(slot), w3_ring.index(slot))
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1


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
    residual, extras, t_ring, t_bars, w2_ring, w2_bars, w3_ring, w3_bars, ends, tiles, m,
    PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr, Z: gl.constexpr,
    T_SLOTS: gl.constexpr, STAGES: gl.constexpr, PLACES: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply and finish the pixels from WHO·TILE.M/2 on of every tile."""
    M: gl.constexpr = TILE.M // 2
    FIRST: gl.constexpr = WHO * M
    N: gl.constexpr = w2_ring.shape[1]
    MIDDLE: gl.constexpr = w2_ring.shape[2]
    NARROW: gl.constexpr = w3_ring.shape[1]
    BLOCKS: gl.constexpr = (OUTPUT.K + N - 1) // N
    wide_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    narrow_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, NARROW, 16])
    t_full, t_empty = t_bars
    w2_full, w2_empty = w2_bars
    w3_full, w3_empty = w3_bars
    out, ready, written = ends
    slot = 0
    phase = 0
    t_slot = 0
    t_phase = 0
    place = 0
    parity = 0
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, p, q, _ = tile_corner(tile, PIXELS, TILE, OUTPUT)
        mbarrier.wait(t_full.index(t_slot), t_phase)
        t = t_ring.index(t_slot).reshape([TILE.M, MIDDLE]).slice(FIRST, M)
        total = warpgroup_mma_init(gl.zeros([M, NARROW], gl.float32, narrow_sums))
        before = 0
        for block in range(BLOCKS):
            mbarrier.wait(w2_full.index(slot), phase)
            acc = gl.zeros([M, N], gl.float32, wide_sums)
            acc = warpgroup_mma(t, w2_ring.index(slot).permute((1, 0)), acc, is_async=True)
            acc, added = warpgroup_mma_wait(num_outstanding=0, deps=(acc, total))
            mbarrier.arrive(w2_empty.index(slot), count=1)
            mbarrier.arrive(t_empty.index(t_slot), count=1, pred=block == BLOCKS - 1)
            mbarrier.arrive(w3_empty.index(before), count=1, pred=block > 0)
            here = WHO * PLACES + place
            mbarrier.wait(ready.index(here), parity)
            wide = out.index(here).reshape([M, N])
            finish_block(
                acc, wide, residual, extras, n, p, q, block * N, m, PIXELS, TILE, OUTPUT, FIRST
            )
            fence_async_shared()
            mbarrier.arrive(written.index(here), count=1)
            mbarrier.wait(w3_full.index(slot), phase)
            total = warpgroup_mma(wide, w3_ring.index(slot).permute((1, 0)), added, is_async=True)
            before = slot
            slot += 1
            if slot == STAGES:
                slot = 0
                phase ^= 1
            place += 1
            if place == PLACES:
                place = 0
                parity ^= 1
        added = warpgroup_mma_wait(num_outstanding=0, deps=(total,))
        mbarrier.arrive(w3_empty.index(before), count=1)
        t_slot += 1
        if t_slot == T_SLOTS:
            t_slot = 0
            t_phase ^= 1
        parts = columns_of(added, N)
        for part in gl.static_range(NARROW // N):
            here = WHO * PLACES + place
            mbarrier.wait(ready.index(here), parity)
            acc = gl.convert_layout(parts[part], wide_sums, assert_trivial=True)
            finish_block(
                acc, out.index(here).reshape([M, N]), None, extras, n, p, q, part * N, m, PIXELS,
                TILE, Z, FIRST,
            )  # fmt: skip
            fence_async_shared()
            mbarrier.arrive(written.index(here), count=1)
            place += 1
            if place == PLACES:
                place = 0
                parity ^= 1


@jit
def columns_of(value, N: gl.constexpr):
    """Its parts of N columns, of which a thread holds what it held."""
    M: gl.constexpr = value.shape[0]
    WIDTH: gl.constexpr = value.shape[1]
    if WIDTH == N:
        return (value,)
    else:  # noqa: RET505  (Triton compiles what follows a return.)
        left, right = value.reshape([M, 2, WIDTH // 2]).permute((0, 2, 1)).split()
        return columns_of(left, N) + columns_of(right, N)


@jit
def finish_block(
    acc, place, residual, extras, n, p, q, column, m,
    PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """The epilogue of some columns, whose residual is at a place in shared memory, for the results;
    zeros behind the last column: the next product reads them."""
    sums: gl.constexpr = acc.type.layout
    N: gl.constexpr = acc.shape[1]
    rows, live = places(acc, n, p, q, m, PIXELS.H, PIXELS.W, PIXELS.row, TILE, OUTPUT, FIRST)
    columns = column + gl.arange(0, N, layout=gl.SliceLayout(0, sums))
    column_mask = columns < OUTPUT.K
    if residual is not None:
        extras = extras + (place.load(sums),)
    value = OUTPUT.epilogue(acc, rows, columns, live, column_mask, extras)
    if OUTPUT.K % N != 0:
        value = gl.where(column_mask[None, :], value, 0.0)
    place.store(value.to(place.dtype))


@jit
def barriers(COUNT: gl.constexpr, FULL: gl.constexpr, EMPTY: gl.constexpr):
    """So many pairs, and how often somebody arrives at the first and at the second of each."""
    full = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(COUNT):
        mbarrier.init(full.index(slot), count=FULL)
        mbarrier.init(empty.index(slot), count=EMPTY)
    return full, empty


@jit
def chain_kernel(
    x, w2, w3, residual, y, z, extras, m,
    PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr, Z: gl.constexpr,
    STAGES: gl.constexpr, T_SLOTS: gl.constexpr, PLACES: gl.constexpr,
):  # fmt: skip
    """m counts images. OUTPUT is y; residual: in boxes as y, None where there is none, or where it
    is among `extras`. STAGES, T_SLOTS: slots of weights and of pixels; PLACES: of each group."""
    NARROW: gl.constexpr = w3.block_shape[0]
    tiles = gl.cdiv(m, PIXELS.N) * (PIXELS.down * PIXELS.across)
    t_ring = gl.allocate_shared_memory(x.dtype, [T_SLOTS] + x.block_shape, x.layout)
    w2_ring = gl.allocate_shared_memory(w2.dtype, [STAGES] + w2.block_shape, w2.layout)
    w3_ring = gl.allocate_shared_memory(w3.dtype, [STAGES] + w3.block_shape, w3.layout)
    out = gl.allocate_shared_memory(y.dtype, [2 * PLACES] + y.block_shape, y.layout)
    t_bars = barriers(T_SLOTS, 1, 2)
    w2_bars = barriers(STAGES, 1, 2)
    w3_bars = barriers(STAGES, 1, 2)
    ready, written = barriers(2 * PLACES, 1, 1)
    ends = (out, ready, written)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume_chain, (
                residual, extras, t_ring, t_bars, w2_ring, w2_bars, w3_ring, w3_bars, ends, tiles,
                m, PIXELS, TILE, OUTPUT, Z, T_SLOTS, STAGES, PLACES, 0,
            )),
            (consume_chain, (
                residual, extras, t_ring, t_bars, w2_ring, w2_bars, w3_ring, w3_bars, ends, tiles,
                m, PIXELS, TILE, OUTPUT, Z, T_SLOTS, STAGES, PLACES, 1,
            )),
            (produce_chain, (
                x, w2, w3, t_ring, t_bars, w2_ring, w2_bars, w3_ring, w3_bars, tiles, PIXELS, TILE,
                OUTPUT, T_SLOTS, STAGES,
            )),
            (carry_chain, (
                y, z, residual, ends, tiles, PIXELS, TILE, OUTPUT, NARROW, PLACES,
            )),
        ],
        [4, 1, 1],
        [240, 24, 24],  # As in `kernel.py`.
    )  # fmt: skip
