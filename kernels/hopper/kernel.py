"""A convolution or matrix product on sm_90 whose warps do different things.

    y[n, p, q, :] = EPILOGUE(
        sum over r, s, c of x[n, p·stride + r·dh − top, q·stride + s·dw − left, c] w[:, r, s, c])

x: (N, H, W, C) or, with stride 2, seen by the parity of rows and columns (`boxes.py`); w: (K, R·S,
C); y: (N, P, Q, K); half precision or tf32 with fp32 sums. A matrix product is the convolution of
its rows as images of one pixel.

Programs stay and take tile after tile: a box of PIXELS images, rows and columns (TILE.M of them) by
TILE.N channels. In each program
- one warp asks the copy engine for boxes, as many ahead as the ring has slots, also across tiles:
  tap (r, s) is the same box of x, moved. What lies outside of x and w arrives as zero, which is the
  padding, and what fills up the channels;
- two groups of four warps multiply straight out of the ring, with one product under way while the
  next one's operands are waited for, and then finish their results. They share each tile, half of
  its pixels each, and the ring fills meanwhile with the next tile's operands; or with TURNS they
  take tiles in turn, and one multiplies while the other finishes;
- where PIXELS.copied, one warp moves residuals in and results out, in boxes: each group has memory
  for its part of a tile, in which the residual has arrived when its sums are complete, and which it
  leaves results in. Nobody else waits for either.

`full[slot]`: both boxes have arrived. `empty[slot]`: who reads them has: a group arrives when only
the product behind it is still under way. `order[group]`, in turns: the other one's loop is over. A
parity tells apart no more than two fillings of a slot; whoever is further behind would take an old
one for its own. Groups that share tiles never wait for each other. `ready[group]`: its results
before have left, and the residual is there; `written[group]`: its results are.

The design is that of CUTLASS's cooperative and ping-pong kernels (Thakkar et al.) with the taps of
a filter in the place of its im2col.
"""

from __future__ import annotations

