"""Arguments of convolutions and poolings as aten gives them, and 1-d ops by way of 2-d ones.

(N, C, L) is the image (N, C, 1, L): the same elements in the same order. Consecutive 1-d ops leave
reshapes between them that undo each other, and a pass removes those.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..contract.epilogue import Stage
from ..contract.op import Arguments, Attributes, Builder, Capture
from ..tile.conv_geometry import Conv2d, SampleConv2d, same_padding
from .movement import Permute
from .rearrangement import Flip, Reshape

PER_DIMENSION = ("kernel_size", "stride", "padding", "output_padding", "dilation")


def numbers(value: Any, count: int) -> tuple[int, ...]:
    """An argument, one number or one per dimension, as `count` numbers."""
    given = [value] if isinstance(value, int) else list(value)
    return tuple(int(number) for number in (given * count if len(given) == 1 else given))


def sizes(g: Builder, a: Arguments, name: str) -> tuple[int, ...]:
    """An argument as one number per dimension of an image or volume; of a sequence, as that of an
    image of one row. A stride that is not given is the window's size."""
    dims = g.spec(a.first).rank - 2
    given = numbers(a.kernel_size if a[name] in ([], ()) else a[name], dims)
    row = () if dims > 1 else (0,) if "padding" in name else (1,)
    return (*row, *given)


def adaptive_size(g: Builder, a: Arguments) -> Any:
    """How large an adaptive pooling's result is, with a row in front of a sequence's; None in
    `output_size` keeps a dimension."""
    extents, given = g.spec(a.self).shape[2:], a.output_size
    given = [given] if isinstance(given, int) else list(given)
    if len(given) == 1:
        given *= len(extents)
    kept = zip(extents, given, strict=True)
    size = tuple(old if new is None else int(new) for old, new in kept)
    return size if len(size) > 1 else (1, *size)


def attributes_of(g: Builder, a: Arguments, make: type[Attributes], **others: Any) -> Attributes:
    """Attributes whose fields are the arguments of the same names, but for the others."""
    for name in (field.name for field in fields(make)):
        argument = "kernel_size" if name == "kernel" else name
        if name not in others and argument in a:
            many = argument in PER_DIMENSION
            others[name] = sizes(g, a, argument) if many else a[argument]
    return make(**others)


def pooling(op: str, make: type[Attributes], indices: bool = False) -> Capture:
    """The capture of poolings with a window, of images, volumes or sequences. With `indices` the op
    has a second output."""

    def capture(g: Builder, a: Arguments) -> Any:
        values = g.apply(op, (as_image(g, a.self),), attributes_of(g, a, make))
        y = as_rank_of(g, values, a.self)
        return (y, as_rank_of(g, g.output(values, 1), a.self)) if indices else y

    return capture


def convolution(op: str, make: type[Attributes]) -> Capture:
    """The capture of convolutions whose padding is before and after every dimension."""

    def capture(g: Builder, a: Arguments) -> Any:
        dilation = sizes(g, a, "dilation")
        pairs: list[tuple[int, int]] = [(0, 0)] * len(dilation)
        if a.padding == "same":
            filter_size = g.spec(a.weight).shape[2:]
            rows = (1,) * (len(dilation) - len(filter_size))
            extents = (*rows, *filter_size)
            pairs = [same_padding(r, d) for r, d in zip(extents, dilation, strict=True)]
        elif a.padding != "valid":
            pairs = [(width, width) for width in sizes(g, a, "padding")]
        sides = tuple(width for pair in pairs for width in pair)
        return with_bias(g, op, a, attributes_of(g, a, make, padding=sides))

    return capture


def with_bias(g: Builder, op: str, a: Arguments, attributes: Attributes) -> Any:
    """A convolution with its bias, one number per channel, as an epilogue."""
    if g.is_computed(a.weight):
        return as_rank_of(g, _by_sample(g, op, a, attributes), a.input)
    x, inputs = a.input, [as_image(g, a.input), as_image(g, a.weight)]
    if a.bias is None:
        return as_rank_of(g, g.apply(op, inputs, attributes), x)
    trailing = (1,) * (g.spec(inputs[0]).rank - 2)
    bias = g.apply("reshape", (a.bias,), Reshape((*g.spec(a.bias).shape, *trailing)))
    return as_rank_of(g, g.apply(op, (*inputs, bias), attributes, (Stage("add"),)), x)


