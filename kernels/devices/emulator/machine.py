"""Runs the instructions of a kernel: all threads of several blocks at once, as arrays.

Threads that took different branches form groups; the group that is furthest behind runs until it
meets the next one, which brings structured code together again where its branches meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import arithmetic, asynchronous, products, tma
from .accesses import Accesses
from .arithmetic import UnsupportedPtxError
from .memory import Array, FaultError, Global
from .registers import WARP, Action, Lanes, Registers
from .source import Instruction, Kernel
from .values import BITS, UNSIGNED

IGNORED = {
    "fence", "membar", "griddepcontrol", "setmaxnreg", "prefetch", "discard", "nanosleep",
    "createpolicy", "pragma",
}  # fmt: skip
FINISHED = np.iinfo(np.int64).max


class Machine(Registers):
    """Several blocks of one launch that run: their state, and where their threads are.

    maps: tensor maps by address, which is what a parameter that is one holds.
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
    ) -> None:
        super().__init__(
            kernel, memory, parameters, blocks, grid, threads, shared_bytes, order
        )
        self.products = products.Pending(self)
        self.check = self.products.check
        self.accesses = Accesses(self)
        self.boxes = tma.Boxes(self, maps or {})
        self.copies = asynchronous.Copies(self, self.boxes)
        self._made: dict[int, Action] = {}

    # Control.

    def run(self) -> None:
        """Until every thread has returned.

        Raises: FaultError, naming the instruction; UnsupportedPtxError.
        """
        where = np.zeros(self.count, np.int64)
        waiting = np.zeros(self.count, bool)
        while True:
            ready = np.where(waiting, FINISHED, where)
            at = int(ready.min())
            if at == FINISHED:
                if waiting.any():
                    raise FaultError(
                        f"{self.kernel.name}: some threads wait at a barrier that other threads of "
                        "their block never reach"
                    )
                return
            others = ready[ready > at]
            lanes = np.flatnonzero(ready == at)
            self._advance(
                self.everyone if lanes.size == self.count else lanes,
                at,
                int(others.min()) if others.size else FINISHED,
                where,
                waiting,
            )

    def _advance(self, lanes: Lanes, at: int, meeting: int, where: Array, waiting: Array) -> None:
        """Runs a group from `at` until it meets another one, splits up, waits or ends."""
        while at < meeting:
            instruction = self.kernel.instructions[at]
            active = self._guarded(instruction, lanes)
            root = instruction.opcode[0]
            if root in ("bra", "ret", "exit"):
                goal = FINISHED
                if root == "bra":
                    goal = self.kernel.target(str(instruction.operands[0]), at)
                if 0 < active.size < lanes.size:
                    where[lanes], where[active] = at + 1, goal
                    return
                at = goal if active.size else at + 1
                continue
            if root in ("bar", "barrier") and instruction.opcode[1] != "warp":
                if instruction.operands != ("0",):
                    raise self._unknown(instruction, "only barrier 0")
                where[lanes], waiting[lanes] = at + 1, True
                self._release(waiting, where)
                if lanes is not self.everyone or waiting.any():
                    return
            elif active.size:
                try:
                    self._action(at)(active)
                except FaultError as fault:
                    raise FaultError(f"{self.kernel.name}: {instruction.text}: {fault}") from None
                except UnsupportedPtxError as error:
                    raise self._unknown(instruction, str(error)) from None
            at += 1
        where[lanes] = at

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

    def _release(self, waiting: Array, where: Array) -> None:
        """Lets the blocks go on of which every thread has reached the barrier."""
        by_block = waiting.reshape(-1, self.threads)
        arrived = by_block.all(1)
        places = where.reshape(-1, self.threads)[arrived]
        if (places != places[:, :1]).any():
            raise FaultError(f"{self.kernel.name}: threads of one block wait at different barriers")
        self.shared.barrier(np.flatnonzero(arrived))
        by_block[arrived] = False

    # Instructions.

    def _action(self, at: int) -> Action:
        if at not in self._made:
            self._made[at] = self._decode(self.kernel.instructions[at])
        return self._made[at]

    def _decode(self, instruction: Instruction) -> Action:
        root = instruction.opcode[0]
        if root in IGNORED or instruction.opcode[:2] == ("bar", "warp"):
            if instruction.opcode[:3] == ("fence", "proxy", "async"):
                return lambda lanes: self.shared.fence()
            return lambda lanes: None
        makers: dict[str, Callable[[Instruction], Action]] = {
            "ld": self.accesses.load, "st": self.accesses.store,
            "atom": self.accesses.atomic, "red": self.accesses.atomic,
            "shfl": self._shuffle, "cp": self.copies.decode, "mov": self._move,
            "cvta": self.accesses.convert_address, "elect": self._elect,
            "redux": self._reduce, "mbarrier": self.boxes.decode,
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
        read = [
            self.getter(op, kind) for op, kind in zip(operands, meaning.kinds, strict=True)
        ]
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