from ..tile.finish import combine
from .gluon import (
    constexpr_function,
    fence_async_shared,
    gl,
    jit,
    load_box,
    mbarrier,
    store_box,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@jit
def tile_corner(tile, PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr):
    """First image, row, column and channel of a tile. Tiles of the same pixels follow each other:
    they find x in the L2 cache."""
    column_tiles: gl.constexpr = (OUTPUT.K + TILE.N - 1) // TILE.N
    box = tile // column_tiles
    q = box % PIXELS.across * PIXELS.W
    p = box // PIXELS.across % PIXELS.down * PIXELS.H
    n = box // (PIXELS.across * PIXELS.down) * PIXELS.N
    return n, p, q, tile % column_tiles * TILE.N


@jit
def after(slot, phase, COUNT: gl.constexpr):
    """The slot after one of so many, and its phase."""
    slot += 1
    if slot == COUNT:
        slot = 0
        phase ^= 1
    return slot, phase


@jit
def produce(
    x, w, x_ring, w_ring, full, empty, tiles,
    IMAGE: gl.constexpr, WINDOW: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr,
    OUTPUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The warp that copies."""
    slot = 0
    phase = 1  # Of the emptying that is waited for: the first round finds every slot empty.
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        n, p, q, column = tile_corner(tile, PIXELS, TILE, OUTPUT)
        for tap in range(WINDOW.R * WINDOW.S):
            for start in range(0, IMAGE.C, TILE.K):
                mbarrier.wait(empty.index(slot), phase)
                load_tap(
                    x, w, n, p, q, column, tap, start, full.index(slot), x_ring.index(slot),
                    w_ring.index(slot), IMAGE, WINDOW,
                )  # fmt: skip
                slot, phase = after(slot, phase, STAGES)


@jit
def load_tap(
    x, w, n, p, q, column, tap, start, arrived, x_place, w_place,
    IMAGE: gl.constexpr, WINDOW: gl.constexpr,
):  # fmt: skip
    """Asks for the box of a tap and some channels, and for their weights."""
    # Even numbers that make the positions of all taps positive: division rounds towards zero.
    rise: gl.constexpr = (WINDOW.top + 1) // 2 * 2
    drift: gl.constexpr = (WINDOW.left + 1) // 2 * 2
    top = tap // WINDOW.S * WINDOW.dilation_h - WINDOW.top
    left = tap % WINDOW.S * WINDOW.dilation_w - WINDOW.left
    mbarrier.expect(arrived, x.block_type.nbytes + w.block_type.nbytes)
    if WINDOW.stride_h == 1:
        load_box(x, [n, p + top, q + left, start], arrived, x_place)
    else:
        half_row = p + (top + rise) // 2 - rise // 2
        half_column = q + (left + drift) // 2 - drift // 2
        inner = (left + drift) % 2 * IMAGE.row_stride + start
        load_box(x, [n, half_row, (top + rise) % 2, half_column, inner], arrived, x_place)
    load_box(w, [column, tap, start], arrived, w_place)


@jit
def part_corner(tile, who, y, PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr):
    """Where the boxes of a group's part of a tile begin, in the order of y's dimensions."""
    n, p, q, column = tile_corner(tile, PIXELS, TILE, OUTPUT)
    if PIXELS.row != PIXELS.W:
        first = p + who * (PIXELS.H - y.block_shape[0])
        return first, n + who * (PIXELS.N - y.block_shape[1]), q, column
    first = n + who * (PIXELS.N - y.block_shape[0])
    second = p + who * (PIXELS.H - y.block_shape[1])
    return first, second, q + who * (PIXELS.W - y.block_shape[2]), column


@jit
def carry(
    y, residual, ends, tiles,
    PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """The warp that moves results out, and residuals in behind them: both groups' in turn."""
    if PIXELS.copied:
        out, ready, written = ends
        N: gl.constexpr = y.block_shape[3]
        PARTS: gl.constexpr = TILE.N // N
        first = gl.program_id(0)
        stride = gl.num_programs(0)
        count = gl.cdiv(tiles - first, stride)
        if not TURNS:
            count *= 2
        for item in range(count + 2):
            who = item % 2
            if item >= 2:
                tile = first + (item - 2 if TURNS else item // 2 - 1) * stride
                a, b, c, column = part_corner(tile, who, y, PIXELS, TILE, OUTPUT)
                mbarrier.wait(written.index(who), (item // 2 + 1) % 2)
                for part in gl.static_range(PARTS):
                    store_box(y, [a, b, c, column + part * N], out.index(who * PARTS + part))
                tma.store_wait(pendings=0)
            if item < count:
                if residual is None:
                    mbarrier.arrive(ready.index(who), count=1)
                else:
                    tile = first + (item if TURNS else item // 2) * stride
                    a, b, c, column = part_corner(tile, who, y, PIXELS, TILE, OUTPUT)
                    arrived = ready.index(who)
                    mbarrier.expect(arrived, PARTS * residual.block_type.nbytes)
                    for part in gl.static_range(PARTS):
                        place = out.index(who * PARTS + part)
                        load_box(residual, [a, b, c, column + part * N], arrived, place)


@jit
def multiply(
    x_ring, w_ring, full, empty, slot, phase, steps: gl.constexpr, N: gl.constexpr,
    TILE: gl.constexpr, STAGES: gl.constexpr, M: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """The sums of M pixels of a box, the last product still under way, the slot that it reads, and
    which is next in which phase."""
    K: gl.constexpr = TILE.K
    bits: gl.constexpr = x_ring.dtype.primitive_bitwidth
    sums: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 256 // bits]
    )
    acc = gl.zeros([M, N], gl.float32, sums)
    before = 0
    for step in range(steps):
        mbarrier.wait(full.index(slot), phase)
        a = x_ring.index(slot).reshape([TILE.M, K]).slice(FIRST, M)
        b = w_ring.index(slot).reshape([N, K]).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, precision=TILE.precision, is_async=True)
        acc = warpgroup_mma_wait(num_outstanding=1, deps=(acc,))
        # Only this product is under way: the slot before has been read.
        mbarrier.arrive(empty.index(before), count=1, pred=step > 0)
        before = slot
        slot, phase = after(slot, phase, STAGES)
    return acc, before, slot, phase


@jit
def consume(
    y, residual, extras, x_ring, w_ring, full, empty, order, ends, tiles, m,
    IMAGE: gl.constexpr, WINDOW: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr,
    OUTPUT: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr, WHO: gl.constexpr,
):  # fmt: skip
    """Four warps that multiply and finish the pixels from WHO·TILE.M/2 on of every tile, or in
    turns every second tile."""
    M: gl.constexpr = TILE.M if TURNS else TILE.M // 2
    FIRST: gl.constexpr = 0 if TURNS else WHO * M
    N: gl.constexpr = TILE.N
    K: gl.constexpr = TILE.K
    steps: gl.constexpr = WINDOW.R * WINDOW.S * ((IMAGE.C + K - 1) // K)
    slot = 0
    phase = 0
    turn = 0
    parity = 0
    first = gl.program_id(0)
    stride = gl.num_programs(0)
    if TURNS:
        first += WHO * stride
        stride *= 2
    for tile in range(first, tiles, stride):
        n, p, q, column = tile_corner(tile, PIXELS, TILE, OUTPUT)
        if TURNS:
            count = (2 * turn + WHO) * steps
            slot = count % STAGES
            phase = count // STAGES % 2
            mbarrier.wait(order.index(WHO), (turn + 1 - WHO) % 2)
            turn += 1
        acc, before, slot, phase = multiply(
            x_ring, w_ring, full, empty, slot, phase, steps, N, TILE, STAGES, M, FIRST
        )
        if TURNS:
            mbarrier.arrive(order.index(1 - WHO), count=1)
        acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
        mbarrier.arrive(empty.index(before), count=1)
        finish(
            acc, y, residual, extras, ends, parity, n, p, q, column, m, PIXELS, TILE, OUTPUT, FIRST,
            WHO,
        )  # fmt: skip
        parity ^= 1


@jit
def finish(
    acc, y, residual, extras, ends, parity, n, p, q, column, m,
    PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr, FIRST: gl.constexpr,
    WHO: gl.constexpr,
):  # fmt: skip
    """The epilogue of a tile's pixels from FIRST on, and their store: as many columns at a time as
    there are registers for beside the others."""
    N: gl.constexpr = PIXELS.columns
    PARTS: gl.constexpr = TILE.N // N
    parts = columns_of(acc, N)
    if PIXELS.copied:
        out, ready, written = ends
        mbarrier.wait(ready.index(WHO), parity)
        for part in gl.static_range(PARTS):
            leave(
                parts[part], residual, out.index(PARTS * WHO + part), extras, n, p, q,
                column + part * N, m, PIXELS, TILE, OUTPUT, FIRST,
            )  # fmt: skip
        fence_async_shared()
        mbarrier.arrive(written.index(WHO), count=1)
    else:
        for part in gl.static_range(PARTS):
            put(
                parts[part], y, extras, n, p, q, column + part * N, m, PIXELS, TILE, OUTPUT, FIRST
            )


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
def leave(
    acc, residual, place, extras, n, p, q, column, m,
    PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """The epilogue of all rows and some columns, whose residual is at a place in shared memory, for
    the results, and for zeros behind the last column: another product may read them."""
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    value = gl.convert_layout(acc, sums, assert_trivial=True)
    place = place.reshape([M, N])
    rows, live = places(value, n, p, q, m, PIXELS.H, PIXELS.W, PIXELS.row, TILE, OUTPUT, FIRST)
    columns = column + gl.arange(0, N, layout=gl.SliceLayout(0, sums))
    if residual is not None:
        extras = extras + (place.load(sums),)
    value = OUTPUT.epilogue(value, rows, columns, live, columns < OUTPUT.K, extras)
    if OUTPUT.K % N != 0:
        value = gl.where((columns < OUTPUT.K)[None, :], value, 0.0)
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
def way_out(y, PIXELS: gl.constexpr, TILE: gl.constexpr):
    """Memory for both groups' results, in boxes of y, and its barriers; empty unless they are
    copied."""
    if PIXELS.copied:
        boxes: gl.constexpr = 2 * (TILE.N // y.block_shape[3])
        out = gl.allocate_shared_memory(y.dtype, [boxes] + y.block_shape, y.layout)
        ready, written = barriers(2, 1, 1)
        return out, ready, written
    else:  # noqa: RET505  (Triton compiles what follows a return.)
        return ()


@jit
def places(
    value, n, p, q, m, H: gl.constexpr, W: gl.constexpr, ROW: gl.constexpr, TILE: gl.constexpr,
    OF: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """The rows of a tensor of OF.P x OF.Q pixels that those of a tile are, from FIRST on of a box
    of H x W whose rows are ROW pixels apart, and which of them exist."""
    pixel = FIRST + gl.arange(0, value.shape[0], layout=gl.SliceLayout(1, value.type.layout))
    image = n + (pixel // (H * W) if ROW == W else pixel // W % (ROW // W))
    row = p + pixel // ROW % H
    place = q + pixel % W
    live = (image < m) & (row < OF.P) & (place < OF.Q)
    if TILE.wide:
        image = image.to(gl.int64)
    return (image * OF.P + row) * OF.Q + place, live


@constexpr_function
def windows(M, N, ROW):
    """The layout in which a thread of 128 holds 8 columns of every window of 2x2 of its pixels,
    whose rows are ROW pixels apart, and stores 16 bytes beside its neighbour's."""
    columns = [[0, 1 << bit] for bit in range(N.bit_length() - 1)]
    window = [[1, 0], [ROW, 0]]
    rows = [[1 << bit, 0] for bit in range(M.bit_length() - 1)]
    others = columns[3:] + [row for row in rows if row not in window]
    return gl.DistributedLinearLayout(
        columns[:3] + window + others[7:], others[:5], others[5:7], [], [M, N]
    )


@jit
def put(
    acc, y, extras, n, p, q, column, m,
    PIXELS: gl.constexpr, TILE: gl.constexpr, OUTPUT: gl.constexpr, FIRST: gl.constexpr,
):  # fmt: skip
    """The epilogue and the store of all rows and some columns of it: 16 bytes by each thread; with
    pooling of every 2x2 window, whose members one thread holds, or the mean of every image."""
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    H: gl.constexpr = PIXELS.H
    W: gl.constexpr = PIXELS.W
    ROW: gl.constexpr = PIXELS.row
    if PIXELS.side == 2:
        value = gl.convert_layout(acc, windows(M, N, ROW))
    else:
        wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // N, N // 8], [4, 1], [1, 0])
        value = gl.convert_layout(acc, wide)
    columns = column + gl.arange(0, N, layout=gl.SliceLayout(0, value.type.layout))
    if PIXELS.side == 1:
        rows, live = places(value, n, p, q, m, H, W, ROW, TILE, OUTPUT, FIRST)
    else:
        rows, live = places(value, n, p, q, m, H, W, ROW, TILE, PIXELS.pool, FIRST)
        value = PIXELS.pool.stages(value, rows, columns, live, columns < OUTPUT.K, extras)
    if PIXELS.side == 0:
        value = gl.where(live[:, None], value, 0.0)
        value = gl.sum(value.reshape([M // (H * W), H * W, N]), axis=1)
        count = gl.full(value.shape, PIXELS.pool.P * PIXELS.pool.Q, gl.float32, value.type.layout)
        value = gl.div_rn(value, count)
        rows, live = places(value, n, p, q, m, 1, 1, 1, TILE, OUTPUT, FIRST // (H * W))
    elif PIXELS.side == 2:
        if PIXELS.pool.overhangs:
            value = gl.where(live[:, None], value, float("-inf"))
        upper, lower = value.reshape([M // 2 // ROW, 2, ROW, N]).permute((0, 2, 3, 1)).split()
        value = combine(upper, lower, PIXELS.pool.maximum)
        even, odd = value.reshape([M // 4, 2, N]).permute((0, 2, 1)).split()
        value = combine(even, odd, PIXELS.pool.maximum)
        rows, live = places(
            value, n, p // 2, q // 2, m, H // 2, W // 2, ROW // 2, TILE, OUTPUT, FIRST // 4
        )  # fmt: skip
    columns = column + gl.arange(0, N, layout=gl.SliceLayout(0, value.type.layout))
    column_mask = columns < OUTPUT.K
    value = OUTPUT.epilogue(value, rows, columns, live, column_mask, extras)
    address = y + OUTPUT.offset + (rows * OUTPUT.row_stride)[:, None] + columns[None, :]
    mask = live[:, None] & column_mask[None, :]
    gl.store(address, value.to(y.dtype.element_ty), mask=mask)


@jit
def hopper_kernel(
    x, w, residual, y, extras, m,
    IMAGE: gl.constexpr, WINDOW: gl.constexpr, PIXELS: gl.constexpr, TILE: gl.constexpr,
    OUTPUT: gl.constexpr, STAGES: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """m counts images. residual: in boxes as y; None where there is none, or where it is
    among `extras`."""
    column_tiles: gl.constexpr = (OUTPUT.K + TILE.N - 1) // TILE.N
    tiles = gl.cdiv(m, PIXELS.N) * (PIXELS.down * PIXELS.across * column_tiles)
    x_ring = gl.allocate_shared_memory(x.dtype, [STAGES] + x.block_shape, x.layout)
    w_ring = gl.allocate_shared_memory(w.dtype, [STAGES] + w.block_shape, w.layout)
    full, empty = barriers(STAGES, 1, 1 if TURNS else 2)
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for who in gl.static_range(2):
        mbarrier.init(order.index(who), count=1)
    ends = way_out(y, PIXELS, TILE)
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume, (
                y, residual, extras, x_ring, w_ring, full, empty, order, ends, tiles, m, IMAGE,
                WINDOW, PIXELS, TILE, OUTPUT, STAGES, TURNS, 0,
            )),
            (consume, (
                y, residual, extras, x_ring, w_ring, full, empty, order, ends, tiles, m, IMAGE,
                WINDOW, PIXELS, TILE, OUTPUT, STAGES, TURNS, 1,
            )),
            (produce, (
                x, w, x_ring, w_ring, full, empty, tiles, IMAGE, WINDOW, PIXELS, TILE, OUTPUT,
                STAGES,
            )),
            (carry, (y, residual, ends, tiles, PIXELS, TILE, OUTPUT, TURNS)),
        ],
        [4, 1, 1],
        # Registers of a thread; 8 · 240 + 4 · 24 of the 2,048 that 32 of them share.
        [240, 24, 24],
    )  # fmt: skip
