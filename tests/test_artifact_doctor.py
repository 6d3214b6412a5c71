"""Files that keep their manifest right and lie all the same: what loading refuses, and what
`doctor` finds when it makes the whole file again."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.cli import main as cli
from convloom.compiler.artifact import rederive, tensors
from convloom.compiler.artifact.archive import digest
from convloom.compiler.artifact.read import open_artifact
from convloom.compiler.graph.typed import dump
from torch import nn

from .artifact_files import members_of, refused, rewrite, save_small, write
from .nets import make

pytestmark = pytest.mark.interpreter
Members = dict[str, bytes]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def members(path: Path) -> Members:
    return members_of(path)


@pytest.fixture
def mutant(tmp_path: Path) -> Path:
    return tmp_path / "mutant.loom"


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, dict[str, str]]]:
    """What `convloom doctor FILE` finds, by the name of the check."""

    def run(path: Path, status: int) -> dict[str, dict[str, str]]:
        assert cli.main(["doctor", str(path), "--json"]) == status
        found = json.loads(capsys.readouterr().out)
        assert found["ok"] == (status == 0)
        return {check["name"]: check for check in found["checks"]}

    return run


def differences(path: Path, members: Members) -> list[str]:
    write(path, members)
    return rederive.differences(open_artifact(path))


def with_plan(members: Members, change: Callable[[Any], None]) -> Members:
    """The members with a change of the plan's first program."""
    plan = json.loads(members["plan.json"])
    change(plan["programs"][0])
    return {**members, "plan.json": dump(plan)}


# The command.


