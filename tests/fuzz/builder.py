"""A program under construction: each line is run on small tensors as it is written, so that lines
which torch refuses never get in and shapes are known."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .program import Program, Statement, floats, run

MOST_ELEMENTS = 1500
"""Of one value: the interpreter takes milliseconds per program."""
MOST_CHANNELS = 48


class UnsuitableError(Exception):
    """The line cannot be written here; the generator tries another."""


class Builder:
    """Grows a program. All choices come from `random`.

    turn: while the first line is written, how many seeds before this one began with the same line;
    its alternatives are then taken in turn. dtype: what a line asks to be computed in; special,
    dynamic: whether no line speaks against NaN in the inputs, against a batch that varies.
    """

    def __init__(self, chosen: random.Random, batch: int, turn: int | None = None) -> None:
        self.random, self.turn = chosen, turn
        self.inputs: list[tuple[str, tuple[int, ...]]] = []
        self.layers: list[tuple[str, str]] = []
        self.statements: list[Statement] = []
        self.results: list[str] = []
        self.values: dict[str, Any] = {}
        self.module = nn.Module().eval()
        self.batch = batch
        self.dtype: torch.dtype | None = None
        self.special = self.dynamic = True
        self._count = 0

    def name(self, kind: str) -> str:
        """A name that is not there yet."""
        self._count += 1
        return f"{kind}{self._count - 1}"

    def input(self, *shape: int) -> str:
        """A new input of (batch, *shape)."""
        name = self.name("x")
        whole = (self.batch, *shape)
        self.inputs.append((name, whole))
        generator = torch.Generator().manual_seed(self._count)
        self.values[name] = torch.randn(whole, generator=generator)
        return name

    def layer(self, constructor: str) -> str:
        """A layer of its own: `self.a3`."""
        name = self.name("a")
        layer = eval(constructor, {"torch": torch, "nn": nn})
        setattr(self.module, name, layer.eval() if isinstance(layer, nn.Module) else layer)
        self.layers.append((name, constructor))
        return f"self.{name}"

    def let(self, expression: str, kinds: str = "y") -> str:
        """One more line; the name of its (first) result. kinds: a letter for each result.

        Raises: UnsuitableError where torch refuses the line or its result is empty or large.
        """
        statement = Statement(tuple(self.name(kind) for kind in kinds), expression)
        known = dict(self.values)
        try:
            with torch.no_grad():
                run(statement, known, self.module)
        except (RuntimeError, ValueError, IndexError) as error:
            raise UnsuitableError(str(error)) from error
        made = [known[name] for name in statement.targets]
        if any(not 0 < value.numel() <= MOST_ELEMENTS for value in made):
            raise UnsuitableError("empty or large")
        if any(value.shape[:1] != (self.batch,) for value in made):
            raise UnsuitableError("the batch is not dimension 0 any more")
        self.values = known
        self.statements.append(statement)
        return statement.targets[0]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.values[name].shape)

    def pick(
        self, *ranks: int, where: Callable[[tuple[int, ...]], bool] = lambda shape: True
    ) -> str:
        """An earlier value of one of these ranks, the latest ones more often.

        Raises: UnsuitableError where there is none.
        """
        found = [
            name
            for name, value in floats(self.values).items()
            if value.dim() in ranks and value.shape[1] <= MOST_CHANNELS and where(self.shape(name))
        ]
        if not found:
            raise UnsuitableError(f"no value of rank {ranks}")
        return self.random.choice((found[-1], self.random.choice(found)))

    def like(self, name: str) -> str:
        """A value of the same shape, perhaps itself."""
        shape = self.shape(name)
        return self.random.choice([n for n in floats(self.values) if self.shape(n) == shape])

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def alternative(self, *choices: Any, of: int = 1, at: int = 0) -> Any:
        """One of the forms of a line: in turn where the line is a program's first, so that some
        hundred seeds have them all. of, at: a line that takes several forms, and which this is."""
        if self.turn is None:
            return self.random.choice(choices)
        return choices[(self.turn * of + at) % len(choices)]

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def program(self) -> Program:
        """What has been written; without results of its own, the last value is the result."""
        results = self.results or [list(floats(self.values))[-1]]
        program = Program(
            tuple(self.inputs), tuple(self.layers), tuple(self.statements),
            tuple(dict.fromkeys(results)),
        )  # fmt: skip
        # Layers of lines that were refused are left out; dead branches stay.
        used = {name for statement in self.statements for name in statement.layers}
        kept = tuple(row for row in program.layers if row[0] in used)
        return Program(program.inputs, kept, program.statements, program.results)


