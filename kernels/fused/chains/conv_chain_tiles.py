"""Tile sizes of `conv_chain`: which there are, which fit a machine, which one is taken unasked.

Every program keeps all channels of t and z of its pixels, so what limits the tiles is registers.
How many the compiler needs on top of the tiles themselves was read from compiled kernels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...contract.cost_model import Block, product_traffic
from ...contract.op import Config, Launch, Target, config, power_of_two
from ...tile import choice

PER_RESULT = 6
"""Instructions of a thread for each wide channel of a pixel: stages, conversion, store
(estimated)."""
BESIDE_TILES = 60
"""Registers of a thread beside its parts of tiles: 3x3 64 -> 256 -> 64 channels take 140 on sm_90
for 80 of tiles, 128 -> 512 -> 128 with a shortcut 190 for 128."""
MOST_SHORTCUT_CHANNELS = 256
"""Channels of s that stay in shared memory: with 512, 104 bytes spill on sm_90."""


@dataclass(frozen=True)
class Sizes:
    """What tiles depend on.

    rows: output pixels; channels of x; middle, narrow, shortcut: channels of t, z and s, 0 where
    there is none; taps: of the first convolution, 0 without one.
    """

    rows: int
    channels: int
    middle: int
    narrow: int
    shortcut: int
    taps: int
    dtype: torch.dtype

    @property
    def block_middle(self) -> int:
        return max(16, power_of_two(self.middle))

    @property
    def block_narrow(self) -> int:
        return max(16, power_of_two(self.narrow))


def shortcut_blocks(sizes: Sizes) -> tuple[int, ...]:
    """Channels of s that one step reads: all of them, once, where they fit beside t, or blocks that
    are read again for every step of the expansion; (0,) without a shortcut."""
    if not sizes.shortcut:
        return (0,)
    block = max(16, power_of_two(sizes.shortcut))
    whole = (block,) if block <= MOST_SHORTCUT_CHANNELS else ()
    return (*whole, 64) if block > 64 else whole


def _tile(m: int, n: int, k: int, warps: int, stages: int, inner: int, beside: int) -> Config:
    blocks = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "INNER_STAGES": inner}
    if beside:
        blocks["BLOCK_SHORTCUT"] = beside
    return config(warps, stages, **blocks)


def configs(sizes: Sizes, target: Target) -> Iterator[Config]:
    """All warps lie along the rows (BLOCK_M = 16 or 32 per warp), so that t stays in registers."""
    block_k = max(16, min(64, power_of_two(sizes.channels)))
    # Behind a convolution its copies keep the multiprocessor busy; alone the expansion's must.
    inner_stages = (1, 2) if sizes.taps else (2, 1)
    for (block_m, warps), block_n, stages, inner, beside in itertools.product(
        ((64, 4), (128, 8), (128, 4)), (32, 64), (3, 4, 2), inner_stages, shortcut_blocks(sizes)
    ):
        tile = _tile(block_m, block_n, block_k, warps, stages, inner, beside)
        if legal(sizes, tile, target) is None:
            yield tile


def legal(sizes: Sizes, tile: Config, target: Target) -> str | None:
    """Shared memory for the pipelined operands."""
    return target.shared_shortage(_shared_bytes(sizes, tile))


def crowded(sizes: Sizes, tile: Config, target: Target) -> str | None:
    """Registers for both accumulators and t."""
    if target.name == "interpreter":
        return None
    per_row = sizes.block_narrow + tile["BLOCK_N"] + sizes.block_middle // 2
    values = tile["BLOCK_M"] * per_row // (32 * tile.num_warps)
    limit = _register_limit(sizes, tile, target)
    if values > limit:
        return f"{values} registers per thread for tiles alone; more than {limit} spill"
    return None


def _shared_bytes(sizes: Sizes, tile: Config) -> int:
    """The front's pipeline, or what the loop over the expansion holds, whichever is more."""
    block_m, block_n = tile["BLOCK_M"], tile["BLOCK_N"]
    weights = tile["INNER_STAGES"] * block_n
    inner = weights * (sizes.block_middle + sizes.block_narrow) + block_m * block_n
    if sizes.shortcut:
        beside = tile["BLOCK_SHORTCUT"]
        if sizes.shortcut <= beside:
            inner += (block_m + weights) * beside
        else:
            inner += (block_m + block_n) * beside * tile.num_stages
    if sizes.taps:
        front = tile.num_stages * (block_m + sizes.block_middle) * tile["BLOCK_K"]
        return max(front, inner) * sizes.dtype.itemsize
    return (block_m * sizes.block_middle + inner) * sizes.dtype.itemsize


