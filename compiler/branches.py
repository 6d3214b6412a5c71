"""Which steps of a plan may run side by side, and in which stream each of them runs.

Two steps are ordered where they touch the same memory and one of them writes: the same part of one
buffer, or buffers that lie on the same bytes of an arena. The parts of a concatenation that is
written in place are disjoint although they alternate in memory: its branches stay independent.

Memory that is shared by buffers which are never alive together orders steps that could overlap, so
where branches are wanted the arena keeps buffers apart unless the streams already order their uses
(`arena.place`): Inception v3 takes more memory then. Off unless `settings.py` says otherwise: what
it gains is not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..kernels.op import Ref
from ..kernels.spec import Operand
from .memory import Buffer
from .plan import KernelStep, Plan, Step, TorchStep
from .streams import Schedule

MOST_STREAMS = 4
"""As many as the branches of an Inception module."""
ARENAS = ("arena", "fixed")


@dataclass(frozen=True)
class Touch:
    """What a step reads or writes; operand: which part of the buffer, None for all of it."""

    buffer: str
    writes: bool
    operand: Operand | None = None


Overlap = Callable[[Touch, Touch], bool]
"""Whether two touches may reach the same bytes."""


def touches(step: Step) -> tuple[Touch, ...]:
    """Everything that a step reads and writes."""
    if isinstance(step, TorchStep):
        read = tuple(Touch(place.buffer, False, place.operand) for place in step.inputs)
        return (*read, *(Touch(place.buffer, True, place.operand) for place in step.outputs))
    return tuple(_touch(step, ref, name) for ref, name in step.buffers.items())


def _touch(step: KernelStep, ref: Ref, name: str) -> Touch:
    problem = step.problem
    if ref.kind == "scratch":
        return Touch(name, True)
    operands = {
        "input": problem.inputs,
        "output": problem.outputs,
        "operand": problem.operands,
        "prologue": problem.prologue_operands,
    }[ref.kind]
    return Touch(name, ref.kind == "output", operands[ref.index])


def overlap_in_buffer(one: Touch, other: Touch) -> bool:
    """Whether they touch the same part of one buffer, wherever buffers lie."""
    if one.buffer != other.buffer:
        return False
    return one.operand is None or other.operand is None or not _apart(one.operand, other.operand)


def _apart(one: Operand, other: Operand) -> bool:
    """Whether two parts of a buffer share no element, as far as offsets and pitches show it."""
    if one.extent <= other.offset or other.extent <= one.offset:
        return True
    if one.pitch != other.pitch:
        return False
    (start, end), (begin, stop) = (_columns(operand) for operand in (one, other))
    within = max(end, stop) <= one.pitch
    return within and (end <= begin or stop <= start)


def _columns(operand: Operand) -> tuple[int, int]:
    """The elements of each row of its buffer that an operand covers: first and past-the-end."""
    spec = operand.spec
    row = spec.shape[spec.layout.order(spec.rank)[-1]] if spec.rank else 1
    start = operand.offset % operand.pitch
    return start, start + row


def overlap_in_memory(buffers: Mapping[str, Buffer]) -> Overlap:
    """The overlap of touches of buffers that have been placed.

    Places and sizes of what scales with the batch do so together: the largest stands for all.
    """

    def overlap(one: Touch, other: Touch) -> bool:
        if one.buffer == other.buffer:
            return overlap_in_buffer(one, other)
        a, b = buffers[one.buffer], buffers[other.buffer]
        if a.kind != b.kind or a.kind not in ARENAS:
            return False
        return a.offset < b.offset + b.size_bytes and b.offset < a.offset + a.size_bytes

    return overlap


def dependencies(steps: Sequence[tuple[Touch, ...]], overlap: Overlap) -> tuple[int, ...]:
    """For each step the earlier ones it must follow, as bits, whatever is implied by others
    included."""
    found: list[int] = []
    for at, mine in enumerate(steps):
        before = 0
        # The latest first: what they follow need not be looked at.
        for earlier in reversed(range(at)):
            if not before >> earlier & 1 and _conflict(mine, steps[earlier], overlap):
                before |= found[earlier] | 1 << earlier
        found.append(before)
    return tuple(found)


def _conflict(mine: Sequence[Touch], theirs: Sequence[Touch], overlap: Overlap) -> bool:
    return any(
        (one.writes or other.writes) and overlap(one, other) for one in mine for other in theirs
    )


def assign(before: Sequence[int], most: int = MOST_STREAMS) -> tuple[int, ...]:
    """A stream for each step, so that few events are needed.

    A step goes on where the latest step that it must follow is the last of its stream; else to a
    new stream, while there are some; else behind the step that has been there for longest.
    """
    last: list[int] = []
    chosen: list[int] = []
    for step, earlier in enumerate(before):
        free = [stream for stream, tail in enumerate(last) if earlier >> tail & 1]
        if free:
            stream = max(free, key=lambda each: last[each])
        elif len(last) < most:
            stream = len(last)
            last.append(step)
        else:
            stream = min(range(most), key=lambda each: last[each])
        last[stream] = step
        chosen.append(stream)
    return tuple(chosen)


def streams(steps: Sequence[Step]) -> tuple[int, ...]:
    """A stream for each step of a plan whose buffers have no memory yet; empty where one does."""
    every = [touches(step) for step in steps]
    found = assign(dependencies(every, overlap_in_buffer))
    return found if max(found, default=0) else ()


def order(before: Sequence[int], chosen: Sequence[int]) -> tuple[int, ...]:
    """As `dependencies`, with the order inside of streams."""
    last: dict[int, int] = {}
    found: list[int] = []
    for step, stream in enumerate(chosen):
        bits = 0
        direct = [earlier for earlier in range(step) if before[step] >> earlier & 1]
        for earlier in (*direct, *([last[stream]] if stream in last else [])):
            bits |= found[earlier] | 1 << earlier
        last[stream] = step
        found.append(bits)
    return tuple(found)


def waits(before: Sequence[int], chosen: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """For each step the steps of other streams to wait for: those that nothing else implies."""
    last: dict[int, int] = {}
    known: list[int] = []  # For each step what is complete when it starts, as bits.
    found: list[tuple[int, ...]] = []
    for step, stream in enumerate(chosen):
        complete = 0
        if stream in last:
            complete = known[last[stream]] | 1 << last[stream]
        needed = []
        for earlier in reversed(range(step)):
            if before[step] >> earlier & 1 and not complete >> earlier & 1:
                needed.append(earlier)
                complete |= known[earlier] | 1 << earlier
        last[stream] = step
        known.append(complete)
        found.append(tuple(reversed(needed)))
    return tuple(found)


def schedule(plan: Plan) -> Schedule | None:
    """How the streams that the plan's steps were given wait for each other, from what they touch in
    memory; None for a plan in one stream."""
    if not plan.streams:
        return None
    every = [touches(step) for step in plan.steps]
    before = dependencies(every, overlap_in_memory(plan.buffers))
    launches = (
        len(step.launches) if isinstance(step, KernelStep) else 1 for step in plan.steps
    )
    return Schedule(plan.streams, waits(before, plan.streams), tuple(launches))


def keep_apart(
    steps: Sequence[Step], chosen: Sequence[int], kept: Sequence[str]
) -> Callable[[str, str], bool]:
    """Whether some uses of two buffers may coincide, so that they must not share memory.

    kept: buffers that are read after the last step.
    """
    every = [touches(step) for step in steps]
    ordered = order(dependencies(every, overlap_in_buffer), chosen)
    users: dict[str, set[int]] = {}
    for step, touched in enumerate(every):
        for touch in touched:
            users.setdefault(touch.buffer, set()).add(step)
    bits = {name: sum(1 << step for step in used) for name, used in users.items()}
    final = frozenset(kept)

    def all_before(one: str, other: str) -> bool:
        """Whether the second is first touched after all uses of the first are over."""
        mine = bits.get(one, 0)
        return one not in final and all(
            mine & ~ordered[step] == 0 for step in users.get(other, ())
        )

    return lambda one, other: not (all_before(one, other) or all_before(other, one))
