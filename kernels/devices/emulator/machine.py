"""Runs the instructions of a kernel: all threads of several blocks at once, as arrays.

Threads that took different branches form groups; the group that is furthest behind runs until it
meets the next one, which brings structured code together again where its branches meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import arithmetic, asynchronous, products, tma, values
from .accesses import Accesses
from .arithmetic import UnsupportedPtxError
from .exchange import Exchange
from .memory import POISON, Array, FaultError, Global, Shared
from .source import Address, Instruction, Kernel, Operand
from .stack import Stack
from .values import BITS, UNSIGNED

Lanes = Array
"""The numbers of the threads that an instruction is executed by."""
Action = Callable[[Lanes], None]
WARP = 32
IGNORED = {
    "fence", "membar", "griddepcontrol", "setmaxnreg", "prefetch", "discard", "nanosleep",
    "createpolicy", "pragma",
}  # fmt: skip
FINISHED = np.iinfo(np.int64).max


class Machine:
    """The state of several blocks of one launch: registers, shared memory, where threads are.

    blocks: their numbers in the grid; parameters: bytes of each of the kernel's; order: in which
    the atomic operations of an instruction happen; maps: tensor maps by address, which is what a
    parameter that is one holds.
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
        self.kernel, self.memory, self.order = kernel, memory, order
        self.threads, self.blocks, self.grid = threads, np.array(blocks, np.uint32), grid
        self.count = len(blocks) * threads
        self.everyone = np.arange(self.count)
        self.thread = (self.everyone % threads).astype(np.uint32)
        self.shared = Shared(len(blocks), shared_bytes, threads)
        self.everywhere = Exchange(memory, self.shared, self.blocks)
        self.stack = Stack(kernel, self.count)
        self.registers: dict[str, Array] = {}
        self.parameters = dict(zip(kernel.parameters, parameters, strict=False))
        self.copies = asynchronous.Copies(self.shared, self.count)
        self.products = products.Pending(self)
        self.accesses = Accesses(self)
        self.boxes = tma.Boxes(self, maps or {})
        self._special = self._special_registers()
        self._made: dict[int, Action] = {}

    # Registers.

    def getter(self, operand: Operand, kind: str) -> Callable[[Lanes], Array]:
        """Reads an operand as values of a type: one per lane, or a single one for a constant."""
        assert isinstance(operand, str), operand
        negated = operand.startswith("!")
        name = operand.lstrip("!")
        if (special := self._special.get(name)) is not None:
            fixed = values.from_bits(special, kind)
            return lambda lanes: fixed[lanes]
        if name in self.parameters:
            where = np.frombuffer(self.parameters[name][:8], np.uint64)
            return lambda lanes: where
        if name in self.kernel.arrays:
            start = np.array([self.stack.starts.get(name, 0)], UNSIGNED[BITS[kind]])
            return lambda lanes: start
        if name[0].isdigit() or name[0] == "-":
            constant = values.immediate(name, kind)
            return lambda lanes: constant
        bits = self._register(name)

        def read(lanes: Lanes) -> Array:
            self.products.check(name, lanes)
            value = values.from_bits(bits if lanes is self.everyone else bits[lanes], kind)
            return ~value if negated else value

        return read

    def _register(self, name: str) -> Array:
        if name not in self.registers:
            try:
                width = self.kernel.width(name)
            except KeyError:
                raise UnsupportedPtxError(f"{name} is no register") from None
            filled = np.full(self.count * max(width // 8, 1), POISON, np.uint8)
            self.registers[name] = filled.view(UNSIGNED[width]) if width > 1 else filled != POISON
        return self.registers[name]

    def setter(self, operand: Operand, kind: str) -> Callable[[Lanes, Array], None]:
        """Writes values of a type to a register."""
        assert isinstance(operand, str), operand
        if operand == "_":
            return lambda lanes, value: None
        bits = self._register(operand)
        width = self.kernel.width(operand)

        def write(lanes: Lanes, value: Array) -> None:
            self.products.check(operand, lanes)
            new = values.widened(values.to_bits(value, kind), kind, width)
            if lanes is self.everyone:
                bits[:] = new
            else:
                bits[lanes] = new

        return write

    def _special_registers(self) -> dict[str, Array]:
        """What special registers hold in every thread."""
        zero = np.zeros(self.count, np.uint32)
        one = zero + np.uint32(1)
        return {
            "%tid.x": self.thread, "%tid.y": zero, "%tid.z": zero,
            "%ctaid.x": np.repeat(self.blocks, self.threads), "%ctaid.y": zero, "%ctaid.z": zero,
            "%ntid.x": one * np.uint32(self.threads), "%ntid.y": one, "%ntid.z": one,
            "%nctaid.x": one * np.uint32(self.grid), "%nctaid.y": one, "%nctaid.z": one,
            "%laneid": self.thread % np.uint32(WARP), "%cluster_ctarank": zero,
        }  # fmt: skip

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
        wanted = self._register(name) ^ negated
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
            "shfl": self._shuffle, "cp": self.copies.decoder(self), "mov": self._move,
            "cvta": self.accesses.convert_address, "elect": self._elect,
            "redux": self._reduce, "mbarrier": self.boxes.decode,
        }  # fmt: skip
        if root in makers:
            return makers[root](instruction)
        if root in ("mma", "wgmma", "ldmatrix", "stmatrix"):
            return products.decode(self, instruction)
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

    def address(self, operand: Operand, kind: str) -> Callable[[Lanes], Array]:
        """The addresses that `[base + offset]` stands for."""
        assert isinstance(operand, Address), operand
        read = self.getter(operand.base, kind)
        offset = np.array([operand.offset], np.int64).astype(UNSIGNED[BITS[kind]])
        return lambda lanes: np.broadcast_to(read(lanes) + offset, lanes.shape)

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

