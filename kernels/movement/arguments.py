"""Arguments of convolutions and poolings as aten gives them, and 1-d ops by way of 2-d ones.

(N, C, L) is the image (N, C, 1, L): the same elements in the same order. Consecutive 1-d ops leave
reshapes between them that undo each other, and a pass removes those.
"""

from __future__ import annotations

from typing import Any

from ..contract.epilogue import Stage
from ..contract.op import Attributes, Builder
from ..tile.conv_geometry import same_padding
from .rearrangement import Reshape


def numbers(value: Any, count: int) -> tuple[int, ...]:
    """An argument, one number or one per dimension, as `count` numbers."""
    given = [value] if isinstance(value, int) else list(value)
    return tuple(int(number) for number in (given * count if len(given) == 1 else given))


def both_sides(
    padding: Any, filter_size: tuple[int, ...], dilation: tuple[int, ...]
) -> tuple[int, ...]:
    """Before and after of every dimension, from numbers or from "same" or "valid"."""
    if padding == "valid":
        return (0,) * (2 * len(dilation))
    if padding == "same":
        pairs = [same_padding(r, d) for r, d in zip(filter_size, dilation, strict=True)]
        return tuple(width for pair in pairs for width in pair)
    return tuple(width for width in numbers(padding, len(dilation)) for _ in (0, 1))


def with_bias(g: Builder, op: str, x: Any, w: Any, b: Any, attributes: Attributes) -> Any:
    """The op with its bias, one number per channel, as an epilogue."""
    if b is None:
        return g.apply(op, (x, w), attributes)
    trailing = (1,) * (g.spec(x).rank - 2)
    bias = g.apply("reshape", (b,), Reshape((*g.spec(b).shape, *trailing)))
    return g.apply(op, (x, w, bias), attributes, (Stage("add"),))


def as_image(g: Builder, x: Any) -> Any:
    """(N, C, L) -> (N, C, 1, L), and weights likewise."""
    n, c, length = g.spec(x).shape
    return g.apply("reshape", (x,), Reshape((n, c, 1, length)))


def as_sequence(g: Builder, x: Any) -> Any:
    """(N, C, 1, L) -> (N, C, L)."""
    n, c, _, length = g.spec(x).shape
    return g.apply("reshape", (x,), Reshape((n, c, length)))
