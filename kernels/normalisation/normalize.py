"""normalize: y = (x − mean) / sqrt(var + eps), mean and biased variance over a set of dimensions.

Layer, group and instance normalisation, and batch normalisation by the batch's own statistics,
differ only in the set: the last dimensions; the pixels and a group's channels; the pixels; samples
and pixels. RMS normalisation leaves the mean out. Weight and bias are stages of the epilogue.

x and y: any rank, dense or NHWC; fp32 inside. `statistics.py` has the kernel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import Attributes, Builder, Config, Domain, Launch, Op, Problem
from ..contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from ..contract.targets import Target
from ..movement.rearrangement import Reshape
from . import statistics
from .batch_norm import BatchNorm


@dataclass(frozen=True)
class Normalize(Attributes):
    """dims: the (non-negative, ascending) dimensions normalised together; groups: into how many
    parts dimension 1, then one of them, is split first; centred: whether the mean is subtracted."""

    dims: tuple[int, ...] = ()
    groups: int = 1
    eps: float = 1e-5
    centred: bool = True


def infer(attributes: Normalize, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The input's own spec."""
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
    attributes = problem.attributes
    assert isinstance(attributes, Normalize)
    return statistics.launches(
        problem, tile, statistics.DEVIATION, attributes.eps, attributes.centred
    )


def _build(draw: Mapping[str, Any]) -> tuple[Normalize, tuple[TensorSpec, ...]] | None:
    shape = tuple(draw["shape"])
    dims = tuple(dim for dim in draw["dims"] if dim < len(shape))
    groups = draw["groups"] if 1 in dims else 1
    if not dims or (groups > 1 and shape[1] % groups):
        return None
    layout = Layout.NHWC if len(shape) in MEMORY_FORMATS and draw["nhwc"] else Layout.DENSE
    attributes = Normalize(dims, groups, draw["eps"], draw["centred"])
    return attributes, (TensorSpec(shape, torch.float32, layout),)


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


def _capture_layer_norm(
    g: Builder, x: Any, shape: Any, w: Any = None, b: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    rank = g.spec(x).rank
    dims = tuple(range(rank - len(shape), rank))
    return _affine(g, x, w, b, shape, Normalize(dims, eps=float(eps)))


def _capture_rms_norm(g: Builder, x: Any, shape: Any, w: Any = None, eps: Any = None) -> Any:
    spec = g.spec(x)
    # What torch takes where none is given.
    eps = torch.finfo(torch.float32).eps if eps is None else float(eps)
    dims = tuple(range(spec.rank - len(shape), spec.rank))
    return _affine(g, x, w, None, shape, Normalize(dims, eps=eps, centred=False))


def _capture_group_norm(
    g: Builder, x: Any, groups: int, w: Any = None, b: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    spec = g.spec(x)
    dims = tuple(range(1, spec.rank))
    if groups == spec.shape[1] and spec.rank > 2:
        dims, groups = dims[1:], 1
    return _affine(g, x, w, b, _per_channel(spec), Normalize(dims, groups, float(eps)))


def _capture_instance_norm(
    g: Builder,
    x: Any,
    w: Any,
    b: Any,
    mean: Any,
    var: Any,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    spec = g.spec(x)
    if not use_input_stats:
        inputs = [value for value in (x, w, b, mean, var) if value is not None]
        attributes = BatchNorm(float(eps), w is not None, b is not None)
        return g.apply("batch_norm", inputs, attributes)
    dims = tuple(range(2, spec.rank))
    return _affine(g, x, w, b, _per_channel(spec), Normalize(dims, eps=float(eps)))


def _capture_batch_statistics(
    g: Builder, x: Any, w: Any, b: Any, training: bool, momentum: float, eps: float
) -> Any:
    """Batch normalisation made with track_running_stats=False: y; no mean, no deviation."""
    spec = g.spec(x)
    dims = (0, *range(2, spec.rank))
    return _affine(g, x, w, b, _per_channel(spec), Normalize(dims, eps=float(eps))), None, None


OP = Op(
    name="normalize",
    attributes=Normalize,
    infer=infer,
    reference=reference,
    launches=launches,
    configs=statistics.configs,
    default=statistics.default,
    legal=statistics.legal,
    cost=statistics.cost,
    domain=Domain(
        ranges={
            "shape": (
                (1,), (37,), (4, 21), (3, 6, 8), (2, 12, 4, 3), (1, 36, 5, 5), (2, 64, 7, 7),
                (2, 1, 6, 1), (2, 4, 3, 2, 5),
            ),
            "dims": (
                (1,), (2, 3), (1, 2, 3), (2,), (3,), (0,), (0, 2, 3), (1, 2, 3, 4), (2, 3, 4),
                (0, 1, 2, 3, 4),
            ),
            "groups": (1, 1, 2, 4, 12),
            "eps": (1e-5, 1e-3),
            "centred": (True, True, True, False),
            "nhwc": (True, True, False),
        },
        build=_build,
        interesting=(
            # Group, layer (ConvNeXt's) and instance normalisation; more than one program holds.
            {"shape": (2, 40, 9, 7), "dims": (1, 2, 3), "groups": 8, "eps": 1e-5,
             "centred": True, "nhwc": True},
            {"shape": (2, 96, 5, 5), "dims": (1,), "groups": 1, "eps": 1e-5,
             "centred": True, "nhwc": True},
            {"shape": (2, 5, 40, 30), "dims": (2, 3), "groups": 1, "eps": 1e-5,
             "centred": True, "nhwc": True},
            {"shape": (2, 17000), "dims": (1,), "groups": 1, "eps": 1e-5,
             "centred": True, "nhwc": False},
            {"shape": (1, 6, 70, 90), "dims": (1, 2, 3), "groups": 2, "eps": 1e-5,
             "centred": False, "nhwc": True},
        ),
        # Far from zero: squares would cancel.
        range=(4.0, 8.0),
    ),
    aten={
        "aten.layer_norm.default": _capture_layer_norm,
        "aten.rms_norm.default": _capture_rms_norm,
        "aten.group_norm.default": _capture_group_norm,
        "aten.instance_norm.default": _capture_instance_norm,
        "aten._native_batch_norm_legit.no_stats": _capture_batch_statistics,
    },
    follows=True,
)  # fmt: skip
