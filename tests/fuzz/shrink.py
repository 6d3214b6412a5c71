"""From a network that breaks a promise to a small one that breaks the same promise.

Greedy, as delta debugging is (A. Zeller, R. Hildebrandt, 2002): the first smaller program that
still fails is taken, until none is left. Steps, from large to small: drop a result; make a value an
input; replace a value by an earlier one of its shape; make a number smaller everywhere or once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import torch

from ..harness import INTERPRETED, Interpreter
from .contract import BrokenError, Case, check
from .program import Program, Statement, floats, fresh

NUMBER = re.compile(r"(?<![\w.])\d+(?![\w.]|\s*\*\*)")
MOST_CHECKS = 400

Fails = Callable[[Case], bool]


def shrink(
    case: Case, fails: Fails | None = None, most: int = MOST_CHECKS,
    device: Interpreter = INTERPRETED,
) -> Case:  # fmt: skip
    """The smallest case found that fails as this one does, after at most `most` checks.

    fails: by default, whether `check` on the device raises a BrokenError of the same kind.
    """
    fails = fails or _same_failure(case, device)
    checks = count(1)
    progress = True
    while progress:
        progress = False
        for smaller in candidates(case):
            if next(checks) > most:
                return case
            if _runs(smaller) and fails(smaller):
                case, progress = smaller, True
                break
    return case


def _same_failure(case: Case, device: Interpreter) -> Fails:
    kind = _kind(case, device)

    def fails(smaller: Case) -> bool:
        return kind is not None and _kind(smaller, device) == kind

    return fails


def _kind(case: Case, device: Interpreter) -> str | None:
    try:
        check(case, device)
    except BrokenError as error:
        return error.kind
    return None


def _runs(case: Case) -> bool:
    """Whether torch takes the program, and no result is empty."""
    try:
        known = case.program.values(case.inputs(), case.module())
    except (RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError):
        return False
    results = [known[name] for name in case.program.results]
    return all(isinstance(x, torch.Tensor) and x.numel() > 0 and x.dim() > 0 for x in results)


def candidates(case: Case) -> Iterator[Case]:
    """Smaller cases, the most promising first; not all of them run."""
    yield from _plainer(case)
    seen = {_key(case.program)}
    for program in _programs(case):
        program = program.pruned()
        if (key := _key(program)) not in seen:
            seen.add(key)
            yield replace(case, program=program)


def _key(program: Program) -> str:
    return f"{program.inputs}{program.source()}"


def _plainer(case: Case) -> Iterator[Case]:
    plain = {"special": False, "strided": False, "checks": (), "without": None, "dtype": None}
    for name, value in plain.items():
        if getattr(case, name) != value:
            yield replace(case, **{name: value})


def _programs(case: Case) -> Iterator[Program]:
    program = case.program
    yield program
    if len(program.results) > 1:
        for name in program.results:
            yield replace(program, results=(name,))
    try:
        values = floats(program.values(case.inputs(), case.module()))
    except RuntimeError:
        return
    shapes = {name: tuple(value.shape) for name, value in values.items()}
    yield from _earlier_results(program, shapes)
    yield from _cuts(program, shapes)
    yield from _replacements(program, shapes)
    yield from _smaller_numbers(program)


def _earlier_results(
    program: Program, shapes: dict[str, tuple[int, ...]]
) -> Iterator[Program]:
    """A value on the way is the result."""
    for statement in program.statements:
        for name in statement.targets:
            if name in shapes and program.results != (name,):
                yield replace(program, results=(name,))


def _cuts(program: Program, shapes: dict[str, tuple[int, ...]]) -> Iterator[Program]:
    """A statement's value is a further input instead; late ones first, which cut most."""
    for statement in reversed(program.statements):
        target = statement.targets[0]
        if target not in shapes or program.results == (target,):
            continue
        name = fresh((name for name, _ in program.inputs), "x")
        inputs = (*program.inputs, (name, shapes[target]))
        yield replace(program, inputs=inputs).renamed({target: name})


def _replacements(
    program: Program, shapes: dict[str, tuple[int, ...]]
) -> Iterator[Program]:
    """An earlier value of the same shape in the place of another."""
    names = list(shapes)
    for at, name in enumerate(names):
        for earlier in names[:at]:
            if shapes[earlier] == shapes[name]:
                yield program.renamed({name: earlier})


def _smaller_numbers(program: Program) -> Iterator[Program]:
    """A number is smaller everywhere (channels of neighbours must agree), or in one place."""
    texts = _texts(program)
    numbers = sorted({int(found) for text in texts for found in NUMBER.findall(text)}, reverse=True)
    for number in numbers:
        for less in dict.fromkeys((1, 2, number // 2, number - 1)):
            if 0 < less < number:
                whole = rf"(?<![\w.]){number}(?![\w.])"
                yield _with_texts(program, [re.sub(whole, str(less), text) for text in texts])
                for at, text in enumerate(texts):
                    for found in re.finditer(whole, text):
                        once = text[: found.start()] + str(less) + text[found.end() :]
                        yield _with_texts(program, [*texts[:at], once, *texts[at + 1 :]])


def _texts(program: Program) -> list[str]:
    """Everything that holds numbers: shapes, layers, expressions."""
    shapes = [str(list(shape)) for _, shape in program.inputs]
    return [*shapes, *(text for _, text in program.layers),
            *(statement.expression for statement in program.statements)]  # fmt: skip


def _with_texts(program: Program, texts: list[str]) -> Program:
    rest = iter(texts)
    inputs = tuple(
        (name, tuple(map(int, NUMBER.findall(next(rest))))) for name, _ in program.inputs
    )
    layers = tuple((name, next(rest)) for name, _ in program.layers)
    statements = tuple(Statement(s.targets, next(rest)) for s in program.statements)
    return Program(inputs, layers, statements, program.results)
