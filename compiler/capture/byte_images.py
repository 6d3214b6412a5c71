"""Images of bytes: inputs that the module casts, or computes on as floats, before anything else."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import InvalidInputError
from .export import source_of

MOVES = (
    "alias", "clone", "detach", "expand", "flip", "permute", "reshape", "select", "slice",
    "squeeze", "transpose", "unsqueeze", "view",
)  # fmt: skip
CASTS = ("aten._to_copy.default", "aten.to.dtype")
ARITHMETIC = tuple(
    f"aten.{name}.{kind}" for name in ("add", "div", "mul", "sub") for kind in ("Tensor", "Scalar")
)
"""Of a byte and a float torch computes in the type of the float, as it does of a float32 tensor
with the same numbers, which are exact."""


def as_floats(program: Any) -> tuple[str, ...]:
    """The inputs of an exported program that are uint8. In it they are float32 from here on: that
    they are cast when a call copies them in changes no number.

    Raises: InvalidInputError where anything else becomes of them, such as whole-number arithmetic.
    """
    names = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        user = node.op == "placeholder" and node.name in program.graph_signature.user_inputs
        if user and isinstance(value, torch.Tensor) and value.dtype is torch.uint8:
            names.append(node.name)
            _follow(node, node.name)
    return tuple(names)


def _follow(node: Any, name: str) -> None:
    node.meta["val"] = node.meta["val"].to(torch.float32)
    for user in node.users:
        target, value = str(user.target), user.meta.get("val")
        if user.op != "output" and value is None and not user.users:
            continue  # An assertion of torch.export.
        dtype = value.dtype if isinstance(value, torch.Tensor) else None
        if target.split(".")[1:2] and target.split(".")[1] in MOVES and dtype is torch.uint8:
            _follow(user, name)
        elif not (
            (target in CASTS and dtype in (torch.float32, torch.float16, torch.bfloat16))
            or (target in ARITHMETIC and dtype is torch.float32)
        ):
            where = "is returned" if user.op == "output" else f"goes into {target}"
            line = f" at {source_of(user)}" if source_of(user) else ""
            raise InvalidInputError(
                f"example input {name}: expected a uint8 image that is cast to floats or "
                f"normalised first, such as x.float() / 255; it {where}{line}"
            )
