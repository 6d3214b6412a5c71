"""The plain product y = epilogue(x wᵀ) of linear layers and 1x1 convolutions, and who computes it.

The configuration says which algorithm:
- `gemm`: tiles on the tensor cores (`tile/gemm.py`);
- `gemm_tma`: the same through descriptors, where memory is aligned (`unmeasured/gemm_tma.py`);
- both of them by programs that stay and compute tile after tile (`unmeasured/gemm_persistent.py`),
  or with the residual read before the loop (`tile/residual.py`);
- on sm_90 by warps that do different things (`hopper/core.py`);
- `gemv`: at most 8 rows, the weights streamed once (`gemv.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from ..contract import cost_model
from ..contract.op import Config, Launch, Problem, Target
from ..hopper import core
from ..tile import choice, gemm, residual
from ..unmeasured import gemm_persistent, gemm_tma
from . import gemv


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    """The launch of the configuration's algorithm."""
    if core.uses_core(tile):
        return core.launch(problem, tile, target)
    if gemv.uses_gemv(tile):
        return gemv.launch(problem, tile)
    of_tiles = gemm_tma.launch if gemm_tma.uses_tma(tile) else gemm.launch
    plain = of_tiles(problem, tile)
    if gemm_persistent.programs_per_sm(tile):
        return gemm_persistent.make_persistent(plain, tile, target)
    return plain


def configs(problem: Problem, target: Target) -> Iterator[Config]:
    """The search space: every algorithm's."""
    size = gemm.problem_size(problem)
    tiles = (*choice.tile_configs(size, target), *gemm_tma.configs(problem, target))
    yield from tiles
    yield from residual.variants(problem, tiles)
    yield from gemm_persistent.variants(problem, tiles, target)
    yield from gemv.configs(size, target)
    yield from core.configs(problem, target)


def legal(problem: Problem, tile: Config, target: Target) -> str | None:
    """Why a configuration cannot run on the target, or None."""
    if core.uses_core(tile):
        return core.legal(problem, tile, target)
    size = gemm.problem_size(problem)
    if gemv.uses_gemv(tile):
        return gemv.legal(size, tile, target)
    refused = residual.legal(problem, tile) or gemm_persistent.legal(problem, tile, target)
    if refused is not None:
        return refused
    if gemm_tma.uses_tma(tile):
        return gemm_tma.legal(problem, tile, target)
    return choice.legal_tile(size.dtype, tile, target)


def default(problem: Problem, target: Target) -> Config:
    """The configuration of least modelled time, of tiles and of streaming: with few rows, tiles are
    mostly padding and take their steps one after the other, or share their sums at a cost.

    Descriptors are left to the tuner: the model tells tiles apart, not how they are read.
    """
    plain = _plain_default(problem, target)
    return core.default(problem, target, plain, lambda: launch(problem, plain, target))


def _plain_default(problem: Problem, target: Target) -> Config:
    size = gemm.problem_size(problem)
    tile = choice.default_tile(size, target)
    streamed = None if target.name == "interpreter" else gemv.default(size, target)
    if streamed is None:
        return tile
    gpu = cost_model.machine_for(target)
    launches = (
        gemv.launch_for_cost_model(size, streamed), choice.launch_for_cost_model(size, tile)
    )  # fmt: skip
    streamed_us, tiled_us = (choice.product_us(gpu, size, launch) for launch in launches)
    return streamed if streamed_us < tiled_us else tile
