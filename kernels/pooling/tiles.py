"""Tiles of outputs, some pixels times some channels: what the kernels of poolings and of upsampling
and their tuning spaces have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..contract.op import Config, Problem, Target, config, power_of_two, tile_config, tiles_of
from .pool_window import windows

# Up to here the taps are unrolled: a loop over taps loses the packed half-precision maximum.
MOST_UNROLLED_TAPS = 25


def channel_block(channels: int) -> int:
    """Channels per program: 64 (128 bytes in half precision), or fewer where that wastes fewer."""
    if channels < 32:
        return power_of_two(channels)
    if channels >= 256:
        return 64
    return min((64, 32), key=lambda block: -(-channels // block) * block)


def output_pixels(problem: Problem) -> int:
    """N * P * Q, or N * O * P * Q of volumes."""
    return problem.output.spec.numel // problem.output.shape[1]


def unrolled_taps(problem: Problem) -> int:
    """Loads of a result that are started together: those of a window that is unrolled."""
    taps = windows(problem).taps
    return taps if taps <= MOST_UNROLLED_TAPS else 0


@dataclass(frozen=True)
class Tiles:
    """The tuning space of a kernel with one program per tile.

    results, channels: of the tiles worth trying; usual: results of the default tile. held: values
    that a thread keeps at a time for each of its results; most: how many are expected to fit its
    registers: larger tiles are not searched. rows: how many the output has, its pixels by default.
    """

    results: tuple[int, ...]
    channels: tuple[int, ...]
    usual: Callable[[Problem], int]
    held: Callable[[Problem], int] = lambda problem: 0
    most: int = 0
    rows: Callable[[Problem], int] = output_pixels

    @property
    def space(self) -> dict[str, Any]:
        return {"configs": self.configs, "default": self.default}

    def configs(self, problem: Problem, target: Target) -> Iterator[Config]:
        """The tiles whose values are expected to fit the registers."""
        for tile in tiles_of(self.results, self.channels):
            results = tile["BLOCK_ROWS"] * tile["BLOCK_COLUMNS"] // (32 * tile.num_warps)
            if not target.is_gpu or results * self.held(problem) <= self.most:
                yield tile

    def default(self, problem: Problem, target: Target) -> Config:
        """The usual number of results; in the interpreter as many as memory allows."""
        channels = problem.output.shape[1]
        if target.name == "interpreter":
            return config(1, 1, **dict(tile_config(self.rows(problem), channels, target).blocks))
        columns = channel_block(channels)
        return config(4, 1, BLOCK_ROWS=self.usual(problem) // columns, BLOCK_COLUMNS=columns)
