"""An ATen call that stays one in the graph, and what stands in its arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ...kernels.contract.op import Attributes


@dataclass(frozen=True)
class TorchCall(Attributes):
    """An ATen call kept as it is: `arguments` with `Slot`s where its tensors go.

    reason: why convloom has no kernel for it; source: the user's line. rows: where arguments are
    `BatchNumber`s, the slot of a tensor that tells the batch, and how many of its rows a sample is.
    """

    target: Any = None
    arguments: tuple[Any, ...] = ()
    keywords: tuple[tuple[str, Any], ...] = ()
    reason: str = ""
    source: str = ""
    rows: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        return str(self.target)


@dataclass(frozen=True)
class Slot:
    """The place of input `index` in the arguments of a `TorchCall`."""

    index: int


@dataclass(frozen=True)
class BatchNumber:
    """A number that follows from the batch, the value of `symbol` in a sympy `expression`."""

    expression: Any
    symbol: Any

    def at(self, batch: int) -> Any:
        """The int, float or bool that it is for a batch."""
        value = self.expression.subs(self.symbol, batch)
        if value.is_Boolean:
            return bool(value)
        return int(value) if value.is_Integer else float(value)

    def __str__(self) -> str:
        return in_words(self.expression)


def in_words(expression: Any) -> str:
    """An expression, or a shape, in terms of the batch N; torch names its symbol s and a number."""
    return re.sub(r"\bs\d+\b", "N", str(expression))
