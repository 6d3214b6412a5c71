"""Networks as text: layer declarations and statements, so that a failing one can be printed, cut
and run.

Values are named x0, x1 (inputs), y2, y3 (results of statements) or i4 (indices); layers a5, b6 ...
are attributes of the module. Nothing else is known of a line: shapes are found by running it.
"""

from __future__ import annotations

import linecache
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

VALUE = re.compile(r"\b[xyi]\d+\b")
LAYER = re.compile(r"\bself\.(\w+)")
_BUILT = count()


@dataclass(frozen=True)
class Statement:
    """One line of `forward`: names, and the expression that they are given."""

    targets: tuple[str, ...]
    expression: str

    @property
    def sources(self) -> tuple[str, ...]:
        """The values it reads, in the order of the text."""
        return tuple(dict.fromkeys(VALUE.findall(self.expression)))

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(LAYER.findall(self.expression)))

    def __str__(self) -> str:
        return f"{', '.join(self.targets)} = {self.expression}"


@dataclass(frozen=True)
class Program:
    """A network. inputs: names and shapes; layers: names and constructors; results: names."""

    inputs: tuple[tuple[str, tuple[int, ...]], ...]
    layers: tuple[tuple[str, str], ...]
    statements: tuple[Statement, ...]
    results: tuple[str, ...]

    def source(self) -> str:
        """The module as Python, without the imports."""
        layers = [f"self.{name} = {text}" for name, text in self.layers]
        arguments = "".join(f", {name}" for name, _ in self.inputs)
        body = [*map(str, self.statements), f"return ({', '.join(self.results)},)"]
        return "\n".join(
            [
                "class Net(nn.Module):",
                "    def __init__(self):",
                "        super().__init__()",
                *(f"        {line}" for line in layers),
                "",
                f"    def forward(self{arguments}):",
                *(f"        {line}" for line in body),
                "",
            ]
        )

    def build(self) -> nn.Module:
        """A fresh module; whatever its own lines raise."""
        source = self.source()
        name = f"<network {next(_BUILT)}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        space: dict[str, Any] = {"torch": torch, "nn": nn, "F": F, "__name__": "network"}
        exec(compile(source, name, "exec"), space)
        module: nn.Module = space["Net"]()
        return module

    def pruned(self) -> Program:
        """Without statements, layers and inputs that no result needs; at least one input stays."""
        needed, kept = set(self.results), []
        for statement in reversed(self.statements):
            if needed & set(statement.targets):
                needed |= set(statement.sources)
                kept.append(statement)
        used = {name for statement in kept for name in statement.layers}
        inputs = tuple(row for row in self.inputs if row[0] in needed) or self.inputs[:1]
        layers = tuple(row for row in self.layers if row[0] in used)
        return Program(inputs, layers, tuple(reversed(kept)), self.results)

    def renamed(self, names: Mapping[str, str]) -> Program:
        """With other values read in the place of some; targets stay."""

        def swap(text: str) -> str:
            return VALUE.sub(lambda found: names.get(found[0], found[0]), text)

        statements = tuple(replace(s, expression=swap(s.expression)) for s in self.statements)
        results = tuple(dict.fromkeys(names.get(name, name) for name in self.results))
        return replace(self, statements=statements, results=results)

    def values(self, inputs: Sequence[torch.Tensor], module: nn.Module) -> dict[str, torch.Tensor]:
        """Every value by name, computed line by line."""
        known: dict[str, Any] = dict(zip((name for name, _ in self.inputs), inputs, strict=True))
        with torch.no_grad():
            for statement in self.statements:
                run(statement, known, module)
        return known


def merged(programs: Sequence[Program]) -> Program:
    """Several networks as one, side by side: torch.export costs as much for ten as for one."""
    inputs: list[Any] = []
    layers: list[Any] = []
    statements: list[Statement] = []
    results: list[str] = []
    for at, program in enumerate(programs):

        def own(text: str, at: int = at) -> str:
            text = VALUE.sub(lambda found: f"{found[0]}{at:02d}", text)
            return LAYER.sub(lambda found: f"{found[0]}{at:02d}", text)

        inputs += [(own(name), shape) for name, shape in program.inputs]
        layers += [(f"{name}{at:02d}", text) for name, text in program.layers]
        statements += [
            Statement(tuple(map(own, s.targets)), own(s.expression)) for s in program.statements
        ]
        results += map(own, program.results)
    return Program(tuple(inputs), tuple(layers), tuple(statements), tuple(results))


def run(statement: Statement, known: dict[str, Any], module: Any) -> None:
    """Runs one line on the values known so far, and adds its own."""
    space = {"torch": torch, "F": F, "self": module, **known}
    result = eval(statement.expression, space)
    results = result if len(statement.targets) > 1 else (result,)
    known.update(zip(statement.targets, results, strict=True))


def floats(values: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Those values that are tensors of floating-point numbers."""
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, torch.Tensor) and value.dtype.is_floating_point
    }


def fresh(names: Iterable[str], kind: str) -> str:
    """A name of that kind that is not there yet."""
    taken = [int(name[1:]) for name in names]
    return f"{kind}{max(taken, default=-1) + 1}"
