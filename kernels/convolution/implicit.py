"""The general algorithm of conv2d: an implicit matrix product by the tile engine.

One loop flattened over taps and channel blocks, which is what Triton's pipeliner turns into
asynchronous copies; with few channels per group it runs over (tap, channel) pairs instead. Where
output tiles are few (batch 1), SPLIT programs share the sums of each (`tile/split_k.py`). On sm_90
its configurations may also be those of the core whose warps do different things (`hopper/core.py`).
"""

from __future__ import annotations

from ..contract.op import Config, Launch, Problem, Target
from ..hopper import core
from ..tile import choice, engine, gemm, source, space
from ..tile.conv_geometry import Conv2d


def size(problem: Problem) -> choice.Size:
    """The matrix product that the convolution is."""
    groups = problem.attributes.expect(Conv2d).groups
    n, k, p, q = problem.output.shape
    _, per_group, r, s = problem.inputs[1].shape
    by_tap = source.runs_by_tap(per_group, r * s) or bool(problem.prologue)
    depth = per_group if by_tap else per_group * r * s
    dtype = problem.inputs[0].spec.dtype
    return choice.Size(
        n * p * q, k // groups, depth, dtype, groups, not by_tap, taps=r * s, splits=by_tap
    )


def launch(problem: Problem, tile: Config, target: Target) -> Launch:
    """The launch of the tile kernel, or the Hopper core's where the configuration says so."""
    if core.uses_core(tile):
        return core.launch(problem, tile, target)
    attributes = problem.attributes.expect(Conv2d)
    x, w, product = problem.inputs[0], problem.inputs[1].shape, size(problem)
    split, costs = choice.split_of(tile), choice.modelled(product, tile)
    if product.gathers:
        # 23 for each element that is loaded, 16 for each result, as counted in sm_90 code for half
        # precision.
        loaded = 23 * product.steps(tile["BLOCK_K"]) * tile["BLOCK_K"]
        costs["instructions"] = tile["BLOCK_M"] * (loaded + 16 * tile["BLOCK_N"])
        costs["step_instructions"] = 0
    return engine.launch(
        problem, tile, target, space.of_pixels(problem.output.spec, tile["BLOCK_M"]),
        source.of_convolution(attributes, x, w, gemm.prologue_of(problem)),
        groups=attributes.groups,
        split=split,
        precision=choice.dot_precision(problem, w[1] * w[2] * w[3]),
        **costs,
    )  # fmt: skip


configs, default, legal = core.beside(choice.of_product(size), launch)
"""Tiles, and where it is asked for the Hopper core's; the default is the fastest by the model."""
