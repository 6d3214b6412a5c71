"""Saved executables whose hashes are right and whose plans or graphs are not: each is refused."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import convloom
import pytest
from convloom.compiler.artifact import archive
from convloom.compiler.graph.typed import dump
from convloom.errors import ArtifactError

from .artifact_files import members_of, refused, rewrite, save_small, write

pytestmark = pytest.mark.interpreter


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def members(path: Path) -> dict[str, bytes]:
    return members_of(path)


@pytest.fixture
def mutant(tmp_path: Path) -> Path:
    return tmp_path / "mutant.loom"


# Plans whose hashes are right.


def change(plan: Any, place: str, value: Any) -> None:
    *steps, last = place.split(".")
    for step in steps:
        plan = plan[int(step) if step.isdigit() else step]
    plan[int(last) if last.isdigit() else last] = value


P = "programs.0."
ABSURD = {
    "version": ("version", 1, "this convloom reads version 5"),
    "format": ("format", "zip", "not a convloom plan"),
    "no programs": ("programs", [], "it has no programs"),
    "unknown field": (P + "more", 1, "expected no field 'more'"),
    "target": (P + "target", "cuda:sm_42", "unknown target"),
    "another target": (P + "target", "cuda:sm_90", "expected a cubin in kernels/sm_90/"),
    "batch": (P + "batch", [4, 1], "batches 4 to 1"),
    "negative batch": (P + "batch", [-1, 4], "batches -1 to 4; expected a range within 0 to"),
    "only empty batches": (P + "batch", [0, 0], "that ends at 1 or above"),
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
    "the first below": (P + "buffer_list.0.size_bytes", -(2**62), "expected a number below"),
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
    "nesting": (P + "result", {"kind": "namedtuple", "items": [], "keys": []}, "not a structure"),
    "constant value": (P + "arguments.items.0.items.0",
                 {"kind": "constant", "items": [], "keys": ["[1]"]}, "constant that is not a bool"),
    "too many constants": (P + "arguments.items.0.items.0",
                  {"kind": "constant", "items": [], "keys": ["1"]}, "0 inputs and 1 results are"),
    "constant result": (P + "result", {"kind": "constant", "items": [], "keys": ["1"]},
                        "not a structure of"),
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
    "many programs": (P + "calls.0.grid.columns", 10_000, "programs for 64 rows"),
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


@pytest.mark.parametrize("role", ["write", "scratch"])
@pytest.mark.parametrize("kind", ["constant", "input"])
def test_a_write_into_what_is_only_read_is_refused(
    members: dict[str, bytes], mutant: Path, kind: str, role: str
) -> None:
    plan, program = program_of(members)
    kinds = {buffer["name"]: buffer["kind"] for buffer in program["buffer_list"]}
    every = (argument for call in program["calls"] for argument in call["arguments"])
    read = next(a for a in every if a["kind"] == "read" and kinds[a["buffer"]] == kind)
    read["kind"] = role
    write(mutant, {**members, "plan.json": dump(plan)})
    assert f"would {role} '{read['buffer']}', a buffer of {kind}" in refused(mutant)


def test_an_operand_that_only_the_largest_batch_holds_is_refused(
    members: dict[str, bytes], mutant: Path
) -> None:
    plan, program = program_of(members)
    spec = program["calls"][0]["arguments"][0]["operand"]["spec"]
    assert spec["batch"] == 4
    spec["batch"] = None
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "for a batch of 1" in refused(mutant)


def test_more_rows_than_elements_are_refused(members: dict[str, bytes], mutant: Path) -> None:
    plan, program = program_of(members)
    program["calls"][0]["grid"] |= {"rows": 1 << 20, "block_rows": 1 << 20, "columns": 1}
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "starts 1 programs for 1,048,576 rows on tensors" in refused(mutant)


def test_more_rows_than_elements_of_parts_are_refused(
    members: dict[str, bytes], mutant: Path
) -> None:
    """What a launch may touch counts, not the buffers that its parts lie in."""
    plan, program = program_of(members)
    call = program["calls"][0]
    parts = [argument["operand"] for argument in call["arguments"] if argument["operand"]]
    assert all(len(part["spec"]["shape"]) == 4 for part in parts)
    for part in parts:
        part["spec"]["shape"][2:] = [1, 1]
    call["grid"] |= {"rows": 400, "block_rows": 400, "columns": 1}
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "starts 1 programs for 400 rows on tensors" in refused(mutant)


def test_more_programs_than_a_gpu_counts_are_refused(
    members: dict[str, bytes], mutant: Path
) -> None:
    """Though there are elements for all of them."""
    plan, program = program_of(members)
    call = program["calls"][1]
    arena = {b["name"]: b for b in program["buffer_list"] if b["kind"] == "arena"}
    read = next(a for a in call["arguments"] if a["kind"] == "read" and a["buffer"] in arena)
    read["operand"] = None
    arena[read["buffer"]] |= {"size_bytes": 1 << 37, "offset": 0}
    call["grid"] |= {"rows": 4, "block_rows": 4, "columns": 1 << 31}
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "starts 2,147,483,648 programs" in refused(mutant)


def test_an_output_that_nobody_writes_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    plan, program = program_of(members)
    program["calls"].pop()
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "nobody writes output 'output0'" in refused(mutant)


def test_a_constant_of_another_dtype_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    """Of the same size, and kernels that agree with what the buffer says."""
    plan, program = program_of(members)
    constant = next(b for b in program["buffer_list"] if b["kind"] == "constant")
    assert constant["dtype"] == "float32"
    constant["dtype"] = "int32"
    for call in program["calls"]:
        for at, argument in enumerate(call["arguments"]):
            if argument["buffer"] == constant["name"]:
                program["images"][call["image"]]["signature"][at] = "*i32"
    write(mutant, {**members, "plan.json": dump(plan)})
    assert f"constant '{constant['name']}' of" in refused(mutant)


def test_a_read_before_the_write_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    plan, program = program_of(members)
    first, second, *rest = program["calls"]
    second["step"], first["step"] = first["step"], second["step"]
    program["calls"] = [second, first, *rest]
    write(mutant, {**members, "plan.json": dump(plan)})
    assert "before it is written" in refused(mutant)


def test_code_that_is_no_machine_code_is_refused(members: dict[str, bytes], mutant: Path) -> None:
    name, code = next(name for name in members if name.endswith(".cubin")), b"#!/bin/sh\n"
    new = f"kernels/sm_80/{archive.digest([code])[:32]}.cubin"
    changed = {each: data for each, data in members.items() if each != name}
    changed["plan.json"] = changed["plan.json"].replace(name.encode(), new.encode())
    write(mutant, {**changed, new: code})
    assert f"'{new}' is not machine code" in refused(mutant)


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

ABSURD_GRAPHS = {
    "op": ("op", "exec", "no op 'exec'"),
    "torch": ("op", "torch", "no op 'torch'"),
    "class": ("attributes.is", "TorchCall", "expected a class of Attributes"),
    "attributes": ("attributes", {}, "expected attributes with their class"),
    "attributes of another op": ("attributes.is", "NoAttributes", "are not those of linear"),
    "epilogue": ("epilogue.0.name", "system", "expected a pointwise function"),
    "parameters": ("epilogue.0.parameters", [1.0], "expected 0 numbers"),
    "channels": ("epilogue.0.channels", [5, 2], "expected a range of channels"),
    "a later value": ("epilogue.0.back", -1, "expected how many stages ago"),
    "a value of before": ("epilogue.0.back", 3, "stages that read values of their own chain"),
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
