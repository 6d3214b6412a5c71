"""Sums that the programs of a cluster put together in their shared memories: right, and the same
bits as without a cluster."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.artifact.read import open_artifact
from convloom.compiler.run.runtime import bind_launch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract import cost_model
from convloom.kernels.contract.op import Config, Launch, Problem
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import parse
from convloom.kernels.devices import offline
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile import choice, split_k
from convloom.kernels.tile.conv_geometry import Conv2d
from torch import nn

from . import harness
from .test_offline import conv
from .test_split import RESIDUAL

SM_90 = parse("cuda:sm_90")
HALF = torch.float16


@pytest.fixture(autouse=True)
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLOOM_LAUNCH", "clusters")


# -------------------------------------------------------------------------------- results


def problem(name: str, attributes: object, x: TensorSpec, w: TensorSpec) -> Problem:
    op = registry.get(name)
    (y,) = op.infer(attributes, (x, w))
    return harness.problem_for(op, attributes, (x, w), RESIDUAL, (y,), pad=8)


def half(*shape: int, batch: int | None = None) -> TensorSpec:
    if len(shape) == 4 and batch:
        return TensorSpec(shape, HALF, Layout.NHWC, batch)
    return TensorSpec(shape, HALF, batch=batch)


PROBLEMS = {
    "3x3": problem(
        "conv2d", Conv2d(padding=(1,) * 4), half(2, 40, 7, 5, batch=2), half(48, 40, 3, 3)
    ),
    "groups": problem(
        "conv2d", Conv2d((2, 2), (1, 0, 1, 1), groups=2), half(2, 160, 5, 6, batch=2),
        half(48, 80, 3, 3),
    ),
    "linear": problem("linear", Linear(), half(21, 1100, batch=21), half(40, 1100)),
}  # fmt: skip


def with_blocks(tile: Config, **blocks: int) -> Config:
    return replace(tile, blocks=tuple({**dict(tile.blocks), **blocks}.items()))


def tiles_of(asked: Problem, split: int) -> list[Config]:
    """The first and the last tile of the search space in clusters of so many programs."""
    found = [
        tile
        for tile in registry.get(asked.op).configs(asked, SM_90)
        if choice.cluster_of(tile) == split
    ]
    return [found[0], found[-1]] if found else []


QUICK = (("3x3", 2), ("groups", 2), ("linear", 8))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        pytest.param(*pair, marks=() if pair in QUICK else pytest.mark.slow)
        for pair in itertools.product(PROBLEMS, (2, 4, 8))
    ],
)
def test_a_cluster_makes_the_bits_of_a_split_sum(name: str, split: int) -> None:
    """Parts are added up in the same order; a call with fewer samples leaves the others alone."""
    asked = PROBLEMS[name]
    op, batch = registry.get(asked.op), asked.inputs[0].spec.batch or 1
    tensors = tuple(
        harness.make_tensor(each.spec, at, -1, 1) for at, each in enumerate(asked.inputs)
    )
    residual = harness.make_tensor(asked.output.spec, 9, -1, 1)
    tiles = tiles_of(asked, split)
    assert tiles or split == 8
    for tile in tiles:
        for count in (batch, batch - 1):
            given = (harness.Emulator("sm_90"), op, asked, tensors, (residual,))
            (ours,) = harness.run_on(*given, tile, count)
            (theirs,) = harness.run_on(*given, with_blocks(tile, CLUSTER=0), count)
            assert torch.equal(ours.nan_to_num(7.0), theirs.nan_to_num(7.0)), tile
        assert ours[batch - 1 :].isnan().all()
        (whole,) = harness.run_on(*given, tile, batch)
        harness.compare(op, asked, (whole,), tensors, (residual,))


def test_a_network_is_right_and_its_file_starts_clusters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """At batch 1, with programmatic launches as well."""
    monkeypatch.setenv("CONVLOOM_LAUNCH", "clusters, programmatic")
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(64, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 64, 3, padding=1)
    ).eval()
    x = torch.randn(1, 64, 6, 6)
    exe = convloom.compile(module, (x,), target="emulator:sm_90", dtype=HALF)
    clusters = [launch.cluster for _, launch in exe.plan.kernels]
    assert max(clusters) > 1
    torch.testing.assert_close(exe(x), module(x), rtol=5e-3, atol=5e-3)
    made = convloom.compile(module, (x,), target="cuda:sm_90", dtype=HALF, tuning="heuristic")
    made.save(tmp_path / "made.loom")
    (program,) = open_artifact(tmp_path / "made.loom").programs
    launches = [launch for _, launch in made.plan.kernels]
    for call, launch in zip(program.calls, launches, strict=True):
        image = program.images[call.image]
        assert image.num_ctas == launch.cluster
        assert call.grid.programs_at(1) * image.num_ctas == launch.grid_at(1)[0]
        assert image.shared_bytes > launch.cluster_bytes
    shared = [at for at, launch in enumerate(launches) if launch.cluster > 1]
    assert [twin.step for twin in program.twins] == [program.calls[at].step for at in shared]
    assert all(program.images[twin.image].num_ctas == 1 for twin in program.twins)


# ------------------------------------------------------------------------------- the choice


def test_clusters_are_chosen_only_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a default nor in the tuning space otherwise, and on no other GPU."""
    op, asked = registry.get("conv2d"), conv(512, 512, 7, 3, n=1)
    assert choice.cluster_of(op.default(asked, SM_90)) > 1
    assert any(choice.cluster_of(tile) > 1 for tile in op.configs(asked, SM_90))
    for words, target in (("", SM_90), ("programmatic", SM_90), ("clusters", parse("cuda:sm_80")),
                          ("clusters", parse("cuda:sm_100"))):  # fmt: skip
        monkeypatch.setenv("CONVLOOM_LAUNCH", words)
        assert choice.cluster_of(op.default(asked, target)) == 1
        assert all(choice.cluster_of(tile) == 1 for tile in op.configs(asked, target))