def _by_sample(g: Builder, op: str, a: Arguments, attributes: Any) -> Any:
    """A convolution of images with weights that are computed.

    With filters of its own for each sample it is written as one of a single image, which has the
    channels of all samples in groups: where that shows, it is one of samples again.
    """
    if op not in ("conv2d", "conv_transpose2d"):
        return g.refuse(f"{op} with computed weights; only images and sequences are convolved so")
    x, w, groups = as_image(g, a.input), as_image(g, a.weight), attributes.groups
    n, is_split = 1, False
    if g.spec(w).batch is not None:
        n = g.spec(x).shape[0]
    elif (split := _samples_of(g, x, groups)) is not None:
        x, n, groups = split, g.spec(split).shape[0], groups // g.spec(split).shape[0]
        is_split = True
    first, second, *kernel = g.spec(w).shape
    padding: Any
    order: tuple[int, ...]
    if isinstance(attributes, Conv2d):
        k, stride, padding = first // n, attributes.stride, attributes.padding
        spread, order = (1, 1), (0, 2, 3, 1)
    else:
        k, stride, spread = groups * second, (1, 1), attributes.stride
        padding = _of_transposed(attributes, kernel)
        w = g.apply("reshape", (w,), Reshape((n * groups, first // (n * groups), second, *kernel)))
        w, order = g.apply("flip", (w,), Flip((3, 4))), (0, 2, 3, 4, 1)
    w = g.apply("permute", (w,), Permute(order))
    w = g.apply("reshape", (w,), Reshape((n, k, g.spec(w).numel // (n * k))))
    convolution = SampleConv2d(
        stride, padding, attributes.dilation, groups, (kernel[0], kernel[1]), spread
    )
    if a.bias is None:
        y = g.apply("sample_conv2d", (x, w), convolution)
    else:
        banks = g.spec(a.bias).shape[0] // k
        bias = g.apply("reshape", (a.bias,), Reshape((banks, k, 1, 1)))
        y = g.apply("sample_conv2d", (x, w, bias), convolution, (Stage("add"),))
    return g.apply("reshape", (y,), Reshape((1, n * k, *g.spec(y).shape[2:]))) if is_split else y


def _samples_of(g: Builder, x: Any, groups: int) -> Any:
    """The (N, C, H, W) that a single image with N·C channels was made of, whose groups each belong
    to one sample; or None."""
    made = g.maker(x)
    if made is None or made[0] != "reshape":
        return None
    (source,) = made[2]
    shape, wanted = g.spec(source).shape, g.spec(x).shape
    folds = len(shape) == 4 and wanted == (1, shape[0] * shape[1], *shape[2:])
    return source if folds and shape[0] > 1 and groups % shape[0] == 0 else None


def _of_transposed(attributes: Any, kernel: Any) -> tuple[int, ...]:
    """The padding of the convolution of the spread image that a transposed one is."""
    sides = []
    for at, size in enumerate(kernel):
        reach = attributes.dilation[at] * (size - 1) - attributes.padding[at]
        sides += [reach, reach + attributes.output_padding[at]]
    return tuple(sides)


def as_image(g: Builder, x: Any) -> Any:
    """(N, C, L) -> (N, C, 1, L), and weights likewise; images and volumes stay as they are."""
    if g.spec(x).rank != 3:
        return x
    n, c, length = g.spec(x).shape
    return g.apply("reshape", (x,), Reshape((n, c, 1, length)))


def as_rank_of(g: Builder, y: Any, x: Any) -> Any:
    """(N, C, 1, L) -> (N, C, L) where x is a sequence; else y."""
    if g.spec(x).rank != 3:
        return y
    n, c, _, length = g.spec(y).shape
    return g.apply("reshape", (y,), Reshape((n, c, length)))
