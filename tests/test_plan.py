"""Plans: where tensors lie, that none is overwritten while it is needed, and what is reported."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

import convloom
import pytest
import torch
import torch.nn.functional as F
from convloom import zoo
from convloom.compiler.fusion.overrides import CONCAT_RULE
from convloom.compiler.graph.memory import ALIGNMENT, Buffer, BufferSlice, arena_bytes_at
from convloom.compiler.passes import NAMES
from convloom.compiler.plan.arena import Lifetime, allocate
from convloom.compiler.plan.lower import VIEW_RULE
from convloom.compiler.plan.plan import KernelStep, Plan, Step, TorchStep
from convloom.compiler.run.executable import Executable
from convloom.kernels.contract.op import Ref
from convloom.kernels.contract.spec import Operand
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from . import nets
from .fuzz.contract import together
from .fuzz.grammar import generate
from .nets import Made, make

WIDE = (2, 8, 5, 4)

# The arena.

spans = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted)
lifetimes = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=2),
    st.builds(lambda size, span: Lifetime(size, *span), st.integers(0, 9), spans),
    max_size=9,
)


def overlaps(a: Lifetime, b: Lifetime) -> bool:
    return a.first <= b.last and b.first <= a.last


def most_alive(alive: dict[str, Lifetime]) -> int:
    """Bytes that must exist at the same time: no placement can do with less."""
    steps = range(max((life.last for life in alive.values()), default=0) + 1)
    return max(
        sum(life.size for life in alive.values() if life.first <= step <= life.last)
        for step in steps
    )


@given(alive=lifetimes)
def test_buffers_alive_together_share_no_byte(alive: dict[str, Lifetime]) -> None:
    offsets, total = allocate(alive)
    assert offsets.keys() == alive.keys()
    for a, b in itertools.combinations(alive, 2):
        if overlaps(alive[a], alive[b]) and alive[a].size and alive[b].size:
            apart = offsets[a] + alive[a].size <= offsets[b]
            assert apart or offsets[b] + alive[b].size <= offsets[a], (a, b)
    assert total >= most_alive(alive)
    assert total == max((offsets[n] + alive[n].size for n in alive), default=0)
    assert total <= sum(life.size for life in alive.values())


@given(alive=lifetimes)
def test_placement_does_not_depend_on_the_order_of_a_dictionary(alive: dict[str, Lifetime]) -> None:
    assert allocate(alive) == allocate(dict(reversed(alive.items())))


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_a_chain_needs_two_neighbours_only(sizes: list[int]) -> None:
    alive = {str(at): Lifetime(size, at, at + 1) for at, size in enumerate(sizes)}
    largest = max(a + b for a, b in itertools.pairwise([*sizes, 0]))
    assert most_alive(alive) == largest
    assert allocate(alive)[1] <= largest + max(sizes)


def test_nothing_to_place() -> None:
    assert allocate({}) == ({}, 0)


# Memory, step by step.


def bytes_of(plan: Plan, place: BufferSlice, batch: int) -> tuple[str, torch.Tensor]:
    """The piece of memory a place lies in, and the bytes of it that it covers."""
    buffer = plan.buffers[place.buffer]
    operand = place.operand
    elements = indices(operand, batch).reshape(-1, 1) * buffer.dtype.itemsize
    inside = (elements + torch.arange(buffer.dtype.itemsize)).reshape(-1)
    size = buffer.bytes_at(batch)
    assert inside.numel() == 0 or 0 <= inside.min() <= inside.max() < size, f"outside {buffer.name}"
    if buffer.kind in ("arena", "fixed"):
        return buffer.kind, inside + buffer.offset_at(batch)
    return buffer.name, inside


def indices(operand: Operand, batch: int) -> torch.Tensor:
    shape = operand.spec.at(batch)
    index = torch.tensor(operand.offset)
    for size, stride in zip(shape, operand.strides, strict=True):
        index = index.unsqueeze(-1) + torch.arange(size) * stride
    return index


def places_of(step: Step) -> tuple[list[BufferSlice], list[BufferSlice]]:
    """What a step reads and what it writes; constants, which are packed, are left out."""
    if isinstance(step, TorchStep):
        return list(step.inputs), list(step.outputs)
    problem = step.problem
    groups = {
        "input": problem.inputs,
        "operand": problem.operands,
        "prologue": problem.prologue_operands,
        "output": problem.outputs,
    }
    placed = {
        kind: [BufferSlice(step.buffers[Ref(kind, at)], each) for at, each in enumerate(operands)]
        for kind, operands in groups.items()
    }
    return [*placed["input"], *placed["operand"], *placed["prologue"]], placed["output"]


def simulate(plan: Plan, batch: int) -> None:
    """Asserts that every byte read was written for this buffer and not overwritten since, that no
    step writes what it reads, and that no byte of a buffer is written twice."""
    owner: dict[str, torch.Tensor] = {}
    numbers = {name: at + 1 for at, name in enumerate(plan.buffers)}
    written: dict[str, set[int]] = {name: set() for name in plan.buffers}

    def own(place: BufferSlice, memory: str, covered: torch.Tensor) -> None:
        size = int(covered.max()) + 1 if covered.numel() else 0
        have = owner.get(memory, torch.zeros(0, dtype=torch.int64))
        if len(have) < size:
            have = torch.cat([have, torch.zeros(size - len(have), dtype=torch.int64)])
        have[covered] = numbers[place.buffer]
        owner[memory] = have

    def read(place: BufferSlice, who: str) -> tuple[str, set[int]]:
        memory, covered = bytes_of(plan, place, batch)
        have = owner.get(memory, torch.zeros(0, dtype=torch.int64))
        assert covered.numel() == 0 or int(covered.max()) < len(have), f"{who} reads the unwritten"
        wrong = have[covered] != numbers[place.buffer]
        assert not wrong.any(), f"{who} reads bytes of {place.buffer} that hold something else"
        return memory, set(covered.tolist())

    for port in plan.inputs:
        own(port.place, *bytes_of(plan, port.place, batch))
    for step in plan.steps:
        inputs, outputs = places_of(step)
        inputs = [place for place in inputs if plan.buffers[place.buffer].kind != "constant"]
        seen = [read(place, step.name) for place in inputs]
        for place in outputs:
            memory, covered = bytes_of(plan, place, batch)
            now = set(covered.tolist())
            for where, touched in seen:
                assert where != memory or not touched & now, f"{step.name} writes what it reads"
            assert not written[place.buffer] & now, f"{step.name} writes {place.buffer} again"
            written[place.buffer] |= now
            own(place, memory, covered)
    for port in plan.outputs:
        if plan.buffers[port.place.buffer].kind != "constant":
            read(port.place, port.name)


def random_network(seed: int) -> Made:
    """Some random networks side by side, so that there is much to place."""
    case = together([generate(at) for at in range(10 * seed, 10 * seed + 4)])
    return case.module(), case.inputs()


@pytest.mark.parametrize("seed", range(40, 46))
def test_no_step_of_a_random_network_disturbs_another(seed: int) -> None:
    module, inputs = random_network(seed)
    with nets.exporting_once():
        for dtype in (None, torch.float16):
            plan = convloom.compile(module, inputs, target="interpreter", dtype=dtype).plan
            simulate(plan, 1)
            check_offsets(plan, 1)
            assert not unread(plan), "a step computes what nobody reads"


def unread(plan: Plan) -> set[str]:
    """Steps none of whose results are read or returned."""
    read = {port.place.buffer for port in plan.outputs}
    for step in plan.steps:
        read |= {place.buffer for place in places_of(step)[0]}
    results = ((step.name, places_of(step)[1]) for step in plan.steps)
    return {name for name, made in results if not any(place.buffer in read for place in made)}


@pytest.mark.parametrize("seed", [60, 63, 64, 66])
def test_no_step_disturbs_another_at_any_batch(seed: int) -> None:
    module, inputs = random_network(seed)
    plan = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 5)).plan
    for batch in range(1, 6):
        simulate(plan, batch)
        check_offsets(plan, batch)


def check_offsets(plan: Plan, batch: int) -> None:
    """Aligned, inside the arena, and proportional to the batch."""
    for buffer in plan.buffers.values():
        assert buffer.offset_at(batch) % ALIGNMENT == 0, buffer
        if buffer.kind in ("arena", "fixed"):
            end = buffer.offset_at(batch) + buffer.bytes_at(batch)
            assert end <= arena_bytes_at(plan.buffers, buffer.kind, batch)
        if buffer.batch is not None:
            assert buffer.offset_at(batch) * buffer.batch == buffer.offset * batch
            assert buffer.bytes_at(batch) * buffer.batch == buffer.size_bytes * batch
    largest = plan.batch[1] if plan.batch else 1
    total = sum(arena_bytes_at(plan.buffers, kind, largest) for kind in ("arena", "fixed"))
    assert total == plan.arena_bytes


def test_the_simulation_notices_a_collision() -> None:
    """The check itself: two buffers that are alive together on the same bytes."""
    module, inputs = make(lambda m, x: m.conv(torch.relu(x)) + torch.relu(x), WIDE, conv=conv())
    plan = convloom.compile(module, inputs, target="interpreter", passes=()).plan
    simulate(plan, 1)
    first, *others = [name for name, b in plan.buffers.items() if b.kind == "arena"]
    for name in others:
        object.__setattr__(plan.buffers[name], "offset", plan.buffers[first].offset)
    with pytest.raises(AssertionError, match=r"writes what it reads|hold something else"):
        simulate(plan, 1)


# Concatenations written in place.


def conv(c: int = 8, k: int = 8) -> nn.Conv2d:
    return nn.Conv2d(c, k, 3, padding=1)


def joined(function: Callable[..., Any], **layers: nn.Module) -> Made:
    return make(function, WIDE, **layers)


def pair() -> dict[str, nn.Module]:
    return {"a": conv(), "b": conv()}


def branches(m: Any, x: Any) -> Any:
    return torch.cat([m.a(x), m.b(x)], 1).relu()


def with_residual(m: Any, x: Any) -> Any:
    y = m.a(x)
    return torch.cat([y, m.b(y) + y, torch.tanh(y)], 1)


def read_by_slices(m: Any, x: Any) -> Any:
    z = torch.cat([m.a(x), m.b(x)], 1)
    return m.b(z[:, 4:12]) + z[:, 8:] * z[:, :8]


def nested(m: Any, x: Any) -> Any:
    y = m.a(x)
    inner = torch.cat([y, torch.sigmoid(y)], 1)
    return torch.cat([m.c(inner), inner, m.b(y)], 1)


def nested_twice(m: Any, x: Any) -> Any:
    y = m.a(x)
    inner = torch.cat([y, m.b(y)], 1)
    return torch.cat([torch.cat([inner, torch.tanh(y)], 1), torch.cat([m.c(inner), inner], 1)], 1)


def joined_twice(m: Any, x: Any) -> Any:
    y = m.a(x)
    return torch.cat([y, m.b(x), y], 1)


def in_two_places(m: Any, x: Any) -> Any:
    y, z = m.a(x), m.b(x)
    return torch.cat([y, z], 1), torch.cat([z, y], 1)


def with_the_input(m: Any, x: Any) -> Any:
    return torch.cat([x, m.a(x), x], 1)


def with_a_constant(m: Any, x: Any) -> Any:
    return torch.cat([m.a(x), m.b.weight[:2, :, :1, :1].expand(2, 8, 5, 4)], 1)


def returned_too(m: Any, x: Any) -> Any:
    y = m.a(x)
    return torch.cat([y, m.b(y)], 1), y


def of_narrow_parts(m: Any, x: Any) -> Any:
    return torch.cat([m.c(x), m.a(x), m.c(x).relu()], 1).relu()


def along_rows(m: Any, x: Any) -> Any:
    return torch.cat([m.a(x), m.b(x)], 2)


def along_samples(m: Any, x: Any) -> Any:
    return torch.cat([m.a(x), m.b(x)], 0).relu()


def dense_block(m: Any, x: Any) -> Any:
    features = [m.a(x)]
    for layer in (m.b, m.c, m.d):
        features.append(layer(torch.relu(torch.cat(features, 1))))
    return torch.cat(features, 1)


def pooled(m: Any, x: Any) -> Any:
    y = m.a(x)
    return torch.cat([F.max_pool2d(y, 3, 1, 1), F.avg_pool2d(y, 3, 1, 1), y], 1)


def of_rows(m: Any, x: Any) -> Any:
    y = x.mean((2, 3))
    return torch.cat([m.e(y), torch.relu(y), m.e(y.tanh())], 1)


# Layers, values written in place, values refused (each once).
CONCATS: dict[Callable[..., Any], tuple[dict[str, nn.Module], int, int]] = {
    branches: (pair(), 2, 0),
    with_residual: (pair(), 3, 0),
    read_by_slices: (pair(), 2, 0),
    nested: ({**pair(), "c": conv(16)}, 5, 0),
    nested_twice: ({**pair(), "c": conv(16)}, 7, 1),
    joined_twice: (pair(), 1, 1),
    in_two_places: (pair(), 2, 2),
    with_the_input: (pair(), 1, 1),
    with_a_constant: (pair(), 1, 1),
    returned_too: (pair(), 2, 0),
    of_narrow_parts: ({"a": conv(), "c": conv(8, 3)}, 0, 3),
    along_rows: (pair(), 0, 2),
    along_samples: (pair(), 2, 0),
    dense_block: ({"a": conv(), "b": conv(), "c": conv(16), "d": conv(24)}, 6, 0),
    pooled: (pair(), 3, 0),
    of_rows: ({"e": nn.Linear(8, 8)}, 3, 0),
}


def events(exe: Executable, accepted: bool) -> list[str]:
    found = [e for e in exe.ledger.events if e.rule == CONCAT_RULE and e.accepted is accepted]
    return [event.reason for event in found]


@pytest.mark.interpreter
@pytest.mark.parametrize("function", CONCATS, ids=lambda function: function.__name__)
def test_concatenations_in_place(function: Callable[..., Any]) -> None:
    layers, in_place, copied = CONCATS[function]
    module, inputs = joined(function, **layers)
    with nets.exporting_once():
        whole, exe, plain = (
            convloom.compile(module, inputs, target="interpreter", passes=passes)
            for passes in ("default", UNMERGED, "none")
        )
    truth = nets.Truth(module, inputs)
    for compiled in (whole, exe, plain, exe):
        truth.check(compiled(*inputs))
        simulate(compiled.plan, 1)
    assert (len(events(exe, True)), len(events(exe, False))) == (in_place, copied)
    assert not events(plain, True), "an ablation without passes copies"


UNMERGED = tuple(name for name in NAMES if name != "choose_partition")
"""The branches of these networks read one tensor: merged, they would be another test."""


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (joined_twice, "is joined twice"),
        (in_two_places, "already lies in another concatenation"),
        (with_the_input, "is not computed by a kernel"),
        (of_narrow_parts, "not a multiple of 8"),
        (along_rows, "dimension 2 is not the innermost"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_copies_are_explained(function: Callable[..., Any], reason: str) -> None:
    made = joined(function, **CONCATS[function][0])
    exe = convloom.compile(*made, target="reference", passes=UNMERGED)
    assert any(reason in refusal for refusal in events(exe, False))
    assert reason in exe.explain()


@pytest.mark.interpreter
@pytest.mark.parametrize("function", [nested, with_residual, dense_block, of_rows])
def test_concatenations_under_a_dynamic_batch(function: Callable[..., Any]) -> None:
    module, inputs = joined(function, **CONCATS[function][0])
    exe = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 3))
    for batch in (3, 1, 2):
        (x,) = nets.inputs_of((batch, *WIDE[1:]), seed=batch)
        nets.check(exe(x), module, (x,))
        simulate(exe.plan, batch)


# Views.


def views() -> dict[str, Callable[..., Any]]:
    return {
        "flatten": lambda m, x: m.fc(m.a(x).flatten(1)),
        "channel slices": lambda m, x: m.a(x)[:, 4:].relu() - m.a(x)[:, :4].relu(),
        "chunks": lambda m, x: torch.stack(m.a(x).chunk(4, 1), 1).sum(1),
        "squeezed": lambda m, x: m.a(x).mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
        "permuted pixels": lambda m, x: m.a(x).permute(0, 2, 3, 1).softmax(-1),
        "rows": lambda m, x: m.a(x)[:, :, 1:4].contiguous() + 1.0,
        "every second": lambda m, x: m.a(x)[:, ::2, ::2, 1::2].relu(),
        "shuffle": lambda m, x: m.a(x).view(-1, 2, 4, 5, 4).transpose(1, 2).reshape(-1, 8, 5, 4),
        "one sample": lambda m, x: m.a(x)[1],
        "view of a view": lambda m, x: m.a(x)[:, 2:7][:, 1:4].flatten(2).transpose(1, 2),
        "returned input": lambda m, x: (x[:, 1:3], x.view(2, -1), x.permute(0, 2, 3, 1)),
    }


@pytest.mark.interpreter
@pytest.mark.parametrize("name", views())
def test_views_and_copies(name: str) -> None:
    module, inputs = joined(views()[name], a=conv(), fc=nn.Linear(160, 3))
    exe = convloom.compile(module, inputs, target="interpreter")
    result = exe(*inputs)
    nets.check(result, module, inputs)
    simulate(exe.plan, 1)


def test_a_flattening_between_convolution_and_linear_layer_moves_nothing() -> None:
    module, inputs = joined(views()["flatten"], a=conv(), fc=nn.Linear(160, 3))
    exe = convloom.compile(module, inputs, target="interpreter")
    assert [step.op for step in exe.plan.steps] == ["relayout", "conv2d", "linear"]
    assert any(event.rule == VIEW_RULE for event in exe.ledger.events)


# Reports.


def test_a_plan_is_plain_data_and_readable() -> None:
    module, inputs = joined(nested, **CONCATS[nested][0])
    plan = convloom.compile(module, inputs, target="interpreter", dynamic_batch=(1, 3)).plan
    data = json.loads(json.dumps(plan.to_json()))
    assert data["target"] == "interpreter" and data["batch"] == [1, 3]
    assert data["summary"] == plan.summary()
    assert len(data["steps"]) == len(plan.steps) and len(data["buffers"]) == len(plan.buffers)
    named = {buffer["name"]: buffer for buffer in data["buffers"]}
    for step in data["steps"]:
        assert set(step["buffers"].values()) <= named.keys()
        assert all(launch["programs"] >= 1 for launch in step["launches"])
    assert {buffer["kind"] for buffer in data["buffers"]} <= KINDS
    assert any(buffer["scales_with_batch"] for buffer in data["buffers"])
    lines = plan.to_text().splitlines()
    assert len(lines) == len(plan.steps)
    assert all(line.startswith(step.name) for line, step in zip(lines, plan.steps, strict=True))


KINDS = {"input", "output", "constant", "arena", "fixed"}


def test_a_plan_with_torch_steps_is_plain_data_too() -> None:
    module, inputs = joined(lambda m, x: torch.logcumsumexp(m.a(x), 1), a=conv())
    plan = convloom.compile(module, inputs, target="interpreter", fallback="torch").plan
    data = json.loads(json.dumps(plan.to_json()))
    torch_steps = [step["torch"] for step in data["steps"] if "torch" in step]
    assert torch_steps == ["aten.logcumsumexp.default"]
    assert "torch  aten.logcumsumexp.default" in plan.to_text()


def test_counts() -> None:
    module, inputs = joined(branches, **pair())
    plan = convloom.compile(module, inputs, target="interpreter", passes=UNMERGED).plan
    relayouts = sum(step.op == "relayout" for step in kernel_steps(plan))
    assert plan.convs == 2 and plan.torch_fallbacks == 0
    assert len(plan.kernels) == sum(len(step.launches) for step in kernel_steps(plan))
    assert len(plan.kernels) == 2 + 1 + relayouts, "two convolutions and the activation"
    assert plan.activation_bytes == 4 * (2 * 5 * 4) * (8 + 8 + 16 + 16), "every captured op"


def kernel_steps(plan: Plan) -> Iterator[KernelStep]:
    return (step for step in plan.steps if isinstance(step, KernelStep))


def test_the_arena_of_resnet50_is_a_quarter_of_its_activations() -> None:
    """A plan is made for every target; the reference one runs no kernels."""
    module, x = zoo.resnet50().eval(), torch.zeros(1, 3, 224, 224)
    with nets.exporting_once():
        for dtype in (None, torch.float16):
            plan = convloom.compile(module, (x,), target="reference", dtype=dtype).plan
            assert plan.convs == 53
            assert plan.arena_bytes * 4 <= plan.activation_bytes, plan.summary()


def test_buffers_that_hold_the_batch_shrink_with_it() -> None:
    scaled = Buffer("a", "arena", torch.float16, 480, batch=8, offset=160)
    fixed = Buffer("b", "fixed", torch.float16, 480, offset=160)
    assert [(scaled.bytes_at(n), scaled.offset_at(n)) for n in (8, 3)] == [(480, 160), (180, 60)]
    assert [(fixed.bytes_at(n), fixed.offset_at(n)) for n in (8, 3)] == [(480, 160)] * 2
    both = {"a": scaled, "b": fixed}
    assert (arena_bytes_at(both, "arena", 3), arena_bytes_at(both, "fixed", 3)) == (240, 640)
