"""Calls that torch.export would leave whole, or take apart into comparisons, by calls with kernels.

Each is a function of tensors that is traced in the place of the call.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch.export import exported_program

from ...kernels import registry
from ...kernels.devices.language import forkable_lock
from .fourier import hypot, replace_transforms

aten = torch.ops.aten


def _logsumexp(x: torch.Tensor, dims: Any, keepdim: bool = False) -> torch.Tensor:
    """Of the distances to the largest, or to 0 where that is infinite: inf - inf would be NaN."""
    dims = [dims] if isinstance(dims, int) else dims or list(range(x.dim()))
    largest = x.amax(dims, True).nan_to_num(0.0, 0.0, 0.0)
    result = (x - largest).exp().sum(dims, True).log() + largest
    return result if keepdim else result.squeeze(dims)


def _std_mean(
    x: torch.Tensor, dims: Any = None, unbiased: bool = True, keepdim: bool = False,
    *, correction: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    dims = dims or list(range(x.dim()))
    less = float(unbiased) if correction is None else correction
    return torch.std(x, dims, correction=less, keepdim=keepdim), x.mean(dims, keepdim)


def _norm(x: torch.Tensor, p: float, dim: int, keepdim: bool) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(x, p, dim, keepdim)
    return norm


def _cosine_similarity(
    x: torch.Tensor, y: torch.Tensor, dim: int = 1, eps: float = 1e-8
) -> torch.Tensor:
    rank = max(x.dim(), y.dim())
    x, y = (v[(None,) * (rank - v.dim())] for v in (x, y))
    first, second = (_norm(v, 2, dim, True).clamp(min=eps) for v in (x, y))
    return ((x / first) * (y / second)).sum(dim)


def _cdist(
    x: torch.Tensor, y: torch.Tensor, p: float = 2.0, compute_mode: int | None = None
) -> torch.Tensor:
    """By differences, whatever the mode: products of the rows would cancel where two are near."""
    return _norm(x.unsqueeze(-2) - y.unsqueeze(-3), p, -1, False)


def _hardshrink(x: torch.Tensor, width: float = 0.5) -> torch.Tensor:
    """A pass makes one function of it (`passes/recognise.py`), and of soft shrinkage."""
    above = torch.nn.functional.threshold(x, width, 0.0)
    return above - torch.nn.functional.threshold(-x, width, 0.0)


def _other_leg(x: torch.Tensor) -> torch.Tensor:
    """Of a right triangle with a leg x and the hypotenuse 1."""
    return ((1.0 - x) * (1.0 + x)).sqrt()


def _without_nan(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x, and the other where it is NaN."""
    return torch.where(x.isnan(), other, x)


