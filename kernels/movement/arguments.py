"""Arguments of convolutions and poolings as aten gives them, and 1-d ops by way of 2-d ones.

(N, C, L) is the image (N, C, 1, L): the same elements in the same order. Consecutive 1-d ops leave
reshapes between them that undo each other, and a pass removes those.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ..contract.epilogue import Stage
from ..contract.op import Arguments, Attributes, Builder, Capture
from ..tile.conv_geometry import same_padding
from .rearrangement import Reshape

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


def attributes_of(
    g: Builder, a: Arguments, make: type[Attributes], **others: Any
) -> Attributes:
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
    x, inputs = a.input, [as_image(g, a.input), as_image(g, a.weight)]
    if a.bias is None:
        return as_rank_of(g, g.apply(op, inputs, attributes), x)
    trailing = (1,) * (g.spec(inputs[0]).rank - 2)
    bias = g.apply("reshape", (a.bias,), Reshape((*g.spec(a.bias).shape, *trailing)))
    return as_rank_of(g, g.apply(op, (*inputs, bias), attributes, (Stage("add"),)), x)


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
