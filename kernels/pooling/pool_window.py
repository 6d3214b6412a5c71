"""What windowed pooling computes: attributes, the output-size rule, and torch's own results.

The kernel that computes it is in `pool.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract.epilogue import Epilogue, Stage
from ..contract.op import Attributes, Problem
from ..contract.spec import Layout, Operand, TensorSpec


@dataclass(frozen=True)
class MaxPool2d(Attributes):
    """Everything as (vertical, horizontal); `padding` is on both sides, with -inf."""

    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    dilation: tuple[int, ...] = (1, 1)
    ceil_mode: bool = False


@dataclass(frozen=True)
class AvgPool2d(Attributes):
    """Everything as (vertical, horizontal); `padding` is on both sides, with zeros.

    The divisor is `divisor_override`, or how many pixels of the window lie in the padded image
    (in the image itself without `count_include_pad`).
    """

    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    padding: tuple[int, ...] = (0, 0)
    ceil_mode: bool = False
    count_include_pad: bool = True
    divisor_override: int | None = None

    @property
    def dilation(self) -> tuple[int, ...]:
        return (1,) * len(self.kernel)


@dataclass(frozen=True)
class LpPool2d(Attributes):
    """The norm's p > 0, and the window as (vertical, horizontal)."""

    norm: float = 2.0
    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)
    ceil_mode: bool = False

    padding = (0, 0)
    dilation = (1, 1)


@dataclass(frozen=True)
class MaxPool3d(MaxPool2d):
    """The same with the depth in front."""

    kernel: tuple[int, ...] = (1, 1, 1)
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)
    dilation: tuple[int, ...] = (1, 1, 1)


@dataclass(frozen=True)
class AvgPool3d(AvgPool2d):
    """The same with the depth in front."""

    kernel: tuple[int, ...] = (1, 1, 1)
    stride: tuple[int, ...] = (1, 1, 1)
    padding: tuple[int, ...] = (0, 0, 0)


@dataclass(frozen=True)
class InnerWindow(Attributes):
    """The window and its stride as (vertical, horizontal); windows lie inside the image."""

    kernel: tuple[int, ...] = (1, 1)
    stride: tuple[int, ...] = (1, 1)

    padding = (0, 0)
    dilation = (1, 1)
    ceil_mode = False


@dataclass(frozen=True)
class AdaptivePool2d(Attributes):
    """The output's height and width."""

    size: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class AdaptivePool3d(Attributes):
    """The output's depth, height and width."""

    size: tuple[int, int, int] = (1, 1, 1)


Pool = MaxPool2d | AvgPool2d | LpPool2d | InnerWindow
AdaptivePool = AdaptivePool2d | AdaptivePool3d


class Axis(NamedTuple):
    """The windows of one dimension, which takes part in none by default.

    size: of the input; outputs: how many windows; taps: of each (the largest where they differ);
    then the distance from one window to the next, from the first window to the input, and from one
    tap to the next.
    """

    size: int = 1
    outputs: int = 1
    taps: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1


class Windows(NamedTuple):
    """The windows over depth (of images: of one plane), height and width; from one pixel to the
    next the input has `row_stride` elements, and `offset` before the first."""

    depth: Axis
    height: Axis
    width: Axis
    row_stride: int
    offset: int

    @staticmethod
    def of(attributes: Any, x: Operand, y: Operand) -> Windows:
        """Of a pooling of x (N, C, H, W) or (N, C, D, H, W) to y."""
        sizes = zip(x.shape[2:], y.shape[2:], strict=True)
        if isinstance(attributes, (AdaptivePool2d, AdaptivePool3d)):
            axes = [Axis(size, outputs, largest_window(size, outputs)) for size, outputs in sizes]
        else:
            geometry = zip(
                attributes.kernel, attributes.stride, attributes.padding, attributes.dilation,
                strict=True,
            )  # fmt: skip
            axes = [Axis(*pair, *rest) for pair, rest in zip(sizes, geometry, strict=True)]
        depth, height, width = [Axis()] * (3 - len(axes)) + axes
        return Windows(depth, height, width, x.pitch, x.offset)

    @property
    def plane_taps(self) -> int:
        """Taps of one plane of a window."""
        return self.height.taps * self.width.taps

    @property
    def taps(self) -> int:
        return self.depth.taps * self.plane_taps


def windows(problem: Problem) -> Windows:
    """The windows of a problem, whose attributes and first input say where they lie."""
    return Windows.of(problem.attributes, problem.inputs[0], problem.output)


