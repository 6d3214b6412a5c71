"""Runs the instructions of a kernel: all threads of several blocks at once, as arrays.

Threads that took different branches form groups; the group that is furthest behind runs until it
meets the next one, which brings structured code together again where its branches meet. Threads
that wait let the others run; where all that are left wait for each other, that is a deadlock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import arithmetic, asynchronous, products, tma, waits
from .accesses import Accesses
from .arithmetic import UnsupportedPtxError
from .clocks import Array
from .memory import FaultError, Global
from .registers import WARP, Action, Lanes, Registers
from .source import BRANCHES, Instruction, Kernel
from .values import BITS, UNSIGNED

IGNORED = {
    "fence", "membar", "griddepcontrol", "prefetch", "discard", "nanosleep", "createpolicy",
    "pragma",
}  # fmt: skip
FINISHED = np.iinfo(np.int64).max
DEADLOCKS = {
    "mbarrier": "a wait at an mbarrier that nothing under way will end",
    "setmaxnreg": "a wait for registers that no warp gives back",
    "wgmma": f"not all {products.WARPGROUP} threads take part",
    "barrier": "a wait at a barrier of a cluster that not all threads arrive at",
}


class Machine(Registers):
    """Several blocks of one launch that run: their state, and where their threads are.

    maps: tensor maps by generic address; a parameter that is one holds that in its own space.
    """

    def __init__(
        self,
        kernel: Kernel,
        memory: Global,
        parameters: Sequence[bytes],
        blocks: Sequence[int],
        grid: int,
        threads: int,
        shared_bytes: int,
        order: np.random.Generator,
        maps: dict[int, tma.TensorMap] | None = None,
        cluster: int = 1,
    ) -> None:
        super().__init__(
            kernel, memory, parameters, blocks, grid, threads, shared_bytes, order, cluster
        )
        self.products = products.Pending(self)
        self.check = self.products.check
        self.where = np.zeros(self.count, np.int64)
        self.clusters = waits.Clusters(self, cluster, self.where, FINISHED)
        self.accesses = Accesses(self, self.clusters)
        self.barriers = waits.Mbarriers(self)
        self.block_barriers = waits.BlockBarriers(self)
        self.pool = waits.RegisterPool(self)
        self.boxes = tma.Boxes(self, maps or {}, self.barriers)
        self.copies = asynchronous.Copies(self, self.boxes)
        self.along = np.array([*kernel.order, FINISHED])
        self._blocked = np.zeros(self.count, bool)
        self._made: dict[int, Action] = {}
        self._trials: dict[int, Callable[[Lanes], Array]] = {}

    # Control.

    def run(self) -> None:
        """Until every thread has returned.

        Raises: FaultError, naming the instruction; UnsupportedPtxError.
        """
        waiting = self.block_barriers.waiting
        while True:
            if self.barriers.changed:
                self._blocked[:], self.barriers.changed = False, False
            along = self.along[np.minimum(self.where, self.along.size - 1)]
            ready = np.where(waiting | self._blocked, FINISHED, along)
            least = int(ready.min())
            if least == FINISHED:
                break
            others = ready[ready > least]
            lanes = np.flatnonzero(ready == least)
            self._advance(
                self.everyone if lanes.size == self.count else lanes,
                int(self.where[lanes[0]]),
                int(others.min()) if others.size else FINISHED,
            )
        if self._blocked.any():
            raise self._deadlock()
        if waiting.any():
            raise FaultError(
                f"{self.kernel.name}: some threads wait at a barrier that other threads of their "
                "block never reach"
            )
        for parts in (self.boxes, self.barriers, self.clusters):
            try:
                parts.check_ended()
            except FaultError as fault:
                raise FaultError(f"{self.kernel.name}: {fault}") from None

    def _advance(self, lanes: Lanes, at: int, meeting: int) -> None:
        """Runs a group from `at` until it meets another one, splits up, waits or ends."""
        while at < FINISHED and self.along[at] < meeting:
            instruction = self.kernel.instructions[at]
            active = self._guarded(instruction, lanes)
            root = instruction.opcode[0]
            if root in BRANCHES:
                goals = self._goals(instruction, at, active)
                if 0 < active.size < lanes.size or isinstance(goals, np.ndarray):
                    self.where[lanes] = at + 1
                    self.where[active] = goals
                    return
                at = goals if active.size else at + 1
                continue
            if active.size:
                try:
                    if not self._execute(instruction, at, lanes, active):
                        return
                except FaultError as fault:
                    raise self._fault(instruction, str(fault)) from None
                except UnsupportedPtxError as error:
                    raise self._unknown(instruction, str(error)) from None
            at += 1
        self.where[lanes] = at

    def _goals(self, instruction: Instruction, at: int, lanes: Lanes) -> int | Array:
        """Where a branch leads these threads, all of them or each.

        Raises: FaultError for a number that no label has.
        """
        root = instruction.opcode[0]
        if root == "bra":
            return self.kernel.target(str(instruction.operands[0]), at)
        if root != "brx":
            return FINISHED
        names = self.kernel.tables[str(instruction.operands[1])]
        index = self.getter(instruction.operands[0], "u32")(lanes)
        if (index >= len(names)).any():
            raise self._fault(instruction, f"a branch to a label outside its table of {len(names)}")
        return np.array([self.kernel.target(name, at) for name in names])[index]

    def _execute(self, instruction: Instruction, at: int, lanes: Lanes, active: Lanes) -> bool:
        """Executes what is no branch; whether all threads of the group go on together."""
        root = instruction.opcode[0]
        if instruction.opcode[:2] == ("wgmma", "mma_async") and active is not self.everyone:
            late, others = self._incomplete(at, active)
            if late.size or others.size:
                self._block(at, lanes, late)
                self._blocked[others], self.where[active] = False, at
                return False
        if instruction.opcode[:2] == ("barrier", "cluster"):
            return self._meet_cluster(instruction, at, lanes, active)
        if root in ("bar", "barrier") and instruction.opcode[1] != "warp":
            self.where[lanes] = at + 1
            self.block_barriers.wait(instruction, active, self.where)
            return lanes is self.everyone and not self.block_barriers.waiting.any()
        if root == "setmaxnreg" or (root == "mbarrier" and instruction.opcode[1] == "try_wait"):
            if at not in self._trials:
                of = self.pool.change if root == "setmaxnreg" else self.barriers.wait
                self._trials[at] = of(instruction)
            done = self._trials[at](active)
            self.barriers.changed |= root == "setmaxnreg" and bool(done.any())
            return True if done.all() else self._block(at, lanes, active[~done])
        self._action(at)(active)
        return True

    def _meet_cluster(self, instruction: Instruction, at: int, lanes: Lanes, active: Lanes) -> bool:
        if instruction.opcode[2] == "arrive":
            self.clusters.arrive(instruction)(active)
            self.barriers.changed = True
            return True
        done = self.clusters.wait(instruction)(active)
        return True if done.all() else self._block(at, lanes, active[~done])

    def _block(self, at: int, lanes: Lanes, late: Lanes) -> bool:
        """Of a group, some threads wait at an instruction; the others go on."""
        self.where[lanes] = at + 1
        self.where[late], self._blocked[late] = at, True
        return False

    def _incomplete(self, at: int, lanes: Lanes) -> tuple[Lanes, Lanes]:
        """(those of the threads that must wait for others of their warpgroup at an instruction,
        others that have waited there for the rest of them)"""
        size = products.WARPGROUP
        waiting = np.flatnonzero(self._blocked & (self.where == at))
        arrived = np.bincount(np.concatenate([lanes, waiting]) // size, minlength=self.count)
        return lanes[arrived[lanes // size] < size], waiting[arrived[waiting // size] == size]

    def _deadlock(self) -> FaultError:
        """What names an instruction that some threads wait at for ever, and their warps."""
        clocks, lanes = self.shared.clocks, np.flatnonzero(self._blocked)
        at, block = self.where[lanes[0]], clocks.block[lanes[0]]
        held = lanes[(self.where[lanes] == at) & (clocks.block[lanes] == block)]
        warps = ", ".join(map(str, np.unique(clocks.warp[held]).tolist()))
        instruction = self.kernel.instructions[int(at)]
        what = f"{DEADLOCKS[instruction.opcode[0]]} (block {self.blocks[block]}, warps {warps})"
        return self._fault(instruction, what)

    def _fault(self, instruction: Instruction, what: str) -> FaultError:
        return FaultError(f"{self.kernel.name}: {instruction.text}: {what}")

    def _unknown(self, instruction: Instruction, why: str) -> UnsupportedPtxError:
        return UnsupportedPtxError(
            f"{self.kernel.name}: the emulator does not know `{instruction.text}` ({why}); "
            "target='interpreter' runs the kernel's source"
        )

    def _guarded(self, instruction: Instruction, lanes: Lanes) -> Lanes:
        """Those of the lanes whose guard lets them execute."""
        if instruction.guard is None:
            return lanes
        name, negated = instruction.guard
        wanted = self.register(name) ^ negated
        chosen = wanted if lanes is self.everyone else wanted[lanes]
        return lanes if chosen.all() else lanes[chosen]

    # Instructions.

    def _action(self, at: int) -> Action:
        if at not in self._made:
            self._made[at] = self._decode(self.kernel.instructions[at])
        return self._made[at]

    def _decode(self, instruction: Instruction) -> Action:
        root = instruction.opcode[0]
        if root in IGNORED or instruction.opcode[:2] == ("bar", "warp"):
            if instruction.opcode[:3] == ("fence", "proxy", "async"):
                return self.shared.fence
            return lambda lanes: None
        makers: dict[str, Callable[[Instruction], Action]] = {
            "ld": self.accesses.load, "st": self.accesses.store,
            "atom": self.accesses.atomic, "red": self.accesses.atomic,
            "shfl": self._shuffle, "cp": self.copies.decode, "mov": self._move,
            "cvta": self.accesses.convert_address, "elect": self._elect,
            "redux": self._reduce, "mbarrier": self.barriers.decode, "mapa": self.clusters.map,
        }  # fmt: skip
        if root in makers:
            return makers[root](instruction)
        if root in ("mma", "wgmma", "ldmatrix", "stmatrix"):
            return products.decode(self.products, instruction)
        return self._arithmetic(instruction)

    def _arithmetic(self, instruction: Instruction) -> Action:
        result, *operands = instruction.operands
        meaning = arithmetic.function_of(instruction.opcode, len(instruction.operands))
        if len(operands) != len(meaning.kinds):
            raise UnsupportedPtxError("this form")
        read = [self.getter(op, kind) for op, kind in zip(operands, meaning.kinds, strict=True)]
        function = meaning.function
        if instruction.opcode[0] == "setp" and "|" in str(result):
            return self._both(str(result), lambda lanes: function(*(each(lanes) for each in read)))
        write = self.setter(result, meaning.result)
        return lambda lanes: write(lanes, function(*(each(lanes) for each in read)))

    def _both(self, goals: str, decide: Callable[[Lanes], Array]) -> Action:
        """setp p|q: a condition and its opposite, or the conditions of a pair's halves."""
        writers = [self.setter(name, "pred") for name in goals.split("|")]

        def store(lanes: Lanes) -> None:
            found = decide(lanes)
            first, second = found.T if found.ndim == 2 else (found, ~found)
            writers[0](lanes, first)
            writers[1](lanes, second)

        return store

    def _move(self, instruction: Instruction) -> Action:
        """Also splits a register into parts and joins parts to one."""
        (goal, source), kind = instruction.operands, instruction.opcode[-1]
        if isinstance(source, tuple):
            part = f"b{BITS[kind] // len(source)}"
            read = [self.getter(each, part) for each in source]
            write = self.setter(goal, kind)

            def join(lanes: Lanes) -> None:
                parts = [np.broadcast_to(each(lanes), lanes.shape) for each in read]
                write(lanes, np.stack(parts, 1).view(UNSIGNED[BITS[kind]]).reshape(-1))

            return join
        if isinstance(goal, tuple):
            part = f"b{BITS[kind] // len(goal)}"
            whole = self.getter(source, kind)
            writers = [self.setter(each, part) for each in goal]

            def split(lanes: Lanes) -> None:
                value = np.broadcast_to(whole(lanes), lanes.shape)
                parts = np.ascontiguousarray(value).view(UNSIGNED[BITS[part]])
                for index, each in enumerate(writers):
                    each(lanes, parts.reshape(-1, len(writers))[:, index])

            return split
        one = self.getter(source, kind)
        store = self.setter(goal, kind)
        return lambda lanes: store(lanes, one(lanes))

    def _shuffle(self, instruction: Instruction) -> Action:
        mode = instruction.opcode[2]
        goal, source, by, clamp, _ = instruction.operands
        assert isinstance(goal, str)
        goal, _, flag = goal.partition("|")
        read, amount = self.getter(source, "b32"), self.getter(by, "u32")
        bound = self.getter(clamp, "u32")
        write = self.setter(goal, "b32")
        write_flag = self.setter(flag, "pred") if flag else None

        def shuffle(lanes: Lanes) -> None:
            value = np.zeros(self.count, np.uint32)
            value[lanes] = read(lanes)
            present = np.zeros(self.count, bool)
            present[lanes] = True
            lane = lanes % WARP
            b, c = amount(lanes).astype(np.int64), bound(lanes).astype(np.int64)
            segment, limit = c >> 8 & 31, c & 31
            highest = (lane & segment) | (limit & ~segment)
            other = {
                "up": lane - b, "down": lane + b, "bfly": lane ^ b,
                "idx": (lane & segment) | (b & ~segment),
            }[mode]  # fmt: skip
            valid = other >= highest if mode == "up" else other <= highest
            source_lane = lanes - lane + np.where(valid, other, lane)
            if not present[source_lane].all():
                raise FaultError("a warp shuffle reads a thread that does not take part")
            write(lanes, value[source_lane])
            if write_flag:
                write_flag(lanes, valid)

        return shuffle

    def _reduce(self, instruction: Instruction) -> Action:
        """redux.sync: what all threads of a warp hold, added up or the like."""
        kind = instruction.opcode[-1]
        functions = {"add": np.add, "min": np.minimum, "max": np.maximum, "or": np.bitwise_or,
                     "and": np.bitwise_and, "xor": np.bitwise_xor}  # fmt: skip
        function = functions[instruction.opcode[2]]
        read = self.getter(instruction.operands[1], kind)
        write = self.setter(instruction.operands[0], kind)

        def reduce(lanes: Lanes) -> None:
            products.whole(lanes, WARP)
            value = np.broadcast_to(read(lanes), lanes.shape).reshape(-1, WARP)
            write(lanes, np.repeat(function.reduce(value, axis=1, dtype=value.dtype), WARP))

        return reduce

    def _elect(self, instruction: Instruction) -> Action:
        goal = instruction.operands[0]
        assert isinstance(goal, str)
        write = self.setter(goal.partition("|")[2], "pred")
        return lambda lanes: write(lanes, lanes % WARP == 0)
