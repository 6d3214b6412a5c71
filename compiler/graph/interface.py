"""The outside of an executable: its inputs and outputs, how they are nested, and what is checked of
every call. Nothing here knows of kernels, so that saved executables are called without Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...errors import InvalidInputError
from ...kernels.contract.spec import TensorSpec
from .memory import BufferSlice


@dataclass(frozen=True)
class Structure:
    """How the module's arguments and result are nested.

    results: for each leaf of the result, the index of a graph output or a literal.
    """

    arguments: pytree.TreeSpec
    result: pytree.TreeSpec
    results: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Port:
    """An input or output of the executable: its spec outside, and where it lies."""

    name: str
    spec: TensorSpec
    place: BufferSlice


@dataclass(frozen=True)
class Interface:
    """What a call takes and gives; `batch` is the range that a dynamic batch may come from."""

    inputs: tuple[Port, ...]
    structure: Structure
    batch: tuple[int, int] | None = None

    def flatten(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """The tensors of a call's arguments.

        Raises: InvalidInputError where they are not structured as the example was.
        """
        leaves, spec = pytree.tree_flatten((tuple(inputs), {}))
        if spec != self.structure.arguments:
            expected = [f"{port.name} {port.spec}" for port in self.inputs]
            raise InvalidInputError(
                f"inputs: expected {len(expected)} tensor(s) structured as the example "
                f"({', '.join(expected)}), got {len(leaves)}"
            )
        return leaves

    def check(
        self, tensors: Sequence[torch.Tensor], device: torch.device, at_least: int = 0
    ) -> int:
        """The batch of a call (1 where it is fixed).

        Raises: InvalidInputError for a wrong rank, dtype, device, shape or batch.
        """
        batches = set()
        for port, tensor in zip(self.inputs, tensors, strict=True):
            batches.add(_check_input(port, tensor, self.batch, device))
        sizes = {batch for batch in batches if batch is not None}
        if len(sizes) > 1:
            raise InvalidInputError(f"inputs: batches differ: {sorted(sizes)}")
        batch = sizes.pop() if sizes else 1
        if batch < at_least:
            raise InvalidInputError(f"inputs: expected a batch of at least {at_least}, got {batch}")
        return batch

    def unflatten(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The outputs in the module's own structure."""
        leaves = [
            outputs[value] if kind == "tensor" else value
            for kind, value in self.structure.results
        ]
        return pytree.tree_unflatten(leaves, self.structure.result)


def _check_input(
    port: Port, tensor: Any, bounds: tuple[int, int] | None, device: torch.device
) -> int | None:
    """The batch of one input (None where it is fixed); raises InvalidInputError."""
    spec = port.spec
    if not isinstance(tensor, torch.Tensor):
        raise InvalidInputError(
            f"input {port.name}: expected a tensor {spec}, got {type(tensor).__name__}"
        )
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else str(tensor.layout)
        raise InvalidInputError(f"input {port.name}: expected a dense tensor {spec}, got {kind}")
    got = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
    if tensor.dim() != spec.rank:
        raise InvalidInputError(f"input {port.name}: expected rank {spec.rank} ({spec}), got {got}")
    if tensor.dtype is not spec.dtype:
        raise InvalidInputError(f"input {port.name}: expected dtype {spec.dtype}, got {got}")
    if tensor.device != device:
        raise InvalidInputError(f"input {port.name}: expected device {device}, got {got}")
    batch = None
    if spec.batch is not None:
        assert bounds is not None
        batch = tensor.shape[0] // (spec.shape[0] // spec.batch)
        if not bounds[0] <= batch <= bounds[1]:
            raise InvalidInputError(
                f"input {port.name}: expected a batch from {bounds[0]} to {bounds[1]}, got {got}"
            )
    expected = spec.shape if batch is None else spec.at(batch)
    if tuple(tensor.shape) != expected:
        raise InvalidInputError(f"input {port.name}: expected shape {expected}, got {got}")
    return batch


def empty_outputs(ports: Sequence[Port], device: torch.device) -> list[torch.Tensor]:
    """The results of a call with no samples: nothing has to run.

    Raises: InvalidInputError where one of them does not depend on the batch.
    """
    for port in ports:
        if port.spec.batch is None:
            raise InvalidInputError(
                f"inputs: expected at least one sample, got none; {port.name} {port.spec} does "
                "not depend on the batch"
            )
    specs = [port.spec for port in ports]
    return [torch.empty(spec.at(0), dtype=spec.dtype, device=device) for spec in specs]
