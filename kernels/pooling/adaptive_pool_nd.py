"""Adaptive pooling of volumes; that of sequences by way of images.

y[n,c,o,p,q] = the maximum or the average of x over floor(o·D / O) <= d < ceil((o+1)·D / O), h and w
likewise. x: (N, C, D, H, W) channels innermost in memory -> y: (N, C, O, P, Q) likewise; fp32
accumulation. The kernel is that of `pool_nd.py`; pooling to one voxel is a reduction (`reduce.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract.op import Arguments, Builder, Capture, Op
from ..contract.spec import Layout, TensorSpec
from ..movement.arguments import adaptive_size
from ..normalisation.reduce import Reduce
from .pool_nd import configs, cost, default, launches, legal
from .pool_window import AdaptivePool3d


def infer(
    name: str, attributes: AdaptivePool3d, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """(N, C, *size)."""
    (x,) = inputs
    if x.rank != 5:
        raise InvalidInputError(f"{name}: expected x (N,C,D,H,W), got {x}")
    if min(*attributes.size, *x.shape[2:]) < 1:
        raise InvalidInputError(f"{name}: cannot pool {x} to {attributes.size}; both need voxels")
    return (TensorSpec((*x.shape[:2], *attributes.size), x.dtype, Layout.NHWC, x.batch),)


def reference_avg(attributes: AdaptivePool3d, x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_avg_pool3d(x, attributes.size)


def reference_max(attributes: AdaptivePool3d, x: torch.Tensor) -> torch.Tensor:
    return F.adaptive_max_pool3d(x, attributes.size)


def _capture(name: str, reduction: str, indices: bool) -> Capture:
    """With `indices` the call has a second result, for whose readers there is no kernel."""

    def capture(g: Builder, a: Arguments) -> Any:
        size = adaptive_size(g, a)
        if size == (1, 1, 1):
            y = g.apply(reduction, (a.self,), Reduce((2, 3, 4), keepdim=True))
        else:
            y = g.apply(name, (a.self,), AdaptivePool3d(size))
        return (y, None) if indices else y

    return capture


def _op(name: str, reference: Any, aten: Mapping[str, Capture]) -> Op:
    return Op(
        name=name,
        attributes=AdaptivePool3d,
        infer=partial(infer, name),
        reference=reference,
        launches=launches,
        configs=configs,
        default=default,
        legal=legal,
        cost=cost,
        aten=aten,
        batched="pooling",
    )


OPS = (
    _op(
        "adaptive_avg_pool3d",
        reference_avg,
        {"aten.adaptive_avg_pool3d.default": _capture("adaptive_avg_pool3d", "mean", False)},
    ),
    _op(
        "adaptive_max_pool3d",
        reference_max,
        {"aten.adaptive_max_pool3d.default": _capture("adaptive_max_pool3d", "amax", True)},
    ),
)
