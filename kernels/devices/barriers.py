"""Two groups of warps that multiply out of one shared memory: whether a barrier stands between a
wait for products and the next write to what they read, looked up in the PTX.

`wgmma.wait_group` waits for the products of its own group of four warps only. Triton's analysis has
taken it for a barrier of the whole block (triton issue 11047): with more than four warps one group
would then overwrite what the other still reads. Every kernel that is compiled is looked at, on all
its paths. Addresses are followed as intervals from the start of the shared memory; one that cannot
be followed may lie anywhere, the slots of a ring among them: a kernel that overwrites another slot
than the one that was read, and has its barrier further on, is refused although it is right (seen:
fp32 by three tf32 products with 8 warps).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

WAIT = "wgmma.wait_group"
PRODUCT = re.compile(r"wgmma\.mma_async\S*\.m64n(\d+)k\d+\.\S*\s")
WRITE = re.compile(
    r"(st\.(?:volatile\.)?shared(?:::cta)?(?:\.v(?P<count>\d))?\.\w(?P<bits>\d+)|stmatrix\.\S+"
    r"|cp\.async\.c[ag]\.shared\S*|cp\.async\.bulk\S*\.shared::cluster\S*"
    r"|(?:red|atom)\.\S*shared\S*)"
    r"\s[^\[]*\[\s*(?P<address>%\w+)(?:\s*\+\s*(?P<offset>-?\d+))?"
)
BARRIER = re.compile(r"(bar|barrier|barrier\.cta)\.sync\b")
LABEL = re.compile(r"^(\$[\w$]+):")
BRANCH = re.compile(r"^(@!?%\w+\s+)?bra(?:\.uni)?\s+(\$[\w$]+)")
RETURN = re.compile(r"^(ret|exit|trap)\b")
PREDICATE = re.compile(r"^@!?%\w+\s+")
DEFINITION = re.compile(r"^([\w.:]+)\s+(%\w+),\s*(.*);")
FAR = 1 << 32
SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Bytes of a row of an operand, by the top two bits of its descriptor."""


class Interval(NamedTuple):
    """Values from `low` to `high`. in_shared: counted from the start of the shared memory; row: of
    a descriptor, the bytes of one row of its operand; bits: those that may be set, -1 for all."""

    low: int
    high: int
    in_shared: bool = False
    row: int = 0
    bits: int = -1

    @staticmethod
    def of(low: int, high: int, in_shared: bool = False, bits: int = -1) -> Interval:
        """Values without a sign have no bits above the highest one of `high`."""
        if low < 0:
            return Interval(low, high, in_shared)
        bits &= (1 << high.bit_length()) - 1
        return Interval(low, min(high, bits), in_shared, bits=bits)


ANYWHERE = (0, FAR)
Span = tuple[int, int]
"""Bytes of shared memory: the first and the one past the last."""


@dataclass
class _Block:
    """Instructions between two labels or branches, and where it goes on.

    events: in order ("product", what it reads), ("wait", ()) for all products, ("wait for some",
    ()), ("barrier", ()) or (an instruction that writes, (its span,)).
    """

    events: list[tuple[str, tuple[Span, ...]]] = field(default_factory=list)
    next: list[str] = field(default_factory=list)


class _State(NamedTuple):
    """What products under way read, and what those read that were waited for without a barrier."""

    issued: frozenset[Span]
    waited: frozenset[Span]


def unordered_write(ptx: str, threads: int) -> str | None:
    """The first write that some path reaches from a wait for products, without a barrier between
    them, to shared memory that those products read; None where there is none."""
    if WAIT not in ptx:
        return None
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    blocks = _blocks(lines, _Addresses(lines, threads))
    reached: dict[str, _State] = {"": _State(frozenset(), frozenset())}
    pending = [""]
    while pending:
        name = pending.pop()
        state = reached[name]
        for kind, spans in blocks[name].events:
            if kind == "product":
                state = state._replace(issued=state.issued | set(spans))
            elif kind in ("wait", "wait for some"):
                left = frozenset() if kind == "wait" else state.issued
                state = _State(left, state.waited | state.issued)
            elif kind == "barrier":
                state = state._replace(waited=frozenset())
            elif any(a < stop and start < b for a, b in spans for start, stop in state.waited):
                return kind
        for following in blocks[name].next:
            before = reached.get(following)
            joined = state if before is None else _State(
                before.issued | state.issued, before.waited | state.waited
            )
            if joined != before:
                reached[following] = joined
                pending.append(following)
    return None


