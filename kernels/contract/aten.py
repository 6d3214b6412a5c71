"""Calls of ATen, and how an op says what it makes of one: the arguments by the names of the schema,
and the builder of a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import torch

from .attributes import Attributes
from .epilogue import Epilogue
from .spec import TensorSpec

WITHOUT_EFFECT = frozenset((
    "memory_format", "layout", "device", "pin_memory", "non_blocking", "copy", "implicit",
    "cudnn_enabled", "cudnn_enable", "momentum", "output_size",
))  # fmt: skip
"""Arguments with a default that say where a result lies and how it is computed, not what it is."""


class Arguments:
    """An ATen call's arguments as attributes, `a.kernel_size`, or items, `a["kernel_size"]`.

    schema: of the overload, with the defaults of what the call leaves out; args, keywords: as the
    call gives them, tensors as values of the graph.

    Reads are noted: what differs from its default and is never read, the reader does not know
    (`unread`), such as an argument that another version of torch has added.
    """

    def __init__(self, schema: Any, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        self.schema, self.args, self.keywords = schema, tuple(args), dict(keywords)
        names = (argument.name for argument in schema.arguments)
        self.given = {**dict(zip(names, self.args, strict=False)), **self.keywords}
        self._defaults = {
            argument.name: argument.default_value
            for argument in schema.arguments
            if argument.has_default_value()
        }
        self._values = {**self._defaults, **self.given}
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._values[name]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in self:
            raise AttributeError(f"{self.schema.name} has no argument {name!r}")
        return self[name]

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str, default: Any = None) -> Any:
        """The argument, or a default where the schema has none of that name."""
        return getattr(self, name, default)

    @property
    def first(self) -> Any:
        """What the call computes with first, `self` or `input` in most schemas; None without
        arguments."""
        return next(iter(self.given.values()), None)

    @property
    def unread(self) -> list[str]:
        """The arguments that have an effect, differ from their default, and were not read."""
        return [
            name
            for name, value in self.given.items()
            if name in self._defaults
            and name not in self._read | WITHOUT_EFFECT
            and value != self._defaults[name]
        ]

    def mapped(self, function: Callable[[str, Any], Any], /, **more: Any) -> Arguments:
        """`function(name, value)` for each value that the call gives, and more by keyword; reads
        count for both."""
        args = tuple(map(function, self.given, self.args))
        keywords = {name: function(name, value) for name, value in self.keywords.items()}
        changed = Arguments(self.schema, args, {**keywords, **more})
        changed._read = self._read
        return changed

    def replaced(self, /, **changes: Any) -> Arguments:
        """With other values for some arguments, given or not; reads count for both."""
        more = {name: value for name, value in changes.items() if name not in self.given}
        return self.mapped(lambda name, value: changes.get(name, value), **more)


class Builder(Protocol):
    """What an op's capture function may do: apply ops to values, look at their specs."""

    def apply(
        self,
        op: str,
        inputs: Sequence[Any],
        attributes: Attributes | None = None,
        epilogue: Epilogue = (),
    ) -> Any:
        """The (first) output value of a new node."""
        ...

    def spec(self, value: Any) -> TensorSpec:
        """The spec of a value."""
        ...

    def output(self, value: Any, index: int) -> Any:
        """Another output of the node whose first output a value is."""
        ...

    def maker(self, value: Any) -> tuple[str, Attributes, tuple[Any, ...]] | None:
        """The op that computes a value, its attributes and inputs; None for inputs, constants and
        what torch computes."""
        ...

    def constant(self, value: Any) -> torch.Tensor | None:
        """The tensor behind a value that is known at compile time, or None."""
        ...

    def is_computed(self, value: Any) -> bool:
        """Whether a value depends on an input of the graph."""
        ...

    def add_constant(self, tensor: torch.Tensor, dtype: torch.dtype) -> Any:
        """A new constant, which its readers see in `dtype`."""
        ...

    def refuse(self, reason: str) -> NoReturn:
        """Reports that this call is not supported."""
        ...


Capture = Callable[[Builder, Arguments], Any]
"""`capture(g, a)`: what the builder `g` makes of an ATen call with the arguments `a`; None for a
result that is not computed. Each argument that matters is read on every way to a result: one that
differs from its default and is not read is refused by its name."""
