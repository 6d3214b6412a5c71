"""Fourier transforms of a fixed size, and what is computed with their complex results.

While an exported program is traced again a complex tensor is a pair of real ones. A transform along
one dimension is then a product with a constant matrix of cosines and sines, a linear layer; along
several dimensions it is one after the other. That is n² products for n points, where a fast
transform has n · log2(n) sums: up to some hundred points, as images have, matrix units make up for
it. Complex tensors never reach a graph: what the table below does not have is refused by name.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils import _pytree as pytree

aten = torch.ops.aten


class Pair(NamedTuple):
    """A complex tensor."""

    real: Any
    imag: Any


def _pair(x: Any) -> Pair:
    """A number or tensor as a pair; a complex constant is taken apart."""
    if isinstance(x, torch.Tensor):
        return Pair(*torch.view_as_real(x).unbind(-1)) if x.is_complex() else Pair(x, x * 0.0)
    return x if isinstance(x, Pair) else Pair(x.real, x.imag)


def _parts(x: Any) -> list[Any]:
    """The real tensors, or numbers, that a tensor or number consists of."""
    is_real = not x.is_complex() if isinstance(x, torch.Tensor) else isinstance(x, (int, float))
    return [x] if is_real else list(_pair(x))


def _part(x: Any, name: str) -> Any:
    """The arguments of a call with tensors replaced by one of their parts."""
    if isinstance(x, (Pair, torch.Tensor)):
        return getattr(_pair(x), name)
    return [_part(one, name) for one in x] if isinstance(x, (list, tuple)) else x


def _by_part(target: Any) -> Callable[..., Any]:
    """A call that does the same to both parts, such as a permutation or a sum."""

    def call(*args: Any, **keywords: Any) -> Any:
        parts = []
        for name in Pair._fields:
            named = {key: _part(value, name) for key, value in keywords.items()}
            parts.append(target(*(_part(value, name) for value in args), **named))
        real, imag = parts
        return [*map(Pair, real, imag)] if isinstance(real, (list, tuple)) else Pair(real, imag)

    return call


def _sum(sign: int, x: Any, y: Any, alpha: Any = 1) -> Pair:
    (a, b), (c, d) = _pair(x), _pair(y)
    return Pair(a + sign * alpha * c, b + sign * alpha * d)


def _product(x: Any, y: Any) -> Pair:
    if len(_parts(x)) == 1:
        x, y = y, x
    if len(_parts(y)) == 1:
        return Pair(*(part * _parts(y)[0] for part in _pair(x)))
    (a, b), (c, d) = _pair(x), _pair(y)
    return Pair(a * c - b * d, a * d + b * c)


def _quotient(x: Any, y: Any) -> Pair:
    if len(_parts(y)) == 1:
        return Pair(*(part / _parts(y)[0] for part in _pair(x)))
    c, d = _pair(y)
    size = c * c + d * d
    return Pair(*(part / size for part in _product(x, Pair(c, -d))))


def hypot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Of the larger number and a ratio: squares of halves would overflow. Two infinities are an
    infinity: their ratio is taken to the largest number."""
    x, y = x.abs(), y.abs()
    larger, limits = torch.maximum(x, y), torch.finfo(x.dtype)
    ratio = torch.minimum(x, y) / larger.clamp(limits.tiny, limits.max)
    return larger * (ratio * ratio + 1.0).sqrt()


def _scale(norm: str | None, n: int, inverse: bool) -> float:
    if norm == "ortho":
        return 1.0 / math.sqrt(n)
    return 1.0 / n if (norm == "forward") != inverse else 1.0


def _cosines(rows: int, columns: int, n: int, like: torch.Tensor) -> Pair:
    """Cosines and sines of 2π · row · column / n, in fp64; zeros are exact, so that a result has no
    imaginary part where it can have none."""
    places = (torch.arange(count, device=like.device) for count in (rows, columns))
    first, second = places
    angles = (first.unsqueeze(1) * second % n).to(torch.float64) * (2.0 * math.pi / n)
    return Pair(*(torch.nn.functional.hardshrink(x, 1e-9) for x in (angles.cos(), angles.sin())))