def _register_limit(sizes: Sizes, tile: Config, target: Target) -> int:
    """Registers per thread that tiles may take before the compiler spills.

    32 pixels per warp leave less to the front's addresses and masks: 64 -> 256 -> 64 channels need
    192 registers on sm_90 in steps of 32 channels (128 for tiles) and spill 56 bytes in steps of 64
    (160 for tiles); on sm_80 they need 254. 16 pixels per warp: 128 -> 512 -> 128 channels in steps
    of 64 by 8 warps (128 for tiles) spill 552 bytes on sm_80. 256 -> 1024 -> 256 channels (208 for
    tiles) fit, but spill 24 bytes on sm_100 by 4 warps, and with the addresses of a shortcut.
    """
    if tile["BLOCK_M"] > 16 * tile.num_warps:
        return 128 if target.capability >= 90 else 0
    if target.capability < 90 and tile.num_warps == 8 and tile["BLOCK_N"] == 64:
        return 96
    return 192 if sizes.shortcut or (target.capability >= 100 and tile.num_warps == 4) else 208


def launch_for_cost_model(sizes: Sizes, tile: Config, wide: int, l2_bytes: int) -> Launch:
    """What the cost model needs to know of a launch with so many wide channels.

    The pixels of t, and of the wide channels on their way into the reduction, are operands in
    registers; only weights are copied for them.
    """
    m, n, k, warps = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"], tile.num_warps
    dtype, middle, narrow = sizes.dtype, sizes.block_middle, sizes.block_narrow
    inner_steps = -(-wide // n)
    traffic = inner_steps * product_traffic(Block(m, n, middle), warps, dtype, rows_held=True)
    traffic += 2 * m * wide * dtype.itemsize  # Results change their places on the way out.
    if sizes.narrow:
        block = Block(m, narrow, n)
        traffic += inner_steps * product_traffic(block, warps, dtype, rows_held=True)
    if sizes.shortcut:
        block = Block(m, n, power_of_two(sizes.shortcut))
        traffic += inner_steps * product_traffic(block, warps, dtype)
    issued = PER_RESULT * m * wide
    front_steps = 0
    if sizes.taps:
        front_steps = sizes.taps * -(-sizes.channels // k)
        block = Block(m, middle, k)
        traffic += front_steps * product_traffic(block, warps, dtype)
        copied = config(warps, tile.num_stages, BLOCK_M=m, BLOCK_N=middle, BLOCK_K=k)
        per_step = choice.step_instructions(copied, dtype, sizes.taps)
        issued += 32 * warps * front_steps * per_step
    per_row = narrow * bool(sizes.narrow) + n + middle // 2
    return choice.sketch(
        tile,
        sizes.rows,
        n,  # All columns: a program has every one of its pixels.
        l2_bytes=l2_bytes,
        shared_traffic=traffic,
        shared_held=_shared_bytes(sizes, tile),
        registers=m * per_row // (32 * warps) + BESIDE_TILES,
        instructions=issued,
        steps=front_steps + inner_steps,
    )


def interpreter_tile(sizes: Sizes) -> Config:
    """Few, large programs: the interpreter pays per tile operation."""
    block_m = max(16, min(4096, power_of_two(sizes.rows)))
    block_k = max(16, min(128, power_of_two(sizes.channels)))
    return _tile(block_m, 256, block_k, 1, 1, 1, shortcut_blocks(sizes)[0])


def any_tile(sizes: Sizes) -> Config:
    return _tile(128, 32, 64, 8, 3, 1, shortcut_blocks(sizes)[0])
