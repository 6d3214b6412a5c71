"""Files that were damaged or made to do harm: each is refused, and seeded fuzzers find no other."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.artifact import archive, rederive
from convloom.compiler.artifact.program import Program
from convloom.compiler.artifact.read import Artifact, open_artifact
from convloom.compiler.graph.typed import dump
from convloom.errors import ArtifactError

from .artifact_files import members_of, refused, rewrite, save_small, write

pytestmark = pytest.mark.interpreter
RAW, REBUILT = 1500, 500
"""Mutants: of the file's bytes, and of a member's contents with everything around made right."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def members(path: Path) -> dict[str, bytes]:
    return members_of(path)


@pytest.fixture
def mutant(tmp_path: Path) -> Path:
    return tmp_path / "mutant.loom"


# Bytes.


def test_the_untouched_file_is_accepted(
    path: Path, members: dict[str, bytes], mutant: Path
) -> None:
    artifact = open_artifact(path)
    assert rederive.differences(artifact) == []
    write(mutant, members)
    assert mutant.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused(path: Path, mutant: Path, share: float) -> None:
    data = path.read_bytes()
    mutant.write_bytes(data[: int(share * len(data))])
    assert "not a convloom executable" in refused(mutant)


def test_a_flipped_bit_in_each_member_is_refused(path: Path, mutant: Path) -> None:
    data = path.read_bytes()
    for name, member in archive.Archive(path).members.items():
        changed = bytearray(data)
        changed[data.index(member) + len(member) // 2] ^= 4
        mutant.write_bytes(changed)
        message = refused(mutant)
        assert name in message and ("sha256" in message or "checksum" in message), name


def test_a_wrong_hash_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    manifest = json.loads(members["manifest.json"])
    manifest["members"]["graph.json"]["sha256"] = "0" * 64
    archive.write(mutant, {**as_content(members), "manifest.json": [dump(manifest)]})
    assert "the sha256 of 'graph.json' is not manifest.json's" in refused(mutant)


def test_a_wrong_size_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    manifest = json.loads(members["manifest.json"])
    manifest["members"]["graph.json"]["size"] += 1
    archive.write(mutant, {**as_content(members), "manifest.json": [dump(manifest)]})
    assert "manifest.json says" in refused(mutant)


def as_content(members: dict[str, bytes]) -> dict[str, Any]:
    return {name: [data] for name, data in members.items()}


def test_a_member_that_the_manifest_does_not_know_is_refused(
    members: dict[str, bytes], mutant: Path
) -> None:
    extra = f"kernels/sm_80/{'0' * 32}.cubin"
    archive.write(mutant, {**as_content(members), extra: [b"\x7fELF"]})
    assert f"'{extra}' is not in both manifest.json and the file" in refused(mutant)


@pytest.mark.parametrize("name", ["plan.json", "graph.json", "ledger.json", "manifest.json",
                                  "weights.safetensors"])  # fmt: skip
def test_a_missing_member_is_refused(members: dict[str, bytes], mutant: Path, name: str) -> None:
    rest = {each: data for each, data in members.items() if each != name}
    if name == "manifest.json":
        archive.write(mutant, as_content(rest))
    else:
        write(mutant, rest)
    assert f"it has no '{name}'" in refused(mutant)


# Zips.


@pytest.mark.parametrize(
    "name", ["../plan.json", "/etc/passwd", "kernels/sm_80/../../x.cubin", "plan.json\0", "C:\\x"]
)
def test_a_path_that_leaves_is_refused(members: dict[str, bytes], mutant: Path, name: str) -> None:
    archive.write(mutant, {**as_content(members), name: [b"x"]})
    assert "not a convloom executable: it holds" in refused(mutant)
    assert sorted(mutant.parent.iterdir()) == [mutant]


def test_a_zip_bomb_is_refused_without_being_unpacked(mutant: Path) -> None:
    with zipfile.ZipFile(mutant, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("plan.json", b"0" * 50_000_000)
    assert "the header of 'plan.json' is not what convloom writes" in refused(mutant)


def test_a_size_that_is_only_claimed_is_refused(path: Path, mutant: Path) -> None:
    """A directory that says 4 GB of a member that is not there."""
    data = bytearray(path.read_bytes())
    start = struct.unpack("<I", data[-6:-2])[0]
    data[start + 20 : start + 28] = struct.pack("<2I", 2**32 - 1, 2**32 - 1)
    mutant.write_bytes(data)
    assert "is damaged" in refused(mutant)


def test_duplicate_members_are_refused(members: dict[str, bytes], mutant: Path) -> None:
    with zipfile.ZipFile(mutant, "w") as file, pytest.warns(UserWarning, match="Duplicate"):
        for name, data in members.items():
            file.writestr(name, data)
        file.writestr("plan.json", members["plan.json"])
    assert "not each there once" in refused(mutant)


def test_a_strangers_zip_of_the_same_members_is_refused(
    members: dict[str, bytes], mutant: Path
) -> None:
    with zipfile.ZipFile(mutant, "w") as file:
        for name in sorted(members):
            file.writestr(zipfile.ZipInfo(name), members[name])
    assert "is not what convloom writes" in refused(mutant)


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_in_it_is_not_unpickled(tmp_path: Path, mutant: Path) -> None:
    torch.save({"x": Harm(tmp_path / "harm")}, mutant)
    assert "not a convloom executable" in refused(mutant)
    mutant.write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    assert "not a convloom executable" in refused(mutant)
    with zipfile.ZipFile(mutant, "w") as file:
        file.writestr("weights.safetensors", pickle.dumps(Harm(tmp_path / "harm")))
    refused(mutant)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("data", [b"", b"x", b"PK\5\6" + bytes(18), bytes(5000)])
def test_what_is_no_zip_is_refused(mutant: Path, data: bytes) -> None:
    mutant.write_bytes(data)
    assert "not a convloom executable" in refused(mutant)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.loom")
    assert "Is a directory" in refused(tmp_path)


# The fuzzer.


def raw_mutants(data: bytes, draw: random.Random) -> Iterator[bytes]:
    """The file with a few bytes changed, cut, moved or repeated."""
    size = len(data)
    # Half of them where structure is: the directory, headers and JSON.
    at = lambda: draw.randrange(size) if draw.random() < 0.5 else size - draw.randrange(1, 4000)  # noqa: E731
    while True:
        changed = bytearray(data)
        kind = draw.randrange(6)
        if kind == 0:
            changed[at()] ^= 1 << draw.randrange(8)
        elif kind == 1:
            for _ in range(draw.randrange(1, 9)):
                changed[at()] = draw.randrange(256)
        elif kind == 2:
            del changed[at() :]
        elif kind == 3:
            start = at()
            del changed[start : start + draw.randrange(1, 300)]
        elif kind == 4:
            start = at()
            changed[start:start] = data[start : start + draw.randrange(1, 300)]
        else:
            start, length = at(), draw.choice((1, 2, 4, 8))
            value = draw.choice((0, 1, 255, 2**31 - 1, 2**32 - 1, 2**63)).to_bytes(8, "little")
            changed[start : start + length] = value[:length]
        if changed != data:
            yield bytes(changed)


def leaves(data: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    if isinstance(data, dict | list):
        pairs = data.items() if isinstance(data, dict) else enumerate(data)
        for key, value in pairs:
            yield from leaves(value, (*place, key))


NUMBERS = (0, -1, 1, 3, 2**20, 2**31, 2**40, 2**63, -(2**63), 0.5, 1e300)
OTHERS = ("", "x", None, [], {}, True, [[]], {"float": "nan"})


def mutate(value: Any, draw: random.Random) -> Any:
    if isinstance(value, list) and value and draw.random() < 0.6:
        changed = list(value)
        action = draw.randrange(3)
        if action == 0:
            changed.pop(draw.randrange(len(changed)))
        elif action == 1:
            changed.append(draw.choice(changed))
        else:
            draw.shuffle(changed)
        return changed
    if isinstance(value, int) and not isinstance(value, bool) and draw.random() < 0.6:
        return draw.choice((value + 1, value - 1, value * 2, value // 2, value + 256, -value))
    return draw.choice((*NUMBERS, *OTHERS))


def rebuilt_mutants(members: dict[str, bytes], draw: random.Random) -> Iterator[tuple[str, Any]]:
    """A JSON member with one value changed, to be written with right hashes around it."""
    parsed = {name: json.loads(members[name]) for name in ("plan.json", "graph.json")}
    # What tells kernels from each other is drawn as often as the names of nodes.
    places = {name: list(leaves(data))[1:] for name, data in parsed.items()}
    while True:
        name = draw.choice(("plan.json", "plan.json", "graph.json"))
        data = copy.deepcopy(parsed[name])
        *steps, last = draw.choice(places[name])
        inner = data
        for step in steps:
            inner = inner[step]
        before = copy.deepcopy(inner[last])
        inner[last] = mutate(before, draw)
        if dump(data) != members[name]:
            yield name, data


def fuzz(count: int, make_one: Callable[[], None], path: Path) -> list[Artifact]:
    """Opens mutants; those that are accepted."""
    accepted = []
    for _ in range(count):
        make_one()
        try:
            accepted.append(open_artifact(path))
        except ArtifactError:
            continue
    return accepted


def test_no_mutant_of_the_bytes_is_accepted(path: Path, mutant: Path) -> None:
    mutants = raw_mutants(path.read_bytes(), random.Random(6))
    assert fuzz(RAW, lambda: mutant.write_bytes(next(mutants)) and None, mutant) == []


def work(program: Program) -> tuple[Any, ...]:
    """All that a program does."""
    outside = program.inputs, program.outputs, program.arguments, program.result, program.results
    inside = program.buffer_list, program.constants, program.images, program.calls
    return program.target, program.batch, *outside, *inside


def test_no_mutant_with_right_hashes_runs_another_plan(
    path: Path, members: dict[str, bytes], mutant: Path
) -> None:
    """Refused when it is opened, or found out when its plan is made again from its graph."""
    draw = random.Random(7)
    whole = open_artifact(path)
    mutants = rebuilt_mutants(members, draw)
    found_out = 0
    for _ in range(REBUILT):
        name, data = next(mutants)
        rewrite(mutant, members, name, data)
        try:
            artifact = open_artifact(mutant)
        except ArtifactError:
            continue
        if rederive.differences(artifact):
            found_out += 1
            continue
        assert [work(each) for each in artifact.programs] == [work(each) for each in whole.programs]
    assert found_out


def test_a_mutated_graph_never_crashes_the_reference(
    members: dict[str, bytes], mutant: Path
) -> None:
    draw = random.Random(8)
    data = json.loads(members["graph.json"])
    places = [place for place in leaves(data) if place[2:3] == ("nodes",)]
    x = torch.zeros(2, 3, 4, 4)
    for _ in range(100):
        changed = copy.deepcopy(data)
        *steps, last = draw.choice(places)
        inner = changed
        for step in steps:
            inner = inner[step]
        inner[last] = mutate(inner[last], draw)
        rewrite(mutant, members, "graph.json", changed)
        try:
            y = convloom.load(mutant, "reference")(x)
        except convloom.ConvloomError:
            continue
        assert y.shape == (2, 4)


def test_a_stream_of_zeros_is_no_loop(mutant: Path) -> None:
    """A directory that claims more entries than it has bytes."""
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, 60_000, 60_000, 0, 0, 0)
    mutant.write_bytes(io.BytesIO(end).getvalue())
    assert "its directory of 60000 members" in refused(mutant)


# Files that change, and what is no file.


def test_a_file_that_is_cut_off_later_is_still_whole_in_memory(
    path: Path, members: dict[str, bytes], mutant: Path
) -> None:
    """It was read as it was checked: whoever writes into it now changes nothing."""
    mutant.write_bytes(path.read_bytes())
    artifact, exe = open_artifact(mutant), convloom.load(mutant, "interpreter")
    x = torch.ones(2, 3, 4, 4)
    y = exe(x)
    with mutant.open("r+b") as file:
        file.write(bytes(1000))
        file.truncate(2000)
    assert torch.equal(exe(x), y)
    (name, *_) = (name for name in members if name.endswith(".cubin"))
    assert artifact.code(name) == members[name]
    assert all(tensor.isfinite().all() for tensor in artifact.tensors.values())


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "it is no file, but a pipe or a device" in refused(tmp_path / "pipe")
    assert "it is no file, but a pipe or a device" in refused(Path("/dev/zero"))


def test_a_name_that_no_file_can_have_is_refused() -> None:
    assert "no file has this name" in refused(Path("a\0b.loom"))


# Sizes.


def spread(members: dict[str, bytes], count: int) -> Any:
    """The plan with so many buffers more, which nobody uses."""
    plan = json.loads(members["plan.json"])
    buffer = next(b for b in plan["programs"][0]["buffer_list"] if b["kind"] == "arena")
    more = [{**buffer, "name": f"more{at}"} for at in range(count)]
    plan["programs"][0]["buffer_list"] += more
    return plan


def test_checks_take_time_in_proportion_to_a_plan(members: dict[str, bytes], mutant: Path) -> None:
    """Four times the buffers, side by side and one after the other, at most six times as long."""

    def seconds(count: int) -> float:
        plan = spread(members, count)
        program = plan["programs"][0]
        used = [copy.deepcopy(program["calls"][0]) for _ in range(count // 8)]
        for at, call in enumerate(used):
            argument = next(a for a in call["arguments"] if a["kind"] == "write")
            argument["buffer"] = f"more{at}"
        program["calls"] = used + program["calls"]
        rewrite(mutant, members, "plan.json", plan)
        started = time.process_time()
        open_artifact(mutant)
        return time.process_time() - started

    seconds(400)
    assert seconds(8_000) < 6 * seconds(2_000)


def test_too_many_programs_are_refused(members: dict[str, bytes], mutant: Path) -> None:
    plan = json.loads(members["plan.json"])
    plan["programs"] *= 257
    rewrite(mutant, members, "plan.json", plan)
    assert "it has 257 programs" in refused(mutant)
