"""The outside of an executable: its inputs and outputs, how they are nested, and what is checked of
every call. Nothing here knows of kernels, so that saved executables are called without Triton."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from ...errors import InvalidInputError
from ...kernels.contract.spec import TensorSpec
from .memory import BufferSlice

CONSTANTS = (bool, int, float, str, type(None))
"""What may stand among the arguments beside tensors: part of the compiled code."""


class Constant:
    """A constant among the arguments, as a container without tensors: structures that differ in a
    constant differ."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)

    def __eq__(self, other: object) -> bool:
        # By their text: 1 is not True, 0.0 is not -0.0, and nan is nan.
        return isinstance(other, Constant) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


pytree.register_pytree_node(Constant, lambda constant: ([], constant), lambda _, constant: constant)


def with_constants(arguments: Any) -> Any:
    """The arguments with `Constant`s as constants."""
    return pytree.tree_map(
        lambda leaf: Constant(leaf) if isinstance(leaf, CONSTANTS) else leaf, arguments
    )


def with_tensors(arguments: Any) -> Any:
    """The arguments with tensors instead of NumPy's arrays; they share memory where they can."""
    return pytree.tree_map(_tensor, arguments)


def _tensor(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray):
        return leaf
    try:
        return torch.from_numpy(np.require(leaf, requirements=("C", "W")))
    except TypeError as error:
        raise InvalidInputError(
            f"inputs: expected an array of numbers, got NumPy's {leaf.dtype}"
        ) from error


@dataclass(frozen=True)
class Structure:
    """How the module's arguments (positional ones, keywords) and its result are nested.

    results: for each leaf of the result, the index of a graph output or a literal. names: of what
    `forward` takes by position or by name, in its order; none where that is not known. images:
    inputs of uint8, which are float32 in the graph.
    """

    arguments: pytree.TreeSpec
    result: pytree.TreeSpec
    results: tuple[tuple[str, Any], ...]
    names: tuple[str, ...] = ()
    images: tuple[str, ...] = ()


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

    def flatten(
        self, inputs: Sequence[Any], keywords: Mapping[str, Any] | None = None
    ) -> list[torch.Tensor]:
        """The tensors of a call's arguments.

        Raises: InvalidInputError where they are not structured as the example was, or a constant
        among them is another.
        """
        # Most calls, for which there is nothing to take apart.
        is_usual = self._is_flat and not keywords and len(inputs) == len(self.inputs)
        if is_usual and all(isinstance(each, torch.Tensor) for each in inputs):
            return list(inputs)
        arguments: Any = (tuple(inputs), {})
        if keywords or len(inputs) != len(self._example[0]):
            arguments = self._as_in_the_example(inputs, keywords or {})
        if self._has_constants:
            arguments = with_constants(arguments)
        leaves, spec = pytree.tree_flatten(arguments)
        if spec != self.structure.arguments:
            self._refuse(arguments)
        if any(isinstance(leaf, np.ndarray) for leaf in leaves):
            leaves = with_tensors(leaves)
        return leaves

    def placed(self, tensors: Sequence[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments and keywords of a call with these tensors, constants included."""
        rebuilt = pytree.tree_unflatten(list(tensors), self.structure.arguments)
        arguments, keywords = pytree.tree_map(
            lambda leaf: leaf.value if isinstance(leaf, Constant) else leaf,
            rebuilt, is_leaf=_is_constant,
        )  # fmt: skip
        return arguments, keywords

    @cached_property
    def _example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the example, with the names of inputs in the place of tensors."""
        names = [port.name for port in self.inputs]
        example: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_unflatten(
            names, self.structure.arguments
        )
        return example

    @cached_property
    def _is_flat(self) -> bool:
        """Whether the arguments of the example were tensors by position."""
        return self._example == (tuple(port.name for port in self.inputs), {})

    @cached_property
    def _has_constants(self) -> bool:
        return any(isinstance(leaf, Constant) for leaf in _leaves(self._example))

    def _as_in_the_example(self, inputs: Sequence[Any], keywords: Mapping[str, Any]) -> Any:
        """The arguments of a call as those of the example stand: what was given by position there
        may be given by name, and the other way round, where `forward` takes both.

        Raises: InvalidInputError for what is given by position and by name.
        """
        given, rest = list(inputs), dict(keywords)
        positional, named = self._example
        names = self.structure.names
        places: Sequence[Any] = names[: len(positional)] if names else positional
        for name in names[: len(given)]:
            if name in rest:
                raise InvalidInputError(f"inputs: '{name}' is given by position and by name")
        if names and len(positional) < len(given) <= len(names):
            rest = {**dict(zip(names[len(places) :], given[len(places) :], strict=False)), **rest}
            given = given[: len(places)]
        for name in places[len(given) :]:
            if not isinstance(name, str) or name not in rest:
                break
            given.append(rest.pop(name))
        ordered = {name: rest.pop(name) for name in named if name in rest}
        return tuple(given), {**ordered, **rest}

    def _refuse(self, arguments: Any) -> None:
        """Raises: InvalidInputError for arguments whose structure is not the example's."""
        expected, got = _leaves(self._example), _leaves(arguments)
        same = _form(self._example) == _form(arguments)
        for one, other in zip(expected, got, strict=True) if same else ():
            if isinstance(one, Constant) and one != other:
                found = other if isinstance(other, Constant) else type(other).__name__
                raise InvalidInputError(
                    f"inputs: expected the constant {one} of the example, got {found}; it is part "
                    "of the compiled code: compile again for another"
                )
        specs = [f"{port.name} {port.spec}" for port in self.inputs]
        constants = [f"constant {leaf}" for leaf in expected if isinstance(leaf, Constant)]
        names = f" and keywords {', '.join(self._example[1])}" if self._example[1] else ""
        count = sum(not isinstance(leaf, Constant) for leaf in got)
        raise InvalidInputError(
            f"inputs: expected {len(specs)} tensor(s) structured as the example "
            f"({', '.join(specs + constants)}{names}), got {count}"
            + (f" and keywords {', '.join(arguments[1])}" if arguments[1] else "")
        )

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
            raise InvalidInputError(f"inputs: expected equal batches, got {sorted(sizes)}")
        batch = sizes.pop() if sizes else 1
        if batch < at_least:
            raise InvalidInputError(f"inputs: expected a batch of at least {at_least}, got {batch}")
        return batch

    def unflatten(self, outputs: Sequence[torch.Tensor]) -> Any:
        """The outputs in the module's own structure."""
        leaves = [
            outputs[value] if kind == "tensor" else value for kind, value in self.structure.results
        ]
        return pytree.tree_unflatten(leaves, self.structure.result)


def _is_constant(leaf: Any) -> bool:
    return isinstance(leaf, Constant)


def _leaves(arguments: Any) -> list[Any]:
    """Tensors and constants."""
    return pytree.tree_leaves(arguments, is_leaf=_is_constant)


def _form(arguments: Any) -> pytree.TreeSpec:
    """The structure, whatever the constants."""
    return pytree.tree_structure(arguments, is_leaf=_is_constant)


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
