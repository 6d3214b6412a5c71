"""Which steps of a plan may run side by side, and in which stream each of them runs.

Steps that touch the same memory are ordered (`streams.py`), the others may overlap.

Memory that is shared by buffers which are never alive together orders steps that could overlap, so
where branches are wanted the arena keeps buffers apart unless the streams already order their uses
(`arena.place`): Inception v3 takes more memory then. Off unless `settings.py` says otherwise: what
it gains is not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from .plan import KernelStep, Plan, Step, TorchStep
from .streams import MOST_STREAMS, Schedule, Touch, dependencies, overlap_in_buffer, scheduled


def touches(step: Step) -> tuple[Touch, ...]:
    """Everything that a step reads and writes."""
    if isinstance(step, TorchStep):
        read = tuple(Touch(place.buffer, False, place.operand) for place in step.inputs)
        return (*read, *(Touch(place.buffer, True, place.operand) for place in step.outputs))
    groups = step.problem.groups
    return tuple(
        Touch(name, True)
        if ref.kind == "scratch"
        else Touch(name, ref.kind == "output", groups[ref.kind][ref.index])
        for ref, name in step.buffers.items()
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


def schedule(plan: Plan) -> Schedule | None:
    """How the streams that the plan's steps were given wait for each other, from what they touch in
    memory; None for a plan in one stream."""
    launches = (len(s.launches) if isinstance(s, KernelStep) else 1 for s in plan.steps)
    every = [touches(step) for step in plan.steps]
    return scheduled(plan.streams, every, plan.buffers, tuple(launches))


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
        return one not in final and all(mine & ~ordered[step] == 0 for step in users.get(other, ()))

    return lambda one, other: not (all_before(one, other) or all_before(other, one))
