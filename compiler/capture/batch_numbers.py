"""Numbers that depend on the batch of a call, and what the module's code decides by the batch.

torch.export hands on `x.shape[0]` and what is computed from it as expressions of a symbol. In a
shape they are sizes, which executables scale with the batch of each call. Anywhere else (a divisor,
a bound, an index) a kernel would need the number itself: such calls are refused by name, or run as
torch ops, which are given it call by call (`BatchNumber.at`).

torch.export also takes for granted that a batch is not 1: code that decides by it is traced for
larger batches, without a guard. `watched` notes what is decided, so that it can be held to 1.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ...kernels.contract.op import Arguments, BatchExtent
from ..graph.torch_call import BatchNumber, in_words

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
GENERATED = ("<string>", "<eval_with_key>")
LIBRARIES = (
    str(Path(torch.__file__).parent), str(Path(__file__).parents[1]), contextlib.__file__,
    *GENERATED,
)  # fmt: skip
"""How the names of files begin whose code is torch's or ours, not the user's, or between both."""

SIZES = ("size", "shape", "repeats", "end")
SIZED = frozenset((
    "aten.view.default", "aten.reshape.default", "aten._unsafe_view.default",
    "aten.expand.default", "aten.repeat.default",
    "aten.new_zeros.default", "aten.new_ones.default", "aten.new_full.default",
    "aten.zeros.default", "aten.ones.default", "aten.full.default",
    "aten.arange.default", "aten.arange.start", "aten.arange.start_step",
))  # fmt: skip
"""Calls that have, at a smaller batch, the first rows of their result at the largest; `SIZES`:
which of their arguments says how many."""
DROPPING = ("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims")
"""Calls whose result has another rank where a dimension is 1, of those they name or of all."""


@dataclass(frozen=True)
class Batch:
    """The batch as torch.export knows it, and the range that calls take it from."""

    symbol: Any
    lowest: int
    highest: int

    def number(self, value: Any) -> Any:
        """A symbolic number as a `BatchNumber`, or as a plain one where there is one batch only."""
        number = BatchNumber(value.node.expr, self.symbol)
        return number.at(self.highest) if self.lowest == self.highest else number

    def size(self, number: Any) -> Any:
        """A number inside a shape: what it is at the largest batch."""
        if not isinstance(number, BatchNumber):
            return number
        return BatchExtent(number.at(self.highest), self.highest)

    def sized(self, target: str, a: Arguments) -> Arguments:
        """The arguments of a call, with `BatchNumber`s in its shape as sizes."""
        takes_rows = target == "aten.slice.Tensor" and (a.dim, a.start or 0, a.step) == (0, 0, 1)
        if target not in SIZED and not takes_rows:
            return a
        return a.mapped(
            lambda name, value: pytree.tree_map(self.size, value) if name in SIZES else value
        )

    def may_drop(self, target: str, a: Arguments, shape: Sequence[Any]) -> int | None:
        """A dimension of size 1 at a batch of 1 only, which a call would drop then."""
        if target not in DROPPING or self.lowest > 1:
            return None
        named = a.get("dim", range(len(shape)))
        for dim in (dim % len(shape) for dim in ([named] if isinstance(named, int) else named)):
            size = shape[dim]
            if isinstance(size, torch.SymInt) and size.node.expr.subs(self.symbol, 1) == 1:
                return dim
        return None


def follows_from_values(value: Any, batch: Batch | None) -> bool:
    """Whether a symbolic number depends on what is in a tensor."""
    if not isinstance(value, SYMBOLIC):
        return False
    symbols = value.node.expr.free_symbols
    return bool(symbols - {batch.symbol} if batch else symbols)


@dataclass(frozen=True)
class Decision:
    """What the module's code asked of a symbolic number: its truth, or to be a plain number.

    result: the answer; None where torch.export had none. line: where, in words.
    """

    expression: Any
    result: Any
    line: str

    @property
    def question(self) -> str:
        """The number or condition, in terms of the batch N."""
        return in_words(self.expression)

    def differs_at_one(self, symbol: Any) -> bool:
        """Whether the answer is another one for a batch of 1."""
        if self.expression.free_symbols != {symbol}:
            return False
        answer = BatchNumber(self.expression, symbol).at(1)
        return bool(answer) != self.result if isinstance(self.result, bool) else False


@contextlib.contextmanager
def watched() -> Iterator[list[Decision]]:
    """The decisions that code outside torch takes by symbolic numbers inside the block."""
    decisions: list[Decision] = []
    originals = [
        (kind, name, vars(kind)[name])
        for kind in SYMBOLIC
        for name in ("__bool__", "__int__", "__index__", "__float__")
        if name in vars(kind)
    ]
    for kind, name, original in originals:
        setattr(kind, name, _noting(original, decisions))
    try:
        yield decisions
    finally:
        for kind, name, original in originals:
            setattr(kind, name, original)


def _noting(original: Callable[[Any], Any], decisions: list[Decision]) -> Callable[[Any], Any]:
    def ask(number: Any) -> Any:
        code, line = sys._getframe(1).f_code, sys._getframe(1).f_lineno
        if code.co_filename.startswith(LIBRARIES):
            return original(number)
        expression, result = number.node.expr, None
        try:
            result = original(number)
            return result
        finally:
            where = f"{Path(code.co_filename).name}:{line}"
            decisions.append(Decision(expression, result, where))

    return ask
