"""Loads, stores and atomic operations: global, shared and local memory, and addresses of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from . import stack, values
from .arithmetic import UnsupportedPtxError
from .clocks import Array
from .exchange import Exchange
from .memory import Shared, gather, scatter
from .registers import Action, Registers
from .source import Address, Instruction, Operand
from .tma import PARAMETERS
from .values import BITS, UNSIGNED
from .waits import Clusters

WORDS = {
    "global", "shared", "local", "relaxed", "acquire", "release", "acq_rel", "gpu", "sys", "cta",
    "volatile", "weak", "nc", "ca", "cg", "cs", "cv", "wb", "wt", "shared::cta", "shared::cluster",
    "v2", "v4", "v8",
}  # fmt: skip
HINTS = ("L1::", "L2::")


Space = Exchange | Shared | stack.Stack | Clusters
"""Memory that threads load from and store to. bytes: all of it; `locate` finds positions there of
accesses of `size` bytes; `note_read` and `note_write` raise FaultError for what is wrong with them;
`alike` tells where two values at positions are one, written by two threads."""
Pieces = Callable[[Array], Iterable[tuple[Space, Array, Array]]]
"""For lanes: (space, those of them that access it, positions there)."""


class Accesses:
    """The instructions of one machine that access memory a thread at a time."""

    def __init__(self, machine: Registers, clusters: Clusters) -> None:
        self.machine, self.clusters = machine, clusters

    def load(self, instruction: Instruction) -> Action:
        """`ld`. Raises: UnsupportedPtxError."""
        if "param" in instruction.opcode:
            return self._load_parameter(instruction)
        kind, width = _element(instruction)
        goal, source = instruction.operands[:2]
        goals = goal if isinstance(goal, tuple) else (goal,)
        writers = [self.machine.setter(each, kind) for each in goals]
        size = width * len(goals)
        pieces = self._pieces(instruction, source, size)

        def load(lanes: Array) -> None:
            for space, chosen, at in pieces(lanes):
                space.note_read(at, size, chosen)
                parts = gather(space.bytes, at, width, len(goals))
                for write, part in zip(writers, parts, strict=True):
                    write(chosen, values.from_bits(part, kind))

        return load

    def _load_parameter(self, instruction: Instruction) -> Action:
        goal, source = instruction.operands
        assert isinstance(source, Address)
        kind = instruction.opcode[-1]
        raw = self.machine.parameters[source.base][source.offset :][: BITS[kind] // 8]
        value = values.from_bits(np.frombuffer(raw, UNSIGNED[BITS[kind]]), kind)
        write = self.machine.setter(goal, kind)
        return lambda lanes: write(lanes, value)

    def store(self, instruction: Instruction) -> Action:
        """`st`. Raises: UnsupportedPtxError."""
        kind, width = _element(instruction)
        goal, source = instruction.operands[:2]
        sources = source if isinstance(source, tuple) else (source,)
        read = [self.machine.getter(each, kind) for each in sources]
        size = width * len(sources)
        pieces = self._pieces(instruction, goal, size)

        def store(lanes: Array) -> None:
            for space, chosen, at in pieces(lanes):
                parts = [
                    np.broadcast_to(values.to_bits(each(chosen), kind), chosen.shape)
                    for each in read
                ]
                space.note_write(at, size, chosen)
                scatter(space.bytes, at, width, parts, space.alike)

        return store

    def _pieces(self, instruction: Instruction, operand: Operand, size: int) -> Pieces:
        """Where an instruction accesses `size` bytes; one that names no space, wherever the
        addresses lie."""
        machine, words = self.machine, instruction.opcode
        shared = any(word.startswith("shared") for word in words)
        address = machine.address(operand, "b32" if shared else "b64")
        named: Space | None = None
        if shared:
            named = self.clusters if "shared::cluster" in words else machine.shared
        elif "global" in words:
            named = machine.everywhere
        elif "local" in words:
            named = machine.stack

        def pieces(lanes: Array) -> Iterable[tuple[Space, Array, Array]]:
            given = address(lanes)
            if named is not None:
                return ((named, lanes, named.locate(given, size, lanes)),)
            return tuple(self._generic(lanes, given, size))

        return pieces

    def _generic(
        self, lanes: Array, address: Array, size: int
    ) -> Iterable[tuple[Space, Array, Array]]:
        local = stack.Stack.holds(address)
        offset = np.uint64(stack.BASE)
        for space, base, held in (
            (self.machine.stack, offset, local),
            (self.machine.everywhere, np.uint64(0), ~local),
        ):
            if held.any():
                chosen = lanes if held.all() else lanes[held]
                yield space, chosen, space.locate(address[held] - base, size, chosen)

    def atomic(self, instruction: Instruction) -> Action:
        """`atom` and `red`: one thread after the other, in any order."""
        machine = self.machine
        root, *words = instruction.opcode
        kind, width = words[-1], BITS[words[-1]] // 8
        name = next((w for w in words if w in ("add", "max", "min", "exch")), None)
        if "shared" in words or name is None:
            raise UnsupportedPtxError("this form")
        goal, address, *sources = instruction.operands if root == "atom" else (
            "_", *instruction.operands)  # fmt: skip
        where = machine.address(address, "b64")
        read, write = machine.getter(sources[0], kind), machine.setter(goal, kind)
        functions: dict[str, Callable[[Any, Any], Any]] = {
            "add": np.add, "max": np.maximum, "min": np.minimum, "exch": lambda old, new: new,
        }  # fmt: skip
        function = functions[name]

        def atomic(lanes: Array) -> None:
            at = machine.memory.locate(where(lanes), width)
            machine.memory.check_writable(at)
            cells = machine.memory.bytes.view(values.NUMPY[kind])
            new = np.broadcast_to(read(lanes), lanes.shape)
            old = np.empty_like(new)
            for index in machine.order.permutation(lanes.size):
                cell = at[index] // width
                old[index] = cells[cell]
                cells[cell] = function(cells[cell], new[index])
                machine.everywhere.meet(int(at[index]), int(lanes[index]), words)
            write(lanes, old)

        return atomic

    def convert_address(self, instruction: Instruction) -> Action:
        """`cvta`: of tensors, which stay, of parameters and of local memory; shared memory is
        addressed from zero. Raises: UnsupportedPtxError."""
        spaces = {"global": 0, "param": PARAMETERS, "local": stack.BASE}
        words = instruction.opcode
        if not (space := spaces.keys() & {*words}):
            raise UnsupportedPtxError("this form")
        read = self.machine.getter(instruction.operands[1], "b64")
        write = self.machine.setter(instruction.operands[0], "b64")
        moved = spaces[space.pop()]
        offset = np.array([-moved if "to" in words else moved], np.int64).view(np.uint64)
        return lambda lanes: write(lanes, read(lanes) + offset)


def _element(instruction: Instruction) -> tuple[str, int]:
    """(type, bytes) of each element that is loaded or stored.

    Raises: UnsupportedPtxError for a space or a modifier that is not known.
    """
    *words, kind = instruction.opcode[1:]
    if odd := [word for word in words if word not in WORDS and not word.startswith(HINTS)]:
        raise UnsupportedPtxError(", ".join(odd))
    return kind, BITS[kind] // 8
