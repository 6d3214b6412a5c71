"""Files that were damaged or made to do harm: each is refused, and seeded fuzzers find no other."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
import struct
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
from convloom.compiler.typed import dump
from convloom.errors import ArtifactError
from torch import nn

from .nets import make

pytestmark = pytest.mark.interpreter
RAW, REBUILT = 1500, 500
"""Mutants: of the file's bytes, and of a member's contents with everything around made right."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small file: two convolutions and a layer on their pixels, for a GPU, any batch to 4."""
    module, inputs = make(
        lambda m, x: m.linear(torch.relu(m.two(torch.relu(m.one(x)))).flatten(1)),
        (2, 3, 4, 4),
        one=nn.Conv2d(3, 8, 1),
        two=nn.Conv2d(8, 8, 3, padding=1),
        linear=nn.Linear(128, 4),
    )
    exe = convloom.compile(
        module, inputs, target="cuda:sm_80", dynamic_batch=(1, 4), tuning="heuristic"
    )
    path = tmp_path_factory.mktemp("files") / "net.loom"
    exe.save(path)
    return path


@pytest.fixture(scope="module")
def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as file:
        return {name: file.read(name) for name in file.namelist()}


@pytest.fixture
def mutant(tmp_path: Path) -> Path:
    return tmp_path / "mutant.loom"


def write(path: Path, members: dict[str, bytes]) -> None:
    """The members as convloom would write them, with a manifest that is right."""
    held: dict[str, Any] = {name: [data] for name, data in members.items()}
    held.pop("manifest.json", None)
    held["manifest.json"] = [dump({"members": archive.manifest_of(held)})]
    archive.write(path, held)


def rewrite(path: Path, members: dict[str, bytes], name: str, data: Any) -> None:
    """A JSON member replaced; a graph's hash in the plan is made right too."""
    changed = {**members, name: dump(data)}
    if name == "graph.json" and isinstance(data, dict) and isinstance(data.get("graphs"), list):
        plan = json.loads(members["plan.json"])
        plan["graphs"] = [archive.digest([dump(graph)]) for graph in data["graphs"]]
        changed["plan.json"] = dump(plan)
    write(path, changed)


