"""Reads the text of PTX into instructions."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ....errors import KernelError

WIDTHS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "f32": 32, "f64": 64}
COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
ENTRY = re.compile(r"\.entry\s+([\w$.]+)\s*\((.*?)\)([^{]*)\{", re.DOTALL)
MOST_REGISTERS = re.compile(r"\.maxnreg\s+(\d+)")
TARGETS = ".branchtargets"
PARAMETER = re.compile(r"\.[busf](\d+)\s.*?([\w$]+)(?:\[(\d+)\])?$")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")
ARRAY = re.compile(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]")
LABEL = re.compile(r"^([\w$]+):")
SCOPES = "{} \t\n"
BRANCHES = {"bra", "brx", "ret", "exit"}
GUARD = re.compile(r"^@(!?)(%?[\w$]+)\s+")


@dataclass(frozen=True)
class Address:
    """`[base + offset]`; base: a register or a symbol. more: what else stands in the brackets."""

    base: str
    offset: int = 0
    more: tuple[str, ...] = ()


Operand = str | Address | tuple[str, ...]
"""A register, number or symbol; an address; a vector."""


@dataclass(frozen=True)
class Instruction:
    """One instruction. opcode: split at the dots; guard: (register, whether it is negated)."""

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: tuple[str, bool] | None
    text: str


@dataclass(frozen=True)
class Kernel:
    """One entry. parameters: name -> bytes, in order; registers: bits by name or by prefix;
    labels: numbers of the instructions behind, several where a scope has its own; arrays: (space,
    bytes) by name; tables: labels that a branch chooses from, by name; most_registers: of a thread
    when the kernel begins, where that is said."""

    name: str
    parameters: dict[str, int]
    registers: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, list[int]]
    arrays: dict[str, tuple[str, int]] = field(default_factory=dict)
    tables: dict[str, list[str]] = field(default_factory=dict)
    most_registers: int | None = None

    def width(self, register: str) -> int:
        """Bits of a register.

        Raises: KeyError for a name that is not a register.
        """
        known = self.registers.get(register)
        return known if known is not None else self.registers[register.rstrip("0123456789")]

    def target(self, label: str, at: int) -> int:
        """Where a branch at an instruction leads to: of several labels in scopes of their own the
        last one in front of it."""
        first, *others = self.labels[label]
        return max((place for place in others if place <= at), default=first)

    @cached_property
    def order(self) -> list[int]:
        """How far along each instruction is, and the kernel's end: its number, but behind every
        branch to it where nothing else leads there. Compilers put ends of loops in front of them.
        """
        count, goals = len(self.instructions), dict[int, list[int]]()
        for at, each in enumerate(self.instructions):
            if each.opcode[0] in BRANCHES:
                label = str(each.operands[-1]) if each.operands else None
                labels = self.tables.get(str(label), [label] if label else [])
                goals[at] = [self.target(name, at) for name in labels]
                if each.guard is not None:
                    goals[at].append(at + 1)
        ends = {*goals, count - 1}
        reached = itertools.chain.from_iterable(goals.values())
        starts = sorted({0, *(at + 1 for at in ends), *reached})
        sources: dict[int, list[int]] = {start: [] for start in starts}
        for start, stop in itertools.pairwise(starts):
            for to in goals.get(stop - 1, [stop]):
                sources[to].append(start)
        along: dict[int, tuple[int, ...]] = {start: (start,) for start in starts}
        for start in starts:
            before = [along[source] for source in sources[start]]
            if start and before and min(before) > along[start]:
                along[start] = *max(before), start
        blocks = sorted(itertools.pairwise(starts), key=lambda block: along[block[0]])
        found = [0] * count
        for rank, at in enumerate(at for block in blocks for at in range(*block)):
            found[at] = rank
        return found


def parse(text: str) -> Kernel:
    """The only entry of a module.

    Raises: KernelError where there is none, or functions beside it.
    """
    text = COMMENT.sub("", text)
    entry = ENTRY.search(text)
    if entry is None or ".func" in text:
        raise KernelError("the emulator runs modules of one entry without functions")
    arrays = {name: ("shared", 0) for _, name, _ in ARRAY.findall(text[: entry.start()])}
    registers: dict[str, int] = {}
    labels: dict[str, list[int]] = {}
    tables: dict[str, list[str]] = {}
    instructions: list[Instruction] = []
    for statement in _statements(text[entry.end() :]):
        while label := LABEL.match(statement):
            labels.setdefault(label[1], []).append(len(instructions))
            statement = statement[label.end() :].lstrip(SCOPES)
            if statement.startswith(TARGETS):
                tables[label[1]] = list(_split(statement.removeprefix(TARGETS)))
        if declared := REGISTERS.match(statement):
            for name in declared[2].split(","):
                registers[name.strip().partition("<")[0]] = WIDTHS[declared[1]]
        elif statement.startswith(".") and (array := ARRAY.search(statement)):
            arrays[array[2]] = (statement[1:].split()[0], int(array[3] or 0))
        elif statement and not statement.startswith("."):
            instructions.append(_instruction(statement))
    parameters = {
        name: int(bits) // 8 * int(count or 1)
        for each in entry[2].split(",")
        for bits, name, count in PARAMETER.findall(each.strip())
    }
    most = MOST_REGISTERS.search(entry[3])
    return Kernel(
        entry[1], parameters, registers, tuple(instructions), labels, arrays, tables,
        int(most[1]) if most else None,
    )  # fmt: skip


def _statements(body: str) -> Iterator[str]:
    """What stands between semicolons, without the braces of scopes."""
    for part in body.split(";"):
        # Directives that end with the line, not with a semicolon.
        lines = [line for line in part.splitlines() if line.split()[:1] != [".loc"]]
        # Braces of vectors have operands in front of them in the same statement.
        yield " ".join(line.strip() for line in lines).lstrip(SCOPES).strip()


def _instruction(statement: str) -> Instruction:
    text = statement
    guard = GUARD.match(statement)
    if guard:
        statement = statement[guard.end() :]
    opcode, _, rest = statement.partition(" ")
    if "\t" in opcode:
        opcode, _, more = opcode.partition("\t")
        rest = f"{more} {rest}"
    operands = tuple(_operand(part) for part in _split(rest))
    return Instruction(
        tuple(opcode.split(".")), operands, guard and (guard[2], guard[1] == "!"), text
    )


def _split(text: str) -> Iterator[str]:
    """At the commas that are in no bracket."""
    depth, start = 0, 0
    for at, char in enumerate(text):
        depth += (char in "{[(") - (char in "}])")
        if char == "," and not depth:
            yield text[start:at].strip()
            start = at + 1
    if last := text[start:].strip():
        yield last


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(_split(text[1:-1]))
    if text.startswith("["):
        first, *more = _split(text[1:-1])
        base, sign, offset = re.sub(r"\s", "", first).partition("+")
        return Address(base, int(offset) if sign else 0, tuple(more))
    return text
