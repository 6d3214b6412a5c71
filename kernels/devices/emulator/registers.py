"""The state of several blocks of one launch, and its registers: what the parts of the emulator that
know one kind of instruction each share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from . import values
from .arithmetic import UnsupportedPtxError
from .clocks import Array
from .exchange import Exchange
from .memory import POISON, Global, Shared
from .source import Address, Kernel, Operand
from .stack import Stack
from .values import BITS, UNSIGNED

Lanes = Array
"""The numbers of the threads that an instruction is executed by."""
Action = Callable[[Lanes], None]
WARP = 32


class Registers:
    """Registers, shared memory and the places of several blocks of one launch.

    blocks: their numbers in the grid; parameters: bytes of each of the kernel's; order: in which
    the atomic operations of an instruction happen; cluster: blocks of each. check: called with
    every register that is read or written and by whom, before it is; it raises where that is too
    early.
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
        cluster: int = 1,
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
        self.check: Callable[[str, Lanes], None] = lambda name, lanes: None
        self._special = self._special_registers(cluster, shared_bytes)

    def getter(self, operand: Operand, kind: str) -> Callable[[Lanes], Array]:
        """Reads an operand as values of a type: one per lane, or a single one for a constant."""
        assert isinstance(operand, str), operand
        negated = operand.startswith("!")
        name = operand.lstrip("!")
        if (special := self._special.get(name)) is not None:
            fixed = values.from_bits(special, kind)
            return lambda lanes: fixed[lanes]
        if name in self.parameters:
            where = np.frombuffer(self.parameters[name], UNSIGNED[BITS[kind]], 1)
            return lambda lanes: where
        if name in self.kernel.arrays:
            start = np.array([self.stack.starts.get(name, 0)], UNSIGNED[BITS[kind]])
            return lambda lanes: start
        if name[0].isdigit() or name[0] == "-":
            constant = values.immediate(name, kind)
            return lambda lanes: constant
        bits = self.register(name)

        def read(lanes: Lanes) -> Array:
            self.check(name, lanes)
            value = values.from_bits(bits if lanes is self.everyone else bits[lanes], kind)
            return ~value if negated else value

        return read

    def register(self, name: str) -> Array:
        """The bits of a register, one element per thread.

        Raises: UnsupportedPtxError for what is none.
        """
        if name not in self.registers:
            try:
                width = self.kernel.width(name)
            except KeyError:
                raise UnsupportedPtxError(f"{name} is not a register") from None
            filled = np.full(self.count * max(width // 8, 1), POISON, np.uint8)
            self.registers[name] = filled.view(UNSIGNED[width]) if width > 1 else filled != POISON
        return self.registers[name]

    def setter(self, operand: Operand, kind: str) -> Callable[[Lanes, Array], None]:
        """Writes values of a type to a register."""
        assert isinstance(operand, str), operand
        if operand == "_":
            return lambda lanes, value: None
        bits = self.register(operand)
        width = self.kernel.width(operand)

        def write(lanes: Lanes, value: Array) -> None:
            self.check(operand, lanes)
            new = values.widened(values.to_bits(value, kind), kind, width)
            if lanes is self.everyone:
                bits[:] = new
            else:
                bits[lanes] = new

        return write

    def _special_registers(self, cluster: int, shared_bytes: int) -> dict[str, Array]:
        """What special registers hold in every thread."""
        zero = np.zeros(self.count, np.uint32)
        one = zero + np.uint32(1)
        return {
            "%tid.x": self.thread, "%tid.y": zero, "%tid.z": zero,
            "%ctaid.x": np.repeat(self.blocks, self.threads), "%ctaid.y": zero, "%ctaid.z": zero,
            "%ntid.x": one * np.uint32(self.threads), "%ntid.y": one, "%ntid.z": one,
            "%nctaid.x": one * np.uint32(self.grid), "%nctaid.y": one, "%nctaid.z": one,
            "%laneid": self.thread % np.uint32(WARP),
            "%cluster_ctarank": np.repeat(self.blocks % np.uint32(cluster), self.threads),
            "%dynamic_smem_size": one * np.uint32(shared_bytes),
        }  # fmt: skip

    def address(self, operand: Operand, kind: str) -> Callable[[Lanes], Array]:
        """The addresses that `[base + offset]` stands for."""
        assert isinstance(operand, Address), operand
        read = self.getter(operand.base, kind)
        offset = np.array([operand.offset], np.int64).astype(UNSIGNED[BITS[kind]])
        return lambda lanes: np.broadcast_to(read(lanes) + offset, lanes.shape)