def pixels_read(problem: Problem, pool: MaxPool2d | AvgPool2d, results: int) -> int:
    """Pixels under the windows of so many neighbouring results, each once."""
    (h, width), (p, q) = problem.inputs[0].shape[2:], problem.output.shape[2:]
    results = min(results, p * q)
    rows = min(h, (-(-results // q) - 1) * pool.stride[0] + pool.kernel[0])
    return rows * min(width, (min(results, q) - 1) * pool.stride[1] + pool.kernel[1])


def largest_window(size: int, outputs: int) -> int:
    """The most elements that one of `outputs` adaptive windows takes of `size`."""
    return max(-(-(at + 1) * size // outputs) - at * size // outputs for at in range(outputs))


class Reduction(NamedTuple):
    """How the kernel reduces a window.

    maximum: the maximum instead of the sum; counts: whose pixels divide the sum ("padded", "image",
    or the "taps" of an adaptive window) where their number differs between windows; divisor: their
    number where it does not; norm: the p of an Lp norm; adaptive: how the windows lie.
    """

    maximum: bool = False
    counts: str | None = None
    divisor: int | None = None
    norm: float | None = None
    adaptive: bool = False

    @property
    def divide(self) -> Epilogue:
        """The stage that divides sums by one number for all, where there is one."""
        return () if self.divisor is None else (Stage("div", literal=float(self.divisor)),)


def reduction(problem: Problem) -> Reduction:
    """The reduction that the problem's attributes ask for."""
    attributes = problem.attributes
    if isinstance(attributes, MaxPool2d):
        return Reduction(maximum=True)
    if isinstance(attributes, (AdaptivePool2d, AdaptivePool3d)):
        maximum = problem.op.startswith("adaptive_max")
        return Reduction(maximum, None if maximum else "taps", adaptive=True)
    if isinstance(attributes, LpPool2d):
        # Without overhang the mean times R·S is the sum.
        counts = "padded" if _overhangs(problem) else None
        norm = attributes.norm
        return Reduction(counts=counts, norm=int(norm) if norm == int(norm) else norm)
    average = attributes.expect(AvgPool2d)
    if average.divisor_override is not None:
        return Reduction(divisor=average.divisor_override)
    padded = average.count_include_pad or not any(average.padding)
    if not padded or _overhangs(problem):
        return Reduction(counts="padded" if padded else "image")
    return Reduction(divisor=math.prod(average.kernel))


def _overhangs(problem: Problem) -> bool:
    """Whether the last window reaches beyond the padded image, as `ceil_mode` allows."""
    return any(
        (axis.outputs - 1) * axis.stride + axis.taps > axis.size + 2 * axis.padding
        for axis in windows(problem)[:3]
    )


def output_size(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> int:
    """Windows along one dimension by ATen's rule: with `ceil_mode` the last one may overhang, but
    must start inside the image or its leading padding."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1
    return count


def infer(name: str, attributes: Pool, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """P = floor or ceil of (H + 2·ph − dh·(R − 1) − 1) / sh, plus 1; the others likewise."""
    (x,) = inputs
    dims = len(attributes.kernel)
    if x.rank != dims + 2:
        expected = "(N,C,H,W)" if dims == 2 else "(N,C,D,H,W)"
        raise InvalidInputError(f"{name}: expected x {expected}, got {x}")
    if min(*attributes.kernel, *attributes.stride, *attributes.dilation) < 1:
        raise InvalidInputError(f"{name}: window, stride, dilation must be positive: {attributes}")
    if isinstance(attributes, AvgPool2d) and attributes.divisor_override == 0:
        raise InvalidInputError(f"{name}: divisor_override must not be zero")
    if isinstance(attributes, LpPool2d) and not 0 < attributes.norm < math.inf:
        raise InvalidInputError(f"{name}: the norm must be positive, got {attributes.norm}")
    sizes = []
    for axis in range(dims):
        kernel, dilation = attributes.kernel[axis], attributes.dilation[axis]
        padding, stride = attributes.padding[axis], attributes.stride[axis]
        if not 0 <= padding <= kernel // 2:
            raise InvalidInputError(
                f"{name}: padding {attributes.padding} must be at most half the window "
                f"{attributes.kernel}, as in torch"
            )
        size = output_size(
            x.shape[2 + axis], kernel, stride, padding, dilation, attributes.ceil_mode
        )
        # Torch wants windows of average pooling in three dimensions to fit without padding.
        unpadded = isinstance(attributes, AvgPool3d) and kernel > x.shape[2 + axis]
        if size < 1 or unpadded:
            raise InvalidInputError(
                f"{name}: a window of {dilation * (kernel - 1) + 1} pixels does not fit dimension "
                f"{axis + 2} of {x} padded by {padding}"
            )
        sizes.append(size)
    n, c = x.shape[:2]
    return (TensorSpec((n, c, *sizes), x.dtype, Layout.NHWC, x.batch),)


def reference(function: Callable[..., Any], attributes: Attributes, x: torch.Tensor) -> Any:
    """By a function of torch, whose arguments the attributes are, in its order."""
    return function(x, *(getattr(attributes, item.name) for item in fields(attributes)))


def name_of(pool: MaxPool2d | AvgPool2d) -> str:
    """The op that a pooling inside another op is by itself."""
    return "max_pool2d" if isinstance(pool, MaxPool2d) else "avg_pool2d"


def pooled(pool: MaxPool2d | AvgPool2d, x: torch.Tensor) -> torch.Tensor:
    """The reference of a pooling inside another op."""
    result: torch.Tensor = reference(getattr(F, name_of(pool)), pool, x)
    return result
