"""Problems of `kernels/movement/movement_ops.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from convloom.kernels.movement.movement import Concat, FlattenPixels, Permute, Relayout, Slice
from convloom.kernels.movement.rearrangement import Expand, Reshape

from ...properties.domain import Domain


def _spec(shape: tuple[int, ...], layout: Layout) -> TensorSpec:
    """Images are NHWC, volumes may be, everything else is dense."""
    images = {4: Layout.NHWC, 5: layout}
    return TensorSpec(shape, torch.float32, images.get(len(shape), Layout.DENSE))


SHAPES = ((1,), (4, 6), (2, 3, 5), (2, 4, 3, 5), (1, 1, 8, 4), (3, 16, 1, 1), (2, 3, 2, 2, 3))


def _build_reshape(draw: Mapping[str, Any]) -> tuple[Reshape, tuple[TensorSpec, ...]] | None:
    x = TensorSpec(draw["shape"], torch.float32)
    if draw["flat"]:
        return Reshape((x.shape[0], x.numel // x.shape[0])), (x,)
    return Reshape((x.numel,)), (x,)


def _build_flatten(
    draw: Mapping[str, Any],
) -> tuple[FlattenPixels, tuple[TensorSpec, ...]] | None:
    x = _spec(draw["shape"], Layout.NHWC)
    return (FlattenPixels(), (x,)) if x.rank in MEMORY_FORMATS else None


def _build_permute(draw: Mapping[str, Any]) -> tuple[Permute, tuple[TensorSpec, ...]] | None:
    rank = len(draw["shape"])
    dims = sorted(range(rank), key=lambda dim: (draw["seed"] * (dim + 3)) % 7)
    return Permute(tuple(dims)), (_spec(draw["shape"], draw["layout"]),)


def _build_expand(draw: Mapping[str, Any]) -> tuple[Expand, tuple[TensorSpec, ...]] | None:
    shape = draw["shape"]
    dim = draw["seed"] % len(shape)
    small = tuple(1 if at == dim else size for at, size in enumerate(shape))
    kept = tuple(-1 if draw["flat"] and at != dim else size for at, size in enumerate(shape))
    return Expand(kept), (_spec(small, draw["layout"]),)


def _build_slice(draw: Mapping[str, Any]) -> tuple[Slice, tuple[TensorSpec, ...]] | None:
    shape = draw["shape"]
    dim = draw["seed"] % len(shape)
    stop = shape[dim] - draw["cut"]
    if stop - draw["cut"] < 1:
        return None
    return Slice(dim, draw["cut"], stop, draw["step"]), (_spec(shape, draw["layout"]),)


def _build_concat(draw: Mapping[str, Any]) -> tuple[Concat, tuple[TensorSpec, ...]] | None:
    shape = draw["shape"]
    if len(shape) == 1:
        return None
    dim = draw["seed"] % len(shape)
    shapes = [(*shape[:dim], size, *shape[dim + 1 :]) for size in (3, shape[dim], 8)]
    specs = [_spec(part, draw["layout"]) for part in shapes]
    return Concat(dim), tuple(specs[: draw["count"]])


def _build_relayout(draw: Mapping[str, Any]) -> tuple[Relayout, tuple[TensorSpec, ...]] | None:
    spec = _spec(draw["shape"], Layout.DENSE if draw["flat"] else Layout.NHWC)
    layout = draw["layout"] if spec.rank in MEMORY_FORMATS else Layout.DENSE
    return Relayout(layout, torch.float32), (spec,)


def _domain(build: Any) -> Domain:
    return Domain(
        ranges={
            "shape": SHAPES,
            "seed": tuple(range(1, 7)),
            "cut": (0, 1),
            "step": (1, 2),
            "count": (1, 2, 3),
            "flat": (False, True),
            "layout": tuple(Layout),
        },
        build=build,
    )


DOMAINS = {
    name: _domain(build)
    for name, build in {
        "reshape": _build_reshape,
        "flatten_pixels": _build_flatten,
        "permute": _build_permute,
        "expand": _build_expand,
        "slice": _build_slice,
        "concat": _build_concat,
        "relayout": _build_relayout,
    }.items()
}
