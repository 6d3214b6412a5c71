"""Binds a launch's symbolic arguments to tensors, and runs launches in the interpreter.

A tensor argument of a launch is the flat buffer its operand lives in; offsets and pitches are
compile-time constants of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..contract.epilogue import resolved
from ..contract.op import Launch, Ref, TmaDescriptor


def bind(launch: Launch, tensor_of: Callable[[Ref], torch.Tensor], batch: int) -> dict[str, Any]:
    """The kernel's run-time arguments by name: pointers, boxes, `extras` and `m`."""
    arguments: dict[str, Any] = {name: tensor_of(ref) for name, ref in launch.pointers.items()}
    for name, box in launch.boxes.items():
        base = tensor_of(box.ref)[box.offset :]
        shape, strides = list(box.shape_at(batch)), list(box.strides)
        arguments[name] = TensorDescriptor(base, shape, strides, list(box.box))
    arguments["extras"] = tuple(tensor_of(ref) for ref in launch.extras)
    arguments["m"] = launch.m_at(batch)
    return arguments


def parameters(launch: Launch) -> tuple[Ref | TmaDescriptor | None, ...]:
    """The kernel's run-time arguments in its own order, tuples flattened; None is `m`."""
    found: list[Ref | TmaDescriptor | None] = []
    for name in launch.kernel.arg_names:
        if name in launch.pointers:
            found.append(launch.pointers[name])
        elif name in launch.boxes:
            found.append(launch.boxes[name])
        elif name == "extras":
            found.extend(launch.extras)
        elif name == "m":
            found.append(None)
    return tuple(found)


def scratch(launch: Launch, device: torch.device | str = "cpu") -> dict[Ref, torch.Tensor]:
    """Memory for a launch's scratch; what need not be zero is not."""
    made = {}
    for index, wanted in enumerate(launch.scratch):
        fill = 0 if wanted.zeroed else float("nan")
        made[Ref("scratch", index)] = torch.full(
            (wanted.elements,), fill, dtype=wanted.dtype, device=device
        )
    return made


def interpret(launch: Launch, tensor_of: Callable[[Ref], torch.Tensor], batch: int) -> None:
    """Runs the launch on CPU tensors; call inside `interpreter.interpreting()`."""
    from . import interpreter

    arguments = bind(launch, tensor_of, batch)
    grid = launch.grid_at(batch)
    interpreter.run(launch.kernel, grid, arguments, resolved(launch.constexprs))