def refused(path: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        open_artifact(path)
    return str(caught.value)


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
    assert "no executable of convloom" in refused(mutant)


def test_a_flipped_bit_in_each_member_is_refused(path: Path, mutant: Path) -> None:
    data = path.read_bytes()
    for name, span in archive.Archive(path).members.items():
        changed = bytearray(data)
        changed[span.offset + span.size // 2] ^= 4
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
    assert f"manifest.json does not list '{extra}'" in refused(mutant)


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
    assert "no executable of convloom: it holds" in refused(mutant)
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
    assert "no executable of convloom" in refused(mutant)
    mutant.write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    assert "no executable of convloom" in refused(mutant)
    with zipfile.ZipFile(mutant, "w") as file:
        file.writestr("weights.safetensors", pickle.dumps(Harm(tmp_path / "harm")))
    refused(mutant)
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize("data", [b"", b"x", b"PK\5\6" + bytes(18), bytes(5000)])
def test_what_is_no_zip_is_refused(mutant: Path, data: bytes) -> None:
    mutant.write_bytes(data)
    assert "no executable of convloom" in refused(mutant)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "none.loom")
    assert "Is a directory" in refused(tmp_path)


# Plans whose hashes are right.


def change(plan: Any, place: str, value: Any) -> None:
    *steps, last = place.split(".")
    for step in steps:
        plan = plan[int(step) if step.isdigit() else step]
    plan[int(last) if last.isdigit() else last] = value


P = "programs.0."
ABSURD = {
    "version": ("version", 1, "this convloom reads version 2"),
    "format": ("format", "zip", "no plan of convloom"),
    "no programs": ("programs", [], "it has no programs"),
    "unknown field": (P + "more", 1, "expected no field 'more'"),
    "target": (P + "target", "cuda:sm_42", "unknown target"),
    "another target": (P + "target", "cuda:sm_90", "expected a cubin in kernels/sm_90/"),
    "batch": (P + "batch", [4, 1], "batches 4 to 1"),
    "huge batch": (P + "batch", [1, 2**40], "batches 1 to"),
    "graph": (P + "graph", 1, "graph 1 of 1"),
    "account": (P + "account", -1, "account -1 of 1"),
    "precision": (P + "precision", "fp8", "expected ieee or tf32"),
    "buffer size": (P + "buffer_list.0.size_bytes", 2**50, "bytes at"),
    "negative size": (P + "buffer_list.0.size_bytes", -256, "bytes at"),
    "buffer kind": (P + "buffer_list.0.kind", "heap", "of kind 'heap'"),
    "buffer dtype": (P + "buffer_list.0.dtype", "complex64", "expected one of float64"),
    "buffer batch": (P + "buffer_list.0.batch", 3, "is of batch 3, the program of 4"),
    "a bool": (P + "buffer_list.0.size_bytes", True, "a value of type int"),
    "beyond 64 bits": (P + "buffer_list.0.size_bytes", 10**400, "expected a number below"),
    "constant": (P + "constants.0.1", "0" * 32, "the file has no tensor"),
    "constants": (P + "constants", [], "are not its constant buffers"),
    "input shape": (P + "inputs.0.spec.shape", [4, 3, 4, 4000], "outside and"),
    "input rank": (P + "inputs.0.place.operand.spec.shape", [4] * 9, "has the shape"),
    "input extent": (P + "inputs.0.place.operand.spec.shape", [4, 3, 4, -4], "has the shape"),
    "input layout": (P + "inputs.0.place.operand.spec.layout", "nchw", "expected one of"),
    "input pitch": (P + "inputs.0.place.operand.pitch", 1, "has pitch 1"),
    "input offset": (P + "inputs.0.place.operand.offset", 2**33, "reaches byte"),
    "input buffer": (P + "inputs.0.place.buffer", "nowhere", "which is no buffer"),
    "an output": (P + "outputs.0.place.operand.offset", -1, "and offset -1"),
    "result": (P + "results.0.1", 7, "result 7 of 1 outputs"),
    "result kind": (P + "results.0.0", "code", "a result of kind 'code'"),
    "nesting": (P + "result", {"kind": "namedtuple", "items": [], "keys": []}, "no structure of"),
    "arguments": (P + "arguments.items", [], "0 inputs and 1 results are nested"),
    "entry": (P + "images.0.entry", "a b", "is no name of a function"),
    "cubin": (P + "images.0.cubin", "plan.json", "expected a cubin in kernels/sm_80/"),
    "warps": (P + "images.0.num_warps", 64, "64 warps"),
    "cluster": (P + "images.0.num_ctas", 3, "3 blocks per cluster"),
    "shared memory": (P + "images.0.shared_bytes", 300_000, "300000 bytes of shared memory"),
    "signature": (P + "images.0.signature.0", "*fp8", "unknown are ['*fp8']"),
    "image": (P + "calls.0.image", 99, "is of kernel 99"),
    "step": (P + "calls.0.step", 99, "belongs to step 99"),
    "arguments of a launch": (P + "calls.0.arguments", [], "passes 0 arguments"),
    "argument kind": (P + "calls.0.arguments.0.kind", "free", "passes 'free'"),
    "argument buffer": (P + "calls.0.arguments.0.buffer", "x", "passes 'read' 'x'"),
    "argument extent": (P + "calls.0.arguments.0.operand.offset", 10**9, "reaches byte"),
    "rows": (P + "calls.0.grid.rows", 2**40, "rows in blocks"),
    "no rows": (P + "calls.0.grid.rows", 0, "0 rows"),
    "block": (P + "calls.0.grid.block_rows", 0, "in blocks of 0"),
    "columns": (P + "calls.0.grid.columns", 2**30, "programs for"),
    "no blocks": (P + "calls.0.grid.most", 0, "at most 0 programs"),
    "grid batch": (P + "calls.0.grid.batch", 3, "rows for 3 images"),
    "streams": (P + "streams", [9], "steps are in streams from 9 to 9; expected every step"),
    "no launches": (P + "calls", [], "0 launches of"),
}  # fmt: skip


@pytest.mark.parametrize("what", ABSURD)
def test_an_absurd_plan_is_refused(members: dict[str, bytes], mutant: Path, what: str) -> None:
    place, value, message = ABSURD[what]
    plan = json.loads(members["plan.json"])
    change(plan, place, value)
    write(mutant, {**members, "plan.json": dump(plan)})
    assert message in refused(mutant)


def program_of(members: dict[str, bytes]) -> tuple[Any, Any]:
    plan = json.loads(members["plan.json"])
    return plan, plan["programs"][0]


def test_buffers_that_share_memory_are_refused(members: dict[str, bytes], mutant: Path) -> None:
    plan, program = program_of(members)
    arena = [buffer for buffer in program["buffer_list"] if buffer["kind"] == "arena"]
    assert len({buffer["offset"] for buffer in arena}) > 1
    for buffer in arena:
        buffer["offset"] = 0
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "share memory while both are used" in refused(mutant)


def test_a_buffer_that_is_not_aligned_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    plan, program = program_of(members)
    next(b for b in program["buffer_list"] if b["kind"] == "arena")["offset"] += 4 * 4
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "is not aligned to 16 bytes for every batch" in refused(mutant)


def test_a_write_into_constants_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    plan, program = program_of(members)
    arguments = program["calls"][0]["arguments"]
    constant = next(a for a in arguments if a["kind"] == "read" and a["operand"] is None)
    constant["kind"] = "write"
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "a buffer of constant" in refused(mutant)


def test_a_read_before_the_write_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    plan, program = program_of(members)
    first, second, *rest = program["calls"]
    second["step"], first["step"] = first["step"], second["step"]
    program["calls"] = [second, first, *rest]
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "before it is written" in refused(mutant)


def test_code_that_is_no_machine_code_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    name = next(name for name in members if name.endswith(".cubin"))
    write(mutant, {**members, name: b"#!/bin/sh\n"})
    assert f"'{name}' is no machine code" in refused(mutant)


def test_json_in_another_form_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    for data in (b" " + members["plan.json"], b"\xff", b"[" * 100_000, b'{"a": NaN}\n'):
        write(mutant, {**members, "plan.json": data})
        assert "expected JSON" in refused(mutant)


def test_weights_of_another_form_are_refused(members: dict[str, bytes], mutant: Path) -> None:
    data = members["weights.safetensors"]
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(iter(header))
    for key, value in (("dtype", "F8"), ("shape", [2**60]), ("shape", [1, 1]), ("shape", ["1"])):
        text = json.dumps({**header, name: {**header[name], key: value}}).encode()
        changed = struct.pack("<Q", len(text)) + text + data[8 + length :]
        write(mutant, {**members, "weights.safetensors": changed})
        assert "weights.safetensors" in refused(mutant)
    for changed in (data[:-4], data + b"1234", struct.pack("<Q", 2**63), b""):
        write(mutant, {**members, "weights.safetensors": changed})
        assert "weights.safetensors" in refused(mutant)


# Graphs whose hashes are right.

G = "graphs.0."
ABSURD_GRAPHS = {
    "op": ("op", "exec", "no op 'exec'"),
    "torch": ("op", "torch", "no op 'torch'"),
    "class": ("attributes.is", "TorchCall", "expected a class of Attributes"),
    "attributes": ("attributes", {}, "expected attributes with their class"),
    "attributes of another op": ("attributes.is", "NoAttributes", "are not those of linear"),
    "epilogue": ("epilogue.0.name", "system", "expected a pointwise function"),
    "parameters": ("epilogue.0.parameters", [1.0], "expected 0 numbers"),
    "channels": ("epilogue.0.channels", [5, 2], "expected a range of channels"),
    "shape": ("outputs.0.shape", [4, 2**31, 2**31], "has the shape"),
    "another shape": ("outputs.0.shape", [4, 9], "the node says"),
    "batch": ("outputs.0.batch", 0, "has no batch of 0"),
    "reads nothing": ("inputs", [], "is damaged"),
    "reads a stranger": ("inputs.0.0", "nobody", "reads 'nobody'"),
    "reads itself": ("inputs.0.0", "SELF", "has a cycle"),
}


@pytest.mark.parametrize("what", ABSURD_GRAPHS)
def test_an_absurd_graph_is_refused(members: dict[str, bytes], mutant: Path, what: str) -> None:
    place, value, message = ABSURD_GRAPHS[what]
    data = json.loads(members["graph.json"])
    nodes = data["graphs"][0]["nodes"]
    at = next(at for at, node in enumerate(nodes) if node["op"] == "linear")
    value = nodes[at]["name"] if value == "SELF" else value
    change(data, f"graphs.0.nodes.{at}.{place}", value)
    rewrite(mutant, members, "graph.json", data)
    with pytest.raises(ArtifactError, match=message):
        convloom.load(mutant, "reference")


def test_a_word_that_no_kernel_knows_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    """References look some words up in torch: `load` is not one of them."""
    head = {"links": [[]], "average": False, "softmax": "load"}
    data = json.loads(members["graph.json"])
    node = next(node for node in data["graphs"][0]["nodes"] if node["op"] == "linear")
    node["op"], node["attributes"] = "head", {"is": "Head", "has": head}
    rewrite(mutant, members, "graph.json", data)
    with pytest.raises(ArtifactError, match=r"expected one of '', 'constant'.*got 'load'"):
        convloom.load(mutant, "reference")


def test_a_graph_of_another_network_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    data = json.loads(members["graph.json"])
    data["graphs"][0]["name"] = "Other"
    write(mutant, {**members, "graph.json": dump(data)})
    assert "plan.json was not made of the graphs in graph.json" in refused(mutant)


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
