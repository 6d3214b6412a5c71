"""A convolution between two chains of stages, F(conv2d(B(x), w)), of which a fusion makes more.

x: (N, C, H, W) NHWC in memory; w: (K, C, R, S), a constant packed as conv2d packs it. B is a chain
of pointwise stages that see no single pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...errors import InvalidInputError
from ..contract import epilogue as ep
from ..contract.op import Attributes, Config, Launch, Problem, Ref, Target, TensorSpec
from ..convolution import conv2d
from ..hopper import core
from ..hopper.boxes import Pool
from ..tile import choice, conv_geometry, engine, source
from ..tile.conv_geometry import Conv2d
from ..tile.finish import Finish
from ..tile.space import Space
from . import links


@dataclass(frozen=True)
class StagedConv(Attributes):
    """A convolution, the stages on its input and those on its result.

    Inputs: x, w, operands of `before` (one number per channel of x, or per image and channel where
    the convolution has stride 1 and no padding), operands of `stages`.
    """

    conv: Conv2d = field(default_factory=Conv2d)
    before: ep.Epilogue = ()
    stages: ep.Epilogue = ()

    def unsupported(self, pixels: tuple[int, ...]) -> str | None:
        """Why the kernel cannot do what follows a result of that height and width, or None."""
        return None


def result_of(name: str, attributes: StagedConv, inputs: tuple[TensorSpec, ...]) -> TensorSpec:
    """The spec of the convolution's result, stages included.

    Raises: InvalidInputError for a wrong number of inputs, an operand that does not fit, or a
    result that is `unsupported`.
    """
    first, last = (ep.operand_count(s) for s in (attributes.before, attributes.stages))
    if len(inputs) != 2 + first + last:
        raise InvalidInputError(f"{name}: expected {2 + first + last} inputs, got {len(inputs)}")
    (result,) = conv_geometry.infer(attributes.conv, inputs[:2])
    for operand in inputs[2 : 2 + first]:
        if not is_per_channel(operand, inputs[0]) and not (
            attributes.conv == Conv2d() and is_per_image(operand, inputs[0])
        ):
            raise InvalidInputError(
                f"{name}: {operand}, read before the convolution, is not one number per channel "
                f"of {inputs[0]}"
            )
    links.check_operands(name, "the convolution", inputs[2 + first :], result)
    if (reason := attributes.unsupported(result.shape[2:])) is not None:
        raise InvalidInputError(f"{name}: {reason}")
    return result


def result(problem: Problem) -> TensorSpec:
    specs = tuple(operand.spec for operand in problem.inputs)
    return result_of(problem.op, problem.attributes.expect(StagedConv), specs)


def flops(problem: Problem) -> int:
    """Of the products of all pixels of the convolution's result."""
    return 2 * result(problem).numel * math.prod(problem.inputs[1].shape[1:])


def is_per_channel(operand: TensorSpec, x: TensorSpec) -> bool:
    """Whether a tensor broadcasts to x and is the same for all its pixels."""
    sizes = (1,) * (x.rank - operand.rank) + operand.shape
    return ep.broadcasts(operand, x) and operand.numel == sizes[1]


def is_per_image(operand: TensorSpec, x: TensorSpec) -> bool:
    """Whether a tensor broadcasts to x and is the same for all pixels of an image."""
    return ep.broadcasts(operand, x) and operand.rank == 4 and operand.shape[2:] == (1, 1)


def reference(attributes: StagedConv, tensors: tuple[torch.Tensor, ...]) -> torch.Tensor:
    x, w, *operands = tensors
    first = ep.operand_count(attributes.before)
    x = ep.apply_reference(attributes.before, x, tuple(operands[:first]))
    y = conv_geometry.reference(attributes.conv, x, w)
    return ep.apply_reference(attributes.stages, y, tuple(operands[first:]))


def launch(
    problem: Problem,
    tile: Config,
    target: Target,
    space: Space,
    stages: ep.Epilogue,
    result: TensorSpec,
    end: Any,
    *,
    maximum: bool = True,
    **more: Any,
) -> Launch:
    """The launch of a convolution whose result, of that spec, goes through `stages` (the first of
    the attributes') to `end`, a function of `tile/finish.py`; `more` as the engine takes it."""
    attributes = problem.attributes.expect(StagedConv)
    x, w, *operands = problem.inputs
    own, first = len(problem.operands), ep.operand_count(attributes.before)
    before = None
    if attributes.before:
        reads = tuple(ep.access(operand, x.spec) for operand in operands[:first])
        sizes = ep.memory_sizes(x.spec)
        before = ep.generate(attributes.before, reads, sizes, own, "prologue")
    reads = tuple(ep.access(operand, result) for operand in operands[first:])
    function = ep.generate(stages, reads, ep.memory_sizes(result), own + first, "stages")
    extras = tuple(Ref("input", 2 + index) for index in range(len(operands)))
    if core.uses_core(tile):
        (p, q), (down, across) = result.shape[2:], problem.output.shape[2:] or (1, 1)
        pool = Pool(p, q, function, maximum, 2 * down > p or 2 * across > q)
        launch = core.launch(problem, tile, target, pool, more.get("before", ()), extras)
        full = _full_bytes(problem, tile["BLOCK_M"] * tile["BLOCK_N"], result)
        return replace(launch, l2_bytes=launch.l2_bytes + full)
    return engine.launch(
        problem, tile, target, space, source.of_convolution(attributes.conv, x, w.shape, before),
        finish=Finish(end, function, maximum),
        extras=extras,
        precision=choice.dot_precision(problem, math.prod(w.shape[1:])),
        step_instructions=choice.step_instructions(tile, x.spec.dtype, math.prod(w.shape[2:])),
        **more,
    )  # fmt: skip


def runs_by_tap(problem: Problem) -> bool:
    """Whether the loop goes over blocks of channels, which is all that a prologue can be given."""
    attributes = problem.attributes.expect(StagedConv)
    _, c, r, s = problem.inputs[1].shape
    return bool(attributes.before) or source.runs_by_tap(c, r * s)


def size_of(problem: Problem, rows: int) -> choice.Size:
    """The matrix product for `rows` pixels, as `gemm` chooses tiles for it."""
    k, c, r, s = problem.inputs[1].shape
    by_tap = runs_by_tap(problem)
    depth = c if by_tap else c * r * s
    dtype = problem.inputs[0].spec.dtype
    return choice.Size(rows, k, depth, dtype, gathers=not by_tap, taps=r * s)


def l2_bytes(problem: Problem, rows: int, columns: int, result: TensorSpec) -> int:
    """What a program of that many pixels and channels reads: both operand tiles for all terms of
    its sums, and its part of the tensors that stages read in full; those of the epilogue are
    smaller."""
    _, c, r, s = problem.inputs[1].shape
    operands = c * r * s * (rows + columns) * problem.inputs[0].spec.dtype.itemsize
    return operands + _full_bytes(problem, rows * columns, result)


def _full_bytes(problem: Problem, results: int, result: TensorSpec) -> int:
    """What stages read for so many results of tensors that have an element for each."""
    full = sum(operand.spec.numel == result.numel for operand in problem.inputs[2:])
    return full * results * problem.inputs[0].spec.dtype.itemsize


def pack(attributes: StagedConv, w: torch.Tensor) -> torch.Tensor:
    return conv2d.pack(attributes.conv, w)