def test_a_cluster_that_cannot_be_is_refused() -> None:
    op, asked = registry.get("conv2d"), conv(512, 512, 7, 3, n=1)
    tile = op.default(asked, SM_90)
    assert op.legal(asked, tile, SM_90) is None
    for count in (1, 3, 16):
        odd = op.legal(asked, with_blocks(tile, SPLIT=count), SM_90)
        assert odd is None if count == 1 else f"a cluster of {count}; 2, 4 and 8" in (odd or "")
    assert "on sm_90, not on cuda:sm_80" in (op.legal(asked, tile, parse("cuda:sm_80")) or "")
    large = with_blocks(tile, BLOCK_M=256, BLOCK_N=128, BLOCK_K=64)
    assert "shared memory" in (op.legal(asked, large, SM_90) or "")


def test_an_unknown_launch_option_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLOOM_LAUNCH", "clusters,branches,programmatic")
    with pytest.raises(InvalidInputError, match="exclude each other"):
        registry.get("conv2d").default(conv(512, 512, 7, 3, n=1), SM_90)
    monkeypatch.setenv("CONVLOOM_LAUNCH", "cluster")
    with pytest.raises(InvalidInputError, match="programmatic, branches or clusters"):
        registry.get("conv2d").default(conv(512, 512, 7, 3, n=1), SM_90)


def launched(tile: Config, asked: Problem) -> Launch:
    return registry.get(asked.op).launches(asked, tile, SM_90)[0]


def test_the_model_knows_what_a_cluster_saves() -> None:
    """Two latencies, and what one program reads of the others; no workspace."""
    asked = conv(512, 512, 7, 3, n=1)
    tile = with_blocks(registry.get("conv2d").default(asked, SM_90), SPLIT=4)
    ours, theirs = (launched(with_blocks(tile, CLUSTER=count), asked) for count in (1, 0))
    area = tile["BLOCK_M"] * tile["BLOCK_N"]
    assert (ours.combine_bytes, theirs.combine_bytes) == (3 * area, 16 * area)
    assert (ours.cluster, theirs.cluster) == (4, 1) and ours.grid_at(1) == theirs.grid_at(1)
    assert not ours.scratch and len(theirs.scratch) == 2
    gpu = cost_model.machine_for(SM_90)
    cycles = 2 * cost_model.CLUSTER_CYCLES + 3 * area / cost_model.CLUSTER_BYTES[4]
    assert cost_model.combine_us(gpu, ours) == pytest.approx(cycles / 1_600)
    assert cost_model.combine_us(gpu, ours) < cost_model.combine_us(gpu, theirs)


# ----------------------------------------------------------------------------- the compiler


def test_the_kernel_is_told_of_its_cluster_and_its_memory() -> None:
    """Parts lie behind what the compiler asked for; nothing goes through global memory."""
    asked = conv(512, 512, 7, 3, n=1)
    tile = registry.get("conv2d").default(asked, SM_90)
    apart, joint = (
        offline.request(launched(with_blocks(tile, CLUSTER=count), asked), lambda ref: HALF, SM_90)
        for count in (0, 1)
    )
    plain, compiled = map(offline.compile_request, (apart, joint))
    split = choice.split_of(tile)
    more = split_k.part_bytes(tile["BLOCK_M"], tile["BLOCK_N"])
    assert (plain.metadata.num_ctas, compiled.metadata.num_ctas) == (1, split)
    assert compiled.packed_metadata[1:3] == (split, compiled.metadata.shared)
    assert compiled.metadata.shared > more > 0 and joint.cluster_bytes == more
    ptx = compiled.asm["ptx"]
    assert "%dynamic_smem_size" in ptx and ptx.count("barrier.cluster.arrive") == 2
    assert "atom.global" not in ptx and "ld.shared::cluster" not in plain.asm["ptx"]
    report = offline.report(joint)
    assert not report.spill_bytes and report.shared_bytes == compiled.metadata.shared


# ------------------------------------------------------------------------------ the launcher


def test_a_launcher_starts_a_cluster_in_the_place_of_each() -> None:
    """A grid counts clusters there, of which Triton's launcher knows how large they are."""
    asked = conv(512, 512, 7, 3, n=1)
    launch = launched(registry.get("conv2d").default(asked, SM_90), asked)
    started: dict[str, Any] = {}
    memory = torch.zeros(32, dtype=HALF)

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            started["grid"] = grid

    bind_launch(launch, Compiled(), lambda ref: memory, 1)
    assert launch.cluster > 1
    assert started["grid"] == (launch.grid_at(1)[0] // launch.cluster, 1, 1)
