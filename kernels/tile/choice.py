"""Which tiles a matrix product has, which of them can run, and which is taken without search."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ... import settings
from ..contract import cost_model
from ..contract.cost_model import MULTIPROCESSORS
from ..contract.op import NONE, Config, Launch, Problem, Target, config, power_of_two
from . import split_k
from .geometry import CLUSTER

# (BLOCK_M, BLOCK_N, warps), the largest first. What a tile of 128x256 reads out of L2 serves twice
# the products of one of 128x64; small ones are for small results. Where 255 registers are not
# enough for one of them and an epilogue, the compiler's report says so, and the next is taken.
TILES = (
    (128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (256, 64, 8), (64, 256, 4),
    (128, 64, 4), (64, 128, 4), (64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4), (16, 64, 4),
    (16, 32, 2),
)  # fmt: skip
# On sm_100 256x128 keeps 72 bytes on the stack where a pooling follows.
TILES_SM100 = tuple(tile for tile in TILES if tile != (256, 128, 8))
# mma.sync keeps both operands in registers: 128x64 w4 spills 88 bytes on sm_80, w8 needs 136.
TILES_BEFORE_SM90 = (
    (128, 256, 8), (256, 128, 8), (128, 128, 8), (128, 128, 4), (128, 64, 8), (64, 128, 8),
    (64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4), (16, 64, 4), (16, 32, 2),
)  # fmt: skip
# fp32 by three tf32 products keeps each operand twice in registers, so the tiles are smaller.
TILES_FP32 = ((64, 64, 4), (64, 32, 4), (32, 64, 4), (32, 32, 4), (16, 64, 4), (16, 32, 2))
STAGES = (3, 4, 5, 2)
DEPTHS = (64, 32, 128, 16)
"""Terms of a step; of equal configurations by the model the first is tried first."""
DEFAULT_STAGES = (4, 3)
LARGE = 128
"""Sums of a thread beside which operands are taken 32 terms at a time before sm_90, where they are
held in registers (128x256x32 with 8 warps: 213 to 240 there)."""
FEWEST_TERMS = 16
"""Terms of a sum of fp32 numbers from which tensor cores multiply it; shorter ones are left to
FMAs ("ieee")."""
MOST_WARPS_OF_FMAS = 4
CLUSTER_CAPABILITY = 90
MOST_GATHERED = 64
"""Rows and columns of a default tile whose rows are gathered element by element."""


def dot_precision(problem: Problem, depth: int) -> str:
    """How Triton multiplies fp32 tiles: three tf32 products keep fp32 accuracy at 3x the speed of
    FMAs; short sums (depth < 16) stay with FMAs."""
    if problem.precision == "tf32":
        return "tf32"
    return "tf32x3" if depth >= FEWEST_TERMS else "ieee"


def l2_bytes(problem: Problem, tile: Config, terms: int) -> int:
    """What the loop of one program reads: both operand tiles for all terms of its sums."""
    elements = terms * (tile["BLOCK_M"] + tile["BLOCK_N"])
    return elements * problem.inputs[0].spec.dtype.itemsize


def step_instructions(tile: Config, dtype: torch.dtype, taps: int) -> int:
    """What each warp issues in a step of the loop beside the products.

    Counted in sm_90 code: for every 16 bytes that a thread copies of x 12 over filter taps (masks
    and addresses) and 8 over plain rows, of w 2 and 3, and 70 or 51 for the step: within 5 of 11
    tiles from 128x64 to 256x128.
    """
    copied = 32 * tile.num_warps * cost_model.COPY_BYTES // dtype.itemsize
    of_x = tile["BLOCK_M"] * tile["BLOCK_K"] / copied
    of_w = tile["BLOCK_N"] * tile["BLOCK_K"] / copied
    count = 70 + 12 * of_x + 2 * of_w if taps > 1 else 51 + 8 * of_x + 3 * of_w
    return round(count)


def shared_bytes(tile: Config, dtype: torch.dtype) -> int:
    """Shared memory of a pipelined matrix product: one A and one B tile per stage; or of two parts
    of a split sum that change their places, in fp32; in a cluster one beside the stages."""
    area = (tile["BLOCK_M"] + tile["BLOCK_N"]) * tile["BLOCK_K"]
    if cluster_of(tile) > 1:
        parts = split_k.part_bytes(tile["BLOCK_M"], tile["BLOCK_N"])
        return tile.num_stages * area * dtype.itemsize + parts
    parts = 2 * 4 * tile["BLOCK_M"] * tile["BLOCK_N"] if split_of(tile) > 1 else 0
    return max(tile.num_stages * area * dtype.itemsize, parts)


def legal_tile(dtype: torch.dtype, tile: Config, target: Target) -> str | None:
    """Why a matrix-product tile cannot run on the target, or None; whether it fits registers only
    the compiler tells."""
    return target.shared_shortage(shared_bytes(tile, dtype))


def tiles(dtype: torch.dtype, target: Target) -> tuple[tuple[int, int, int], ...]:
    """The (BLOCK_M, BLOCK_N, warps) worth trying."""
    if dtype is torch.float32:
        return TILES_FP32
    if target.capability >= 100:
        return TILES_SM100
    return TILES if target.capability >= 90 else TILES_BEFORE_SM90


@dataclass(frozen=True)
class Size:
    """A matrix product: rows x columns, an inner dimension, and how many of them side by side.

    gathers: the input rows are gathered element by element (few channels per tap), which takes
    registers for addresses and masks. taps: of the filter, over which the inner loop is flattened.
    splits: the kernel can share a sum among programs.
    """

    rows: int
    columns: int
    depth: int
    dtype: torch.dtype
    groups: int = 1
    gathers: bool = False
    taps: int = 1
    splits: bool = False

    @property
    def terms(self) -> int:
        """Products that are added up for one result."""
        return self.depth * (1 if self.gathers else self.taps)

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.columns * self.groups * self.terms

    @property
    def work(self) -> Work:
        results = self.rows * self.columns * self.groups * self.dtype.itemsize
        return Work(self.flops, self.dtype, results)

    def tiles(self, block_m: int, block_n: int) -> int:
        return -(-self.rows // block_m) * -(-self.columns // block_n) * self.groups

    def steps(self, block_k: int) -> int:
        """Iterations of the inner loop."""
        return -(-self.depth // block_k) * (1 if self.gathers else self.taps)


def legal(size: Size, tile: Config, target: Target) -> str | None:
    """Why a product cannot use a configuration on the target, or None.

    Inductor's tests have found loops over filter taps that were wrong with 8 warps (pytorch issue
    173068): fp32 products by FMAs, for a reason that nobody has found. Those keep to 4; tensor
    cores do not (what Hopper needs with two groups of warps, a barrier behind each wait for
    products, is checked in what is compiled: `offline.check_barriers`).
    """
    if cluster_of(tile) > 1 and (reason := no_cluster(tile, target)) is not None:
        return reason
    by_fmas = size.dtype is torch.float32 and size.terms < FEWEST_TERMS
    if target.is_gpu and by_fmas and size.taps > 1 and tile.num_warps > MOST_WARPS_OF_FMAS:
        return (
            f"{tile.num_warps} warps: fp32 sums over {size.taps} filter taps by FMAs have come out "
            f"wrong with more than {MOST_WARPS_OF_FMAS} (pytorch issue 173068)"
        )
    return legal_tile(size.dtype, tile, target)


def tile_configs(size: Size, target: Target) -> Iterator[Config]:
    widest = 32 if size.dtype is torch.float32 else 128
    for block in tiles(size.dtype, target):
        for block_k in DEPTHS:
            if block_k > max(16, min(widest, power_of_two(size.depth))):
                continue
            for stages in STAGES:
                for split in splits(size, block[0], block[1], block_k) if stages == 3 else (1,):
                    for ways in ways_to_split(split, target):
                        tile = config_of(size, block, block_k, stages, split, ways)
                        if legal(size, tile, target) is None:
                            yield tile


def config_of(
    size: Size, block: tuple[int, int, int], block_k: int, stages: int, split: int,
    in_cluster: bool = False,
) -> Config:  # fmt: skip
    """A configuration for a block of (rows, columns, warps)."""
    block_m, block_n, warps = block
    sizes = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8}
    if size.splits:
        sizes["SPLIT"] = split
    if in_cluster:
        sizes[CLUSTER] = 1
    return config(warps, stages, **sizes)


def ways_to_split(split: int, target: Target) -> tuple[bool, ...]:
    """Whether programs that share sums are a cluster. No GPU has run that: it is tried only where
    `CONVLOOM_LAUNCH=clusters` asks for it."""
    asked = settings.CLUSTERS in settings.launch() and target.capability == CLUSTER_CAPABILITY
    return (False, True) if asked and 1 < split <= split_k.MOST_IN_CLUSTER else (False,)


def no_cluster(tile: Config, target: Target) -> str | None:
    """Why the programs that share the sums of a tile cannot be a cluster, or None."""
    if target.capability != CLUSTER_CAPABILITY:
        return f"programs share sums in clusters on sm_{CLUSTER_CAPABILITY}, not on {target.name}"
    if split_of(tile) not in (2, 4, split_k.MOST_IN_CLUSTER):
        return f"a cluster of {split_of(tile)}; 2, 4 and {split_k.MOST_IN_CLUSTER} are possible"
    return None


def splits(size: Size, block_m: int, block_n: int, block_k: int) -> tuple[int, ...]:
    """Among how many programs the sums of a tile may be shared: where the tiles leave half of the
    multiprocessors idle, and each program keeps at least four steps."""
    count = size.tiles(block_m, block_n)
    steps = size.steps(block_k)
    return tuple(
        split
        for split in (1, 2, 4, 8, 16)
        if split == 1
        or (size.splits and count * split <= 2 * MULTIPROCESSORS and steps >= 4 * split)
    )


def default_tile(size: Size, target: Target) -> Config:
    """A tile without search: the fastest by the model."""
    return _default_tile(size, target, True in ways_to_split(2, target))


@lru_cache(maxsize=1 << 14)
def _default_tile(size: Size, target: Target, in_clusters: bool) -> Config:
    """in_clusters: part of the key alone; `ways_to_split` asks the environment again."""
    if target.name == "interpreter":
        return interpreter_tile(size)
    return fastest(size, candidates(size, target), target)


def candidates(size: Size, target: Target) -> list[Config]:
    """What is tried on a GPU without search."""
    return [
        tile
        for block in tiles(size.dtype, target)
        if not size.gathers or max(block[:2]) <= MOST_GATHERED
        for block_k, is_usual in _depths_and_halves(size, block, target)
        for split in splits(size, block[0], block[1], block_k)
        if is_usual or split > 1
        for stages in (DEFAULT_STAGES if split == 1 else (3,))
        for ways in ways_to_split(split, target)
        if legal(size, tile := config_of(size, block, block_k, stages, split, ways), target) is None
    ]


def of_product(size_of: Callable[[Problem], Size]) -> dict[str, Any]:
    """What an op says of its tuning space where that is the one of a matrix product of this size:
    `configs`, `default` and `legal`."""
    return {
        "configs": lambda problem, target: tile_configs(size_of(problem), target),
        "default": lambda problem, target: default_tile(size_of(problem), target),
        "legal": lambda problem, tile, target: legal(size_of(problem), tile, target),
    }


class Work(NamedTuple):
    """What a launch has to do whatever its tiles: products and sums, of which dtype, and the bytes
    that its end writes and reads."""

    flops: int
    dtype: torch.dtype
    end_bytes: int

    @staticmethod
    def of(problem: Problem, flops: int) -> Work:
        """Of a problem of so many operations."""
        return Work(flops, problem.inputs[0].spec.dtype, cost_model.end_bytes(problem))


def choose(
    candidates: Iterable[Config],
    launch_of: Callable[[Config], Launch],
    work: Work,
    target: Target,
    *,
    factor: Callable[[Config], float] = lambda tile: 1,
    waste: Callable[[Config], float] = lambda tile: 0,
    crowded: Callable[[Config], str | None] = lambda tile: None,
    default: Config | None = None,
) -> Config:
    """The candidate of least modelled time; of equals that of least `waste`, and of those the
    first.

    launch_of: what the cost model needs to know of a launch; factor: what the model does not know
    of a configuration, as a multiple of its time; crowded: why one is expected to need more
    registers than there are: the first of those is taken where there are no others. default: where
    there is no candidate.
    """
    gpu = cost_model.machine_for(target)

    def time_us(tile: Config) -> float:
        return factor(tile) * cost_model.launch_us(gpu, launch_of(tile), *work)

    every = list(candidates)
    roomy = [tile for tile in every if crowded(tile) is None]
    if not roomy and every:
        return every[0]
    least = min(roomy, key=lambda tile: (time_us(tile), waste(tile)), default=default)
    assert least is not None, "no configuration can run"
    return least


def fastest(size: Size, candidates: Iterable[Config], target: Target) -> Config:
    """The configuration of least modelled time; of equals the one with the fewest columns of zeros,
    which only cost registers, and of those the first."""
    return choose(
        candidates,
        lambda tile: launch_for_cost_model(size, tile),
        size.work,
        target,
        waste=lambda tile: -size.columns % tile["BLOCK_N"],
    )


def sketch(
    tile: Config,
    rows: int,
    columns: int,
    programs: int = 1,
    constexprs: Mapping[str, int] = NONE,
    **modelled: Any,
) -> Launch:
    """A launch that only the cost model sees: of BLOCK_M (or ROWS) of the rows times BLOCK_N of the
    columns in each program, of which every tile has so many."""
    sizes = dict(tile.blocks)
    return Launch(
        kernel=None,
        pointers={},
        rows=rows,
        block_rows=sizes.get("BLOCK_M") or sizes["ROWS"],
        columns=-(-columns // tile["BLOCK_N"]) * programs,
        constexprs=constexprs,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **modelled,
    )


def default_depths(size: Size, block: tuple[int, int, int], target: Target) -> Iterator[int]:
    """Terms of a step: 128 bytes of a row where registers allow it; fewer where that fills the last
    step of a row of channels with less zeros (80 channels are 128 in steps of 64); and 32 where a
    multiprocessor then holds two programs."""
    large = target.capability < 90 and block[0] * block[1] >= LARGE * 32 * block[2]
    widest = 32 if size.gathers or size.dtype is torch.float32 or large else 64
    deepest, least = max(16, min(widest, power_of_two(size.depth))), 1 << 62
    for block_k in (64, 32, 16):
        padded = -(-size.depth // block_k) * block_k
        halved = deepest == 64 and block_k == 32 and _halves_fit_in_twos(size, block, target)
        if block_k <= deepest and (padded < least or halved):
            least = min(least, padded)
            yield block_k


def _depths_and_halves(
    size: Size, block: tuple[int, int, int], target: Target
) -> Iterator[tuple[int, bool]]:
    """`default_depths`, and halves of 64 for sums that are shared: 18 steps are 5 for the slowest
    of 4 programs, 36 of half as many terms are 9."""
    usual = tuple(default_depths(size, block, target))
    yield from ((block_k, True) for block_k in usual)
    if 64 in usual and 32 not in usual:
        yield 32, False


def _halves_fit_in_twos(size: Size, block: tuple[int, int, int], target: Target) -> bool:
    """Whether a multiprocessor holds two programs that take 32 terms per step, and one that takes
    64: the end of one program is then hidden behind the loop of the other. 256x64 by 8 warps over
    3x3 taps, sm_90: 120 to 124 registers and 60 kB with 32 terms, 147 and 120 kB with 64."""
    if target.capability < 90:
        return False
    gpu = cost_model.machine_for(target)

    def held(block_k: int) -> int:
        tile = config_of(size, block, block_k, min(DEFAULT_STAGES), 1)
        return cost_model.resident(gpu, launch_for_cost_model(size, tile), size.dtype)

    return held(64) == 1 and held(32) > 1


def launch_for_cost_model(size: Size, tile: Config, **changes: Any) -> Launch:
    """What the cost model needs to know of the launch that a tile would become; changes: of what is
    `modelled`."""
    programs, costs = size.groups * split_of(tile), {**modelled(size, tile), **changes}
    return sketch(tile, size.rows, size.columns, programs, dict(tile.blocks), **costs)


def modelled(size: Size, tile: Config) -> dict[str, Any]:
    """What the launch of a product says to the cost model, and its scratch."""
    block_m, block_n, split = tile["BLOCK_M"], tile["BLOCK_N"], split_of(tile)
    cluster, tiles = cluster_of(tile), size.tiles(block_m, block_n)
    steps = -(-size.steps(tile["BLOCK_K"]) // split)
    read = min(steps * tile["BLOCK_K"], size.terms)  # Padding is not.
    return {
        "l2_bytes": read * (block_m + block_n) * size.dtype.itemsize,
        "steps": steps,
        "step_instructions": step_instructions(tile, size.dtype, size.taps),
        "combine_bytes": split_k.combine_bytes(split, block_m, block_n, cluster),
        "cluster": cluster,
        "cluster_bytes": split_k.part_bytes(block_m, block_n) if cluster > 1 else 0,
        "scratch": split_k.scratch(tiles, split, block_m, block_n, cluster),
    }


def split_of(tile: Config) -> int:
    """Among how many programs a configuration shares the sums of a tile."""
    return dict(tile.blocks).get("SPLIT", 1)


def cluster_of(tile: Config) -> int:
    """How many programs of a configuration are a cluster."""
    return split_of(tile) if dict(tile.blocks).get(CLUSTER, 0) else 1


def interpreter_tile(size: Size, least_rows: int = 16) -> Config:
    """Few, large programs: the interpreter pays about a millisecond per tile operation.

    Operand tiles hold up to half a million elements, accumulators a million.
    """
    block_m = max(16, least_rows, min(4096, power_of_two(size.rows)))
    block_n = max(16, min(1024, (1 << 20) // block_m, power_of_two(size.columns)))
    room = max(128, (1 << 19) // max(block_m, block_n))
    block_k = max(16, min(room, power_of_two(size.depth)))
    split = {"SPLIT": 1} if size.splits else {}
    return config(1, 1, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=1, **split)