def _along(x: torch.Tensor, dim: int, n: int) -> torch.Tensor:
    """With the dimension last, and n of its elements; zeros behind fewer would add nothing."""
    x = x.movedim(dim, -1)
    return x.narrow(-1, 0, min(n, x.shape[-1]))


def _times(x: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, matrix.t().to(x.dtype))


def _forward(
    inverse: bool, bins: Callable[[int], int], x: Any, n: int | None = None, dim: int = -1,
    norm: str | None = None,
) -> Pair:  # fmt: skip
    """The transform along one dimension; bins: how many of the n frequencies are kept."""
    parts = _parts(x)
    n = n or parts[0].shape[dim]
    parts = [_along(part, dim, n) for part in parts]
    cosine, sine = _cosines(parts[0].shape[-1], bins(n), n, parts[0])
    sine = sine if inverse else -sine
    rows = [torch.cat([cosine, sine], 1), torch.cat([-sine, cosine], 1)]
    matrix = torch.cat(rows[: len(parts)]) * _scale(norm, n, inverse)
    y = _times(torch.cat(parts, -1), matrix)
    return Pair(*(part.movedim(-1, dim) for part in torch.split(y, bins(n), -1)))


def _to_real(x: Any, n: int | None = None, dim: int = -1, norm: str | None = None) -> torch.Tensor:
    """The inverse of the transform of n real numbers, from its first n // 2 + 1 frequencies: each
    other one is the conjugate of one of them."""
    parts = _parts(x)
    n = n or 2 * (parts[0].shape[dim] - 1)
    parts = [_along(part, dim, n // 2 + 1) for part in parts]
    count = parts[0].shape[-1]
    cosine, sine = _cosines(count, n, n, parts[0])
    frequency = torch.arange(count, device=parts[0].device).unsqueeze(1)
    twice = ((frequency != 0) & (2 * frequency != n)).to(torch.float64) + 1.0
    matrix = torch.cat([cosine * twice, -sine * twice][: len(parts)]) * _scale(norm, n, True)
    return _times(torch.cat(parts, -1), matrix).movedim(-1, dim)


def _dims(x: Any, s: Sequence[int] | None, dim: Sequence[int] | None) -> list[tuple[Any, int]]:
    """The sizes and dimensions of a transform along several."""
    if dim is None:
        dim = range(-(len(s) if s else _parts(x)[0].dim()), 0)
    sizes = [None if size == -1 else size for size in s] if s else [None] * len(dim)
    return list(zip(sizes, dim, strict=True))


def _several(
    one: Callable[..., Any], others: Callable[..., Any], real_last: bool, x: Any, s: Any = None,
    dim: Any = None, norm: str | None = None,
) -> Any:  # fmt: skip
    """One dimension after the other; `one` along the last: first, or where it makes real numbers at
    the end."""
    *before, last = _dims(x, s, dim)
    order = [(others, place) for place in before]
    for transform, (n, at) in [*order, (one, last)] if real_last else [(one, last), *order]:
        x = transform(x, n, at, norm)
    return x


_FFT, _IFFT = (partial(_forward, inverse, lambda n: n) for inverse in (False, True))
_RFFT = partial(_forward, False, lambda n: n // 2 + 1)
_PLANE = (-2, -1)
_ALONG: dict[str, Callable[..., Any]] = {
    "fft": _FFT, "ifft": _IFFT, "rfft": _RFFT, "irfft": _to_real,
}  # fmt: skip


def _of_plane(
    function: Callable[..., Any], x: Any, s: Any = None, dim: Any = _PLANE, norm: Any = None
) -> Any:
    return function(x, s, dim, norm)


def _transforms() -> dict[Any, Callable[..., Any]]:
    transforms: dict[Any, Callable[..., Any]] = {}
    for name, one in _ALONG.items():
        others = _IFFT if name.startswith("i") else _FFT
        several = partial(_several, one, others, name == "irfft")
        transforms[getattr(aten, f"fft_{name}").default] = one
        transforms[getattr(aten, f"fft_{name}n").default] = several
        transforms[getattr(aten, f"fft_{name}2").default] = partial(_of_plane, several)
    return transforms


TRANSFORMS = _transforms()


def _table() -> dict[Any, Callable[..., Any]]:
    alike = (
        aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int,
        aten.slice.Tensor, aten.select.int, aten.cat.default, aten.stack.default,
        aten.clone.default, aten.contiguous.default, aten.unsqueeze.default, aten.squeeze.dim,
        aten.squeeze.dims, aten.expand.default, aten.flip.default, aten.roll.default,
        aten.neg.default, aten.sum.dim_IntList, aten.mean.dim, aten.flatten.using_ints,
        aten.unflatten.int, aten.movedim.int, aten.movedim.intlist, aten.split.Tensor,
        aten.split_with_sizes.default, aten.chunk.default, aten.unbind.int, aten.narrow.default,
        aten.zeros_like.default, aten.fft_fftshift.default, aten.fft_ifftshift.default,
        aten.detach.default, aten.alias.default,
    )  # fmt: skip
    return (
        TRANSFORMS
        | {target: _by_part(target) for target in alike}
        | {
            operator.getitem: operator.getitem,
            aten.add.Tensor: partial(_sum, 1),
            aten.sub.Tensor: partial(_sum, -1),
            aten.rsub.Scalar: lambda x, y, alpha=1: _sum(-1, y, x, alpha),
            aten.mul.Tensor: _product,
            aten.div.Tensor: _quotient,
            aten.abs.default: lambda x: hypot(*_pair(x)),
            aten.angle.default: lambda x: torch.atan2(*reversed(_pair(x))),
            aten.real.default: lambda x: _pair(x).real,
            aten.imag.default: lambda x: _pair(x).imag,
            aten.conj.default: lambda x: Pair(_pair(x).real, -_pair(x).imag),
            aten._conj.default: lambda x: Pair(_pair(x).real, -_pair(x).imag),
            aten.resolve_conj.default: _pair,
            aten.view_as_real.default: lambda x: torch.stack(_pair(x), -1),
            aten.view_as_complex.default: lambda x: Pair(*x.unbind(-1)),
            aten.complex.default: lambda real, imag: Pair(real.clone(), imag.clone()),
            aten.polar.default: lambda size, angle: Pair(size * angle.cos(), size * angle.sin()),
        }
    )


TABLE = _table()
"""What stands for each call that takes complex tensors, or makes them."""


def _concerns(node: Any) -> bool:
    """Whether a call of a program is a transform, or takes or makes a complex tensor."""
    values = [node.meta.get("val"), *(one.meta.get("val") for one in node.all_input_nodes)]
    leaves = pytree.tree_leaves(values)
    is_complex = any(isinstance(leaf, torch.Tensor) and leaf.is_complex() for leaf in leaves)
    return is_complex or node.target in TRANSFORMS


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that has a name, which a graph asks of what it calls."""
    return lambda *args, **keywords: function(*args, **keywords)


def replace_transforms(program: Any) -> None:
    """Puts the functions in the place of the calls of an exported program that is to be traced
    again; of none where there is one that the table does not have, or a transform along the batch:
    they stay, and are refused by name."""
    calls = [node for node in program.graph.nodes if node.op != "placeholder" and _concerns(node)]
    known = all(node.target in TABLE and _is_fixed(node) for node in calls)
    if known and not _is_written(program):
        for node in calls:
            node.target = _named(TABLE[node.target])


def _is_written(program: Any) -> bool:
    """Whether a program writes into a complex tensor through `view_as_real`: a pair has a copy."""
    views = set()
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.target is aten.view_as_real.default:
            views.add(node)
        elif schema is not None and views.intersection(node.all_input_nodes):
            if schema.is_mutable:
                return True
            if any(result.alias_info for result in schema.returns):
                views.add(node)
    return False


def _is_fixed(node: Any) -> bool:
    """Whether a call is no transform along a dimension that varies."""
    if node.target not in TRANSFORMS:
        return True
    schema = [argument.name for argument in node.target._schema.arguments]
    given = {**dict(zip(schema, node.args, strict=False)), **node.kwargs}
    shape = node.args[0].meta["val"].shape
    dims = given.get("dim", -1 if "n" in schema else _PLANE if "2" in str(node.target) else None)
    dims = range(len(shape)) if dims is None else [dims] if isinstance(dims, int) else dims
    return all(isinstance(shape[dim], int) for dim in dims)
