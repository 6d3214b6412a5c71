"""conv2d: y[n,k,p,q] = sum_{r,s,c} x[n, c, p·sh − top + r·dh, q·sw − left + s·dw] w[k,c,r,s].

x: (N, C, H, W) NHWC in memory; w: (K, C/G, R, S), a constant packed as (K, R·S·C/G);
y: (N, K, P, Q) NHWC. fp32 accumulation. The bias is an epilogue.

Implicit GEMM (Chetlur et al., cuDNN, 2014): the rows of the product are output pixels, its inner
dimension the filter taps and channels; the input matrix is never built. Five algorithms:
- `depthwise`: one input channel per group: no matrix product at all;
- `conv_rows`: 4 or 8 channels and no padding at the sides: whole filter rows at a time;
- `grouped`: few channels per group: several groups in one product;
- `product`: 1x1, stride 1, no padding: a plain matrix product (`products/product.py`);
- `implicit`: everything else, by the tile engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from ..contract.op import Config, Launch, Op, Problem, Target, counted
from ..movement.arguments import convolution
from ..products import product
from ..tile.conv_geometry import Conv2d, infer, is_product, reference
from . import conv_rows, depthwise, grouped, implicit


def pack(attributes: Conv2d, w: torch.Tensor) -> torch.Tensor:
    """(K, C/G, R, S) -> (K, R·S·C/G), or depthwise's own order."""
    if depthwise.applies(attributes, tuple(w.shape)):
        return depthwise.pack(w)
    return _flat(attributes, w)


def _flat(attributes: Conv2d, w: torch.Tensor) -> torch.Tensor:
    return w.permute(0, 2, 3, 1).reshape(w.shape[0], -1).contiguous()


class Algorithm(NamedTuple):
    """A way to compute conv2d. applies(attributes, shape of w): whether it can; pack: how it wants
    the weight; launch, configs, default and legal as an `Op` has them."""

    name: str
    applies: Callable[[Conv2d, tuple[int, ...]], bool]
    pack: Callable[[Conv2d, torch.Tensor], torch.Tensor]
    launch: Callable[[Problem, Config, Target], Launch]
    configs: Callable[[Problem, Target], Iterator[Config]]
    default: Callable[[Problem, Target], Config]
    legal: Callable[[Problem, Config, Target], str | None]


def _of(
    module: Any,
    applies: Callable[[Conv2d, tuple[int, ...]], bool],
    pack: Callable[[Conv2d, torch.Tensor], torch.Tensor] = _flat,
) -> Algorithm:
    """The algorithm of a module, which has functions of those names."""
    name = module.__name__.rpartition(".")[2]
    return Algorithm(
        name, applies, pack, module.launch, module.configs, module.default, module.legal
    )


ALGORITHMS = (
    _of(depthwise, depthwise.applies, lambda attributes, w: depthwise.pack(w)),
    _of(conv_rows, conv_rows.applies, lambda attributes, w: conv_rows.pack(w)),
    _of(grouped, grouped.applies, lambda attributes, w: grouped.pack(attributes.groups, w)),
    _of(product, is_product),
    _of(implicit, lambda attributes, filters: True),
)
"""The first that applies computes a problem."""


def _algorithm(attributes: Conv2d, filters: tuple[int, ...]) -> Algorithm:
    return next(each for each in ALGORITHMS if each.applies(attributes, filters))


def algorithm(problem: Problem) -> Algorithm:
    return _algorithm(problem.attributes.expect(Conv2d), problem.inputs[1].shape)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    return (algorithm(problem).launch(problem, tile, target),)


@counted
def cost(problem: Problem) -> int:
    _, per_group, r, s = problem.inputs[1].shape
    return 2 * problem.output.spec.numel * per_group * r * s


OP = Op(
    "conv2d", Conv2d, infer, reference, launches, cost,
    configs=lambda problem, target: algorithm(problem).configs(problem, target),
    default=lambda problem, target: algorithm(problem).default(problem, target),
    legal=lambda problem, tile, target: algorithm(problem).legal(problem, tile, target),
    crowded=product.crowded,
    aten={
        f"aten.conv{dims}d.{overload}": convolution("conv2d", Conv2d)
        for dims in (1, 2)
        for overload in ("default", "padding")
    },
    batched="convolution",
    packs=lambda _: {1: lambda conv, w: _algorithm(conv, tuple(w.shape)).pack(conv, w)},
    takes_prologue=True,
)  # fmt: skip
