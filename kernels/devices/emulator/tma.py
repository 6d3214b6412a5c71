"""The tensor memory accelerator of sm_90: boxes of tensors, copied to and from shared memory, and
bytes that are asked for ahead.

Source: Parallel Thread Execution ISA, "cp.async.bulk.tensor".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from .arithmetic import UnsupportedPtxError
from .clocks import Array
from .memory import FaultError, scatter, swizzled
from .registers import Action, Registers
from .source import Address, Instruction, Operand
from .waits import Mbarriers

PARAMETERS = 0x6D00_0000_0000
"""Where parameters lie for instructions that name no space; in their own, tensor maps lie from 0
on, one after the other."""
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


@dataclass(frozen=True)
class Load:
    """A box on its way to shared memory. barrier: where the barrier lies that tells of its end;
    lane: who began it; at: places in shared memory; size: bytes of an element; data: what will be
    there."""

    barrier: int
    lane: Array
    at: Array
    size: int
    data: Array


@dataclass(frozen=True)
class Store:
    """A box on its way to global memory. group: its number in the thread that began it; places: of
    shared memory that are read, none when that is over; at: positions in global memory."""

    lane: Array
    group: int
    places: Array
    at: Array
    size: int


class Boxes:
    """Copies of boxes. One to shared memory arrives when somebody waits for it, no sooner."""

    def __init__(self, machine: Registers, maps: dict[int, TensorMap], barriers: Mbarriers) -> None:
        self.machine, self.maps, self.barriers = machine, maps, barriers
        barriers.deliver = self._deliver
        self.loads: list[Load] = []
        self.stores: list[Store] = []
        self._committed = np.zeros(machine.count, np.int64)

    def decode(self, instruction: Instruction) -> Action:
        """`cp.async.bulk`. Raises: UnsupportedPtxError."""
        words = instruction.opcode[3:]
        if words == ("commit_group",):
            return self._commit
        if words in (("wait_group",), ("wait_group", "read")):
            newest = int(str(instruction.operands[0]))
            return lambda lanes: self._wait(lanes, newest, "read" in words)
        if words == ("prefetch", "L2", "global"):
            return self._prefetch(instruction)
        if words[:1] != ("tensor",):
            raise UnsupportedPtxError("this form")
        goal_space, source_space, *kinds = words[2:]
        kinds = [word for word in kinds if word != "tile"]
        if goal_space.startswith("shared::") and (source_space, kinds) == (
            "global", ["mbarrier::complete_tx::bytes"]
        ):  # fmt: skip
            return self._load(instruction)
        if (goal_space, source_space, kinds) == ("global", "shared::cta", ["bulk_group"]):
            return self._store(instruction)
        raise UnsupportedPtxError("this form")

    def check_ended(self) -> None:
        """Raises: FaultError for copies under way when all threads have returned."""
        if self.loads or any(store.places.size for store in self.stores):
            raise FaultError("a block ends while its shared memory is copied from or to")

    def _prefetch(self, instruction: Instruction) -> Action:
        """Bytes in a row that are asked for: sixteens, of memory that the launch may read."""
        address = self.machine.address(instruction.operands[0], "b64")
        size = self.machine.getter(instruction.operands[1], "u32")

        def prefetch(lanes: Array) -> None:
            first = address(lanes)
            self.machine.memory.locate(first, 16)
            self.machine.memory.locate(first + size(lanes) - np.uint64(16), 16)

        return prefetch

    def _boxes(self, operand: Operand) -> Callable[[Array], list[tuple[TensorMap, list[int]]]]:
        """For lanes, the map and the corner of a box that `[map, {corner}]` stands for."""
        if not isinstance(operand, Address) or len(operand.more) != 1:
            raise UnsupportedPtxError("this form")
        which = self.machine.address(operand, "b64")
        names = operand.more[0].strip("{} ").split(",")
        corner = [self.machine.getter(name.strip(), "s32") for name in reversed(names)]

        def boxes(lanes: Array) -> list[tuple[TensorMap, list[int]]]:
            starts = np.stack([np.broadcast_to(each(lanes), lanes.shape) for each in corner], 1)
            maps = [self.maps.get(address) for address in which(lanes).tolist()]
            found = [each for each in maps if each is not None]
            if len(found) < len(maps):
                raise FaultError("a box of what is not a tensor map")
            return list(zip(found, starts.tolist(), strict=True))

        return boxes

    def _located(self, found: TensorMap, corner: list[int]) -> tuple[Array, Array]:
        """(which elements of a box lie in the tensor, where these are in global memory)"""
        spans = zip(found.box, corner, strict=True)
        axes = np.ix_(*(np.arange(extent) + at for extent, at in spans))
        inside = np.ones(found.box, bool)
        offset = np.zeros(found.box, np.int64)
        size = found.tensor.element_size()
        for axis, extent, stride in zip(axes, found.shape, found.strides, strict=True):
            inside &= (axis >= 0) & (axis < extent)
            offset = offset + axis * stride * size
        memory = self.machine.memory
        address = np.uint64(memory.address(found.tensor)) + offset[inside].astype(np.uint64)
        return inside, memory.locate(address, size)

    def _places(self, found: TensorMap, start: int, lane: Array) -> Array:
        """Where the elements of a box lie in shared memory."""
        if start % 128:
            raise FaultError("a box lies at a place that is not a multiple of 128 bytes")
        size, count = found.tensor.element_size(), int(np.prod(found.box))
        at = swizzled(start + np.arange(count) * size, found.width)
        return self.machine.shared.locate(at, size, np.repeat(lane, count))

    def _load(self, instruction: Instruction) -> Action:
        goal, source, barrier = instruction.operands[:3]
        shared, boxes = self.machine.address(goal, "b32"), self._boxes(source)
        places = self.barriers.places(barrier)

        def load(lanes: Array) -> None:
            goals, told = shared(lanes).tolist(), places(lanes).tolist()
            for index, (found, corner) in enumerate(boxes(lanes)):
                lane = lanes[index : index + 1]
                size = found.tensor.element_size()
                inside, read = self._located(found, corner)
                self.machine.everywhere.note_read(read, size, np.repeat(lane, read.size))
                data = np.zeros(found.box, f"u{size}")
                data[inside] = self.machine.memory.bytes.view(f"u{size}")[read // size]
                at = self._places(found, goals[index], lane)
                self.machine.shared.start_copy(at, size, np.repeat(lane, at.size))
                self.loads.append(Load(told[index], lane, at, size, data.ravel()))
            self.barriers.changed = True

        return load

    def _deliver(self, barriers: set[int]) -> None:
        """The boxes arrive that are told of by these barriers."""
        shared = self.machine.shared
        for place in sorted({load.barrier for load in self.loads} & barriers):
            arrived = [load for load in self.loads if load.barrier == place]
            self.loads = [load for load in self.loads if load.barrier != place]
            # Together: which of them is first nobody knows.
            agent = self.barriers.arrived(place, sum(load.data.nbytes for load in arrived))
            for load in arrived:
                scatter(shared.bytes, load.at, load.size, [load.data])
                shared.end_copy(load.at, load.size, np.repeat(load.lane, load.at.size), agent)
            shared.clocks.tick(place // shared.size)

    def _store(self, instruction: Instruction) -> Action:
        goal, source = instruction.operands[:2]
        shared, boxes = self.machine.address(source, "b32"), self._boxes(goal)

        def store(lanes: Array) -> None:
            sources = shared(lanes).tolist()
            for index, (found, corner) in enumerate(boxes(lanes)):
                lane = lanes[index : index + 1]
                size = found.tensor.element_size()
                inside, written = self._located(found, corner)
                at = self._places(found, sources[index], lane)
                grains = (at[:, None] + np.arange(0, size, 2)).ravel()
                places = self.machine.shared.start_reading(grains, lane)
                data = self.machine.shared.bytes.view(f"u{size}")[at // size].reshape(found.box)
                self.machine.everywhere.note_box(written, size, np.repeat(lane, written.size))
                self.machine.memory.bytes.view(f"u{size}")[written // size] = data[inside]
                group = int(self._committed[lane[0]])
                self.stores.append(Store(lane, group, places, written, size))

        return store

    def _commit(self, lanes: Array) -> None:
        self._committed[lanes] += 1

    def _wait(self, lanes: Array, newest: int, only_read: bool) -> None:
        """All but the `newest` groups that these threads have committed have been read from shared
        memory, or have arrived as well."""
        left = []
        for store in self.stores:
            lane = int(store.lane[0])
            if lane not in lanes or store.group >= self._committed[lane] - newest:
                left.append(store)
                continue
            if store.places.size:
                self.machine.shared.end_reading(store.places, store.lane)
            if only_read:
                left.append(replace(store, places=store.places[:0]))
            else:
                alone = np.repeat(store.lane, store.at.size)
                self.machine.everywhere.note_write(store.at, store.size, alone)
        self.stores = left
