"""Global memory between the threads of a launch: who wrote what another one reads.

A thread may read what another warp of its block wrote in front of a barrier. What another block
wrote it may read where an atomic operation of that block with release semantics, behind the write,
came before one with acquire semantics at the same place in front of the read. Barriers lie between
an operation and the other warps of its block.

It does not see that two threads write to one place one after the other, nor that one overwrites
what another one may still read.
Source: Parallel Thread Execution ISA, "Memory consistency model".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .memory import Array, FaultError, Global, Moment, Shared

RELEASES, ACQUIRES = {"release", "acq_rel"}, {"acquire", "acq_rel"}
WARP_BITS = 8


class Exchange:
    """The global memory as the threads of a machine reach it."""

    def __init__(self, memory: Global, shared: Shared, blocks: Array) -> None:
        """shared: knows where threads are and which barriers they have met; blocks: numbers."""
        self.memory, self.bytes = memory, memory.bytes
        self._shared = shared
        self._blocks = blocks.astype(np.int64)

    def locate(self, address: Array, size: int, lanes: Array) -> Array:
        """As `Global.locate`."""
        return self.memory.locate(address, size)

    def alike(self, at: Array, old: Array, new: Array) -> Array:
        """As `Global.alike`."""
        return self.memory.alike(at, old, new)

    def note_write(self, at: Array, size: int, lanes: Array) -> None:
        """Raises: FaultError for what the launch may only read."""
        self.memory.check_writable(at)
        moments = self._moments(lanes)
        for offset in range(0, size, self.memory.grain):
            self.memory.writers[(at + offset) // self.memory.grain] = moments

    def note_read(self, at: Array, size: int, lanes: Array) -> None:
        """Raises: FaultError where another thread's write may not have arrived."""
        if not self.memory.is_writable(at).any():
            return
        for offset in range(0, size, self.memory.grain):
            writers = self.memory.writers[(at + offset) // self.memory.grain]
            if writers.any():
                self._check(writers, self._moments(lanes))

    def _moments(self, lanes: Array) -> Array:
        """Block, warp and barriers met of each thread, in one number above zero."""
        shared = self._shared
        block = self._blocks[shared.block[lanes]] + 1
        warp = shared.warp[lanes].astype(np.int64)
        epoch = shared.epoch[shared.block[lanes]].astype(np.int64)
        return np.asarray((block << WARP_BITS | warp) << 32 | epoch)

    def _check(self, writers: Array, readers: Array) -> None:
        others = (writers > 0) & (writers >> 32 != readers >> 32)
        pairs = np.unique(np.stack([writers[others], readers[others]]), axis=1)
        for writer, reader in pairs.T.tolist():
            self._check_pair(_parts(writer), _parts(reader))

    def _check_pair(self, writer: tuple[int, Moment], reader: tuple[int, Moment]) -> None:
        (by, written), (block, read) = writer, reader
        if by == block:
            if not _precedes(written, read):
                raise FaultError("global memory is read that another warp wrote since the last "
                                 "barrier")  # fmt: skip
        elif not any(
            _precedes(acquired, read) and any(_precedes(written, end) for end in seen.get(by, ()))
            for acquired, seen in self.memory.acquired.get(block, ())
        ):
            raise FaultError(
                "global memory is read that another block wrote, and no release and acquire lie "
                "between"
            )

    def meet(self, at: int, lane: int, words: Sequence[str]) -> None:
        """An atomic operation of a thread, at a place."""
        if "cta" in words:
            return
        block, moment = _parts(int(self._moments(np.array([lane]))[0]))
        released = self.memory.released.setdefault(at, {})
        if ACQUIRES & {*words} and released:
            seen = {by: list(ends) for by, ends in released.items()}
            self.memory.acquired.setdefault(block, []).append((moment, seen))
        if not RELEASES & {*words}:
            return
        # What a block has seen it passes on.
        for acquired, passed in self.memory.acquired.get(block, ()):
            if _precedes(acquired, moment):
                for by, ends in passed.items():
                    released[by] = list(dict.fromkeys([*released.get(by, ()), *ends]))
        released.setdefault(block, []).append(moment)


def _parts(number: int) -> tuple[int, Moment]:
    """(block, its moment)"""
    warp = number >> 32 & ((1 << WARP_BITS) - 1)
    return (number >> 32 >> WARP_BITS) - 1, (warp, number & 0xFFFF_FFFF)


def _precedes(first: Moment, second: Moment) -> bool:
    """Whether a warp had done something for sure when another one of its block does something."""
    return first[0] == second[0] or first[1] < second[1]
