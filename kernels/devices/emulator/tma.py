"""The tensor memory accelerator of sm_90: boxes of tensors, copied to shared memory, and the
barriers in shared memory that tell when they have arrived.

Source: Parallel Thread Execution ISA, "cp.async.bulk.tensor" and "mbarrier".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from .arithmetic import UnsupportedPtxError
from .memory import Array, FaultError, scatter, swizzled
from .registers import Action, Registers
from .source import Address, Instruction

MAPS = 0x6D00_0000_0000
"""Where tensor maps are, in the emulated constant memory."""
MAP_BYTES = 128
SWIZZLE_BYTES = (16, 32, 64, 128)
"""Of Triton's number for a pattern."""


@dataclass(frozen=True)
class TensorMap:
    """A tensor that is copied in boxes. shape, strides: in elements, the last one contiguous; box:
    elements that are copied at a time; width: bytes of a row of the pattern in shared memory."""

    tensor: torch.Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    width: int


@dataclass
class Barrier:
    """count: arrivals that end a phase; left: of this phase; bytes_left: to be copied before."""

    count: int
    left: int
    bytes_left: int = 0
    phase: int = 0

    def settle(self) -> None:
        """Ends the phase where all have arrived."""
        if self.left == 0 and self.bytes_left == 0:
            self.phase, self.left = self.phase ^ 1, self.count


@dataclass(frozen=True)
class BoxCopy:
    """A copy under way. barrier: where the barrier lies that tells of its end; lane: who began it;
    at: places in shared memory; size: bytes of an element; data: what will be there."""

    barrier: int
    lane: Array
    at: Array
    size: int
    data: Array


