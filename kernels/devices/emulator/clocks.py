"""Who has seen what: a vector clock per warp.

Time counts per block, and moves on with every release: a barrier, an arrival at an mbarrier, the
end of a copy that an mbarrier tells of, an atomic operation with release semantics. An access is
stamped with its agent and the time; a warp may build on it when it has seen what the agent did up
to then.
Source: L. Lamport, "Time, Clocks, and the Ordering of Events in a Distributed System" (1978);
C. Flanagan and S. Freund, "FastTrack" (2009).
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
ALWAYS = np.iinfo(np.int32).max
"""Until when a warp has seen what it did itself."""
WARP = 32


class Clocks:
    """What the warps of several blocks have seen of each other.

    Agents of a block: its warps, then one for each mbarrier, which stands for the copies that it
    tells of. seen: (warp of the machine, agent), the time up to which the warp has seen what the
    agent did; floor: the least of a warp's times for other warps; block, warp, row: of each thread,
    its block, its warp in the block and in the machine; now: the time of each block.
    """

    def __init__(self, blocks: int, threads: int) -> None:
        self.warps = -(-threads // WARP)
        lanes = np.arange(blocks * threads)
        self.block = lanes // threads
        self.warp = lanes % threads // WARP
        self.row = self.block * self.warps + self.warp
        self.now = np.ones(blocks, np.int32)
        alone = np.where(np.eye(self.warps, dtype=bool), ALWAYS, 0).astype(np.int32)
        self.seen = np.tile(alone, (blocks, 1))
        self.floor = self.seen.min(1)
        self._mbarriers: dict[int, int] = {}

    def known(self, rows: Array, agents: Array | int) -> Array:
        """Up to when warps have seen what agents did."""
        return np.asarray(self.seen.ravel()[rows * self.seen.shape[1] + agents])

    def copies_of(self, mbarrier: int) -> int:
        """The agent that stands for the copies of an mbarrier, by its place in a block."""
        if mbarrier not in self._mbarriers:
            self._mbarriers[mbarrier] = self.seen.shape[1]
            new = np.zeros((self.seen.shape[0], 1), np.int32)
            self.seen = np.ascontiguousarray(np.hstack([self.seen, new]))
        return self._mbarriers[mbarrier]

    def tick(self, block: int) -> int:
        """The time of something that is released now; what follows is later."""
        time = int(self.now[block])
        self.now[block] += 1
        return time

    def release(self, row: int) -> Array:
        """What a warp has seen and done so far, as times of all agents."""
        told: Array = self.seen[row].copy()
        told[row % self.warps] = self.tick(row // self.warps)
        return told

    def acquire(self, rows: Array, told: Array) -> None:
        """Warps of one block have seen what was released with these times, of the first agents."""
        agents = slice(told.size)
        self.seen[rows, agents] = np.maximum(self.seen[rows, agents], told)
        self.floor[rows] = self.seen[rows, : self.warps].min(1)

    def meet(self, rows: Array) -> None:
        """Warps of one block, which have all seen what each of them had seen and done."""
        told = self.seen[rows]
        told[range(rows.size), rows % self.warps] = self.tick(int(rows[0]) // self.warps)
        self.acquire(rows, told.max(0))

    def meet_everyone(self, blocks: Array) -> None:
        """`meet`, of all warps of each of these blocks."""
        warps = self.warps
        rows = (blocks[:, None] * warps + np.arange(warps)).ravel()
        seen = self.seen[rows].reshape(blocks.size, warps, -1)
        seen[:, :, warps:] = seen[:, :, warps:].max(1, keepdims=True)
        seen[:, :, :warps] = self.now[blocks, None, None]
        seen[:, range(warps), range(warps)] = ALWAYS
        self.now[blocks] += 1
        self.seen[rows] = seen.reshape(rows.size, -1)
        self.floor[rows] = self.seen[rows, :warps].min(1)