def _blocks(lines: Sequence[str], addresses: _Addresses) -> dict[str, _Block]:
    """The function's blocks by label; those without one by the number of their line."""
    name, blocks = "", {"": _Block()}
    for number, line in enumerate(lines):
        if (label := LABEL.match(line)) is not None:
            blocks.setdefault(label[1], _Block())
            blocks[name].next.append(label[1])
            name = label[1]
        elif (branch := BRANCH.match(line)) is not None:
            blocks.setdefault(branch[2], _Block())
            blocks[str(number)] = _Block()
            blocks[name].next += [branch[2], *([str(number)] if branch[1] else [])]
            name = str(number)
        elif RETURN.match(line):
            name = str(number)
            blocks[name] = _Block()
        elif (event := _event(PREDICATE.sub("", line), number, addresses)) is not None:
            blocks[name].events.append(event)
    return blocks


def _event(line: str, at: int, addresses: _Addresses) -> tuple[str, tuple[Span, ...]] | None:
    """What the instruction in line `at` does to shared memory or to who waits for whom."""
    if line.startswith(WAIT):
        return "wait" if line.rstrip(";").split()[-1] == "0" else "wait for some", ()
    if BARRIER.match(line):
        return "barrier", ()
    if (product := PRODUCT.match(line)) is not None:
        # Sums in braces; then x, in braces too where it is in registers, and w.
        operands = re.sub(r"\{[^}]*\}", "{}", line).split(",")[1:3]
        rows = (64, int(product[1]))
        given = [(x.strip(), count) for x, count in zip(operands, rows, strict=True)]
        return "product", tuple(addresses.operand(x, at, n) for x, n in given if x != "{}")
    if (write := WRITE.match(line)) is not None:
        size = int(write["count"] or 1) * int(write["bits"] or 128) // 8
        if "bulk" in write[1]:
            size = FAR
        return line, (addresses.span(write["address"], at, int(write["offset"] or 0), size),)
    return None


class _Definition(NamedTuple):
    """block: the number of the line that the straight line of instructions around it begins at."""

    line: int
    block: int
    opcode: str
    operands: str


