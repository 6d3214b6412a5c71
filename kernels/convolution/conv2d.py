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

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch

from ...errors import InvalidInputError
from ..contract.op import Builder, Config, Cost, Domain, Launch, Op, Problem, tensor_bytes
from ..contract.spec import Layout, TensorSpec
from ..contract.targets import Target
from ..products import product
from ..tile.conv_geometry import Conv2d, infer, pair, reference, same_padding
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


def _is_plain(attributes: Conv2d, filters: tuple[int, ...]) -> bool:
    """Whether the input's pixels, as they are, are the rows of a matrix product."""
    plain = attributes.stride == (1, 1) and not any(attributes.padding) and attributes.groups == 1
    return plain and filters[2:] == (1, 1)


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
    _of(product, _is_plain),
    _of(implicit, lambda attributes, filters: True),
)
"""The first that applies computes a problem."""


def _algorithm(attributes: Conv2d, filters: tuple[int, ...]) -> Algorithm:
    return next(each for each in ALGORITHMS if each.applies(attributes, filters))


def algorithm(problem: Problem) -> Algorithm:
    """Which algorithm computes the problem."""
    return _algorithm(cast("Conv2d", problem.attributes), problem.inputs[1].shape)


def _pack_for_algorithm(attributes: Conv2d, w: torch.Tensor) -> torch.Tensor:
    return _algorithm(attributes, tuple(w.shape)).pack(attributes, w)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the algorithm's kernel."""
    return (algorithm(problem).launch(problem, tile, target),)


def cost(problem: Problem) -> Cost:
    _, per_group, r, s = problem.inputs[1].shape
    read, written = tensor_bytes(problem)
    return Cost(2 * problem.output.spec.numel * per_group * r * s, read, written)


def _build(draw: Mapping[str, Any]) -> tuple[Conv2d, tuple[TensorSpec, ...]] | None:
    groups, per_group, per_group_out = draw["groups"], draw["C"], draw["K"]
    if draw["depthwise"]:
        groups, per_group = groups * draw["C"], 1
        per_group_out = min(per_group_out, 2)
    (h, width), (r, s) = draw["image"], draw["filter"]
    attributes = Conv2d(draw["stride"], draw["padding"], draw["dilation"], groups)
    x = TensorSpec((draw["N"], groups * per_group, h, width), torch.float32, Layout.NHWC)
    w = TensorSpec((groups * per_group_out, per_group, r, s), torch.float32)
    try:
        infer(attributes, (x, w))
    except InvalidInputError:
        return None
    return attributes, (x, w)


def _rows_draw(channels: int, filters: tuple[int, int], stride: tuple[int, int]) -> dict[str, Any]:
    """A problem of the algorithm `rows`, with a border above and below."""
    return {
        "N": 2, "image": (12, 16), "C": channels, "K": 33, "filter": filters, "stride": stride,
        "padding": (3, 2, 0, 0), "dilation": (1, 1), "groups": 1, "depthwise": False,
    }  # fmt: skip


def _capture(
    g: Builder,
    x: Any,
    w: Any,
    b: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    dilations = pair(dilation)
    if padding == "valid":
        sides = (0, 0, 0, 0)
    elif padding == "same":
        r, s = g.spec(w).shape[2:]
        sides = (*same_padding(r, dilations[0]), *same_padding(s, dilations[1]))
    else:
        vertical, horizontal = pair(padding)
        sides = (vertical, vertical, horizontal, horizontal)
    attributes = Conv2d(pair(stride), sides, dilations, int(groups))
    if g.spec(x).rank != 4:
        return g.refuse("unbatched convolution; pass a batch dimension")
    from ..movement.arguments import with_bias

    return with_bias(g, "conv2d", x, w, b, attributes)


OP = Op(
    name="conv2d",
    attributes=Conv2d,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=lambda problem, target: algorithm(problem).configs(problem, target),
    default=lambda problem, target: algorithm(problem).default(problem, target),
    legal=lambda problem, tile, target: algorithm(problem).legal(problem, tile, target),
    cost=cost,
    domain=Domain(
        ranges={
            "N": (1, 2, 3),
            "image": ((1, 1), (5, 5), (7, 9), (12, 4), (16, 16)),
            "C": (1, 3, 4, 8, 16, 20, 33),
            "K": (1, 8, 10, 33),
            "filter": ((1, 1), (3, 3), (5, 5), (1, 7), (2, 3), (7, 7)),
            "stride": ((1, 1), (2, 2), (1, 2), (3, 1)),
            "padding": ((0, 0, 0, 0), (1, 1, 1, 1), (3, 3, 3, 3), (0, 1, 2, 0), (2, 3, 0, 0)),
            "dilation": ((1, 1), (2, 2), (1, 3)),
            "groups": (1, 2, 3),
            "depthwise": (False, False, True),
        },
        build=_build,
        interesting=(
            _rows_draw(4, (7, 7), (2, 2)),
            _rows_draw(4, (3, 5), (1, 1)),
            _rows_draw(8, (5, 5), (2, 1)),
            # Blocks of groups, the last of them not full.
            {**_rows_draw(4, (3, 3), (1, 1)), "K": 4, "groups": 9},
            {**_rows_draw(3, (3, 3), (2, 2)), "K": 5, "groups": 7, "dilation": (1, 2)},
            # Depthwise, with a border on every side, each of another width.
            {**_rows_draw(20, (3, 3), (1, 1)), "padding": (1, 2, 2, 1), "depthwise": True},
            {**_rows_draw(33, (5, 5), (2, 2)), "padding": (2, 2, 2, 2), "depthwise": True},
        ),
    ),
    aten={"aten.conv2d.default": _capture, "aten.conv2d.padding": _capture},
    packs=lambda attributes: {1: _pack_for_algorithm},
    takes_prologue=True,
)