def _copy(x: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """What is written over all of x. A number that is written everywhere is added to zeros, which
    have the batch of x."""
    source = source.to(x.dtype)
    return torch.zeros_like(x) + source if source.dim() == 0 else source.expand(x.shape).clone()


def _slice_scatter(
    x: torch.Tensor, source: torch.Tensor, dim: int = 0, start: int | None = None,
    end: int | None = None, step: int = 1,
) -> Any:  # fmt: skip
    """x[..., start:end:step, ...] = source, as what lies before, in and behind the slice; some
    samples of a batch that varies are refused by name."""
    dim %= x.dim()
    size, count = x.shape[dim], source.shape[dim]
    if not isinstance(size, int):
        return NotImplemented
    first, *_ = slice(start, end).indices(size)
    last = first + max((count - 1) * step + 1, 0)
    if step > 1 and count > 1:  # Each element in all places of its group, chosen in one of them.
        offset = first % step
        first -= offset
        last = min(first + count * step, size)
        here = torch.arange(last - first, device=x.device) % step == offset
        wide = source.repeat_interleave(step, dim).narrow(dim, 0, last - first)
        others = x.narrow(dim, first, last - first)
        source = torch.where(here.view(-1, *(1,) * (x.dim() - 1 - dim)), wide, others)
    parts = [x.narrow(dim, 0, first), source, x.narrow(dim, last, size - last)]
    return torch.cat([part for part in parts if part.shape[dim]], dim)


def _select_scatter(x: torch.Tensor, source: torch.Tensor, dim: int, index: int) -> Any:
    if not isinstance(x.shape[dim], int):
        return NotImplemented
    index %= x.shape[dim]
    return _slice_scatter(x, source.unsqueeze(dim), dim, index, index + 1)


def _matrix_product(equation: str) -> tuple[str, str, str, str] | None:
    """For an einsum that is x @ w with a matrix w, where dimension 0 of the result is one of x: the
    dimensions of x, w and the result, and those that are summed over. None for any other."""
    inputs, _, result = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if len(terms) != 2 or not result or any(len(set(t)) != len(t) for t in (*terms, result)):
        return None
    x, w = terms if result[0] in terms[0] else reversed(terms)
    summed = "".join(name for name in w if name in x)
    kept = set(x) ^ set(w)
    if not all(name.isalpha() for name in x + w) or not summed or kept != set(result):
        return None
    return (x, w, result, summed) if result[0] not in w else None


def _einsum(equation: str, tensors: Sequence[torch.Tensor], **path: Any) -> torch.Tensor:
    """With the batch in dimension 0, from which torch's own way moves it."""
    product = _matrix_product(equation)
    assert product is not None
    names, other, result, summed = product
    x, w = tensors if equation.replace(" ", "").startswith(f"{names},") else reversed(tensors)
    rows = [name for name in result if name in names]
    columns = [name for name in result if name in other]
    x = x.permute([names.index(name) for name in (*rows, *summed)]).flatten(len(rows))
    w = w.permute([other.index(name) for name in (*summed, *columns)])
    sizes = w.shape[len(summed) :]
    y = x @ w.reshape(x.shape[-1], -1)
    y = y.reshape(*y.shape[:-1], *sizes) if sizes else y.squeeze(-1)
    return y.permute([(*rows, *columns).index(name) for name in result])


def _affine_grid(theta: torch.Tensor, size: Sequence[Any], align_corners: bool) -> Any:
    """The places of pixels, which are constants, times each sample's matrix."""
    sizes = size[2:]

    def along(dim: int) -> torch.Tensor:
        count = sizes[dim]
        if count == 1:
            return torch.zeros(1, dtype=theta.dtype, device=theta.device)
        places = torch.linspace(-1.0, 1.0, count, dtype=theta.dtype, device=theta.device)
        return places if align_corners else places * ((count - 1) / count)

    places = torch.meshgrid(*map(along, range(len(sizes))), indexing="ij")
    corners = torch.stack([*reversed(places), torch.ones_like(places[0])], -1)
    grid = torch.nn.functional.linear(theta, corners.flatten(0, -2))
    return grid.transpose(1, 2).reshape(theta.shape[0], *sizes, len(sizes))


def _sum(
    x: torch.Tensor, dims: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """How many are true, as whole numbers."""
    if x.dtype is not torch.bool or dtype not in (None, torch.int64):
        return NotImplemented
    return x.to(torch.float32).sum(dims, keepdim).to(torch.int64)


def _unfold(x: torch.Tensor, dim: int, size: int, step: int) -> torch.Tensor:
    """Windows along a dimension, their elements in a new last one: stacked windows, or taps where
    there are fewer of those."""
    dim %= x.dim()
    count = (x.shape[dim] - size) // step + 1
    if count <= size:
        windows = [x.narrow(dim, at * step, size) for at in range(count)]
        return torch.stack(windows, dim).movedim(dim + 1, -1)
    last = (count - 1) * step + 1
    taps = [aten.slice.Tensor(x, dim, at, at + last, step) for at in range(size)]
    return torch.stack(taps, -1)


def _one_hot(indices: torch.Tensor, classes: int = -1) -> torch.Tensor:
    places = torch.arange(classes, device=indices.device)
    return (indices.unsqueeze(-1) == places).to(torch.int64)


LEFT_WHOLE = (
    "linalg_cholesky", "linalg_inv", "linalg_ldl_factor", "linalg_lu_factor", "linalg_solve",
    "rrelu",
)  # fmt: skip
"""What torch takes apart into a computation and an effect, the error where there is no result; and
what draws numbers, which `export.py` refuses by name."""


def _computes(overload: Any) -> bool:
    """Whether an op makes tensors of tensors: what makes them of nothing is evaluated."""
    schema = overload._schema
    name = schema.name.removeprefix("aten::")
    if name in LEFT_WHOLE or (name.startswith("fft_") and "shift" not in name):
        return False  # Fourier transforms by their public names, which `fourier.py` knows.
    if schema.overload_name == "data":
        return False  # Packed sequences: how long they are their values tell.
    return _maps_tensors(overload)


def _maps_tensors(overload: Any) -> bool:
    sides = overload._schema.arguments, overload._schema.returns
    return all(any("Tensor" in str(each.type) for each in side) for side in sides)


def _with_dropout(unrolled: Callable[..., Any]) -> Callable[..., Any]:
    """A recurrent layer, with the dropout of one that trains, which torch's decomposition leaves
    out; `export.py` refuses it."""

    def recurrent(x: torch.Tensor, *others: Any) -> Any:
        dropout, train = others[4:6]
        return unrolled(torch.dropout(x, dropout, True) if train and dropout else x, *others)

    return recurrent


def own() -> Mapping[Any, Callable[..., Any]]:
    """What is taken apart while the program is traced again: what has no kernel, as torch does it;
    and what writes into slices, which tracing alone brings about."""
    torchs = torch.export.default_decompositions()
    recurrent = (getattr(aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"))
    return {
        **{
            overload: function
            for overload, function in torchs.items()  # type: ignore[no-untyped-call]
            if str(overload) not in registry.CAPTURES and _computes(overload)
        },
        **{overload: _with_dropout(torchs[overload]) for overload in recurrent},
        aten.affine_grid_generator.default: _affine_grid,
        aten.copy.default: _copy,
        **dict.fromkeys(
            (aten.fill.Scalar, aten.fill.Tensor), lambda x, value: torch.zeros_like(x) + value
        ),
        aten.sum.dim_IntList: _sum,
        aten.slice_scatter.default: _slice_scatter,
        aten.select_scatter.default: _select_scatter,
    }


_TRACING = forkable_lock()
_OURS = object()
"""The key of a table that stands for `_split_of`."""


def trace_again(program: Any) -> Any:
    """The program as functional ATen calls, with `own` taken apart.

    Before each program torch writes down for the composite ops of all libraries what to do with
    them, mostly what they do anyway, which takes longer than to trace a small network. Here only
    those are written down for which it differs, and torch's own way stays for other tables: another
    thread may be tracing for itself.
    """
    names = torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd")
    with _TRACING:
        composites, others = _split_of(frozenset(names))
        original = exported_program._split_decomp_table_to_cia_and_python_decomp

        def split(decomp_table: dict[Any, Any]) -> tuple[dict[Any, Any], ...]:
            ours = _OURS in decomp_table
            return (dict(composites), dict(others)) if ours else original(decomp_table)

        try:
            exported_program._split_decomp_table_to_cia_and_python_decomp = split
            return program.run_decompositions({_OURS: None})
        finally:
            exported_program._split_decomp_table_to_cia_and_python_decomp = original


@lru_cache(maxsize=1)
def _split_of(_composites: frozenset[str]) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """What stands for composite ops and for others, while these composite ops are registered."""
    composites, others = exported_program._split_decomp_table_to_cia_and_python_decomp(dict(own()))
    differ = {
        overload: function
        for overload, function in composites.items()
        if _maps_tensors(overload) and not _stands_already(overload, function)
    }
    return differ, others


def _stands_already(overload: Any, function: Any) -> bool:
    """Whether it is what torch calls for a composite op: in C++, behind a `partial`, or Python."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(function, partial) or function is overload.py_kernels.get(key)


@cache
def table() -> Mapping[Any, Callable[..., Any]]:
    """What stands for each overload."""
    return {
        aten.logsumexp.default: _logsumexp,
        aten.special_logsumexp.default: _logsumexp,
        aten.std_mean.dim: _std_mean,
        aten.std_mean.correction: _std_mean,
        aten.cosine_similarity.default: _cosine_similarity,
        aten.cdist.default: _cdist,
        aten.hardshrink.default: _hardshrink,
        aten.softshrink.default: lambda x, width=0.5: x - x.clamp(-width, width),
        aten.asin.default: lambda x: torch.atan2(x, _other_leg(x)),
        aten.acos.default: lambda x: torch.atan2(_other_leg(x), x),
        # Of two logarithms that are exact near 0; one of (1 + x) / (1 - x) would not be near -1.
        aten.atanh.default: lambda x: 0.5 * (torch.log1p(x) - torch.log1p(-x)),
        aten.fmax.default: lambda x, y: torch.maximum(_without_nan(x, y), _without_nan(y, x)),
        aten.fmin.default: lambda x, y: torch.minimum(_without_nan(x, y), _without_nan(y, x)),
        aten.hypot.default: hypot,
        aten.one_hot.default: _one_hot,
        aten.exp2.default: lambda x: torch.pow(2.0, x),
        aten.log2.default: lambda x: torch.log(x) * (1.0 / math.log(2.0)),
        aten.log10.default: lambda x: torch.log(x) * (1.0 / math.log(10.0)),
        aten.tan.default: lambda x: torch.sin(x) / torch.cos(x),
    }


def _quantised(
    x: torch.Tensor, observes: Any, quantises: Any, least: Any, most: Any, scale: torch.Tensor,
    zero: torch.Tensor, average: float, low: int, high: int, axis: int, by_row: bool = False,
    symmetric: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The fake quantisation of a QAT network whose observers are off, as `pointwise_ops.py` has
    it. By arithmetic: torch does not know the op of a batch that varies."""
    zero = zero.to(torch.float32)
    if by_row:
        behind = (1,) * (x.dim() - 1 - axis % x.dim())
        scale, zero = scale.view(-1, *behind), zero.view(-1, *behind)
    huge = torch.finfo(torch.float32).max
    whole = (x * (1.0 / scale)).round().nan_to_num(-huge, huge, -huge)
    return torch.minimum(torch.maximum(whole, low - zero), high - zero) * scale


def _unquantised(x: torch.Tensor, *others: Any, **more: Any) -> torch.Tensor:
    return x.clone()


def _as_frozen(program: Any, node: Any) -> Any:
    """What stands for a fake quantisation that may observe: with its observer on it writes buffers
    at every call, which `export.py` refuses by name."""
    buffers, tensors = program.graph_signature.inputs_to_buffers, program.state_dict
    observes, quantises = (
        bool(tensors[buffers[flag.name]]) if getattr(flag, "name", None) in buffers else True
        for flag in node.args[1:3]
    )
    if observes:
        return node.target
    return _quantised if quantises else _unquantised


def _is_static(node: Any) -> bool:
    """Whether the dimension that a call names, its first argument, has a fixed size."""
    return isinstance(node.args[0].meta["val"].shape[node.args[1]], int)


def decompose(program: Any) -> None:
    """Puts the functions in the place of the calls of an exported program that is to be traced
    again. As an argument of `run_decompositions` some would come too late."""
    replace_transforms(program)
    # Medians of windows are one op (`passes/recognise_pools.py`).
    medians = any(node.target is aten.median.dim for node in program.graph.nodes)
    for node in program.graph.nodes:
        if node.target is aten.fused_moving_avg_obs_fake_quant.default:
            node.target = _as_frozen(program, node)
        elif node.target is aten.einsum.default and _matrix_product(node.args[0]):
            node.target = _einsum
        elif node.target is aten.unfold.default and not medians and _is_static(node):
            node.target = _unfold
        elif node.target is aten.dropout.default and not node.args[2]:
            # As torch did up to 2.13: the ledger tells what became of the layer.
            node.target, node.args = aten.clone.default, node.args[:1]
        elif node.op == "call_function":
            node.target = table().get(node.target, node.target)
    program.graph_module.recompile()
