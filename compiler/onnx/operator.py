"""What an operator's function is given, and the table that the functions enter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch

from ...errors import CaptureError

Value: TypeAlias = torch.Tensor | np.ndarray[Any, Any] | None
"""A tensor of the network; an array of numbers known while capturing (whole numbers, sizes: Python
integers or symbols of a batch that varies); None for an input or output that is left out."""


@dataclass(frozen=True)
class Call:
    """One call of an operator: its attributes, and the version of the operators."""

    op: str
    name: str
    opset: int
    attributes: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        found = self.attributes.get(name)
        return default if found is None else found

    def fail(self, reason: str) -> CaptureError:
        """The error for a call that cannot be computed as it stands."""
        return CaptureError(f"{self.op} '{self.name}': {reason}")

    def numbers(self, value: Value, what: str) -> list[Any]:
        """The elements of an input that must be known while capturing."""
        if isinstance(value, np.ndarray):
            return list(value.reshape(-1))
        raise self.fail(f"its {what} is computed from pixels; expected a constant or a size")


Function: TypeAlias = Callable[..., Any]
"""(call, *inputs) -> the output, or a tuple of outputs."""


@dataclass(frozen=True)
class Operator:
    """function: computes tensors; of_arrays: does the same to numbers known while capturing, where
    the operator is used for sizes. known: inputs that are given as arrays, constants included.
    takes_numbers: constants of one element are given as arrays too."""

    function: Function
    of_arrays: Function | None = None
    known: Sequence[int] = ()
    takes_numbers: bool = False


OPERATORS: dict[str, Operator] = {}


def operator(
    *names: str, known: Sequence[int] = (), sizes: bool = False
) -> Callable[[Function], Function]:
    """Enters a function in the table under its ONNX names. sizes: it computes arrays too."""

    def enter(function: Function) -> Function:
        for name in names:
            OPERATORS[name] = Operator(function, function if sizes else None, known)
        return function

    return enter


def of_arrays(name: str) -> Callable[[Function], Function]:
    """Enters what an operator that is in the table does to arrays."""

    def enter(function: Function) -> Function:
        OPERATORS[name] = replace(OPERATORS[name], of_arrays=function)
        return function

    return enter


def enter_all(functions: Mapping[str, Function]) -> None:
    """Enters functions of one expression each in the table, by their ONNX names."""
    OPERATORS.update({name: Operator(function) for name, function in functions.items()})


def as_tensor(value: Value, like: torch.Tensor) -> Any:
    """A value as an operand beside `like`: one number stays a number."""
    if isinstance(value, np.ndarray):
        if value.size == 1 and value.ndim <= like.dim():
            return value.reshape(()).item()
        return torch.from_numpy(value.astype(np.int64 if value.dtype == object else value.dtype))
    return value