def test_doctor_compares_every_byte_without_the_cache(
    path: Path, doctor: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing can be cached it compiles all the same, and says what nothing vouches for."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path / "file"))
    checks = doctor(path, 0)
    assert checks["made again"]["found"] == "plan and weights: what the graphs give here"
    assert checks["machine code"]["found"] == "what the graphs give here"
    assert "the graphs with their weights" in checks["on trust"]["found"]
    assert os.environ["CONVLOOM_CACHE_DIR"] == str(tmp_path / "file")


def test_a_compiler_that_is_not_here_is_said_and_not_taken_for_right(
    members: Members, mutant: Path, doctor: Callable[..., Any]
) -> None:
    plan = json.loads(members["plan.json"])
    plan["versions"] = [["convloom", "0.1.0"], ["torch", "2.11.0"], ["triton", "3.5.0"]]
    write(mutant, {**members, "plan.json": dump(plan)})
    checks = doctor(mutant, 3)
    assert checks["machine code"]["status"] == "not compared"
    assert "made with triton 3.5.0" in checks["machine code"]["found"]
    # What can be compared is.
    plan["programs"][0]["calls"][0]["grid"]["block_rows"] *= 2
    write(mutant, {**members, "plan.json": dump(plan)})
    (told,) = rederive.differences(open_artifact(mutant))
    assert told == "cuda:sm_80: its launches are not those of its graph"


# Kernels.


def cubins(members: Members) -> list[str]:
    return [name for name in members if name.endswith(".cubin")]


def test_code_under_the_name_of_other_code_is_refused(members: Members, mutant: Path) -> None:
    name = cubins(members)[0]
    write(mutant, {**members, name: members[name] + b"\0"})
    assert f"'{name}' is not named by its sha256" in refused(mutant)


def test_other_code_under_its_own_name_is_found(members: Members, mutant: Path) -> None:
    name, code = cubins(members)[0], members[cubins(members)[0]] + b"\0"
    changed = {key: data for key, data in members.items() if key != name}
    new = f"kernels/sm_80/{digest([code])[:32]}.cubin"
    changed["plan.json"] = changed["plan.json"].replace(name.encode(), new.encode())
    (told,) = differences(mutant, {**changed, new: code})
    assert told == "cuda:sm_80: its kernels are not those of its graph"


def test_code_that_nobody_calls_is_found(members: Members, mutant: Path) -> None:
    code = b"\x7fELF of somebody else"
    name = f"kernels/sm_80/{digest([code])[:32]}.cubin"
    assert differences(mutant, {**members, name: code}) == [f"'{name}' is of no program"]


def test_portable_code_that_is_left_out_is_found(members: Members, mutant: Path) -> None:
    def without_ptx(program: Any) -> None:
        for image in program["images"]:
            image["ptx"] = None

    changed = with_plan(members, without_ptx)
    kept = {name: data for name, data in changed.items() if not name.endswith(".ptx")}
    assert "its kernels are not those" in differences(mutant, kept)[0]


# Weights.


def test_weights_of_the_gpu_alone_that_were_changed_are_found(
    members: Members, mutant: Path
) -> None:
    """Packed as the graph's own are not, and negated under the old name."""
    whole = bytearray(members[tensors.MEMBER])
    header = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
    data = json.loads(members["plan.json"])
    graphs = json.loads(members["graph.json"])["graphs"]
    shared = {stored["tensor"] for _, stored in graphs[0]["constants"]}
    packed = [name for _, name in data["programs"][0]["constants"] if name not in shared]
    assert packed
    start, end = header[packed[0]]["data_offsets"]
    at = len(whole) - max(entry["data_offsets"][1] for entry in header.values())
    flat = torch.frombuffer(whole[at + start : at + end], dtype=torch.float32).neg()
    whole[at + start : at + end] = flat.numpy().tobytes()
    (told,) = differences(mutant, {**members, tensors.MEMBER: bytes(whole)})
    assert told.startswith("'weights.safetensors' is not what its graphs give")


# The outside.


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Members:
    """A file of two results and two targets."""
    module, inputs = make(
        lambda m, x: (torch.relu(m.one(x)), m.two(x)), (2, 3, 4, 4),
        one=nn.Conv2d(3, 8, 1), two=nn.Conv2d(3, 8, 1),
    )  # fmt: skip
    options: dict[str, Any] = {"dynamic_batch": (1, 4), "tuning": "heuristic"}
    both = [
        convloom.compile(module, inputs, target=target, **options)
        for target in ("reference", "interpreter")
    ]
    path = tmp_path_factory.mktemp("files") / "two.loom"
    both[0].save(path, both[1])
    return members_of(path)


def exchanged(program: Any) -> None:
    program["results"].reverse()


def literal(program: Any) -> None:
    program["results"][0] = ["literal", 7]


def smaller(program: Any) -> None:
    program["batch"] = [2, 4]


def counted(program: Any) -> None:
    program["summary"] = [[name, number + (name == "convs")] for name, number in program["summary"]]


@pytest.mark.parametrize("change, what", [
    (exchanged, "results"), (literal, "results"), (smaller, "batch"), (counted, "summary"),
])  # fmt: skip
def test_an_outside_that_is_not_the_graphs_is_refused_and_found(
    two: Members, mutant: Path, change: Callable[[Any], None], what: str
) -> None:
    plan = json.loads(two["plan.json"])
    for program in plan["programs"]:
        change(program)
    told = differences(mutant, {**two, "plan.json": dump(plan)})
    assert len(told) == 2 and all(f"is not that of its plan: {what}" in each for each in told)
    with pytest.raises(convloom.ArtifactError, match=f"is not that of its plan: {what}"):
        convloom.load(mutant, "reference")


def test_programs_in_another_order_are_found(two: Members, mutant: Path) -> None:
    plan = json.loads(two["plan.json"])
    plan["programs"].reverse()
    (told,) = differences(mutant, {**two, "plan.json": dump(plan)})
    assert "'plan.json' is not what its graphs give" in told


def test_geometry_that_torch_would_trip_over_is_refused(two: Members, mutant: Path) -> None:
    changed = two["graph.json"].replace(b'"dilation":[1,1]', b'"dilation":[0,1]')
    data = json.loads(changed)
    assert changed != two["graph.json"]
    rewrite(mutant, two, "graph.json", data)
    with pytest.raises(convloom.ArtifactError, match=r"dilation expected numbers of 1 or more"):
        convloom.load(mutant, "reference")


def test_a_graph_that_nobody_uses_is_found(two: Members, mutant: Path) -> None:
    graphs, plan = json.loads(two["graph.json"])["graphs"], json.loads(two["plan.json"])
    more = copy.deepcopy(graphs[0])
    more["name"] = "another"
    graphs.append(more)
    plan["graphs"].append(digest([dump(more)]))
    changed = {**two, "graph.json": dump({"graphs": graphs}), "plan.json": dump(plan)}
    assert "'graph.json' is not what" in differences(mutant, changed)[0]


def test_a_tile_that_no_memory_holds_is_refused(two: Members, mutant: Path) -> None:
    plan = json.loads(two["plan.json"])
    (program,) = (each for each in plan["programs"] if each["target"] == "interpreter")
    program["steps"][0]["tile"]["blocks"][0][1] = 2**40
    write(mutant, {**two, "plan.json": dump(plan)})
    with pytest.raises(convloom.ArtifactError, match=r"step \w+: BLOCK_\w+ is 1,099,511,627,776"):
        convloom.load(mutant, "interpreter")


def test_constants_that_are_more_exact_than_kernels_are_refused(
    two: Members, mutant: Path
) -> None:
    data = json.loads(two["graph.json"])
    for graph in data["graphs"]:
        spec = next(n["outputs"][0] for n in graph["nodes"] if n["op"] == "constant")
        spec["dtype"] = "float64"
    rewrite(mutant, two, "graph.json", data)
    with pytest.raises(convloom.ArtifactError, match=r"is float64\["):
        convloom.load(mutant, "reference")
