"""rearrange: y = x.reshape(split).permute(dims).reshape(shape); flip: dimensions reversed.

Pixel shuffle and unshuffle, channel shuffle and partition into windows are rearrangements whose
first reshape only splits dimensions and whose second only merges them. Every part then has one
stride in x and one in y, in any memory layout, and the pointwise kernel copies with these strides;
so it does, with negative ones, for flip. Each element is read and written once.

x: any rank, dense or NHWC; y: `shape`, or x's own, in the layout of x where ranks allow it.
"""

from __future__ import annotations

from typing import Any

import torch

from ...errors import InvalidInputError
from ..contract.aten import Arguments, Builder
from ..contract.op import Config, Launch, Problem, Target
from ..contract.spec import TensorSpec
from . import movement, pointwise
from .rearrangement import Flip, Rearrange, factors, parts_of


def infer_rearrange(
    attributes: Rearrange, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """The new shape in the input's layout; NHWC where a rank 4 is made of an image."""
    (x,) = inputs
    split, dims, shape = attributes.split, attributes.dims, attributes.shape
    if sorted(dims) != list(range(len(split))):
        raise InvalidInputError(f"rearrange: {dims} does not permute the parts {split} of {x}")
    if min(x.shape, default=1) < 1 or factors(x.shape, split) is None:
        raise InvalidInputError(f"rearrange: {split} does not split the dimensions of {x}")
    if factors(shape, attributes.parts) is None:
        raise InvalidInputError(f"rearrange: {attributes.parts} does not merge into {shape}")
    if x.batch is not None and (dims[0] != 0 or split[0] != x.shape[0] or shape[0] % x.batch):
        raise InvalidInputError(f"rearrange: the batch of {x} must stay whole in dimension 0")
    return (TensorSpec(shape, x.dtype, movement.layout_for(shape, x), x.batch),)


def infer_flip(attributes: Flip, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    if not all(0 <= dim < x.rank for dim in attributes.dims):
        raise InvalidInputError(f"flip: {x} has no dimensions {attributes.dims}")
    if x.batch is not None and 0 in attributes.dims:
        raise InvalidInputError(f"flip: the batch of {x} must stay in order")
    return (x,)


def rearrange(attributes: Rearrange, x: torch.Tensor) -> torch.Tensor:
    # At another batch than the largest, only dimension 0 differs.
    parts = x.reshape(-1, *attributes.split[1:]).permute(attributes.dims)
    return parts.reshape(-1, *attributes.shape[1:])


def flip(attributes: Flip, x: torch.Tensor) -> torch.Tensor:
    return x.flip(attributes.dims)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes = problem.attributes.expect(Rearrange)
    parts = parts_of(attributes, problem.inputs[0], problem.output.spec)
    return (pointwise.launch_parts(problem, tile, parts.sizes, parts.read, parts.of_output),)


def _shuffled(g: Builder, x: Any, r: int, back: bool = False) -> Any:
    """Channels as r x r pixels each, or such pixels as channels."""
    if g.spec(x).rank != 4:
        return g.refuse(f"pixel {'unshuffle' if back else 'shuffle'} of other ranks than 4")
    n, c, h, w = g.spec(x).shape
    if back:
        h, w = h // r, w // r
        split, dims, shape = (n, c, h, r, w, r), (0, 1, 3, 5, 2, 4), (n, c * r * r, h, w)
    else:
        c //= r * r
        split, dims, shape = (n, c, r, r, h, w), (0, 1, 4, 2, 5, 3), (n, c, h * r, w * r)
    return g.apply("rearrange", (x,), Rearrange(split, dims, shape))


def _capture_channel_shuffle(g: Builder, a: Arguments) -> Any:
    n, c, *pixels = g.spec(a.self).shape
    split = (n, a.groups, c // a.groups, *pixels)
    dims = (0, 2, 1, *range(3, len(split)))
    return g.apply("rearrange", (a.self,), Rearrange(split, dims, g.spec(a.self).shape))


def _capture_flip(g: Builder, a: Arguments) -> Any:
    dims = sorted(dim % g.spec(a.self).rank for dim in a.dims)
    return g.apply("flip", (a.self,), Flip(tuple(dims)))


OPS = (
    pointwise.copying(
        "rearrange", Rearrange, infer_rearrange, rearrange, launches,
        aten={
            "aten.pixel_shuffle.default": lambda g, a: _shuffled(g, a.self, a.upscale_factor),
            "aten.pixel_unshuffle.default": lambda g, a: _shuffled(
                g, a.self, a.downscale_factor, back=True
            ),
            "aten.channel_shuffle.default": _capture_channel_shuffle,
        },
        follows=True, integers=True, writes_any=True,
    ),
    pointwise.copying(
        "flip", Flip, infer_flip, flip, movement.launches,
        aten={"aten.flip.default": _capture_flip}, follows=True, integers=True,
    ),
)  # fmt: skip
