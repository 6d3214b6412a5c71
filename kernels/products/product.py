"""The plain product y = epilogue(x wᵀ) of linear layers and 1x1 convolutions, and who computes it.

The configuration says which algorithm:
- `gemm`: tiles on the tensor cores (`tile/gemm.py`);
- on sm_90 by warps that do different things (`hopper/core.py`);
- `gemv`: at most 8 rows, the weights streamed once (`gemv.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..contract.op import Config, Launch, Problem, Target
from ..hopper import core
from ..tile import choice, gemm
from . import gemv


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    if core.uses_core(tile):
        return core.launch(problem, tile, target)
    if gemv.uses_gemv(tile):
        return gemv.launch(problem, tile)
    return gemm.launch(problem, tile)


def _plain_configs(problem: Problem, target: Target) -> Iterator[Config]:
    size = gemm.problem_size(problem)
    yield from choice.tile_configs(size, target)
    yield from gemv.configs(size, target)


def _plain_legal(problem: Problem, tile: Config, target: Target) -> str | None:
    size = gemm.problem_size(problem)
    if gemv.uses_gemv(tile):
        return gemv.legal(size, tile, target)
    return choice.legal_tile(size.dtype, tile, target)


def crowded(problem: Problem, tile: Config, target: Target) -> str | None:
    """Why a configuration is expected to spill, or None."""
    return gemv.crowded(tile, target) if gemv.uses_gemv(tile) else None


def _plain_default(problem: Problem, target: Target) -> Config:
    """Of least modelled time, of tiles and of streaming: with few rows, tiles are mostly padding
    and take their steps one after the other, or share their sums at a cost."""
    size = gemm.problem_size(problem)
    tile = choice.default_tile(size, target)
    if target.name == "interpreter":
        return tile

    def launch_of(tile: Config) -> Launch:
        if gemv.uses_gemv(tile):
            return gemv.launch_for_cost_model(size, tile)
        return choice.launch_for_cost_model(size, tile)

    return choice.choose(
        (tile, *gemv.configs(size, target)), launch_of, size.work, target,
        crowded=lambda tile: crowded(problem, tile, target),
    )  # fmt: skip


configs, default, legal = core.beside(
    {"configs": _plain_configs, "default": _plain_default, "legal": _plain_legal}, launch
)
"""Of every algorithm; the default is the one of least modelled time."""
