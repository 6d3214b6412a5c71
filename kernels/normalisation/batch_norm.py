"""batch_norm with running statistics: y = (x − mean) / sqrt(var + eps) · weight + bias per channel.

x and y: any rank of at least 2, dense or NHWC, channels in dimension 1; mean, var, and weight and
bias where present: (C,). fp32 inside.

A batch normalisation that follows a convolution is folded into it and never gets here; this op
serves the ones that cannot be (after a concatenation or a pooling, as in DenseNet).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import Attributes, Builder, Config, Domain, Launch, Op, Problem, Ref, counted
from ..contract.spec import MEMORY_FORMATS, Layout, TensorSpec
from ..contract.targets import Target
from ..movement.pointwise import LOAD, launch_reads


@dataclass(frozen=True)
class BatchNorm(Attributes):
    """eps, and which of the optional inputs are there: x, [weight], [bias], mean, var."""

    eps: float = 1e-5
    has_weight: bool = True
    has_bias: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs in order."""
        weight = ("weight",) if self.has_weight else ()
        bias = ("bias",) if self.has_bias else ()
        return ("x", *weight, *bias, "mean", "var")


def infer(attributes: BatchNorm, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """The spec of x."""
    names = attributes.inputs
    if len(inputs) != len(names):
        wanted = ", ".join(names)
        raise InvalidInputError(f"batch_norm: expected {wanted}, got {len(inputs)} inputs")
    x = inputs[0]
    if x.rank < 2:
        raise InvalidInputError(f"batch_norm: expected x of rank 2 or more, got {x}")
    for name, spec in zip(names[1:], inputs[1:], strict=True):
        if spec.shape != (x.shape[1],):
            raise InvalidInputError(
                f"batch_norm: expected {name} of shape ({x.shape[1]},), one per channel of {x}, "
                f"got {spec}"
            )
    return (x,)


def reference(attributes: BatchNorm, *tensors: torch.Tensor) -> torch.Tensor:
    given = dict(zip(attributes.inputs, tensors, strict=True))
    return F.batch_norm(
        given["x"],
        given["mean"],
        given["var"],
        given.get("weight"),
        given.get("bias"),
        eps=attributes.eps,
    )


def pack(attributes: BatchNorm, vector: torch.Tensor) -> torch.Tensor:
    """(C,), dense."""
    return vector.contiguous()


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the pointwise kernel, which reads a number per channel like any operand."""
    attributes, out = problem.attributes, problem.output.spec
    assert isinstance(attributes, BatchNorm)
    at = {name: index for index, name in enumerate(attributes.inputs)}
    channel = tuple(int(dim == 1) for dim in out.layout.order(out.rank))
    stages = {
        "x": LOAD, "mean": ep.Stage("sub"), "var": ep.Stage("mul"), "weight": ep.Stage("mul"),
        "bias": ep.Stage("add"),
    }  # fmt: skip
    through = {"var": ("inverse_deviation", attributes.eps)}
    names = [name for name in stages if name in at]
    per_channel = (ep.Access(channel, 0, name, through.get(name)) for name in names[1:])
    reads = (ep.access(problem.inputs[0], out), *per_channel)
    refs = tuple(Ref("input", at[name]) for name in names)
    return (launch_reads(problem, tile, reads, tuple(stages[name] for name in names), refs),)


def _build(draw: Mapping[str, Any]) -> tuple[BatchNorm, tuple[TensorSpec, ...]] | None:
    shape = tuple(draw["shape"])
    attributes = BatchNorm(draw["eps"], draw["weight"], draw["bias"])
    layout = Layout.NHWC if len(shape) in MEMORY_FORMATS and draw["nhwc"] else Layout.DENSE
    channel = TensorSpec((shape[1],), torch.float32)
    x = TensorSpec(shape, torch.float32, layout)
    return attributes, (x, *(channel for _ in attributes.inputs[1:]))


def _apply(g: Builder, x: Any, w: Any, b: Any, mean: Any, var: Any, eps: float) -> Any:
    if mean is None or var is None:
        return g.refuse("batch normalisation without running statistics")
    attributes = BatchNorm(float(eps), w is not None, b is not None)
    inputs = [value for value in (x, w, b, mean, var) if value is not None]
    return g.apply("batch_norm", inputs, attributes)


def _capture_inference(
    g: Builder, x: Any, w: Any, b: Any, mean: Any, var: Any, momentum: float, eps: float
) -> Any:
    return _apply(g, x, w, b, mean, var, eps), None, None


def _capture(
    g: Builder,
    x: Any,
    w: Any,
    b: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    if training:
        return _capture_batch_statistics(g)
    return _apply(g, x, w, b, mean, var, eps)


def _capture_batch_statistics(g: Builder, *arguments: Any, **keywords: Any) -> Any:
    return g.refuse(
        "batch normalisation that would update its running statistics: the module is in training "
        "mode; call .eval()"
    )


OP = Op(
    name="batch_norm",
    attributes=BatchNorm,
    infer=infer,
    reference=reference,
    launches=launches,
    cost=counted(lambda problem: 3 * problem.output.spec.numel),
    domain=Domain(
        ranges={
            "shape": (
                (4, 1), (3, 10), (2, 5, 7), (1, 3, 9, 8), (2, 16, 5, 1), (2, 33, 3, 4),
                (1, 1, 1, 1), (2, 3, 2, 4, 3),
            ),
            "nhwc": (True, True, False),
            "weight": (True, True, False),
            "bias": (True, True, False),
            "eps": (1e-5, 1e-3),
        },
        build=_build,
        # Variances are drawn from the same range as everything else.
        range=(0.1, 3.0),
    ),
    aten={
        "aten._native_batch_norm_legit_no_training.default": _capture_inference,
        "aten.batch_norm.default": _capture,
        "aten._native_batch_norm_legit.default": _capture_batch_statistics,
    },
    packs=lambda attributes: {index: pack for index in range(1, len(attributes.inputs))},
)  # fmt: skip
