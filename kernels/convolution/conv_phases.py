"""What transposed convolutions compute: attributes, the output-size rule, torch's own results, and
how their outputs fall into phases. The kernel is in `conv_transpose.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch

from ...errors import InvalidInputError
from ..contract.op import Attributes, Problem
from ..contract.spec import Layout, TensorSpec
from ..tile.torch_convolution import convolve_transposed


@dataclass(frozen=True)
class ConvTranspose2d(Attributes):
    """Everything per dimension, as torch has it; `padding` takes away from both sides of the
    output, `output_padding` gives back to its end."""

    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    output_padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class ConvTranspose3d(ConvTranspose2d):
    """The same with the depth in front."""

    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    output_padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)


class Axis(NamedTuple):
    """One dimension: sizes of input, filter and output; stride, padding, dilation; and what follows
    from them.

    shared: only phases f with f + padding a multiple of this have taps; inverse: of dilation /
    shared modulo `every`, leads from a phase to its first tap; tap_count: of a phase, None where it
    differs between phases; is_open: whether some tap reaches outside the input.
    """

    size: int
    taps: int
    outputs: int
    stride: int
    padding: int
    dilation: int
    shared: int
    inverse: int
    tap_count: int | None
    is_open: bool

    @staticmethod
    @cache
    def of(
        size: int = 1, taps: int = 1, outputs: int = 1, stride: int = 1, padding: int = 0,
        dilation: int = 1,
    ) -> Axis:  # fmt: skip
        shared = math.gcd(dilation, stride)
        axis = Axis(size, taps, outputs, stride, padding, dilation, shared, 0, None, False)
        alike = shared == 1 and taps % axis.every == 0
        return axis._replace(
            inverse=pow(dilation // shared, -1, axis.every),
            tap_count=axis.most if alike else None,
            is_open=any(
                (output + padding - tap * dilation) % stride == 0
                and not 0 <= output + padding - tap * dilation < size * stride
                for output in range(outputs)
                for tap in range(taps)
            ),
        )

    @property
    def every(self) -> int:
        """From one tap of a phase to the next."""
        return self.stride // self.shared

    @property
    def most(self) -> int:
        """The most taps that a phase has."""
        return -(-self.taps // self.every)

    @property
    def phase_outputs(self) -> int:
        """Outputs of the longest phase."""
        return -(-self.outputs // self.stride)


def infer(
    name: str, attributes: ConvTranspose2d, inputs: tuple[TensorSpec, ...]
) -> tuple[TensorSpec, ...]:
    """P = (H − 1)·sh − 2·ph + dh·(R − 1) + output padding + 1; the others likewise."""
    x, w = inputs
    dims = len(attributes.stride)
    if x.rank != dims + 2 or w.rank != dims + 2:
        expected = "(N,C,H,W), w (C,K/G,R,S)" if dims == 2 else "(N,C,D,H,W), w (C,K/G,T,R,S)"
        raise InvalidInputError(f"{name}: expected x {expected}, got {x}, {w}")
    c, groups = x.shape[1], attributes.groups
    if groups < 1 or c % groups or w.shape[0] != c:
        raise InvalidInputError(
            f"{name}: {c} input channels with weight {w} do not divide into {groups} groups"
        )
    if min(*attributes.stride, *attributes.dilation) < 1 or min(attributes.padding) < 0:
        raise InvalidInputError(
            f"{name}: stride and dilation must be positive, padding not negative: {attributes}"
        )
    sizes = []
    for at in range(dims):
        stride, dilation = attributes.stride[at], attributes.dilation[at]
        more, padding = attributes.output_padding[at], attributes.padding[at]
        if not 0 <= more < max(stride, dilation):
            raise InvalidInputError(
                f"{name}: output_padding {attributes.output_padding} must be smaller than stride "
                f"{attributes.stride} or dilation {attributes.dilation}"
            )
        size, extent = x.shape[at + 2], dilation * (w.shape[at + 2] - 1) + 1
        sizes.append((size - 1) * stride - 2 * padding + extent + more)
        if sizes[-1] < 1:
            raise InvalidInputError(
                f"{name}: padding {padding} leaves nothing of dimension {at + 2}: {x} with a "
                f"filter of {extent} pixels and stride {stride} gives {sizes[-1]}"
            )
    k = groups * w.shape[1]
    return (TensorSpec((x.shape[0], k, *sizes), x.dtype, Layout.NHWC, x.batch),)


def reference(attributes: ConvTranspose2d, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return convolve_transposed(x, w, **vars(attributes))


def pack(attributes: ConvTranspose2d, w: torch.Tensor) -> torch.Tensor:
    """(C, K/G, R, S) -> (K, R·S·C/G); with one channel per group (R·S, K) in fp32."""
    groups, (c, per_group_out) = attributes.groups, w.shape[:2]
    if c == groups > 1:
        return w.reshape(c * per_group_out, -1).t().contiguous().float()
    grouped = w.reshape(groups, c // groups, per_group_out, -1)
    return grouped.permute(0, 2, 3, 1).reshape(groups * per_group_out, -1).contiguous()


def axes(problem: Problem) -> tuple[Axis, Axis, Axis]:
    """Depth, height and width; images have a depth of one."""
    attributes = problem.attributes.expect(ConvTranspose2d)
    sizes = (tensor.shape[2:] for tensor in (*problem.inputs, problem.output))
    geometry = (*sizes, attributes.stride, attributes.padding, attributes.dilation)
    given = [Axis.of(*each) for each in zip(*geometry, strict=True)]
    depth, height, width = [Axis.of()] * (3 - len(given)) + given
    return depth, height, width
