"""normalize: y = (x − mean) / sqrt(var + eps), mean and biased variance over a set of dimensions.

Layer, group and instance normalisation, and batch normalisation by the batch's own statistics,
differ only in the set: the last dimensions; the pixels and a group's channels; the pixels; samples
and pixels. RMS normalisation leaves the mean out. Weight and bias are stages of the epilogue.

x and y: any rank, dense or NHWC; fp32 inside. `statistics.py` has the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import Arguments, Attributes, Builder, Config, Launch, Op, Problem, Target
from ..contract.spec import TensorSpec
from ..movement.rearrangement import Reshape
from . import batch_norm, statistics


@dataclass(frozen=True)
class Normalize(Attributes):
    """dims: the (non-negative, ascending) dimensions normalised together; groups: into how many
    parts dimension 1, then one of them, is split first; centred: whether the mean is subtracted."""

    dims: tuple[int, ...] = ()
    groups: int = 1
    eps: float = 1e-5
    centred: bool = True


def infer(attributes: Normalize, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    (x,) = inputs
    dims, groups = attributes.dims, attributes.groups
    if not dims or list(dims) != sorted(set(dims)) or not 0 <= dims[0] <= dims[-1] < x.rank:
        raise InvalidInputError(f"normalize: {dims} are not ascending dimensions of {x}")
    if x.batch is not None and dims[0] == 0:
        raise InvalidInputError(
            f"normalize: dimension 0 of {x} is the batch: statistics over all samples of a call "
            "need a batch of fixed size (dynamic_batch=None)"
        )
    if groups != 1 and (1 not in dims or groups < 1 or x.shape[1] % groups):
        raise InvalidInputError(
            f"normalize: dimension 1 of {x} cannot be split into {groups} groups over {dims}"
        )
    return (x,)


def reference(attributes: Normalize, x: torch.Tensor) -> torch.Tensor:
    y = x if x.dtype is torch.float64 else x.float()
    dims = attributes.dims
    if attributes.groups > 1:
        y = y.unflatten(1, (attributes.groups, -1))
        dims = tuple(dim + (dim >= 1) for dim in dims)
    if attributes.centred:
        y = y - y.mean(dims, keepdim=True)
    variance = y.square().mean(dims, keepdim=True)
    return (y / torch.sqrt(variance + attributes.eps)).reshape(x.shape).to(x.dtype)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    attributes = problem.attributes.expect(Normalize)
    kind, eps, centred = statistics.DEVIATION, attributes.eps, attributes.centred
    return statistics.launches(kind, problem, tile, target, eps, centred)


def _affine(g: Builder, x: Any, w: Any, b: Any, shape: Any, attributes: Normalize) -> Any:
    """With weight and bias, seen as tensors of `shape`, as an epilogue."""
    stages, operands = [], []
    for name, value in (("mul", w), ("add", b)):
        if value is None:
            continue
        if g.spec(value).shape != tuple(shape):
            value = g.apply("reshape", (value,), Reshape(tuple(shape)))
        stages.append(ep.Stage(name))
        operands.append(value)
    return g.apply("normalize", (x, *operands), attributes, tuple(stages))


def _per_channel(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of one number per channel."""
    return (spec.shape[1], *(1 for _ in spec.shape[2:]))


def _last(spec: TensorSpec, a: Arguments) -> tuple[int, ...]:
    """The last dimensions, as many as `normalized_shape` has."""
    return tuple(range(spec.rank - len(a.normalized_shape), spec.rank))


def _capture_layer_norm(g: Builder, a: Arguments) -> Any:
    attributes = Normalize(_last(g.spec(a.input), a), eps=float(a.eps))
    return _affine(g, a.input, a.weight, a.bias, a.normalized_shape, attributes)


def _capture_rms_norm(g: Builder, a: Arguments) -> Any:
    # What torch takes where none is given.
    eps = torch.finfo(torch.float32).eps if a.eps is None else float(a.eps)
    attributes = Normalize(_last(g.spec(a.input), a), eps=eps, centred=False)
    return _affine(g, a.input, a.weight, None, a.normalized_shape, attributes)


def _capture_group_norm(g: Builder, a: Arguments) -> Any:
    spec, groups = g.spec(a.input), a.num_groups
    dims = tuple(range(1, spec.rank))
    if groups == spec.shape[1] and spec.rank > 2:
        dims, groups = dims[1:], 1
    attributes = Normalize(dims, groups, float(a.eps))
    return _affine(g, a.input, a.weight, a.bias, _per_channel(spec), attributes)


def _capture_instance_norm(g: Builder, a: Arguments) -> Any:
    spec = g.spec(a.input)
    if not a.use_input_stats:
        return batch_norm.capture(g, a)
    attributes = Normalize(tuple(range(2, spec.rank)), eps=float(a.eps))
    return _affine(g, a.input, a.weight, a.bias, _per_channel(spec), attributes)


def _capture_batch_statistics(g: Builder, a: Arguments) -> Any:
    """Batch normalisation made with track_running_stats=False: y; no mean, no deviation."""
    spec = g.spec(a.input)
    attributes = Normalize((0, *range(2, spec.rank)), eps=float(a.eps))
    return _affine(g, a.input, a.weight, a.bias, _per_channel(spec), attributes), None, None


OP = Op(
    "normalize", Normalize, infer, reference, launches, statistics.cost, statistics.configs,
    statistics.default, statistics.legal,
    # Far from zero: squares would cancel.
    input_range=(4.0, 8.0),
    aten={
        "aten.layer_norm.default": _capture_layer_norm,
        "aten.rms_norm.default": _capture_rms_norm,
        "aten.group_norm.default": _capture_group_norm,
        "aten.instance_norm.default": _capture_instance_norm,
        "aten._native_batch_norm_legit.no_stats": _capture_batch_statistics,
    },
    follows=True,
)  # fmt: skip
