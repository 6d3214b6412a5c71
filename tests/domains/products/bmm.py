"""Problems of `kernels/products/bmm.py` for the tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from convloom.kernels.contract.spec import TensorSpec
from convloom.kernels.movement.rearrangement import Rearrange
from convloom.kernels.products.bmm import Bmm

from ...properties.domain import Domain


def _build(draw: Mapping[str, Any]) -> tuple[Bmm, tuple[TensorSpec, ...]]:
    *leading, rows, depth, columns = draw["shape"]
    shapes = [(*leading, rows, depth), (*leading, depth, columns)]
    if leading and (shared := draw["shared"]) is not None:
        shapes[shared] = (1, *shapes[shared][1:])
    made = [_read_as(kind, shape) for kind, shape in zip(draw["read"], shapes, strict=True)]
    (left, a), (right, b) = made
    specs = TensorSpec(a, torch.float32), TensorSpec(b, torch.float32)
    return Bmm(left, right, draw["wide"]), specs


def _shared_draw(shared: int, read: tuple[str, str], wide: bool) -> dict[str, Any]:
    """A problem one of whose factors all samples share."""
    return {"shape": (2, 3, 7, 5, 6), "read": read, "shared": shared, "wide": wide}


def _read_as(kind: str, shape: tuple[int, ...]) -> tuple[Rearrange | None, tuple[int, ...]]:
    """A rearrangement to a shape, and the shape it starts from."""
    dims = tuple(range(len(shape)))
    if kind == "transposed":
        dims = (*dims[:-2], dims[-1], dims[-2])
        return Rearrange(tuple(shape[dim] for dim in dims), dims, shape), tuple(
            shape[dim] for dim in dims
        )
    if kind == "heads" and len(shape) == 4:
        n, heads, length, width = shape
        split = (n, length, heads, width)
        return Rearrange(split, (0, 2, 1, 3), shape), (n, length, heads * width)
    return None, shape


DOMAINS = {
    "bmm": Domain(
        ranges={
            "shape": (
                (3, 1, 1, 1),
                (2, 5, 8, 3),
                (1, 17, 20, 9),
                (2, 3, 7, 5, 6),
                (3, 2, 16, 33, 18),
                (4, 6, 5),
                (2, 40, 64, 36),
            ),
            "read": (
                ("plain", "plain"),
                ("transposed", "plain"),
                ("plain", "transposed"),
                ("heads", "heads"),
                ("heads", "transposed"),
            ),
            "shared": (None, 0, 1),
            "wide": (False, True),
        },
        build=_build,
        interesting=(
            _shared_draw(1, ("heads", "plain"), wide=False),
            _shared_draw(0, ("transposed", "heads"), wide=True),
        ),
    ),
}
