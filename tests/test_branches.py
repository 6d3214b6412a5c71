"""Independent steps in several streams: what must be ordered is, and nothing else."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.api import lowered
from convloom.compiler.artifact import device, rederive
from convloom.compiler.artifact.read import open_artifact
from convloom.compiler.artifact.tensors import Pool
from convloom.compiler.artifact.write import program_of
from convloom.compiler.plan import branches, streams
from convloom.compiler.plan.plan import Plan
from convloom.compiler.plan.streams import Schedule, Touch
from convloom.compiler.run.runtime import InterpreterRunner
from convloom.kernels.contract.spec import Layout, Operand, TensorSpec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from .nets import make


@dataclass
class FakeStreams:
    """Writes down what streams were given: ("step", name), ("record", event), ("wait", event)."""

    given: dict[int, list[tuple[str, Any]]] = field(default_factory=dict)
    current: int = 0
    events: int = 0

    def add(self, stream: int, kind: str, what: Any) -> None:
        self.given.setdefault(stream, []).append((kind, what))

    @contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def record(self, stream: int) -> int:
        self.events += 1
        self.add(stream, "record", self.events)
        return self.events

    def wait(self, stream: int, event: int) -> None:
        self.add(stream, "wait", event)

    def linearised(self, draw: random.Random) -> list[Any]:
        """The steps in one of the orders that a device may run them in."""
        waiting = {stream: list(given) for stream, given in self.given.items()}
        recorded: set[int] = set()
        found = []
        while any(waiting.values()):
            able = [
                given
                for given in waiting.values()
                if given and (given[0][0] != "wait" or given[0][1] in recorded)
            ]
            assert able, "streams wait for each other for ever"
            kind, what = draw.choice(able).pop(0)
            if kind == "step":
                found.append(what)
            elif kind == "record":
                recorded.add(what)
        for stream, done in self.given.items():
            begins = done[0] == ("wait", self.given[0][0][1]) and self.given[0][0][0] == "record"
            assert not stream or begins, "every stream waits for the start"
            ends = ("wait", done[-1][1]) in self.given[0] and done[-1][0] == "record"
            assert not stream or ends, "the end waits for every stream"
        return found


def played(schedule: Schedule) -> FakeStreams:
    """What streams are given for steps whose launches are named (step, number)."""
    fake = FakeStreams()
    actions: list[streams.Action] = []
    for step, count in enumerate(schedule.launches):
        for number in range(count):
            actions.append(("", lambda what=(step, number): fake.add(fake.current, "step", what)))
    streams.play(actions, schedule, fake)
    return fake


# Any plan.

ROW = TensorSpec((2, 4), torch.float32)
parts = st.sampled_from([None, Operand(ROW, 8, 0), Operand(ROW, 8, 4), Operand(ROW, 4, 16)])
touched = st.lists(
    st.builds(Touch, st.sampled_from("abcd"), st.booleans(), parts), min_size=1, max_size=3
).map(tuple)


def elements(touch: Touch) -> set[tuple[str, int]]:
    if touch.operand is None:
        return {(touch.buffer, at) for at in range(64)}
    part = touch.operand
    rows, columns = part.spec.shape
    at = (part.offset + row * part.pitch for row in range(rows))
    return {(touch.buffer, start + column) for start in at for column in range(columns)}


def must_be_ordered(one: tuple[Touch, ...], other: tuple[Touch, ...]) -> bool:
    return any(
        (a.writes or b.writes) and elements(a) & elements(b) for a in one for b in other
    )


@given(steps=st.lists(touched, max_size=12), most=st.integers(1, 4), seed=st.integers(0, 99))
def test_every_order_that_events_allow_is_right(
    steps: list[tuple[Touch, ...]], most: int, seed: int
) -> None:
    before = streams.dependencies(steps, streams.overlap_in_buffer)
    chosen = branches.assign(before, most)
    launches = tuple(at % 3 for at in range(len(steps)))
    schedule = Schedule(chosen, streams.waits(before, chosen), launches)
    assert schedule.count <= most
    found = played(schedule).linearised(random.Random(seed))
    assert sorted(found) == [(at, n) for at, count in enumerate(launches) for n in range(count)]
    places = {what: at for at, what in enumerate(found)}
    for first, second in ((a, b) for b in range(len(steps)) for a in range(b)):
        if launches[first] and launches[second] and must_be_ordered(steps[first], steps[second]):
            assert places[first, launches[first] - 1] < places[second, 0]


def test_parts_that_alternate_in_memory_are_apart() -> None:
    spec = TensorSpec((2, 8, 3, 3), torch.float16, Layout.NHWC)
    left, right, both = Operand(spec, 24, 0), Operand(spec, 24, 8), Operand(spec, 24, 4)

    def overlap(one: Operand | None, other: Operand | None) -> bool:
        return streams.overlap_in_buffer(Touch("x", True, one), Touch("x", True, other))

    assert not overlap(left, right) and overlap(left, both) and overlap(right, both)
    assert overlap(left, None) and overlap(left, left)
    assert overlap(left, Operand(spec, 32, 8)), "other pitches may meet anywhere"
    behind = Operand(spec, 32, left.extent)
    assert not overlap(left, behind) and not overlap(behind, left)
    second = Operand(spec.with_(shape=(1, 8, 3, 3)), 24, 9 * 24 + 8)
    assert not overlap(left, second), "the right part of the second image"
    assert not streams.overlap_in_buffer(Touch("x", True), Touch("y", True))


@st.composite
def parts(draw: Any) -> Operand:
    """Images with channels innermost, in rows that may be wider than they are."""
    shape = tuple(draw(st.integers(1, size)) for size in (2, 3, 2, 2))
    spec = TensorSpec(shape, torch.float16, Layout.NHWC)
    return Operand(spec, shape[1] + draw(st.integers(0, 4)), draw(st.integers(0, 12)))


def places(part: Operand) -> set[int]:
    """The elements of its buffer that a part covers."""
    steps = zip(part.shape, part.strides, strict=True)
    walks = ([at * step for at in range(size)] for size, step in steps)
    return {part.offset + sum(at) for at in itertools.product(*walks)}


@settings(max_examples=400)
@given(one=parts(), other=parts())
def test_parts_that_share_an_element_overlap(one: Operand, other: Operand) -> None:
    if places(one) & places(other):
        assert streams.overlap_in_buffer(Touch("x", True, one), Touch("x", True, other))


def test_what_shares_no_memory_is_not_ordered() -> None:
    steps = [(Touch("x", True),), (Touch("y", True),), (Touch("x", False),)]
    assert streams.dependencies(steps, streams.overlap_in_buffer) == (0b0, 0b0, 0b1)


def test_no_event_is_superfluous() -> None:
    """0 -> {1, 2} -> 3 -> 4: one event to fork, one to join."""
    before = (0b0, 0b1, 0b1, 0b111, 0b1111)
    chosen = branches.assign(before)
    assert chosen == (0, 0, 1, 1, 1)
    assert streams.waits(before, chosen) == ((), (), (0,), (1,), ())


# Plans of networks.


def inception() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Two modules of three branches, one of them two convolutions long."""

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        for at in "ab":
            one = torch.relu(m.get_submodule(f"{at}1")(x))
            two = torch.relu(m.get_submodule(f"{at}2")(x))
            two = torch.relu(m.get_submodule(f"{at}3")(two))
            three = torch.max_pool2d(x, 3, 1, 1)
            x = torch.cat([one, two, three], 1)
        return x.mean((2, 3))

    def conv(c: int, k: int, size: int) -> nn.Conv2d:
        return nn.Conv2d(c, k, size, padding=size // 2)

    return make(
        forward,
        (2, 16, 6, 6),
        a1=conv(16, 8, 3), a2=conv(16, 16, 5), a3=conv(16, 8, 3),
        b1=conv(32, 8, 3), b2=conv(32, 16, 5), b3=conv(16, 8, 3),
    )  # fmt: skip


@lru_cache(maxsize=4)
def plan_of(launch: str, target: str = "cuda:sm_90") -> Plan:
    module, inputs = inception()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVLOOM_LAUNCH", launch)
        return lowered(module, inputs, target=target)[1]


def test_branches_of_a_network_run_side_by_side() -> None:
    plan = plan_of("branches")
    made = branches.schedule(plan)
    assert made is not None and made.count >= 3
    names = [step.name for step in plan.steps]
    stream = dict(zip(names, made.streams, strict=True))
    writers = [at for at, step in enumerate(plan.steps) if step.name.startswith("conv2d")]
    assert len({stream[names[at]] for at in writers}) >= 2
    assert sum(map(len, made.waits)) < 2 * len(plan.steps)
    before = streams.dependencies(
        [branches.touches(step) for step in plan.steps], streams.overlap_in_memory(plan.buffers)
    )
    independent = [
        (a, b) for b in range(len(names)) for a in range(b) if not before[b] >> a & 1
    ]
    assert len(independent) >= 6, "memory orders what data do not"


def test_one_stream_unless_asked_for() -> None:
    plan = plan_of("")
    assert plan.streams == () and branches.schedule(plan) is None
    assert plan_of("branches", "interpreter").streams == ()
    assert plan.arena_bytes <= plan_of("branches").arena_bytes


def test_memory_that_is_shared_orders_steps() -> None:
    """Streams over an arena that was planned for one line are safe, only less is independent."""
    apart = plan_of("branches")
    tight = replace(plan_of(""), streams=apart.streams)
    found = [
        sum(
            before.bit_count()
            for before in streams.dependencies(
                [branches.touches(step) for step in plan.steps],
                streams.overlap_in_memory(plan.buffers),
            )
        )
        for plan in (apart, tight)
    ]
    assert found[0] <= found[1]
    check_every_order(tight)


@pytest.mark.interpreter
def test_any_order_of_the_steps_computes_the_network() -> None:
    plan = plan_of("branches")
    orders = check_every_order(plan)
    assert len(orders) > 1, "there was a choice"


def check_every_order(plan: Plan) -> set[tuple[int, ...]]:
    """Runs some of the orders that the events of a plan allow; the orders."""
    module, inputs = inception()
    expected = module(*inputs)
    made = branches.schedule(plan)
    assert made is not None
    orders: set[tuple[int, ...]] = set()
    for seed in range(2):
        steps = [what[0] for what in played(made).linearised(random.Random(seed))]
        orders.add(tuple(dict.fromkeys(steps)))
    for each in orders:
        shuffled = replace(plan, steps=tuple(plan.steps[at] for at in each))
        (y,) = InterpreterRunner(shuffled).run(inputs, inputs[0].shape[0])
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    return orders


# Files.


def test_a_file_keeps_the_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And waits as the plan does; doctor makes the same plan again, whatever is asked for there."""
    module, inputs = inception()
    monkeypatch.setenv("CONVLOOM_LAUNCH", "branches")
    exe = convloom.compile(module, inputs, target="cuda:sm_90", dtype=torch.float16)
    exe.save(tmp_path / "net.loom")
    monkeypatch.delenv("CONVLOOM_LAUNCH")
    artifact = open_artifact(tmp_path / "net.loom")
    (program,) = artifact.programs
    made = device.schedule_of(program)
    assert program.streams == exe.plan.streams and made is not None and made.count >= 3
    assert made == branches.schedule(exe.plan)
    assert not rederive.differences(artifact)
    assert device.schedule_of(replace(program, streams=())) is None


def test_a_file_cannot_forget_to_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams that a file mixes up are slow, not wrong: what touches the same memory is ordered."""
    module, inputs = inception()
    monkeypatch.setenv("CONVLOOM_LAUNCH", "branches")
    plan = lowered(module, inputs, target="cuda:sm_90", dtype=torch.float16)[1]
    program = program_of(plan, Pool(), {}, with_ptx=False)
    mixed = replace(program, streams=tuple(at % 4 for at in range(len(program.steps))))
    made = device.schedule_of(mixed)
    assert made is not None
    places = {
        step: at
        for at, step in enumerate(what[0] for what in played(made).linearised(random.Random(3)))
    }
    every = [branches.touches(step) for step in plan.steps]
    before = streams.dependencies(every, streams.overlap_in_memory(plan.buffers))
    for step, earlier in enumerate(before):
        assert all(places[at] < places[step] for at in range(step) if earlier >> at & 1)
