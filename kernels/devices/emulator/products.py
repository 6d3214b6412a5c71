"""Matrix fragments: which thread holds which element, and products of them.

Source: Parallel Thread Execution ISA, "Warp-level matrix instructions" and "Asynchronous warpgroup
level matrix instructions". Products are exact in float32 and summed in float64 here; a tensor core
rounds in between.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from ..barriers import SWIZZLES
from . import values
from .arithmetic import UnsupportedPtxError
from .clocks import Array
from .memory import FaultError, gather, scatter, swizzled
from .registers import Action, Registers
from .source import Instruction
from .values import BITS

WARP, WARPGROUP = 32, 128
SHAPE = re.compile(r"m(\d+)n(\d+)k(\d+)")
PER_REGISTER = {"f16": 2, "bf16": 2, "tf32": 1}
LANE = np.arange(WARP)
ROW, COLUMN = LANE // 4, LANE % 4


def fragment_a(depth: int, pack: int) -> tuple[Array, Array]:
    """(row, k) of each element: (register, lane, place in the register) of a 16 x depth tile."""
    registers = 16 * depth // WARP // pack
    which = np.arange(registers)[:, None, None]
    place = np.arange(pack)[None, None, :]
    row = ROW[None, :, None] + 8 * (which % 2) + 0 * place
    k = COLUMN[None, :, None] * pack + 4 * pack * (which // 2) + place
    return row, k


def fragment_b(depth: int, pack: int) -> tuple[Array, Array]:
    """(k, column) of each element of a depth x 8 tile, as `fragment_a`."""
    registers = depth * 8 // WARP // pack
    which = np.arange(registers)[:, None, None]
    place = np.arange(pack)[None, None, :]
    k = COLUMN[None, :, None] * pack + 4 * pack * which + place
    return k, ROW[None, :, None] + 0 * k


def fragment_c(columns: int) -> tuple[Array, Array]:
    """(row, column) of each float32 of a 16 x columns tile: (register, lane)."""
    which = np.arange(columns // 2)[:, None]
    row = ROW[None, :] + 8 * (which // 2 % 2)
    column = 8 * (which // 4) + 2 * COLUMN[None, :] + which % 2
    return row, column


def decode(pending: Pending, instruction: Instruction) -> Action:
    """Raises: UnsupportedPtxError."""
    machine = pending.machine
    root, *words = instruction.opcode
    if root == "mma":
        return _warp_product(machine, instruction)
    if root in ("ldmatrix", "stmatrix"):
        return _matrices(machine, instruction)
    if "fence" in words:
        return lambda lanes: None
    if "commit_group" in words:
        return pending.commit
    if "wait_group" in words:
        newest = int(str(instruction.operands[0]))
        return lambda lanes: pending.wait(lanes, newest)
    return _warpgroup_product(pending, instruction)


def whole(lanes: Array, size: int) -> Array:
    """The lanes in groups that must take part together.

    Raises: FaultError where some do not.
    """
    if lanes.size % size == 0:
        groups = lanes.reshape(-1, size)
        if (groups == groups[:, :1] // size * size + np.arange(size)).all():
            return groups
    raise FaultError(f"not all {size} threads take part")


def _unpacked(machine: Registers, names: tuple[str, ...], kind: str) -> Callable[[Array], Array]:
    """Reads registers as (lane, register, place in the register)."""
    form = {"f16": "f16x2", "bf16": "bf16x2", "tf32": "tf32", "f32": "f32"}[kind]
    read = [machine.getter(name, form) for name in names]

    def unpacked(lanes: Array) -> Array:
        shape = (lanes.size, BITS[form] // BITS[kind])
        columns = (np.atleast_2d(each(lanes).T).T for each in read)
        return np.stack([np.broadcast_to(each, shape) for each in columns], 1)

    return unpacked


def _warp_product(machine: Registers, instruction: Instruction) -> Action:
    """mma.sync: every warp multiplies 16 x depth by depth x 8."""
    words = instruction.opcode
    shape = next(found for word in words if (found := SHAPE.fullmatch(word)))
    depth, kinds = int(shape[3]), [word for word in words if word in BITS]
    if (shape[1], shape[2]) != ("16", "8") or kinds[0] != "f32" or kinds[1] not in PER_REGISTER:
        raise UnsupportedPtxError("this form")
    goal, a, b, c = instruction.operands
    assert isinstance(goal, tuple) and isinstance(a, tuple) and isinstance(b, tuple)
    assert isinstance(c, tuple)
    kind, pack = kinds[1], PER_REGISTER[kinds[1]]
    read_a, read_b = _unpacked(machine, a, kind), _unpacked(machine, b, kind)
    read_c = _unpacked(machine, c, "f32")
    write = [machine.setter(name, "f32") for name in goal]
    rows, depths = fragment_a(depth, pack)
    depths_b, columns = fragment_b(depth, pack)
    out = fragment_c(8)

    def multiply(lanes: Array) -> None:
        warps = whole(lanes, WARP).shape[0]
        left = np.empty((warps, 16, depth))
        right = np.empty((warps, depth, 8))
        left[:, rows, depths] = _by_warp(read_a(lanes), warps)
        right[:, depths_b, columns] = _by_warp(read_b(lanes), warps)
        product = (left @ right)[:, out[0], out[1]].transpose(0, 2, 1).reshape(lanes.size, -1)
        total = (product + read_c(lanes)[:, :, 0]).astype(np.float32)
        for index, each in enumerate(write):
            each(lanes, total[:, index])

    return multiply


def _by_warp(elements: Array, warps: int) -> Array:
    """(lane, register, place) as (warp, register, lane of the warp, place)."""
    return elements.reshape(warps, WARP, *elements.shape[1:]).transpose(0, 2, 1, 3)


def _matrices(machine: Registers, instruction: Instruction) -> Action:
    """ldmatrix and stmatrix: 8 x 8 matrices of 16 bits, whose rows the lanes point at."""
    words = instruction.opcode
    count = next(int(word[1]) for word in words if word in ("x1", "x2", "x4"))
    loads = words[0] == "ldmatrix"
    names, source = instruction.operands if loads else instruction.operands[::-1]
    assert isinstance(names, tuple)
    if "m8n8" not in words or words[-1] != "b16":
        raise UnsupportedPtxError("this form")
    address = machine.address(source, "b32")
    # The elements of each register: (matrix, lane, 2) -> (row of the matrix, column).
    row, column = np.broadcast_arrays(ROW[:, None], 2 * COLUMN[:, None] + np.arange(2))
    if "trans" in words:
        row, column = column, row
    shared = machine.shared

    def places(lanes: Array) -> Array:
        """Of each element: (register, lane, 2)."""
        warps = whole(lanes, WARP).shape[0]
        used = np.arange(lanes.size).reshape(warps, WARP)[:, : 8 * count]
        pointing = lanes[used.ravel()]
        start = shared.locate(address(lanes)[used.ravel()], 16, pointing)
        rows = start.reshape(warps, count, 8)
        spread = rows[:, :, row] + 2 * column
        return np.asarray(spread.transpose(1, 0, 2, 3).reshape(count, lanes.size, 2))

    def note(lanes: Array, spread: Array, record: Callable[[Array, int, Array], None]) -> None:
        for each in spread:
            record(each.ravel(), 2, np.repeat(lanes, 2))

    if loads:
        writers = [machine.setter(name, "b32") for name in names]

        def load(lanes: Array) -> None:
            spread = places(lanes)
            note(lanes, spread, shared.note_read)
            for each, write in zip(spread, writers, strict=True):
                halves = gather(shared.bytes, each, 2, 1)[0]
                write(lanes, np.ascontiguousarray(halves).view(np.uint32).reshape(-1))

        return load
    read = [machine.getter(name, "b32") for name in names]

    def store(lanes: Array) -> None:
        spread = places(lanes)
        note(lanes, spread, shared.note_write)
        for each, value in zip(spread, read, strict=True):
            halves = np.ascontiguousarray(value(lanes)).view(np.uint16).reshape(-1, 2)
            scatter(shared.bytes, each, 2, [halves], shared.alike)

    return store


# Products of warpgroups.


@dataclass(frozen=True)
class Product:
    """One under way. lanes; group: its number in each lane; names: of the result's registers;
    places: of the operands in shared memory."""

    lanes: Array
    group: Array
    names: tuple[str, ...]
    places: Array


class Pending:
    """Products of warpgroups whose results have not been waited for."""

    def __init__(self, machine: Registers) -> None:
        self.machine = machine
        self.committed = np.zeros(machine.count, np.int64)
        self.waiting: list[Product] = []
        self.results: dict[str, Array] = {}
        self.under_way: dict[str, Array] = {}

    def check(self, name: str, lanes: Array) -> None:
        """Raises: FaultError for a register that a product under way will write."""
        if (pending := self.under_way.get(name)) is not None and pending[lanes].any():
            raise FaultError(f"{name} is used before the product that writes it was waited for")

    def current(self, name: str, lanes: Array) -> Array:
        """What a register holds, or will hold when the products under way have arrived."""
        bits = self.machine.register(name).view(np.float32)[lanes]
        if name not in self.under_way:
            return bits
        return np.where(self.under_way[name][lanes] > 0, self.results[name][lanes], bits)

    def start(self, lanes: Array, names: tuple[str, ...], result: Array, places: Array) -> None:
        """result: (lane, register)."""
        for index, name in enumerate(names):
            if name not in self.under_way:
                self.under_way[name] = np.zeros(self.machine.count, np.int32)
                self.results[name] = np.zeros(self.machine.count, np.float32)
            self.results[name][lanes] = result[:, index]
            self.under_way[name][lanes] += 1
        self.waiting.append(Product(lanes, self.committed[lanes], names, places))

    def commit(self, lanes: Array) -> None:
        self.committed[lanes] += 1

    def wait(self, lanes: Array, newest: int) -> None:
        """All but the `newest` groups that these threads have committed arrive."""
        whole(lanes, WARP)
        left = []
        for product in self.waiting:
            done = np.isin(product.lanes, lanes)
            done &= product.group < self.committed[product.lanes] - newest
            if not done.any():
                left.append(product)
                continue
            lanes_done, rest = product.lanes[done], ~done
            self.machine.shared.end_reading(product.places, lanes_done, not rest.any())
            for name in product.names:
                pending = self.under_way[name]
                pending[lanes_done] -= 1
                arrived = lanes_done[pending[lanes_done] == 0]
                bits = self.machine.register(name).view(np.float32)
                bits[arrived] = self.results[name][arrived]
            if rest.any():
                lanes_left, group = product.lanes[rest], product.group[rest]
                left.append(replace(product, lanes=lanes_left, group=group))
        self.waiting = left


@dataclass(frozen=True)
class Descriptor:
    """Where an operand lies in shared memory: bytes from the block's first, and strides."""

    start: int
    leading: int
    stride: int
    width: int

    @classmethod
    def read(cls, bits: int) -> Descriptor:
        """Raises: UnsupportedPtxError for a pattern that does not begin where it repeats."""
        if bits >> 49 & 7:
            raise UnsupportedPtxError("a matrix descriptor with a base offset")
        start, leading, stride = ((bits >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        return cls(start, leading, stride, SWIZZLES[bits >> 62])

    def places(self, major: Array, depth: Array, size: int, transposed: bool) -> Array:
        """Positions of elements of `size` bytes.

        major: row of A or column of B; depth: along the sum. transposed: not the sum's dimension is
        the contiguous one. Layouts: the canonical ones of the warpgroup instructions.
        """
        row, along = (depth, major) if transposed else (major, depth)
        at = along * size
        next_row, next_piece = self.stride, self.leading
        if transposed and self.width == 16:
            next_row, next_piece = next_piece, next_row
        place = self.start + row % 8 * self.width + row // 8 * next_row
        place = place + at % self.width + at // self.width * next_piece
        return swizzled(place, self.width)


def _warpgroup_product(pending: Pending, instruction: Instruction) -> Action:
    """wgmma: four warps multiply 64 x depth, in registers or shared memory, by depth x columns."""
    machine = pending.machine
    words = instruction.opcode
    shape = next(found for word in words if (found := SHAPE.fullmatch(word)))
    columns, depth = int(shape[2]), int(shape[3])
    kinds = [word for word in words if word in BITS]
    goal, a, b, scale, *rest = instruction.operands
    assert isinstance(goal, tuple)
    signs, transposed = rest[:2], [text != "0" for text in rest[2:]]
    if kinds[0] != "f32" or kinds[1] not in PER_REGISTER or signs != ["1", "1"]:
        raise UnsupportedPtxError("this form")
    kind, size = kinds[1], BITS[kinds[1]] // 8
    pack = PER_REGISTER[kind]
    keep = machine.getter(scale, "pred")
    describe_b = machine.getter(b, "b64")
    in_registers = isinstance(a, tuple)
    fragment = _unpacked(machine, a, kind) if isinstance(a, tuple) else None
    describe_a = None if isinstance(a, tuple) else machine.getter(a, "b64")
    major_a, major_b = (transposed + [False, False])[:2] if not in_registers else (
        False, bool(transposed and transposed[-1]))  # fmt: skip
    rows, depths = fragment_a(depth, pack)
    out = fragment_c(columns)

    def operand(group: Array, bits: Array, extent: int, across: bool) -> tuple[Array, Array]:
        """(values (extent, depth), places) of an operand in shared memory."""
        found = Descriptor.read(int(bits[0]))
        if (bits != bits[0]).any():
            raise FaultError("threads of a warpgroup multiply different matrices")
        at = found.places(np.arange(extent)[:, None], np.arange(depth)[None, :], size, across)
        if at.max() + size > machine.shared.size:
            held = machine.shared.size
            raise FaultError(f"a product reads at {int(at.max())} of {held} shared bytes")
        at = at + machine.shared.origin[group[0]]
        raw = gather(machine.shared.bytes, at, size, 1)[0]
        grains = (at.ravel()[:, None] + np.arange(0, size, 2)).ravel()
        return values.from_bits(raw, kind), grains

    def multiply(lanes: Array) -> None:
        groups = whole(lanes, WARPGROUP)
        fixed = fragment(lanes) if fragment else None
        bits_a = describe_a(lanes) if describe_a else None
        bits_b = np.broadcast_to(describe_b(lanes), lanes.shape).reshape(groups.shape)
        starts = np.broadcast_to(keep(lanes), lanes.shape)
        before = np.stack([pending.current(name, lanes) for name in goal], 1)
        for index, group in enumerate(groups):
            span = slice(index * WARPGROUP, (index + 1) * WARPGROUP)
            touched = []
            if fixed is not None:
                left = np.empty((4, 16, depth))
                left[:, rows, depths] = _by_warp(fixed[span], 4)
            else:
                assert bits_a is not None
                own = np.broadcast_to(bits_a, lanes.shape)[span]
                left, at = operand(group, own, 64, major_a)
                left = left.reshape(4, 16, depth)
                touched.append(at)
            right, at = operand(group, bits_b[index], columns, major_b)
            places = machine.shared.start_reading(np.concatenate([*touched, at]), group)
            product = left.astype(np.float64) @ right.T.astype(np.float64)
            mine = product[:, out[0], out[1]].transpose(0, 2, 1).reshape(WARPGROUP, -1)
            total = mine + np.where(starts[span, None], before[span], 0)
            pending.start(group, goal, total.astype(np.float32), places)

    return multiply
