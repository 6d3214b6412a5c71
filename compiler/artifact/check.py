"""What must hold of a program before anything is allocated for it or launched.

Every size is computed with Python's unbounded integers from what the file says; extents grow
linearly with the batch, as buffers do, so that the smallest and the largest batch stand for all.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from typing import NoReturn

import torch

from ...errors import ArtifactError
from ...kernels.contract import targets
from ...kernels.contract.spec import MEMORY_FORMATS, Layout, Operand, TensorSpec
from ..graph.interface import Port
from ..graph.memory import Buffer
from ..plan.streams import MOST_STREAMS
from .maps import KIND
from .program import READ, ROWS, SCRATCH, WRITE, Argument, Call, Document, Image, Program
from .program import check_nest as count_leaves

LARGEST_BATCH = 1 << 20
LARGEST_MEMORY = 1 << 38
"""Bytes of all buffers at the largest batch: more than any supported GPU has."""
LARGEST_EXTENT = 2**31
MOST_DIMENSIONS = 8
MOST_PROGRAMS = 256
LARGEST_GRID = 2**31 - 1
MOST_ARGUMENTS = 256
MOST_WARPS = 32
PROMISE = 16
"""Bytes; kernels are compiled for pointers that are multiples of it."""
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
}
TARGETS = (targets.REFERENCE, targets.INTERPRETER, *targets.GPU_TARGETS)
ARENAS = ("arena", "fixed")
KINDS = ("input", "output", "constant", "zeroed", *ARENAS)
TOUCHED = {READ: KINDS, WRITE: ("output", *ARENAS), SCRATCH: ("zeroed", *ARENAS)}
"""Which buffers an argument of a kind may be."""
_ENTRY = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,199}")


def spec_problem(spec: TensorSpec) -> str | None:
    """What no tensor can be, in words that follow its name, or None."""
    fits = spec.rank <= MOST_DIMENSIONS and all(0 < size < LARGEST_EXTENT for size in spec.shape)
    if not fits or math.prod(spec.shape) * spec.dtype.itemsize > LARGEST_MEMORY:
        return f"has the shape {str(spec.shape)[:80]}"
    if spec.layout is Layout.NHWC and spec.rank not in MEMORY_FORMATS:
        return f"of rank {spec.rank} is NHWC"
    batch = spec.batch
    if batch is not None and (batch < 1 or not spec.rank or spec.shape[0] % batch):
        return f"of shape {spec.shape} has no batch of {batch}"
    return None


def check_document(
    document: Document,
    members: Collection[str],
    tensors: Mapping[str, torch.Tensor],
    counts: tuple[int, int],
    source: str,
) -> None:
    """Raises ArtifactError unless every program is sound and they belong together.

    members, tensors: what the file holds; counts: of its graphs and accounts.
    """
    programs = document.programs
    if not 0 < len(programs) <= MOST_PROGRAMS:
        raise ArtifactError(f"{source} is damaged: it has {len(programs) or 'no'} programs")
    seen: list[tuple[str, int, int]] = []
    for at, program in enumerate(programs):
        checker = _Checker(program, members, tensors, f"{source}: program {at} ({program.target})")
        checker.run(counts)
        low, high = program.batches
        for target, first, last in seen:
            if target == program.target and first <= high and low <= last:
                checker.refuse(f"batches {low} to {high} are there twice")
        seen.append((program.target, low, high))
        if _outside(program) != _outside(programs[0]):
            checker.refuse("its inputs or outputs are not those of program 0")


def _outside(program: Program) -> tuple[object, ...]:
    """What callers see of a program, whatever its batch."""

    def ports(each: Sequence[Port]) -> tuple[object, ...]:
        return tuple((p.name, p.spec.dtype, p.spec.at(1), p.spec.batch is None) for p in each)

    nests = (program.arguments, program.result, program.results)
    return (*nests, ports(program.inputs), ports(program.outputs), program.batch is None)


def _touched(argument: Argument) -> Argument:
    """What a launch does to memory by an argument, however it sees it."""
    return replace(argument, map=None)


@dataclass(frozen=True)
class _Checker:
    """The checks of one program."""

    program: Program
    members: Collection[str]
    tensors: Mapping[str, torch.Tensor]
    where: str

    def refuse(self, what: str) -> NoReturn:
        raise ArtifactError(f"{self.where} is damaged: {what}")

    def run(self, counts: tuple[int, int]) -> None:
        program = self.program
        names = {target.name: target for target in TARGETS}
        if program.target not in names:
            self.refuse(f"unknown target; this convloom knows {', '.join(names)}")
        low, high = program.batches
        if not 0 <= low <= high <= LARGEST_BATCH or high < 1:
            self.refuse(
                f"batches {low} to {high}; expected a range within 0 to {LARGEST_BATCH:,} that "
                "ends at 1 or above"
            )
        indices = ((program.graph, counts[0], "graph"), (program.account, counts[1], "account"))
        for index, count, what in indices:
            if not 0 <= index < count:
                self.refuse(f"{what} {index} of {count}")
        if program.precision not in ("ieee", "tf32"):
            self.refuse(f"precision {program.precision!r}; expected ieee or tf32")
        self._check_buffers()
        self._check_interface()
        for image in program.images:
            self._check_image(image, names[program.target])
        self._check_calls()
        self._check_twins()
        self._check_streams()
        self._check_lifetimes()

    # Memory.

    def _check_buffers(self) -> None:
        buffers = self.program.buffer_list
        if len({buffer.name for buffer in buffers}) != len(buffers):
            self.refuse("a buffer is there twice")
        is_dynamic = any(buffer.batch is not None for buffer in buffers)
        for buffer in buffers:
            self._check_buffer(buffer, is_dynamic)
        for kind in ARENAS:
            end = max((b.offset + b.size_bytes for b in buffers if b.kind == kind), default=0)
            if end > LARGEST_MEMORY:
                self.refuse(f"the {kind} has {end:,} bytes, more than {LARGEST_MEMORY:,}")
        # Of what is no constant: those are as large as the tensors that the file holds.
        total = sum(b.size_bytes for b in buffers if b.kind not in ("constant", *ARENAS))
        if total > LARGEST_MEMORY:
            self.refuse(f"its buffers have {total:,} bytes, more than {LARGEST_MEMORY:,}")
        held = dict(self.program.constants)
        constants = {buffer.name: buffer for buffer in buffers if buffer.kind == "constant"}
        if len(held) != len(self.program.constants) or set(held) != set(constants):
            self.refuse("its constants are not its constant buffers, each once")
        for name, tensor_name in held.items():
            tensor = self.tensors.get(tensor_name)
            if tensor is None:
                self.refuse(f"constant '{name}': the file has no tensor '{tensor_name[:40]}'")
            size = tensor.numel() * tensor.itemsize
            if (tensor.dtype, size) != (constants[name].dtype, constants[name].size_bytes):
                self.refuse(
                    f"constant '{name}' of {constants[name].size_bytes} bytes, its tensor has "
                    f"{size} of {tensor.dtype}"
                )

    def _check_buffer(self, buffer: Buffer, is_dynamic: bool) -> None:
        """is_dynamic: whether some buffer holds a batch."""
        where = f"buffer '{buffer.name[:80]}'"
        if buffer.kind not in KINDS or buffer.dtype not in POINTERS:
            self.refuse(f"{where} of kind {buffer.kind[:20]!r} and {buffer.dtype}")
        if not 0 < buffer.size_bytes <= LARGEST_MEMORY or not 0 <= buffer.offset <= LARGEST_MEMORY:
            self.refuse(f"{where} has {buffer.size_bytes:,} bytes at {buffer.offset:,}")
        self._check_batch(buffer.batch, where)
        scales = buffer.batch is not None
        fixed = buffer.kind in ("constant", "zeroed", "fixed")
        in_arena = buffer.kind == "arena" and not scales and is_dynamic
        if (scales and fixed) or in_arena or (buffer.offset and buffer.kind not in ARENAS):
            self.refuse(f"{where} of kind {buffer.kind} at {buffer.offset}, batch {buffer.batch}")
        parts = buffer.batch or 1
        if buffer.size_bytes % parts or buffer.offset % parts:
            self.refuse(f"{where}: {buffer.size_bytes} bytes at {buffer.offset} for {parts} images")
        if buffer.size_bytes // parts % buffer.dtype.itemsize:
            self.refuse(f"{where}: {buffer.size_bytes} bytes of {buffer.dtype}")
        if buffer.offset // parts % PROMISE:
            self.refuse(f"{where} is not aligned to {PROMISE} bytes for every batch")

    def _check_operand(self, operand: Operand, buffer_name: str, where: str) -> None:
        """Refuses an operand that does not lie within its buffer, for any batch."""
        self._check_spec(operand.spec, where)
        buffer = self.program.buffers.get(buffer_name)
        if buffer is None:
            self.refuse(f"{where} lies in '{buffer_name[:80]}', which is no buffer")
        spec = operand.spec
        row = spec.shape[spec.layout.order(spec.rank)[-1]] if spec.rank else 1
        if operand.offset < 0 or not row <= operand.pitch < LARGEST_EXTENT:
            self.refuse(f"{where} has pitch {operand.pitch} and offset {operand.offset}")
        if spec.dtype is not buffer.dtype:
            self.refuse(f"{where} is of {spec.dtype}, its buffer of {buffer.dtype}")
        low, high = self.program.batches
        for batch in (max(low, 1), high):  # nothing is launched for an empty batch
            placed = Operand(spec.with_(shape=spec.at(batch)), operand.pitch, operand.offset)
            needed = placed.extent * spec.dtype.itemsize
            if needed > buffer.bytes_at(batch):
                self.refuse(
                    f"{where} reaches byte {needed:,} of '{buffer.name}', which has "
                    f"{buffer.bytes_at(batch):,} for a batch of {batch}"
                )

    def _check_spec(self, spec: TensorSpec, where: str) -> None:
        if problem := spec_problem(spec):
            self.refuse(f"{where} {problem}")
        self._check_batch(spec.batch, where)

    def _check_batch(self, batch: int | None, where: str) -> None:
        high = self.program.batches[1]
        if batch is not None and (self.program.batch is None or batch != high):
            self.refuse(f"{where} is of batch {batch}, the program of {high}")

    # The outside.

    def _check_interface(self) -> None:
        program = self.program
        for kind, ports in (("input", program.inputs), ("output", program.outputs)):
            for port in ports:
                where = f"{kind} '{port.name[:80]}'"
                self._check_spec(port.spec, where)
                self._check_operand(port.place.operand, port.place.buffer, where)
                inner = port.place.operand.spec
                if (inner.shape, inner.batch) != (port.spec.shape, port.spec.batch):
                    self.refuse(f"{where} is {port.spec} outside and {inner} inside")
                buffer = program.buffers[port.place.buffer]
                image = (torch.uint8, torch.float32)  # Cast when it is copied in.
                alike = inner.dtype == port.spec.dtype or (port.spec.dtype, inner.dtype) == image
                if kind == "input" and (buffer.kind != "input" or not alike):
                    self.refuse(f"{where} lies in '{buffer.name}' of kind {buffer.kind}")
        where = f"{self.where}: its structure"
        taken = count_leaves(program.arguments, where, constants=True)
        given = count_leaves(program.result, where)
        if taken != len(program.inputs) or given != len(program.results):
            self.refuse(f"{taken} inputs and {given} results are nested, not those it has")
        shapes = [item.kind for item in program.arguments.items]
        if program.arguments.kind != "tuple" or shapes != ["tuple", "dict"]:
            self.refuse("its inputs are not nested as arguments are")
        for kind, value in program.results:
            is_output = kind == "tensor" and type(value) is int
            if is_output and not 0 <= int(str(value)) < len(program.outputs):
                self.refuse(f"result {value} of {len(program.outputs)} outputs")
            if not is_output and kind != "literal":
                self.refuse(f"a result of kind {kind[:20]!r}")

    # Kernels.

    def _check_image(self, image: Image, target: targets.Target) -> None:
        where = f"kernel '{image.entry[:80]}'"
        if not _ENTRY.fullmatch(image.entry):
            self.refuse(f"{where} is no name of a function")
        folder = f"kernels/sm_{target.capability}/"
        members = {"cubin": image.cubin} | ({} if image.ptx is None else {"ptx": image.ptx})
        for kind, member in members.items():
            named = member.startswith(folder) and member.endswith(f".{kind}")
            if not named or member not in self.members:
                self.refuse(f"{where}: expected a {kind} in {folder}, got '{member[:80]}'")
        sound = 0 < image.num_warps <= MOST_WARPS and image.num_ctas in (1, 2, 4, 8, 16)
        if not sound or not 0 <= image.shared_bytes <= target.shared_bytes:
            self.refuse(
                f"{where}: {image.num_warps} warps, {image.num_ctas} blocks per cluster, "
                f"{image.shared_bytes} bytes of shared memory"
            )
        unknown = [
            name for name in image.signature
            if name != "i32" and KIND.sub(r"\2", name) not in POINTERS.values()
        ]  # fmt: skip
        if unknown or len(image.signature) > MOST_ARGUMENTS:
            self.refuse(f"{where} has {len(image.signature)} arguments, unknown are {unknown[:3]}")

    def _check_calls(self) -> None:
        program = self.program
        launched = bool(program.calls)
        if launched != bool(program.images) or (launched and not program.architecture):
            self.refuse(f"{len(program.calls)} launches of {len(program.images)} kernels")
        previous = 0
        for at, call in enumerate(program.calls):
            where = f"launch {at}"
            if not 0 <= call.image < len(program.images):
                self.refuse(f"{where} is of kernel {call.image} of {len(program.images)}")
            if not previous <= call.step < len(program.steps):
                self.refuse(f"{where} belongs to step {call.step} of {len(program.steps)}")
            previous = call.step
            self._check_call(call, where)

    def _check_call(self, call: Call, where: str) -> None:
        signature = self.program.images[call.image].signature
        if len(signature) != len(call.arguments):
            self.refuse(
                f"{where} passes {len(call.arguments)} arguments, expected {len(signature)}"
            )
        for argument, kind in zip(call.arguments, signature, strict=True):
            self._check_argument(argument, kind, where)
        self._check_grid(call, where)

    def _check_twins(self) -> None:
        """Refuses other twins than one of each untried launch, which touches no more."""
        program = self.program
        own = [call for call in program.calls if program.steps[call.step].tile.is_untried]
        if [call.step for call in own] != [twin.step for twin in program.twins]:
            self.refuse("its twins are not those of its untried launches")
        if len({call.step for call in own}) != len(own):
            self.refuse("an untried step has several launches")
        for call, twin in zip(own, program.twins, strict=True):
            where = f"the twin of step {twin.step}"
            if not 0 <= twin.image < len(program.images):
                self.refuse(f"{where} is of kernel {twin.image} of {len(program.images)}")
            self._check_call(twin, where)
            if not set(map(_touched, twin.arguments)) <= set(map(_touched, call.arguments)):
                self.refuse(f"{where} touches other memory than its launch")

    def _check_streams(self) -> None:
        streams, steps = self.program.streams, len(self.program.steps)
        known = all(0 <= stream < MOST_STREAMS for stream in streams)
        if streams and (not self.program.calls or len(streams) != steps or not known):
            self.refuse(
                f"{len(streams)} of {steps} steps are in streams from {min(streams)} to "
                f"{max(streams)}; expected every step of a GPU in one of {MOST_STREAMS}"
            )

    def _check_argument(self, argument: Argument, kind: str, where: str) -> None:
        if argument.kind == ROWS:
            if kind != "i32" or argument != Argument(ROWS):
                self.refuse(f"{where} passes the number of rows as {kind}")
            return
        buffer = self.program.buffers.get(argument.buffer)
        if buffer is None or argument.kind not in TOUCHED:
            self.refuse(f"{where} passes {argument.kind[:20]!r} '{argument.buffer[:80]}'")
        self._check_map(argument, buffer, where)
        form = "" if argument.map is None else f"box{len(argument.map.shape)}"
        if form + POINTERS[buffer.dtype] != kind:
            self.refuse(f"{where} passes '{buffer.name}' of {buffer.dtype} as {kind}")
        if buffer.kind not in TOUCHED[argument.kind]:
            self.refuse(f"{where} would {argument.kind} '{buffer.name}', a buffer of {buffer.kind}")
        if argument.operand is None and argument.kind == WRITE:
            self.refuse(f"{where} does not say where in '{buffer.name}' it writes")
        if argument.operand is not None:
            self._check_operand(argument.operand, buffer.name, f"{where}: '{buffer.name}'")

    def _check_map(self, argument: Argument, buffer: Buffer, where: str) -> None:
        if argument.map is None:
            return
        if argument.kind not in (READ, WRITE):
            self.refuse(f"{where} would {argument.kind} '{buffer.name}' through a tensor map")
        if argument.kind == WRITE and (place := argument.operand) is not None:
            reached = argument.map.offset, math.prod(argument.map.shape)
            if reached != (place.offset, place.spec.numel):
                self.refuse(f"{where} writes other parts of '{buffer.name}' than it says")
        if problem := argument.map.problem(buffer, self.program.batches):
            self.refuse(f"{where}: a tensor map of '{buffer.name}' {problem}")
        self._check_batch(argument.map.batch, f"{where}: a tensor map of '{buffer.name}'")

    def _check_grid(self, call: Call, where: str) -> None:
        grid, high = call.grid, self.program.batches[1]
        if min(grid.rows, grid.block_rows, grid.columns) < 1 or grid.rows >= LARGEST_EXTENT:
            self.refuse(
                f"{where}: {grid.rows} rows in blocks of {grid.block_rows}, {grid.columns} columns"
            )
        if grid.most is not None and grid.most < 1:
            self.refuse(f"{where}: at most {grid.most} programs")
        static = self.program.batch is None
        if grid.batch is not None and (static or grid.batch != high or grid.rows % grid.batch):
            self.refuse(f"{where}: {grid.rows} rows for {grid.batch} images")
        # Every program has at least one element of some tensor to itself.
        most = sum(self._elements(argument) for argument in call.arguments)
        programs = grid.programs_at(high)
        if programs > min(LARGEST_GRID, most) or grid.rows > most:
            self.refuse(
                f"{where} starts {programs:,} programs for {grid.rows:,} rows on tensors of "
                f"{most:,} elements"
            )

    def _elements(self, argument: Argument) -> int:
        if argument.kind == ROWS:
            return 0
        if argument.operand is not None:
            return math.prod(argument.operand.shape)
        buffer = self.program.buffers[argument.buffer]
        return buffer.size_bytes // buffer.dtype.itemsize

    def _check_lifetimes(self) -> None:
        """Refuses reads of what nobody wrote, and buffers that share memory while both live."""
        program = self.program
        if not program.calls:
            return
        born: dict[str, int] = {}
        died: dict[str, int] = {}
        for at, call in enumerate(program.calls):
            for argument in call.arguments:
                if argument.kind == ROWS:
                    continue
                kind = program.buffers[argument.buffer].kind
                ready = kind in ("input", "constant", "zeroed") or argument.buffer in born
                if argument.kind == READ and not ready:
                    self.refuse(f"launch {at} reads '{argument.buffer}' before it is written")
                born.setdefault(argument.buffer, at)
                died[argument.buffer] = at
        for port in program.outputs:
            buffer = program.buffers[port.place.buffer]
            if buffer.name not in born and buffer.kind not in ("input", "constant"):
                self.refuse(f"nobody writes output '{port.name}'")
            died[buffer.name] = len(program.calls)
        for kind in ARENAS:
            living = [b for b in program.buffer_list if b.kind == kind and b.name in born]
            self._check_overlaps(sorted(living, key=lambda b: born[b.name]), born, died)

    def _check_overlaps(
        self, buffers: Sequence[Buffer], born: Mapping[str, int], died: Mapping[str, int]
    ) -> None:
        """buffers: in the order of their birth. Those alive at one time lie apart, so that a new
        one can only meet its two neighbours."""
        alive: list[tuple[int, int, str]] = []
        deaths: list[tuple[int, tuple[int, int, str]]] = []
        for buffer in buffers:
            while deaths and deaths[0][0] < born[buffer.name]:
                _, gone = heappop(deaths)
                del alive[bisect_left(alive, gone)]
            place = buffer.offset, buffer.offset + buffer.size_bytes, buffer.name
            at = bisect_left(alive, place)
            for start, end, name in alive[max(at - 1, 0) : at + 1]:
                if start < place[1] and place[0] < end:
                    self.refuse(f"'{name}' and '{buffer.name}' share memory while both are used")
            alive.insert(at, place)
            heappush(deaths, (died[buffer.name], place))
