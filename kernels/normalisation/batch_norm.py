"""batch_norm with running statistics: y = (x − mean) / sqrt(var + eps) · weight + bias per channel.

x and y: any rank of at least 2, dense or NHWC, channels in dimension 1; mean, var, and weight and
bias where present: (C,). fp32 inside.

A batch normalisation that follows a convolution is folded into it and never gets here; this op
serves the ones that cannot be (after a concatenation or a pooling, as in DenseNet).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import Arguments, Attributes, Builder, Config, Launch, Op, Problem, Ref, counted
from ..contract.spec import TensorSpec
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
    affine = given.get("weight"), given.get("bias")
    return F.batch_norm(given["x"], given["mean"], given["var"], *affine, eps=attributes.eps)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    """One launch of the pointwise kernel, which reads a number per channel like any operand."""
    attributes, out = problem.attributes.expect(BatchNorm), problem.output.spec
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


def capture(g: Builder, a: Arguments) -> Any:
    """Of calls with the statistics that the module has gathered."""
    if a.get("training"):
        return g.refuse(
            "batch normalisation that would update its running statistics: the module is in "
            "training mode; call .eval()"
        )
    if a.running_mean is None or a.running_var is None:
        return g.refuse("batch normalisation without running statistics")
    inputs = (a.input, a.weight, a.bias, a.running_mean, a.running_var)
    attributes = BatchNorm(float(a.eps), a.weight is not None, a.bias is not None)
    return g.apply("batch_norm", [value for value in inputs if value is not None], attributes)


def _capture_native(g: Builder, a: Arguments) -> Any:
    """The results are y, and what training would go on with."""
    return capture(g, a), None, None


OP = Op(
    "batch_norm", BatchNorm, infer, reference, launches,
    counted(lambda problem: 3 * problem.output.spec.numel),
    # Variances are drawn from the same range as everything else.
    input_range=(0.1, 3.0),
    aten={
        "aten.batch_norm.default": capture,
        "aten._native_batch_norm_legit.default": _capture_native,
        "aten._native_batch_norm_legit_no_training.default": _capture_native,
    },
    packs=lambda attributes: {
        at: lambda _, vector: vector.contiguous() for at in range(1, len(attributes.inputs))
    },
)  # fmt: skip
