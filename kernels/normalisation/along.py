"""Kernels that go along one dimension of tensors in any layout (`scan`, `topk`): tiles, launches.

Results do not lie as rows of their innermost dimension, of which `tile_launch` makes an output: the
launch is made here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import triton
import triton.language as tl

from ..contract.op import Config, Launch, Operand, Problem, Ref, Target, config, power_of_two
from ..tile.geometry import Tile, Walked


@triton.jit
def rows_of_program(m, TILE: tl.constexpr):
    """The program's rows, and which of them exist."""
    rows = tl.program_id(0) * TILE.M + tl.arange(0, TILE.M)
    row_mask = rows < m
    if TILE.wide:
        rows = rows.to(tl.int64)
    return rows, row_mask


def length_of(problem: Problem) -> int:
    """Of the input's dimension that the attributes name."""
    attributes: Any = problem.attributes
    return int(problem.inputs[0].shape[attributes.dim])


def tiles_along(problem: Problem, blocks: Sequence[int]) -> Iterator[Config]:
    """1024 to 4096 elements per program, in blocks of up to so many of a row."""
    for block in blocks:
        columns = min(block, power_of_two(length_of(problem)))
        for elements in (1024, 2048, 4096):
            yield config(4, 1, BLOCK_ROWS=max(1, elements // columns), BLOCK_COLUMNS=columns)


def tile_along(problem: Problem, block: int, target: Target) -> Config:
    """2048 elements; in the interpreter, which pays per program, a quarter of a million."""
    length = length_of(problem)
    columns = min(power_of_two(length), block)
    if target.name == "interpreter":
        rows = problem.inputs[0].spec.numel // length
        most = min(power_of_two(rows), (1 << 18) // columns)
        return config(1, 1, BLOCK_ROWS=most, BLOCK_COLUMNS=columns)
    return config(4, 1, BLOCK_ROWS=max(1, 2048 // columns), BLOCK_COLUMNS=columns)


def launch_along(
    problem: Problem,
    tile: Config,
    kernel: Any,
    tensors: Mapping[str, tuple[Ref, Operand]],
    constexprs: Mapping[str, Any],
) -> tuple[Launch, ...]:
    """One launch over all rows, in the order of the dimensions beside that of the attributes.

    tensors: by the name of the kernel's pointer, of which it also takes a `Walked` in capitals; and
    the dimension's length L, and TILE.
    """
    attributes: Any = problem.attributes
    x, dim = problem.inputs[0], attributes.dim
    rest = [at for at in range(x.spec.rank) if at != dim]
    sizes = tuple(x.shape[at] for at in rest) or (1,)

    def along(operand: Operand) -> Walked:
        strides = tuple(operand.strides[at] for at in rest) or (0,)
        return Walked.of(operand, sizes, strides, operand.strides[dim])

    launch = Launch(
        kernel=kernel,
        pointers={name: ref for name, (ref, _) in tensors.items()},
        rows=x.spec.numel // x.shape[dim],
        batch=x.spec.batch,
        block_rows=tile["BLOCK_ROWS"],
        columns=1,
        constexprs={
            "L": x.shape[dim], "TILE": Tile.of(problem, tile),
            **{name.upper(): along(operand) for name, (_, operand) in tensors.items()},
            **constexprs,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return (launch,)
