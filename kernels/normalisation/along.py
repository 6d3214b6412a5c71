"""Launches of kernels that go along one dimension of tensors in any layout: `scan` and `topk`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..contract import epilogue as ep
from ..contract.op import Config, Launch, Operand, Problem, Ref


def launch_along(
    problem: Problem,
    tile: Config,
    kernel: Any,
    dim: int,
    tensors: Mapping[str, tuple[Ref, Operand]],
    constexprs: Mapping[str, Any],
) -> tuple[Launch, ...]:
    """One launch over all rows, in the order of the dimensions beside `dim`.

    tensors: by the name of the kernel's pointer, of which it also takes, in capitals, _ROW (the
    offset of a row), _STRIDE along the dimension and _OFFSET. The kernel takes the dimension's
    length L, WIDE and the tile's blocks, too.
    """
    x = problem.inputs[0]
    rest = [at for at in range(x.spec.rank) if at != dim]
    sizes = tuple(x.shape[at] for at in rest) or (1,)
    constants: dict[str, Any] = {}
    for name, (_, operand) in tensors.items():
        strides = tuple(operand.strides[at] for at in rest) or (0,)
        constants |= {
            f"{name.upper()}_ROW": ep.row_offset_function(sizes, strides),
            f"{name.upper()}_STRIDE": operand.strides[dim],
            f"{name.upper()}_OFFSET": operand.offset,
        }
    launch = Launch(
        kernel=kernel,
        pointers={name: ref for name, (ref, _) in tensors.items()},
        rows=x.spec.numel // x.shape[dim],
        batch=x.spec.batch,
        block_rows=tile["BLOCK_ROWS"],
        columns=1,
        constexprs={
            "L": x.shape[dim], "WIDE": problem.is_wide, **constants, **constexprs,
            **dict(tile.blocks),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip
    return (launch,)