class _Addresses:
    """Where registers may point, by what defines them."""

    def __init__(self, lines: Sequence[str], threads: int) -> None:
        self._threads = threads
        self._blocks: list[int] = []
        self._definitions: dict[str, list[_Definition]] = {}
        block = 0
        for number, line in enumerate(lines):
            block = number if LABEL.match(line) else block
            self._blocks.append(block)
            if (found := DEFINITION.match(line)) is not None:
                made = _Definition(number, block, found[1], found[3])
                self._definitions.setdefault(found[2], []).append(made)
        self._known: dict[tuple[_Definition, ...], Interval | None] = {}

    def _reaching(self, register: str, at: int) -> tuple[_Definition, ...]:
        """What may have defined a register that line `at` reads: the last definition before it on
        the way from a label, which a ring's counter has before it names a slot, or any."""
        every = self._definitions.get(register, ())
        near = [each for each in every if each.block == self._blocks[at] and each.line < at]
        return (near[-1],) if near else tuple(every)

    def span(self, register: str, at: int, offset: int, size: int) -> Span:
        """The bytes that an access of `size` bytes in line `at` may touch."""
        value = self._value(register, at)
        if value is None or not value.in_shared:
            return ANYWHERE
        # Accesses are aligned to their size, however an interval was rounded.
        return value.low + offset, (value.high + offset) // size * size + size

    def operand(self, register: str, at: int, rows: int) -> Span:
        """The bytes that the product in line `at` reads by a descriptor, which may begin inside the
        first row."""
        value = self._value(register, at)
        if value is None or not value.row:
            return ANYWHERE
        first, last = (at // value.row * value.row for at in (value.low, value.high))
        return first, last + rows * value.row

    def _value(self, text: str, at: int) -> Interval | None:
        """The interval of a register or a literal that line `at` reads; None where it is not
        known."""
        if text == "global_smem":
            return Interval.of(0, 0, in_shared=True)
        if text == "%tid.x":
            return Interval.of(0, self._threads - 1)
        if not text.startswith("%"):
            try:
                return Interval.of(int(text, 0), int(text, 0), bits=int(text, 0))
            except ValueError:
                return None
        found = self._reaching(text, at)
        if found not in self._known:
            self._known[found] = None  # While it is looked up: a cycle is not known.
            values = [self._computed(each) for each in found]
            while len(values) > 1:  # A value per path that leads here.
                first, second = values.pop(), values.pop()
                values.append(_either(first, second) if first and second else None)
            self._known[found] = values[0] if values else None
        return self._known[found]

    def _counter(self, operands: list[str]) -> Interval | None:
        """The place in a ring: `selp 0, x, x > last`, as a loop counts it on."""
        start, counted, past = operands
        definitions = self._definitions.get(past, [])
        if start != "0" or len(definitions) != 1 or not definitions[0].opcode.startswith("setp.gt"):
            return None
        left, last = (text.strip() for text in definitions[0].operands.split(","))
        known = self._value(last, definitions[0].line)
        return Interval.of(0, known.high) if left == counted and known is not None else None

    def _computed(self, definition: _Definition) -> Interval | None:
        _, _, opcode, listed = definition
        name, operands = opcode.split(".")[0], [text.strip() for text in listed.split(",")]
        if name == "selp":
            counter = self._counter(operands)
            if counter is not None:
                return counter
        values = [self._value(text, definition.line) for text in operands]
        compute = COMPUTED.get(name)
        needed = values[: {"shfl": 1, "selp": 2}.get(name, len(values))]
        if compute is None or any(value is None for value in needed):
            return None
        return compute(*(value for value in needed if value is not None))


def _same(x: Interval) -> Interval:
    return x


def _add(x: Interval, y: Interval) -> Interval | None:
    if x.row or y.row:
        return _described(x, y)
    if x.in_shared and y.in_shared:
        return None
    # Without a carry no other bits are set.
    bits = x.bits | y.bits if min(x.low, y.low) >= 0 and not x.bits & y.bits else -1
    return Interval.of(x.low + y.low, x.high + y.high, x.in_shared or y.in_shared, bits)


def _described(x: Interval, y: Interval) -> Interval | None:
    """A descriptor with something added: the low 14 bits count 16 bytes, the top two of a literal
    are the kind of rows."""
    descriptor, literal = (x, y) if x.row else (y, x)
    if literal.low != literal.high:
        if literal.low < 0 or literal.high > 0x3FFF:
            return None
        low, high = descriptor.low + 16 * literal.low, descriptor.high + 16 * literal.high
        return Interval(low, high, True, descriptor.row)
    bits = literal.low & ((1 << 64) - 1)
    moved = 16 * (bits & 0x3FFF)
    row = SWIZZLES[bits >> 62] if bits >> 62 else descriptor.row
    return Interval(descriptor.low + moved, descriptor.high + moved, True, row)


def _and(x: Interval, y: Interval) -> Interval | None:
    if x.row or y.row:  # A descriptor keeps its 14 bits.
        return x if x.row else y
    masks = [each.high for each in (x, y) if each.low >= 0 and not each.in_shared]
    return Interval.of(0, min(masks), bits=x.bits & y.bits) if masks else None


def _or(x: Interval, y: Interval) -> Interval | None:
    if x.row or y.row:
        return _described(x, y)
    if x.in_shared or y.in_shared or min(x.low, y.low) < 0:
        return None
    return Interval.of(0, (1 << max(x.high, y.high).bit_length()) - 1, bits=x.bits | y.bits)


def _shl(x: Interval, y: Interval) -> Interval | None:
    if y.low != y.high or x.in_shared:
        return None
    return Interval.of(x.low << y.low, x.high << y.low, bits=x.bits << y.low)


def _shr(x: Interval, y: Interval) -> Interval | None:
    if x.in_shared:
        return x._replace(row=SWIZZLES[0]) if (y.low, y.high) == (4, 4) else None
    if y.low != y.high or x.low < 0:
        return None
    return Interval.of(x.low >> y.low, x.high >> y.low, bits=x.bits >> y.low)


def _bfe(x: Interval, start: Interval, length: Interval) -> Interval | None:
    if x.in_shared:
        is_descriptor = (start.low, length.low) == (4, 14)
        return x._replace(row=SWIZZLES[0]) if is_descriptor else None
    return Interval.of(0, (1 << length.high) - 1)


def _mul(x: Interval, y: Interval) -> Interval | None:
    if x.in_shared or y.in_shared:
        return None
    corners = [a * b for a in x[:2] for b in y[:2]]
    return Interval.of(min(corners), max(corners))


def _either(x: Interval, y: Interval) -> Interval | None:
    if x.in_shared != y.in_shared or x.row != y.row:
        return None
    low, high, bits = min(x.low, y.low), max(x.high, y.high), x.bits | y.bits
    return Interval.of(low, high, x.in_shared, bits)._replace(row=x.row)


COMPUTED: dict[str, Callable[..., Interval | None]] = {
    "mov": _same, "cvt": _same, "shfl": _same, "add": _add, "and": _and, "or": _or, "xor": _or,
    "shl": _shl, "shr": _shr, "bfe": _bfe, "mul": _mul, "selp": _either,
    "mad": lambda x, y, z: _add(product, z) if (product := _mul(x, y)) else None,
}  # fmt: skip
"""How the interval of a result follows from those of the operands, by opcode."""
