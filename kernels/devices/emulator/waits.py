"""What threads wait for: barriers of a block or a part of it, barriers in shared memory (mbarrier),
registers, and barriers of a cluster of blocks, behind which these read each other's shared memory.

Who arrives makes what it has seen and done known to who waits; so does the end of a copy that an
mbarrier tells of.
Source: Parallel Thread Execution ISA, "bar", "barrier.cluster", "mapa", "mbarrier", "setmaxnreg".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .arithmetic import UnsupportedPtxError
from .clocks import Array, Clocks
from .memory import GRAIN, FaultError
from .registers import WARP, Action, Registers
from .source import Address, Instruction

BYTES = 8
BARRIERS = 16
"""That a block has."""
LEAST_REGISTERS, MOST_REGISTERS = 24, 256
WINDOW = 24
"""Bits of an address in shared memory; above them the rank of the block in its cluster, and 1."""
CLUSTER_ARRIVE, CLUSTER_WAIT = ("arrive", "release", "aligned"), ("wait", "acquire", "aligned")


class BlockBarriers:
    """Barriers by number, each for all threads of a block or for as many as an instruction says.

    waiting: the threads that wait at one.
    """

    def __init__(self, machine: Registers) -> None:
        self.machine = machine
        self.waiting = np.zeros(machine.count, bool)
        self._number = np.zeros(machine.count, np.int8)
        self._size = np.zeros(machine.count, np.int32)

    def wait(self, instruction: Instruction, lanes: Array, where: Array) -> None:
        """Threads arrive; where: the next instruction of every thread that waits.

        Raises: FaultError for barriers that do not fit together; UnsupportedPtxError.
        """
        machine, threads = self.machine, self.machine.threads
        given = [str(operand) for operand in instruction.operands]
        if instruction.opcode[1] != "sync" or not all(each.isdecimal() for each in given):
            raise UnsupportedPtxError("this form")
        number, size = (*map(int, given), threads)[:2]
        if number >= BARRIERS or size % WARP or not 0 < size <= threads:
            raise FaultError(f"no barrier {number} for {size} of {threads} threads")
        self.waiting[lanes], self._number[lanes], self._size[lanes] = True, number, size
        here = self.waiting & (self._number == number)
        if (self._size[here] != size).any():
            raise FaultError("threads meet at a barrier that is for different numbers of them")
        by_block = here.reshape(-1, threads)
        counts = by_block.sum(1)
        if (counts > size).any():
            raise FaultError(f"more threads than {size} meet at a barrier")
        full = np.flatnonzero(counts == size)
        if not full.size:
            return
        arrived = np.flatnonzero(here & np.repeat(counts == size, threads))
        if instruction.opcode[0] == "bar" or "aligned" in instruction.opcode:
            at, warps = where[arrived], arrived // WARP
            if ((at[1:] != at[:-1]) & (warps[1:] == warps[:-1])).any():
                raise FaultError("threads of one warp wait at different barriers")
        self.waiting[arrived] = False
        if size == threads:
            machine.shared.clocks.meet_everyone(full)
            return
        rows = np.unique(machine.shared.clocks.row[arrived]).reshape(full.size, -1)
        for each in rows:
            machine.shared.clocks.meet(each)


class RegisterPool:
    """The registers of blocks, which warps give back and ask for (`setmaxnreg`)."""

    def __init__(self, machine: Registers) -> None:
        self.machine = machine
        clocks = machine.shared.clocks
        self._held = np.full(clocks.now.size * clocks.warps, machine.kernel.most_registers or 0)
        self._free = np.zeros(clocks.now.size, np.int64)
        self._steps = np.zeros(self._held.size, np.int64)
        self._asked: dict[int, list[tuple[str, int]]] = {}

    def change(self, instruction: Instruction) -> Callable[[Array], Array]:
        """Which of the lanes have as many registers now as they ask for.

        Raises: UnsupportedPtxError.
        """
        action, wanted = instruction.opcode[1], int(str(instruction.operands[0]))
        if not self.machine.kernel.most_registers:
            raise UnsupportedPtxError("no .maxnreg says how many registers there are")

        def change(lanes: Array) -> Array:
            if wanted % 8 or not LEAST_REGISTERS <= wanted <= MOST_REGISTERS:
                raise FaultError("registers are counted in eights, from 24 to 256")
            rows = np.unique(self.machine.shared.clocks.row[lanes])
            if (self._held[rows] < wanted if action == "dec" else self._held[rows] > wanted).any():
                raise FaultError("a warp gives back more registers than it has, or asks for fewer")
            blocks = rows // self.machine.shared.clocks.warps
            needed = np.bincount(
                blocks, WARP * (wanted - self._held[rows]), self._free.size
            ).astype(np.int64)
            granted = (needed <= self._free)[blocks]
            for row in rows[granted].tolist():
                self._check_group(row, (action, wanted))
            self._free -= np.where(needed <= self._free, needed, 0)
            self._held[rows[granted]] = wanted
            return np.isin(self.machine.shared.clocks.row[lanes], rows[granted])

        return change

    def _check_group(self, row: int, step: tuple[str, int]) -> None:
        """Raises: FaultError where the warps of a warpgroup ask for different numbers."""
        warps = self.machine.shared.clocks.warps
        group = row // warps * warps + row % warps // 4
        asked = self._asked.setdefault(group, [])
        at = int(self._steps[row])
        self._steps[row] += 1
        if at == len(asked):
            asked.append(step)
        elif asked[at] != step:
            raise FaultError("warps of a warpgroup ask for different numbers of registers")


@dataclass
class Mbarrier:
    """count: arrivals that end a phase; left: of this phase; agent: stands for the copies that the
    barrier tells of; bytes_left: to be copied before the phase ends, below zero where they arrive
    in front of who announces them; told: times that were released to it; released: those of the
    phases that have ended."""

    count: int
    left: int
    agent: int
    bytes_left: int = 0
    phase: int = 0
    told: Array = field(default_factory=lambda: np.zeros(1, np.int32))
    released: Array = field(default_factory=lambda: np.zeros(1, np.int32))

    def tell(self, times: Array) -> None:
        """Times are released to those who wait for this phase."""
        size = max(self.told.size, times.size)
        told = np.zeros(size, np.int32)
        told[: self.told.size] = self.told
        told[: times.size] = np.maximum(told[: times.size], times)
        self.told = told

    def settle(self) -> None:
        """Ends the phase where all have arrived.

        Raises: FaultError where more bytes have than were announced.
        """
        if self.left == 0 and self.bytes_left < 0:
            raise FaultError("more bytes are copied than an mbarrier was told of")
        if self.left == 0 and self.bytes_left == 0:
            self.phase, self.left, self.released = self.phase ^ 1, self.count, self.told


class Mbarriers:
    """The barriers of a machine, by place. changed: whether one was arrived at, or a copy was begun
    that one tells of, since somebody last looked; deliver: called before barriers at these places
    are waited for."""

    def __init__(self, machine: Registers) -> None:
        self.machine = machine
        self.deliver: Callable[[set[int]], None] = lambda places: None
        self.changed = False
        self._barriers: dict[int, Mbarrier] = {}

    @property
    def _clocks(self) -> Clocks:
        return self.machine.shared.clocks

    def decode(self, instruction: Instruction) -> Action:
        """`mbarrier`, but for the waits. Raises: UnsupportedPtxError."""
        makers: dict[str, Callable[[Instruction], Action]] = {
            "init": self._init, "inval": self._inval, "arrive": self._arrive,
            "expect_tx": self._expect,
        }  # fmt: skip
        what = instruction.opcode[1]
        if what not in makers:
            raise UnsupportedPtxError("this form")
        return makers[what](instruction)

    def _located(self, operand: object) -> Callable[[Array], Array]:
        assert isinstance(operand, Address)
        address = self.machine.address(operand, "b32")
        return lambda lanes: self.machine.shared.locate(address(lanes), BYTES, lanes)

    def places(self, operand: object) -> Callable[[Array], Array]:
        """Where the barriers lie that lanes use. It raises FaultError where there are none, or a
        thread cannot know of one yet."""
        located = self._located(operand)

        def places(lanes: Array) -> Array:
            at = located(lanes)
            if not self._barriers.keys() >= {*at.tolist()}:
                raise FaultError("no mbarrier was made here")
            self.machine.shared.note_read(at, BYTES, lanes)
            return at

        return places

    def arrived(self, place: int, size: int) -> int:
        """Bytes of a copy have arrived; the agent that has brought them."""
        barrier = self._barriers[place]
        times = np.zeros(barrier.agent + 1, np.int32)
        times[barrier.agent] = self._clocks.now[place // self.machine.shared.size]
        barrier.tell(times)
        barrier.bytes_left -= size
        barrier.settle()
        return barrier.agent

    def check_ended(self) -> None:
        """Raises: FaultError for phases that count bytes when all threads have returned."""
        if any(barrier.bytes_left for barrier in self._barriers.values()):
            raise FaultError("a block ends in front of bytes that an mbarrier was told of")

    def _init(self, instruction: Instruction) -> Action:
        places = self._located(instruction.operands[0])
        count = self.machine.getter(instruction.operands[1], "u32")

        def init(lanes: Array) -> None:
            counts = np.broadcast_to(count(lanes), lanes.shape)
            at = places(lanes)
            self.machine.shared.note_write(at, BYTES, lanes)
            for place, number in zip(at.tolist(), counts.tolist(), strict=True):
                agent = self._clocks.copies_of(place % self.machine.shared.size)
                self._barriers[place] = Mbarrier(number, number, agent)

        return init

    def _inval(self, instruction: Instruction) -> Action:
        places = self.places(instruction.operands[0])

        def inval(lanes: Array) -> None:
            at = places(lanes)
            for place in at.tolist():
                del self._barriers[place]
            self.machine.shared.note_write(at, BYTES, lanes)

        return inval

    def _expect(self, instruction: Instruction) -> Action:
        """expect_tx by itself, with no arrival."""
        places = self.places(instruction.operands[0])
        number = self.machine.getter(instruction.operands[1], "u32")

        def expect(lanes: Array) -> None:
            sizes = np.broadcast_to(number(lanes), lanes.shape)
            for place, size in zip(places(lanes).tolist(), sizes.tolist(), strict=True):
                self._barriers[place].bytes_left += size

        return expect

    def _arrive(self, instruction: Instruction) -> Action:
        goal, barrier, *size = instruction.operands
        if goal != "_" or {*instruction.opcode} & {"noComplete", "relaxed"}:
            raise UnsupportedPtxError("this form")
        expects = "expect_tx" in instruction.opcode
        places = self.places(barrier)
        number = self.machine.getter(size[0], "u32") if size else None

        def arrive(lanes: Array) -> None:
            given = np.broadcast_to(number(lanes), lanes.shape) if number else np.ones_like(lanes)
            for place, lane, each in zip(
                places(lanes).tolist(), lanes.tolist(), given.tolist(), strict=True
            ):
                found = self._barriers[place]
                found.bytes_left += each if expects else 0
                found.left -= 1 if expects else each
                if found.left < 0:
                    raise FaultError("more threads arrive at an mbarrier than it was made for")
                found.tell(self._clocks.release(int(self._clocks.row[lane])))
                found.settle()
            self.changed = True

        return arrive

    def wait(self, instruction: Instruction) -> Callable[[Array], Array]:
        """try_wait: which of the lanes need not wait any longer, and have seen what was released.

        Raises: UnsupportedPtxError.
        """
        if instruction.opcode[1] != "try_wait" or "parity" not in instruction.opcode:
            raise UnsupportedPtxError("this form")
        goal, barrier, parity, *_ = instruction.operands
        places = self.places(barrier)
        read = self.machine.getter(parity, "u32")
        write = self.machine.setter(goal, "pred")

        def passes(lanes: Array) -> Array:
            waited = places(lanes)
            wanted = np.broadcast_to(read(lanes), lanes.shape)
            self.deliver(set(waited.tolist()))
            done = np.zeros(lanes.shape, bool)
            for place in np.unique(waited).tolist():
                found = self._barriers[place]
                passing = (waited == place) & (wanted != found.phase)
                done |= passing
                if (rows := np.unique(self._clocks.row[lanes[passing]])).size:
                    self._clocks.acquire(rows, found.released)
            write(lanes[done], np.ones(int(done.sum()), bool))
            return done

        return passes


class Clusters:
    """The clusters of a machine, as the memory that blocks read of each other. size: blocks of
    each; where: the next instruction of every thread.

    What a block wrote another one may read behind a barrier of the cluster that both have waited
    for; what was read so may be overwritten, and its block may end, behind the next one. A write to
    another block's memory is not known, nor are barriers that are `relaxed`.
    """

    def __init__(self, machine: Registers, size: int, where: Array, finished: int) -> None:
        self.machine, self.shared, self.size = machine, machine.shared, size
        self.bytes = machine.shared.bytes
        self.alike = machine.shared.alike
        self._where, self._finished = where, finished
        self._arrivals = np.zeros(machine.count, np.int64)
        self._waits = np.zeros(machine.count, np.int64)
        self._told: list[list[Array]] = [[] for _ in machine.blocks]
        self._published = np.zeros((len(machine.blocks), machine.shared.clocks.warps), np.int32)
        if size > 1:
            self.shared.read_afar = np.zeros(self.bytes.size // GRAIN, bool)

    # Barriers.

    def arrive(self, instruction: Instruction) -> Action:
        """`barrier.cluster.arrive`. Raises: UnsupportedPtxError."""
        if instruction.opcode[2:] != CLUSTER_ARRIVE:
            raise UnsupportedPtxError("this form")
        clocks = self.shared.clocks

        def arrive(lanes: Array) -> None:
            if (self._arrivals[lanes] != self._waits[lanes]).any():
                raise FaultError("a thread arrives twice at a barrier of its cluster")
            self._arrivals[lanes] += 1
            for row in np.unique(clocks.row[lanes]).tolist():
                self._told[row // clocks.warps].append(clocks.release(row))
            for cluster in np.unique(clocks.block[lanes] // self.size).tolist():
                self._complete(cluster)

        return arrive

    def _complete(self, cluster: int) -> None:
        """Where all threads of a cluster have arrived, what they did is known to who waits."""
        threads = self.size * self.machine.threads
        arrivals = self._arrivals[cluster * threads : (cluster + 1) * threads]
        if (arrivals != arrivals[0]).any():
            return
        grains = self.shared.size // GRAIN
        for block in range(cluster * self.size, (cluster + 1) * self.size):
            agents = max(each.size for each in self._told[block])
            told = [np.pad(each, (0, agents - each.size)) for each in self._told[block]]
            self._told[block] = [np.max(told, 0)]
            self._published[block] = self._told[block][0][: self._published.shape[1]]
            if self.shared.read_afar is not None:
                self.shared.read_afar[block * grains : (block + 1) * grains] = False

    def wait(self, instruction: Instruction) -> Callable[[Array], Array]:
        """`barrier.cluster.wait`: which of the lanes need not wait any longer.

        Raises: UnsupportedPtxError.
        """
        if instruction.opcode[2:] != CLUSTER_WAIT:
            raise UnsupportedPtxError("this form")
        clocks, threads = self.shared.clocks, self.size * self.machine.threads

        def passes(lanes: Array) -> Array:
            if (self._arrivals[lanes] == self._waits[lanes]).any():
                raise FaultError("a thread waits at a barrier of its cluster and has not arrived")
            least = self._arrivals.reshape(-1, threads).min(1)
            done = least[lanes // threads] >= self._arrivals[lanes]
            self._waits[lanes[done]] += 1
            rows = np.unique(clocks.row[lanes[done]])
            for block in np.unique(rows // clocks.warps).tolist():
                clocks.acquire(rows[rows // clocks.warps == block], self._told[block][0])
            return np.asarray(done)

        return passes

    # Memory.

    def map(self, instruction: Instruction) -> Action:
        """`mapa`: the address of a place in another block's memory. Raises: UnsupportedPtxError."""
        if instruction.opcode[1:] != ("shared::cluster", "u32"):
            raise UnsupportedPtxError("this form")
        goal, address, rank = instruction.operands
        read, which = (self.machine.getter(each, "u32") for each in (address, rank))
        write = self.machine.setter(goal, "u32")

        def mapped(lanes: Array) -> None:
            ranks = np.broadcast_to(which(lanes), lanes.shape)
            if (ranks >= self.size).any():
                raise FaultError(f"rank {int(ranks.max())} in a cluster of {self.size} blocks")
            write(lanes, read(lanes) | (ranks + np.uint32(1) << np.uint32(WINDOW)))

        return mapped

    def locate(self, address: Array, size: int, lanes: Array) -> Array:
        """As `Shared.locate`, of the block that an address names."""
        rank = (address >> np.uint32(WINDOW)).astype(np.int64) - 1
        if (rank < 0).any():
            raise FaultError("an address of a cluster that no mapa made")
        block = self.shared.clocks.block[lanes] // self.size * self.size + rank
        within = address & np.uint32((1 << WINDOW) - 1)
        return self.shared.locate(within, size, block * self.machine.threads)

    def note_read(self, at: Array, size: int, lanes: Array) -> None:
        """Raises: FaultError where what is read may not be there yet, or not any more."""
        shared = self.shared
        places = at // GRAIN + np.arange(max(size // GRAIN, 1))[:, None]
        block = np.broadcast_to(at // shared.size, places.shape)
        if (self._arrivals[lanes] != self._waits[lanes]).any():
            raise FaultError("a block's memory is read between arriving at a barrier and its wait")
        ended = (self._where.reshape(-1, self.machine.threads) == self._finished).all(1)
        if ended[block].any():
            raise FaultError("shared memory of a block of the cluster that has ended")
        if shared.in_flight[places].any() or not shared.write_time[places].all():
            raise FaultError("shared memory of another block that nothing was written to")
        writer = shared.writer[places]
        warps = self._published.shape[1]
        known = np.where(writer < warps, self._published[block, np.minimum(writer, warps - 1)], 0)
        if (known < shared.write_time[places]).any():
            raise FaultError("read of what a block wrote since the last barrier of its cluster")
        assert shared.read_afar is not None
        shared.read_afar[places] = True

    def note_write(self, at: Array, size: int, lanes: Array) -> None:
        """Raises: UnsupportedPtxError."""
        raise UnsupportedPtxError("a write to another block's shared memory")

    def check_ended(self) -> None:
        """Raises: FaultError for reads of a block's memory behind which it waited for nobody."""
        if self.shared.read_afar is not None and self.shared.read_afar.any():
            raise FaultError("a block may end while another one of its cluster reads its memory")
