"""Global memory between the threads of a launch: who wrote what another one reads.

A thread may read what another warp of its block wrote when it has seen that (`clocks.py`). What
another block wrote it may read where an atomic operation of that block with release semantics,
behind the write, came before one with acquire semantics at the same place in front of the read. Of
the block's other warps, one must have seen the write, the other the operation.

It does not see that two threads write to one place one after the other, nor that one overwrites
what another one may still read.
Source: Parallel Thread Execution ISA, "Memory consistency model".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .clocks import Array
from .memory import FaultError, Global, Released, Shared

RELEASES, ACQUIRES = {"release", "acq_rel"}, {"acquire", "acq_rel"}
WARP_BITS = 8
COPY = (1 << WARP_BITS) - 1
"""Stands for the warp of a box that is copied to global memory: nobody sees what that does."""


class Exchange:
    """The global memory as the threads of a machine reach it."""

    def __init__(self, memory: Global, shared: Shared, blocks: Array) -> None:
        """shared: its clocks know who has seen what; blocks: numbers."""
        self.memory, self.bytes, self.alike = memory, memory.bytes, memory.alike
        self._clocks = shared.clocks
        self._blocks = blocks.astype(np.int64)

    def locate(self, address: Array, size: int, lanes: Array) -> Array:
        """As `Global.locate`."""
        return self.memory.locate(address, size)

    def note_write(self, at: Array, size: int, lanes: Array) -> None:
        """Raises: FaultError for what the launch may only read."""
        self.memory.check_writable(at)
        self._stamp(at, size, self._stamps(lanes))

    def note_box(self, at: Array, size: int, lanes: Array) -> None:
        """`note_write`, of a box that has not arrived."""
        self.memory.check_writable(at)
        self._stamp(at, size, self._stamps(lanes) | COPY << 32)

    def _stamp(self, at: Array, size: int, stamps: Array) -> None:
        for offset in range(0, size, self.memory.grain):
            self.memory.writers[(at + offset) // self.memory.grain] = stamps

    def note_read(self, at: Array, size: int, lanes: Array) -> None:
        """Raises: FaultError where another thread's write may not have arrived."""
        if not self.memory.is_writable(at).any():
            return
        for offset in range(0, size, self.memory.grain):
            writers = self.memory.writers[(at + offset) // self.memory.grain]
            if writers.any():
                self._check(writers, lanes)

    def _stamps(self, lanes: Array) -> Array:
        """Block, warp and time of each thread, in one number above zero."""
        clocks = self._clocks
        local = clocks.block[lanes]
        agent = self._blocks[local] + 1 << WARP_BITS | clocks.warp[lanes]
        return np.asarray(agent << 32 | clocks.now[local])

    def _check(self, writers: Array, lanes: Array) -> None:
        others = (writers > 0) & (writers >> 32 != self._stamps(lanes) >> 32)
        rows = self._clocks.row[lanes[others]]
        for writer, row in np.unique(np.stack([writers[others], rows]), axis=1).T.tolist():
            self._check_pair(writer, row)

    def _check_pair(self, writer: int, row: int) -> None:
        agent, time = writer >> 32, writer & 0xFFFF_FFFF
        by, warp = (agent >> WARP_BITS) - 1, agent & COPY
        block = int(self._blocks[row // self._clocks.warps])
        if warp == COPY:
            raise FaultError("global memory is read that a box is copied to which was not waited "
                             "for")  # fmt: skip
        if by == block:
            if self._clocks.seen[row, warp] < time:
                raise FaultError("global memory is read that another warp wrote since the last "
                                 "barrier")  # fmt: skip
        elif not any(
            by in released and released[by][warp] >= time for released in self._acquired(block, row)
        ):
            raise FaultError(
                "global memory is read that another block wrote, and no release and acquire lie "
                "between"
            )

    def _acquired(self, block: int, row: int) -> list[Released]:
        """What warps of a block have acquired that this warp has seen to do so."""
        return [
            released
            for warp, time, released in self.memory.acquired.get(block, ())
            if self._clocks.seen[row, warp] >= time
        ]

    def meet(self, at: int, lane: int, words: Sequence[str]) -> None:
        """An atomic operation of a thread, at a place."""
        if "cta" in words:
            return
        clocks = self._clocks
        row, warp, local = (int(each[lane]) for each in (clocks.row, clocks.warp, clocks.block))
        block = int(self._blocks[local])
        released = self.memory.released.setdefault(at, {})
        if ACQUIRES & {*words} and released:
            entry = (warp, int(clocks.now[local]), dict(released))
            self.memory.acquired.setdefault(block, []).append(entry)
        if not RELEASES & {*words}:
            return
        # What a block has seen it passes on.
        own = {block: clocks.release(row)[: clocks.warps]}
        for passed in (*self._acquired(block, row), own):
            for by, times in passed.items():
                released[by] = np.maximum(released.get(by, 0), times)
