"""Global and shared memory, and what can go wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ....errors import KernelError
from .clocks import Array, Clocks

BASE = 0x7F3A_0000_0000
"""No address of a tensor fits into 32 bits: an offset that lost its upper half is noticed."""
GUARD = 512
"""Bytes between tensors that belong to none."""
FAR = 1 << 31
POISON = 0xFF
"""What memory holds before it is written: NaN in every floating-point format."""
ALIGNMENT = 16
GRAIN = 2
"""Bytes that races are told apart by: the smallest element in shared memory."""


class FaultError(KernelError):
    """What a device would fault at, or what it might get wrong: the instruction, and what."""


@dataclass(frozen=True)
class Bounded:
    """A contiguous tensor and what a launch may do to it. touchable: its elements that it may
    access, all where there is none; writable: whether it may write them."""

    tensor: torch.Tensor
    touchable: Array | None = None
    writable: bool = True


READ, WRITE = 1, 2
Released = dict[int, Array]
"""By block, the times of its warps up to which what they did was released."""


class Global:
    """The tensors of one launch, at addresses of 64 bits. What launches remember of each other's
    writes (`exchange.py`) is kept here as well: it outlives the blocks that advance together."""

    grain = GRAIN

    def __init__(self, arguments: Sequence[Bounded]) -> None:
        """arguments: tensors that share memory share it here; what one of them may do to an element
        the launch may."""
        arguments = [each for each in arguments if each.tensor.numel()]
        self._areas = [Area(*span) for span in _merged([each.tensor for each in arguments])]
        size = GUARD
        for area in self._areas:
            area.start = size
            # Aligned as the compiler was told, and no better.
            size += -(-area.size // 32) * 32 + GUARD + ALIGNMENT
        self.bytes = np.full(-(-size // 32) * 32, POISON, np.uint8)
        self.access = np.zeros(self.bytes.size, np.uint8)
        self.writers = np.zeros(self.bytes.size // GRAIN, np.int64)
        self.released: dict[int, Released] = {}
        self.acquired: dict[int, list[tuple[int, int, Released]]] = {}
        self._tensors = [each.tensor for each in arguments]
        for each in arguments:
            self._place(each.tensor)[:] = _bytes_of(each.tensor)
            allowed = np.full(each.tensor.numel(), True) if each.touchable is None else (
                each.touchable)  # fmt: skip
            code = np.where(allowed, READ | WRITE * each.writable, 0).astype(np.uint8)
            at = self.address(each.tensor) - BASE
            self.access[at : at + each.tensor.nbytes] |= np.repeat(code, each.tensor.element_size())

    def _place(self, tensor: torch.Tensor) -> Array:
        at = self.address(tensor) - BASE
        return self.bytes[at : at + tensor.nbytes]

    def address(self, tensor: torch.Tensor) -> int:
        """Of the first element; an empty tensor has none, and what it points to is nowhere."""
        pointer = tensor.data_ptr()
        for area in self._areas:
            if area.pointer <= pointer < area.pointer + area.size:
                return BASE + area.start + pointer - area.pointer
        return BASE

    def copy_back(self) -> None:
        """Into the tensors, what the kernel wrote."""
        for tensor in self._tensors:
            _bytes_of(tensor)[:] = self._place(tensor)

    def locate(self, address: Array, size: int) -> Array:
        """Positions of `size` bytes each in `bytes`.

        Raises: FaultError for an address that the launch may not touch, or no multiple of the size.
        """
        at = (address - np.uint64(BASE)).view(np.int64)
        inside = (at >= 0) & (at <= self.bytes.size - size)
        inside &= self.access[np.where(inside, at, 0)] > 0
        inside &= self.access[np.where(inside, at + size - 1, 0)] > 0
        if not inside.all():
            bad = int(at[~inside][0])
            raise FaultError(f"an access of {size} bytes outside every tensor{self._near(bad)}")
        if (at % size).any():
            raise FaultError(f"a misaligned access of {size} bytes")
        return at

    def is_writable(self, at: Array) -> Array:
        """Of positions, whether the launch may write there."""
        return np.asarray(self.access[at] & WRITE > 0)

    def check_writable(self, at: Array) -> None:
        """Raises: FaultError for a position in what the launch only reads."""
        if not (held := self.is_writable(at)).all():
            where = self._near(int(at[~held][0]))
            raise FaultError(f"a write to what the launch may only read{where}")

    def alike(self, at: Array, old: Array, new: Array) -> Array:
        """Whether two values that threads write to a position at once are one: both NaN, in the
        format of the tensor."""
        result = np.zeros(at.shape, bool)
        for tensor in self._tensors:
            start = self.address(tensor) - BASE
            held = (at >= start) & (at < start + tensor.nbytes)
            result[held] = alike(old[held], new[held], tensor.dtype)
        return result

    def check_near(self, address: Array) -> None:
        """Copies of nothing may have any address by the manual, but an sm_100 has faulted at one
        that a lost sign had sent 16 GiB away (pytorch pull request 186440).

        Raises: FaultError for an address as far as that.
        """
        at = (address - np.uint64(BASE)).view(np.int64)
        if ((at < -FAR) | (at > self.bytes.size + FAR)).any():
            raise FaultError("a copy (perhaps of 0 bytes) from an address outside every tensor")

    def _near(self, at: int) -> str:
        """Where the position lies, from the memory that is nearest in front of it."""
        before = [area for area in self._areas if area.start <= at]
        if not before:
            return ""
        return f": byte {at - before[-1].start} of memory of {before[-1].size} bytes"


@dataclass
class Area:
    """Host memory from `pointer`, and its position in the emulated memory."""

    pointer: int
    size: int
    start: int = 0


def _merged(tensors: Sequence[torch.Tensor]) -> list[tuple[int, int]]:
    """(address, bytes) of the memory that the tensors lie in; what overlaps is one."""
    spans: list[tuple[int, int]] = []
    for start, size in sorted((t.data_ptr(), t.nbytes) for t in tensors if t.numel()):
        if spans and start < sum(spans[-1]):
            first, length = spans[-1]
            spans[-1] = first, max(length, start + size - first)
        else:
            spans.append((start, size))
    return spans


def _bytes_of(tensor: torch.Tensor) -> Array:
    """Raises: RuntimeError for a tensor that is not contiguous."""
    return tensor.view(-1).view(torch.uint8).numpy()


class Shared:
    """The shared memory of several blocks, and who touched it when.

    A place that one warp touched may be touched by another one only when it has seen that: behind a
    barrier, or a wait at an mbarrier at which the first one has arrived. What an asynchronous copy
    writes is in nobody's hands between its start and the wait for it. What is stored must be fenced
    before warpgroups multiply it or a box of it is stored. By the letter of the manual so must what
    `cp.async` brings; Triton before 3.7 does without, so that is not asked for here.
    """

    def __init__(self, blocks: int, size: int, threads: int) -> None:
        self.size = -(-max(size, 16) // 16) * 16
        self.bytes = np.full(blocks * self.size, POISON, np.uint8)
        self.clocks = Clocks(blocks, threads)
        self.origin = self.clocks.block * self.size
        grains = self.bytes.size // GRAIN
        # Time 0 is before everything: nobody has been there.
        self.write_time = np.zeros(grains, np.int32)
        self.writer = np.zeros(grains, np.int16)
        self.read_time = np.zeros(self.clocks.warps * grains, np.int32)
        self.last_read = np.zeros(grains, np.int32)
        self.in_flight = np.zeros(grains, bool)
        self.unfenced = np.zeros(grains, bool)
        self.being_read = np.zeros(grains, np.int32)
        self.read_afar: Array | None = None  # By another block since the cluster's last barrier.

    def alike(self, at: Array, old: Array, new: Array) -> Array:
        """Whether two values that threads write to a place at once are one: both NaN perhaps."""
        return alike_by_width(old, new)

    def locate(self, address: Array, size: int, lanes: Array) -> Array:
        """Positions of `size` bytes each in `bytes`.

        Raises: FaultError for an address outside the block's memory, or no multiple of the size.
        """
        at = address.astype(np.int64)
        if (at + size > self.size).any():
            reached = int(at.max())
            raise FaultError(f"an access of {size} bytes at {reached} of {self.size} shared bytes")
        if (at % size).any():
            raise FaultError(f"a misaligned access of {size} shared bytes")
        return np.asarray(at + self.origin[lanes])

    def _grains(self, at: Array, size: int, lanes: Array) -> tuple[Array, Array, Array]:
        """Of accesses of `size` bytes: (the places of each in a column, its thread's row of the
        clocks, the time)."""
        places = at // GRAIN + np.arange(max(size // GRAIN, 1))[:, None]
        clocks = self.clocks
        return places, clocks.row[lanes], clocks.now[clocks.block[lanes]]

    def note_read(self, at: Array, size: int, lanes: Array) -> None:
        """Raises: FaultError where another warp may still be writing, or nothing was written."""
        places, rows, times = self._grains(at, size, lanes)
        self._check_read(places, self.clocks.known(rows, self.writer[places]))
        self.read_time[self._reader(places, lanes)] = times
        self.last_read[places] = times

    def _reader(self, places: Array, lanes: Array) -> Array:
        """Where it is kept when the warps of these threads read places."""
        return np.asarray(places + self.clocks.warp[lanes] * self.writer.size)

    def _check_read(self, places: Array, known: Array) -> None:
        """known: up to when those who read have seen what the last writer of each place did."""
        if self.in_flight[places].any():
            raise FaultError("shared memory is read before the copy into it was waited for")
        written = self.write_time[places]
        if not written.all():
            raise FaultError("shared memory is read that nothing was written to")
        self._check_writers(places, known < written, "read of")

    def _check_writers(self, places: Array, unseen: Array, verb: str) -> None:
        """Raises: FaultError where the last write of places has not been seen."""
        if not unseen.any():
            return
        if self.writer[places[unseen]].max() >= self.clocks.warps:
            raise FaultError(f"{verb} what a copy wrote that this warp has not waited for")
        raise FaultError(f"{verb} what another warp wrote since the last barrier")

    def start_reading(self, at: Array, lanes: Array) -> Array:
        """Tensor cores or the copy engine begin to read elements of `GRAIN` bytes, for warps of one
        block; the places read.

        Raises: FaultError where what they read may not be there yet.
        """
        places = at // GRAIN
        seen = self.clocks.seen[np.unique(self.clocks.row[lanes])].min(0)
        self._check_read(places, seen[self.writer[places]])
        if self.unfenced[places].any():
            raise FaultError("tensor cores or a copy read what no fence.proxy.async made visible")
        self.being_read[places] += 1
        return places

    def end_reading(self, places: Array, lanes: Array, is_last: bool = True) -> None:
        """These warps have waited for it, the last ones perhaps: who has seen that they all did may
        overwrite what was read."""
        self.being_read[places] -= is_last
        time = self.clocks.now[self.clocks.block[lanes[0]]]
        for warp in np.unique(self.clocks.warp[lanes]).tolist():
            self.read_time[places + warp * self.writer.size] = time
        self.last_read[places] = time

    def note_write(self, at: Array, size: int, lanes: Array) -> None:
        """Raises: FaultError where another warp may still be reading or writing."""
        self.unfenced[self._write(at, size, lanes)] = True

    def _write(self, at: Array, size: int, lanes: Array) -> Array:
        """The places that threads write now."""
        places, rows, times = self._grains(at, size, lanes)
        if self.in_flight[places].any():
            raise FaultError("shared memory is written while a copy into it is under way")
        if self.being_read[places].any():
            raise FaultError("shared memory is written that a product under way reads, or a copy")
        if self.read_afar is not None and self.read_afar[places].any():
            raise FaultError("shared memory is overwritten that a block of the cluster still reads")
        known = self.clocks.known(rows, self.writer[places])
        self._check_writers(places, known < self.write_time[places], "overwritten")
        # Mostly a warp has seen everything up to the last read, whoever did it.
        late = self.last_read[places] > self.clocks.floor[rows]
        if late.any():
            self._check_readers(places[late], np.broadcast_to(rows, places.shape)[late])
        self.write_time[places], self.writer[places] = times, self.clocks.warp[lanes]
        return places

    def _check_readers(self, places: Array, rows: Array) -> None:
        for warp in range(self.clocks.warps):
            read = self.read_time[places + warp * self.writer.size]
            if (self.clocks.known(rows, warp) < read).any():
                raise FaultError(
                    "shared memory is overwritten that another warp read since the last barrier"
                )

    def start_copy(self, at: Array, size: int, lanes: Array) -> None:
        """An asynchronous copy begins: the places may change from now on."""
        places = self._write(at, size, lanes)
        self.in_flight[places] = True
        self.unfenced[places] = False

    def end_copy(self, at: Array, size: int, lanes: Array, agent: int | None = None) -> None:
        """The copy was waited for by the thread that began it, whose warp has written it then; or
        an agent is told of it, which has."""
        places, _, times = self._grains(at, size, lanes)
        self.in_flight[places] = False
        self.write_time[places] = times
        self.writer[places] = self.clocks.warp[lanes] if agent is None else agent

    def fence(self, lanes: Array) -> None:
        """What these warps have seen is visible to tensor cores and the copy engine."""
        if not (places := np.flatnonzero(self.unfenced)).size:
            return
        clocks = self.clocks
        seen = np.full((clocks.now.size, clocks.seen.shape[1]), -1, np.int32)
        rows = np.unique(clocks.row[lanes])
        np.maximum.at(seen, rows // clocks.warps, clocks.seen[rows])
        blocks = places // (self.size // GRAIN)
        fenced = seen[blocks, self.writer[places]] >= self.write_time[places]
        self.unfenced[places[fenced]] = False


def swizzled(place: Array, width: int) -> Array:
    """Where the byte at a place goes in a pattern whose rows have `width` bytes: pieces of 16 bytes
    are exchanged by exclusive or with the number of the row of 128 bytes."""
    return np.asarray(place ^ ((place >> 7 & (width // 16 - 1)) << 4))


def gather(memory: Array, at: Array, width: int, count: int) -> list[Array]:
    """`count` neighbouring elements of `width` bytes from each position, as unsigned integers."""
    elements = memory.view(f"u{width}")
    first = at // width
    return [elements[first + index] for index in range(count)]


NAN_FROM = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F80_0000,
            torch.float64: 0x7FF0_0000_0000_0000}  # fmt: skip
"""Bits above which, without the sign, a number is NaN."""


def alike(old: Array, new: Array, dtype: torch.dtype) -> Array:
    """Whether the floats that unsigned integers hold, one or several of them, are equal or NaN, of
    whatever bits: which of two NaNs a place keeps nobody can tell, and nobody asks."""
    if dtype not in NAN_FROM or dtype.itemsize > old.itemsize:
        return np.zeros(old.shape, bool)
    unsigned, bits = np.dtype(f"u{dtype.itemsize}"), 8 * dtype.itemsize
    shape = (*old.shape, old.itemsize // unsigned.itemsize)
    first, second = (
        np.ascontiguousarray(each).view(unsigned).reshape(shape) for each in (old, new)
    )
    magnitude = unsigned.type((1 << bits - 1) - 1)
    nan = (first & magnitude > NAN_FROM[dtype]) & (second & magnitude > NAN_FROM[dtype])
    return np.asarray((nan | (first == second)).all(-1))


def alike_by_width(old: Array, new: Array) -> Array:
    """`alike` in some format: for memory whose types are not known. A NaN of bfloat16 is also one
    of float16."""
    formats = (torch.float16, torch.float32, torch.float64)
    return np.asarray(np.logical_or.reduce([alike(old, new, dtype) for dtype in formats]))


Alike = Callable[[Array, Array, Array], Array]
"""For positions, the values there and other ones, whether these are the same."""


def scatter(
    memory: Array, at: Array, width: int, values: Sequence[Array], same: Alike | None = None
) -> None:
    """Stores neighbouring elements of `width` bytes at each position.

    Raises: FaultError where two threads write to one place at once what is not the same.
    """
    elements = memory.view(f"u{width}")
    first = at // width
    for index, value in enumerate(values):
        elements[first + index] = value
    for index, value in enumerate(values):
        kept = elements[first + index]
        if not (lost := kept != value).any():
            continue
        places = at[lost] + index * width
        if same is None or not same(places, kept[lost], np.asarray(value)[lost]).all():
            raise FaultError("two threads write different values to the same place at once")
