"""Reads machine code for the guards: the hot loop of a kernel, and how busy the issue slots are.

On an H100 a warp's share of a matrix product m64nNk16 keeps its tensor core busy for N/2 cycles,
and m16n8k16 for 4; the scheduler issues one instruction per cycle. A loop whose instructions are
more than those cycles cannot keep the tensor cores busy.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
LABEL = re.compile(r"^\s*\.?(L_x_\d+|\.L_\w+|[\w.$]+):")
TARGET = re.compile(r"`\(\.?([\w.$]+)\)")
WIDE_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x")
SMALL_PRODUCT_CYCLES = 4.0


@dataclass(frozen=True)
class Loop:
    """Opcodes of a loop's body, modifiers included."""

    opcodes: tuple[str, ...] = field(repr=False)

    @property
    def tensor_cycles(self) -> float:
        """Cycles for which one warp's tensor core is busy in each round."""
        cycles = 0.0
        for opcode in self.opcodes:
            if wide := WIDE_PRODUCT.match(opcode):
                cycles += int(wide[1]) / 2
            elif opcode.startswith("HMMA."):
                # m16n8k16; the half-deep product of older tensor cores takes half as long.
                cycles += SMALL_PRODUCT_CYCLES / (2 if ".1688" in opcode else 1)
        return cycles

    @property
    def issue_ratio(self) -> float:
        """Instructions per tensor-core cycle: above 1 the loop is bound by issuing."""
        return len(self.opcodes) / self.tensor_cycles

    def count(self, prefix: str) -> int:
        """Instructions that start with the prefix."""
        return sum(opcode.startswith(prefix) for opcode in self.opcodes)


def loops(sass: str) -> list[Loop]:
    """Every stretch of code that ends with a branch back to its start."""
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1].lstrip(".")] = len(opcodes)
        for match in INSTRUCTION.finditer(line):
            opcodes.append(match[2])
            goal = TARGET.search(match[3]) if match[2].startswith("BRA") else None
            start = labels.get(goal[1].lstrip(".")) if goal else None
            if start is not None and start < len(opcodes) - 1:
                found.append(Loop(tuple(opcodes[start:])))
    return found


def hot_loop(sass: str) -> Loop | None:
    """The innermost loop with matrix products, the one with most of them; None: no such loop."""
    inner: list[Loop] = []
    for loop in loops(sass):
        if loop.tensor_cycles and not any(_holds(loop, other) for other in inner):
            inner.append(loop)
    return max(inner, key=lambda loop: loop.tensor_cycles, default=None)


def _holds(outer: Loop, inner: Loop) -> bool:
    """Whether a loop found later ends with, or runs over, one found before."""
    size = len(inner.opcodes)
    starts = range(len(outer.opcodes) - size + 1)
    return any(outer.opcodes[at : at + size] == inner.opcodes for at in starts)
