"""What convloom is to know of this package: a pointwise function, an op with its kernel, a fusion.

pyproject.toml names `EXTENSION` in the entry-point group `convloom.extensions`; nobody else has to
import this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata

import torch
import triton
import triton.language as tl
from convloom import Extension
from convloom.compiler.fusion.declaration import Form, Fusion
from convloom.compiler.fusion.pattern import Call, Match
from convloom.compiler.graph.ir import Graph, Value
from convloom.errors import InvalidInputError
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.op import Arguments, Attributes, Builder, Config, Launch, Op, Problem
from convloom.kernels.contract.scalars import Scalar
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import Target
from convloom.kernels.movement.pointwise import stage_of
from convloom.kernels.tile.finish import put
from convloom.kernels.tile.geometry import Image, tile_launch
from convloom.kernels.tile.space import output_tile

from . import bent_identity_of, shifted

# A pointwise function: it then works alone, as an epilogue stage and as a prologue stage.


@triton.jit
def bend(v):
    return (tl.sqrt_rn(v * v + 1.0) - 1.0) * 0.5 + v


BENT_IDENTITY = Scalar(
    "bent_identity", bend, bent_identity_of, aten=("convloom_shift.bent_identity.default",)
)

# An op with its kernel.


@dataclass(frozen=True)
class Shift(Attributes):
    """before: functions of one value, applied to x while it is read."""

    before: ep.Epilogue = ()


def infer(attributes: Shift, inputs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    """x itself."""
    if len(inputs) != 1 or inputs[0].rank != 4:
        raise InvalidInputError(f"shift: expected x (N,C,H,W), got {', '.join(map(str, inputs))}")
    return (inputs[0].with_(layout=Layout.NHWC),)


def reference(attributes: Shift, x: torch.Tensor) -> torch.Tensor:
    return shifted(ep.apply_reference(attributes.before, x, ()))


@triton.jit
def shift_kernel(
    x, y, extras, m,
    IMAGE: tl.constexpr, BEFORE: tl.constexpr, OUTPUT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # Rows are pixels, columns channels: each element has its own source, a neighbour's.
    rows, columns, row_mask, column_mask = output_tile(m, OUTPUT, TILE)
    at = columns % 9
    down = (rows // IMAGE.W % IMAGE.H)[:, None] + (at // 3 - 1)[None, :]
    right = (rows % IMAGE.W)[:, None] + (at % 3 - 1)[None, :]
    inside = (down >= 0) & (down < IMAGE.H) & (right >= 0) & (right < IMAGE.W)
    pixel = ((rows // (IMAGE.H * IMAGE.W))[:, None] * IMAGE.H + down) * IMAGE.W + right
    address = x + IMAGE.offset + pixel * IMAGE.row_stride + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :] & inside
    value = tl.load(address, mask=mask, other=0.0).to(tl.float32)
    # f(0) need not be 0, but the border is.
    value = tl.where(inside, BEFORE(value, rows, columns, row_mask, column_mask, extras), 0.0)
    put(value, y, rows, row_mask, columns, column_mask, extras, OUTPUT)


def launches(problem: Problem, tile: Config, target: Target) -> tuple[Launch, ...]:
    before = ep.generate(problem.attributes.expect(Shift).before, (), (), name="before")
    constants = {"IMAGE": Image.of(problem.inputs[0]), "BEFORE": before}
    return (tile_launch(problem, tile, shift_kernel, constexprs=constants),)


def capture(g: Builder, a: Arguments) -> object:
    return g.apply("shift", (a.x,), Shift())


SHIFT = Op(
    name="shift",
    attributes=Shift,
    infer=infer,
    reference=reference,
    launches=launches,
    aten={"convloom_shift.shift.default": capture},
)

# A fusion: a function in front of a shift is applied while the shift reads.


def refuse(graph: Graph, found: Match) -> str | None:
    before = found.nodes["before"]
    if graph.operands(before):
        return f"{before.name} has stages that read tensors; a shift applies functions of one value"
    return None


def fused(graph: Graph, found: Match) -> Shift:
    before, own = found.nodes["before"], found.root.attributes.expect(Shift)
    return Shift((stage_of(before.op, before.attributes), *before.epilogue, *own.before))


def inputs(graph: Graph, found: Match) -> tuple[Value, ...]:
    return graph.own_inputs(found.nodes["before"])


FUNCTIONS = ("relu", "clamp", "silu", "gelu", "hardswish", "bent_identity")
PATTERN = Call("shift", Call(FUNCTIONS, name="before"))
INTO_SHIFT = Fusion(
    op="shift",
    forms=(Form("into-shift", "shift(f(x)) => shift(x, before=[f])", PATTERN),),
    attributes=fused,
    inputs=inputs,
    refusals=(refuse,),
)

EXTENSION = Extension(
    "convloom-shift",
    metadata.version("convloom-shift"),
    scalars=(BENT_IDENTITY,),
    ops=(SHIFT,),
    fusions=INTO_SHIFT.rules,
)
