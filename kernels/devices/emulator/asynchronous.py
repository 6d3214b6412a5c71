"""Asynchronous copies from global to shared memory: `cp.async` and the waits for it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .arithmetic import UnsupportedPtxError
from .clocks import Array
from .memory import scatter
from .registers import Action, Registers
from .source import Instruction
from .tma import Boxes
from .values import UNSIGNED


@dataclass(frozen=True)
class Copy:
    """A copy under way. lanes: who began it; group: its number in each lane; at: places in shared
    memory; size: bytes of each; data: what will be there."""

    lanes: Array
    group: Array
    at: Array
    size: int
    data: Array


class Copies:
    """The copies of all threads. What they bring is in shared memory only after the wait."""

    def __init__(self, machine: Registers, boxes: Boxes) -> None:
        self.machine, self.shared, self.boxes = machine, machine.shared, boxes
        self.committed = np.zeros(machine.count, np.int64)
        self.waiting: list[Copy] = []

    def decode(self, instruction: Instruction) -> Action:
        """`cp`. Raises: UnsupportedPtxError."""
        words = instruction.opcode[2:]
        if instruction.opcode[1:3] == ("async", "bulk"):
            return self.boxes.decode(instruction)
        if instruction.opcode[1] != "async" or "mbarrier" in words:
            raise UnsupportedPtxError("this form")
        if words == ("commit_group",):
            return self._commit
        if words == ("wait_group",):
            return lambda lanes: self._wait(lanes, int(str(instruction.operands[0])))
        if words == ("wait_all",):
            return self._wait_for_all
        return self._start(instruction)

    def _start(self, instruction: Instruction) -> Action:
        machine = self.machine
        goal, source, size_text, *present = instruction.operands
        size = int(str(size_text), 0)
        shared = machine.address(goal, "b32")
        address = machine.address(source, "b64")
        read_size = machine.getter(present[0], "u32") if present else None

        def start(lanes: Array) -> None:
            data = np.zeros((lanes.size, size), np.uint8)
            taken = np.broadcast_to(read_size(lanes), lanes.shape) if read_size else None
            whole = np.ones(lanes.size, bool) if taken is None else taken == size
            if taken is not None and ((taken != 0) & ~whole).any():
                raise UnsupportedPtxError("a part of an element")
            given = address(lanes)
            machine.memory.check_near(given)
            found = machine.memory.locate(given[whole], size)
            machine.everywhere.note_read(found, size, lanes[whole])
            data[whole] = machine.memory.bytes.reshape(-1, size)[found // size]
            at = self.shared.locate(shared(lanes), size, lanes)
            self.shared.start_copy(at, size, lanes)
            self.waiting.append(Copy(lanes, self.committed[lanes], at, size, data))

        return start

    def _commit(self, lanes: Array) -> None:
        self.committed[lanes] += 1

    def _wait_for_all(self, lanes: Array) -> None:
        self._commit(lanes)
        self._wait(lanes, 0)

    def _wait(self, lanes: Array, newest: int) -> None:
        """All but the `newest` groups that these threads have committed arrive."""
        waits = np.zeros(self.committed.size, bool)
        waits[lanes] = True
        left = []
        for copy in self.waiting:
            done = waits[copy.lanes] & (copy.group < self.committed[copy.lanes] - newest)
            if done.any():
                unit = min(copy.size, 8)
                parts = np.ascontiguousarray(copy.data[done]).view(UNSIGNED[8 * unit])
                scatter(self.shared.bytes, copy.at[done], unit, list(parts.T))
                self.shared.end_copy(copy.at[done], copy.size, copy.lanes[done])
            if not done.all():
                rest = ~done
                left.append(
                    Copy(copy.lanes[rest], copy.group[rest], copy.at[rest], copy.size,
                         copy.data[rest])
                )  # fmt: skip
        self.waiting = left
