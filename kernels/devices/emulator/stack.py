"""Local memory: what each thread alone can reach, where the compiler puts arrays and stack frames.

Threads see the same addresses and different bytes, so nothing here can race.
"""

from __future__ import annotations

import numpy as np

from .clocks import Array
from .memory import POISON, FaultError, alike_by_width
from .source import Kernel

BASE = 0x7E00_0000_0000
"""Where local memory lies for instructions that name no space."""
WINDOW = 1 << 24
"""Bytes of addresses that are local, whatever is behind them."""
ALIGNMENT = 16


class Stack:
    """The local memory of all threads. starts: of each array, from its beginning."""

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.starts: dict[str, int] = {}
        self.size = 0
        for name, (space, size) in kernel.arrays.items():
            if space == "local":
                self.starts[name] = self.size
                self.size += -(-size // ALIGNMENT) * ALIGNMENT
        self.bytes = np.full(threads * self.size, POISON, np.uint8)
        self.written = np.zeros(self.bytes.size, bool)
        self.arrays = [(self.starts[name], kernel.arrays[name][1]) for name in self.starts]

    @staticmethod
    def holds(address: Array) -> Array:
        """Which of generic addresses are local ones."""
        at = address.view(np.int64) - BASE
        return np.asarray((at >= 0) & (at < WINDOW))

    def locate(self, address: Array, size: int, lanes: Array) -> Array:
        """Positions of `size` bytes each in `bytes`.

        Raises: FaultError for an address outside the thread's arrays, or no multiple of the size.
        """
        at = address.view(np.int64)
        inside = np.zeros(at.shape, bool)
        for start, length in self.arrays:
            inside |= (at >= start) & (at + size <= start + length)
        if not inside.all():
            bad, whole = int(at[~inside][0]), sum(length for _, length in self.arrays)
            raise FaultError(f"an access of {size} bytes at {bad} of {whole} local bytes")
        if (at % size).any():
            raise FaultError(f"a misaligned access of {size} local bytes")
        return np.asarray(at + lanes * self.size)

    def note_read(self, at: Array, size: int, lanes: Array) -> None:
        """Raises: FaultError where the thread has written nothing."""
        if not self.written[at[:, None] + np.arange(size)].all():
            raise FaultError("local memory is read that nothing was written to")

    def note_write(self, at: Array, size: int, lanes: Array) -> None:
        self.written[at[:, None] + np.arange(size)] = True

    def alike(self, at: Array, old: Array, new: Array) -> Array:
        """Nobody else writes here: a place has one value."""
        return alike_by_width(old, new)