class Boxes:
    """Copies of boxes and barriers. A copy arrives when somebody waits for it, no sooner."""

    def __init__(self, machine: Registers, maps: dict[int, TensorMap]) -> None:
        self.machine, self.maps = machine, maps
        self.barriers: dict[int, Barrier] = {}
        self.under_way: list[BoxCopy] = []

    def decode(self, instruction: Instruction) -> Action:
        """`mbarrier` and `cp.async.bulk.tensor`. Raises: UnsupportedPtxError."""
        if instruction.opcode[0] == "cp":
            return self._copy(instruction)
        what = instruction.opcode[1]
        makers: dict[str, Callable[[Instruction], Action]] = {
            "init": self._init, "inval": self._inval, "arrive": self._arrive,
            "try_wait": self._try_wait,
        }  # fmt: skip
        if what not in makers:
            raise UnsupportedPtxError("this form")
        return makers[what](instruction)

    def _places(self, operand: object) -> Callable[[Array], Array]:
        assert isinstance(operand, Address)
        address = self.machine.address(operand, "b32")
        return lambda lanes: self.machine.shared.locate(address(lanes), 8, lanes)

    def _at(self, place: int) -> Barrier:
        if place not in self.barriers:
            raise FaultError("no mbarrier was made here")
        return self.barriers[place]

    def _init(self, instruction: Instruction) -> Action:
        places = self._places(instruction.operands[0])
        count = self.machine.getter(instruction.operands[1], "u32")

        def init(lanes: Array) -> None:
            counts = np.broadcast_to(count(lanes), lanes.shape)
            for place, each in zip(places(lanes).tolist(), counts.tolist(), strict=True):
                self.barriers[place] = Barrier(each, each)

        return init

    def _inval(self, instruction: Instruction) -> Action:
        places = self._places(instruction.operands[0])

        def inval(lanes: Array) -> None:
            for place in places(lanes).tolist():
                self._at(place)
                del self.barriers[place]

        return inval

    def _arrive(self, instruction: Instruction) -> Action:
        goal, barrier, *size = instruction.operands
        if goal != "_":
            raise UnsupportedPtxError("this form")
        expects = "expect_tx" in instruction.opcode
        places = self._places(barrier)
        number = self.machine.getter(size[0], "u32") if size else None

        def arrive(lanes: Array) -> None:
            given = np.broadcast_to(number(lanes), lanes.shape) if number else np.ones_like(lanes)
            for place, each in zip(places(lanes).tolist(), given.tolist(), strict=True):
                found = self._at(place)
                found.bytes_left += each if expects else 0
                found.left -= 1 if expects else each
                if found.left < 0:
                    raise FaultError("more threads arrive at an mbarrier than it was made for")
                found.settle()

        return arrive

    def _try_wait(self, instruction: Instruction) -> Action:
        if "parity" not in instruction.opcode:
            raise UnsupportedPtxError("this form")
        goal, barrier, parity, *_ = instruction.operands
        places = self._places(barrier)
        read = self.machine.getter(parity, "u32")
        write = self.machine.setter(goal, "pred")

        def try_wait(lanes: Array) -> None:
            waited = places(lanes)
            self._deliver(set(waited.tolist()))
            phases = np.array([self._at(place).phase for place in waited.tolist()], np.uint32)
            if (phases == np.broadcast_to(read(lanes), lanes.shape)).any():
                raise FaultError("a wait at an mbarrier that nothing under way will end")
            write(lanes, np.ones(lanes.size, bool))

        return try_wait

    def _deliver(self, barriers: set[int]) -> None:
        """The copies arrive that are told of by these barriers."""
        shared = self.machine.shared
        left = []
        for copy in self.under_way:
            if copy.barrier not in barriers:
                left.append(copy)
                continue
            scatter(shared.bytes, copy.at, copy.size, [copy.data])
            shared.end_copy(copy.at, copy.size, np.repeat(copy.lane, copy.at.size), told=True)
            barrier = self._at(copy.barrier)
            barrier.bytes_left -= copy.data.nbytes
            if barrier.bytes_left < 0:
                raise FaultError("more bytes are copied than an mbarrier was told of")
            barrier.settle()
        self.under_way = left

    def _copy(self, instruction: Instruction) -> Action:
        goal_space, source_space, *words = instruction.opcode[5:]
        known = {"tile", "mbarrier::complete_tx::bytes"}
        if not goal_space.startswith("shared::") or source_space != "global" or {*words} - known:
            raise UnsupportedPtxError("only boxes to shared memory")
        goal, source, barrier = instruction.operands[:3]
        assert isinstance(source, Address) and len(source.more) == 1
        shared = self.machine.address(goal, "b32")
        which = self.machine.address(source, "b64")
        names = source.more[0].strip("{} ").split(",")
        corner = [self.machine.getter(name.strip(), "s32") for name in reversed(names)]
        places = self._places(barrier)

        def copy(lanes: Array) -> None:
            maps = which(lanes)
            corners = [np.broadcast_to(each(lanes), lanes.shape) for each in corner]
            goals, told = shared(lanes), places(lanes)
            for index, lane in enumerate(lanes):
                found = self.maps.get(int(maps[index]))
                if found is None:
                    raise FaultError("a box of what is no tensor map")
                start = [int(each[index]) for each in corners]
                alone = lanes[index : index + 1]
                self._start(found, start, int(goals[index]), int(told[index]), alone)

        return copy

    def _start(
        self, found: TensorMap, corner: list[int], goal: int, barrier: int, lane: Array
    ) -> None:
        """corner: position of the box in the tensor, which it may reach outside of."""
        shared, memory = self.machine.shared, self.machine.memory
        size = found.tensor.element_size()
        spans = zip(found.box, corner, strict=True)
        axes = np.ix_(*(np.arange(extent) + at for extent, at in spans))
        inside = np.ones(found.box, bool)
        offset = np.zeros(found.box, np.int64)
        for axis, extent, stride in zip(axes, found.shape, found.strides, strict=True):
            inside &= (axis >= 0) & (axis < extent)
            offset = offset + axis * stride * size
        address = np.uint64(memory.address(found.tensor)) + offset[inside].astype(np.uint64)
        data = np.zeros(found.box, f"u{size}")
        read = memory.locate(address, size)
        self.machine.everywhere.note_read(read, size, np.repeat(lane, read.size))
        data[inside] = memory.bytes.view(f"u{size}")[read // size]
        if goal % 128:
            raise FaultError("a box is copied to a place that is no multiple of 128 bytes")
        at = swizzled(goal + np.arange(data.size) * size, found.width)
        at = shared.locate(at, size, np.repeat(lane, at.size))
        shared.start_copy(at, size, np.repeat(lane, at.size))
        self.under_way.append(BoxCopy(barrier, lane, at, size, data.ravel()))
