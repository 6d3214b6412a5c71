"""Programs that stay and compute tile after tile: right for any number of them, and never idle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom.compiler.artifact import rederive
from convloom.compiler.artifact.read import open_artifact
from convloom.compiler.records import rank
from convloom.kernels import registry
from convloom.kernels.contract import cost_model, programmatic_launch
from convloom.kernels.contract.cost_model import Machine
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Launch, Problem
from convloom.kernels.contract.spec import FLOAT_DTYPES, TensorSpec
from convloom.kernels.contract.targets import GPU_TARGETS, INTERPRETER, Target, parse
from convloom.kernels.convolution import conv2d
from convloom.kernels.devices import offline
from convloom.kernels.products import product
from convloom.kernels.unmeasured import gemm_persistent, gemm_tma
from torch import nn

from . import harness, machine_code
from .nets import make
from .test_offline import conv, sums_of
from .test_residual import CHAIN, problem, tensors_of

SM_90 = parse("cuda:sm_90")
LARGE = conv(64, 256, 56, 1, n=32)
"""A 1x1 convolution with many tiles of one step."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A GPU of two multiprocessors, so that small problems have more tiles than it has programs."""
    gpu = replace(cost_model.DEFAULT, multiprocessors=2)
    monkeypatch.setattr(cost_model, "machine_for", lambda target: gpu)
    return gpu


def staying(asked: Problem, target: Target = SM_90) -> list[Config]:
    """Of pointers and of descriptors the smallest and the largest configuration that stays."""
    found: dict[bool, list[Config]] = {}
    for tile in registry.get(asked.op).configs(asked, target):
        if gemm_persistent.programs_per_sm(tile):
            found.setdefault(gemm_tma.uses_tma(tile), []).append(tile)
    return [tile for tiles in found.values() for tile in dict.fromkeys((tiles[0], tiles[-1]))]


def launch_of(asked: Problem, tile: Config, target: Target) -> Launch:
    (launch,) = registry.get(asked.op).launches(asked, tile, target)
    return launch


def small_tiles(asked: Problem) -> list[Config]:
    """Tiles of 16 and 32 rows, whose number fills no multiple of the programs."""
    shapes = {(16, 32, 2), (32, 32, 4)}
    tiles = [
        tile
        for tile in registry.get(asked.op).configs(asked, SM_90)
        if gemm_persistent.programs_per_sm(tile)
        and (tile["BLOCK_M"], tile["BLOCK_N"], tile.num_warps) in shapes
    ]
    assert {gemm_persistent.programs_per_sm(tile) for tile in tiles} == {1, 2}
    return tiles[:1] + tiles[-1:]


@pytest.mark.interpreter
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["linear", "1x1"])
def test_it_agrees_with_the_reference(kind: str, dtype: torch.dtype) -> None:
    """Sizes that fill no tile; also of a smaller batch, which leaves the other samples alone."""
    asked = problem(kind, dtype)
    op, batch = registry.get(asked.op), asked.inputs[0].spec.batch or 1
    inputs, operands = tensors_of(asked)
    for tile in small_tiles(asked):
        launch = launch_of(asked, tile, INTERPRETER)
        assert launch.grid_at(batch)[0] < launch.tiles_at(batch)
        results = harness.run_interpreted(op, asked, inputs, operands, tile, batch)
        harness.compare(op, asked, results, inputs, operands)
        (fewer,) = harness.run_interpreted(op, asked, inputs, operands, tile, batch - 1)
        assert torch.equal(fewer[: batch - 1], results[0][: batch - 1])
        assert fewer[batch - 1 :].isnan().all()


@pytest.mark.interpreter
@pytest.mark.usefixtures("small")
def test_descriptors_agree_with_the_reference() -> None:
    asked = replace(problem("1x1"), prologue=(), prologue_operands=())
    wide = harness.problem_for(
        registry.get("conv2d"),
        asked.attributes,
        (asked.inputs[0].spec.with_(shape=(7, 64, 7, 7), batch=7), asked.inputs[1].spec),
        CHAIN,
        (asked.operands[0].spec, asked.output.spec.with_(shape=(7, 40, 7, 7), batch=7)),
        pad=8,
    )
    inputs, operands = tensors_of(wide)
    tile = next(tile for tile in staying(wide) if gemm_tma.uses_tma(tile))
    op = registry.get("conv2d")
    for batch in (7, 6):
        results = harness.run_interpreted(op, wide, inputs, operands, tile, batch)
        if batch == 7:
            harness.compare(op, wide, results, inputs, operands)
        assert results[0][batch:].isnan().all() and not results[0][:batch].isnan().any()


@pytest.mark.interpreter
@pytest.mark.usefixtures("small")
def test_prologues_whole_numbers_and_special_values_at_wide_offsets() -> None:
    plain = problem("1x1", torch.float32)
    op, vector = registry.get("conv2d"), TensorSpec((64, 1, 1), torch.float32)
    asked = replace(
        plain,
        prologue=(Stage("mul"), Stage("relu")),
        prologue_operands=(harness.place(vector),),
    )
    inputs, operands = tensors_of(asked, whole=True)
    before = (harness.make_integers(vector, 5, -2, 2),)
    applied = (torch.relu(inputs[0] * before[0]), inputs[1])
    (exact,) = harness.expected(op, plain, applied, operands)
    special = tuple(harness.with_special_values(operand, 3) for operand in operands)
    for tile in small_tiles(asked):
        (result,) = harness.run_interpreted(op, asked, inputs, operands, tile, 3, before=before)
        assert torch.equal(result.double(), exact), tile
        results = harness.run_interpreted(op, plain, inputs, special, tile, 3, wide=True)
        harness.compare(op, plain, results, inputs, special)


@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda target: target.name)
def test_the_grid_follows_from_the_target(target: Target) -> None:
    """As many programs as its multiprocessors hold; fewer images have fewer tiles to share."""
    asked = conv(64, 256, 56, 1, n=256)
    batched = replace(
        asked, outputs=(replace(asked.output, spec=asked.output.spec.with_(batch=256)),)
    )
    for tile in staying(batched, target):
        launch = launch_of(batched, tile, target)
        resident = gemm_persistent.programs_per_sm(tile)
        assert launch.grid_at(256)[0] == cost_model.machine_for(target).multiprocessors * resident
        assert launch.grid_at(1)[0] == min(launch.tiles_at(1), launch.grid_at(256)[0])
        plain = replace(tile, blocks=tile.blocks[:-1])
        assert launch_of(batched, plain, target).grid_at(256)[0] == launch.tiles_at(256)


def test_it_is_refused_with_a_reason() -> None:
    op, tile = registry.get("conv2d"), staying(LARGE)[0]

    def reason(asked: Problem = LARGE, target: Target = SM_90, **blocks: int) -> str:
        changed = replace(tile, blocks=tuple({**dict(tile.blocks), **blocks}.items()))
        return str(op.legal(asked, changed, target))

    assert reason() == "None"
    few = conv(64, 256, 7, 1, n=1)
    assert "tiles for 132 programs; none would have a second one" in reason(few)
    assert not staying(few)
    assert "4 programs share each tile" in reason(SPLIT=4)
    assert "copies the next tile meanwhile" in reason(RESIDUAL_FIRST=1)
    sm_86 = parse("cuda:sm_86")
    sizes = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "PERSISTENT": 2}
    assert "2 programs need 147456 bytes of shared memory" in reason(target=sm_86, **sizes)


@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda target: target.name)
def test_it_is_never_a_default(target: Target) -> None:
    """By the model programs that stay are no slower, and faster where one fills a multiprocessor;
    only the tuner may take them."""
    op = registry.get("conv2d")
    assert gemm_persistent.programs_per_sm(op.default(LARGE, target)) == 0
    tiles = staying(LARGE, target)
    assert len(tiles) == (4 if target.capability >= 90 else 2)
    for tile in tiles:
        plain = replace(tile, blocks=tile.blocks[:-1])
        times = [rank.modelled_us(op, LARGE, target, each) for each in (tile, plain)]
        assert times[0] <= times[1]
        assert cost_model.padding(
            launch_of(LARGE, tile, target), tile, LARGE
        ) == cost_model.padding(launch_of(LARGE, plain, target), plain, LARGE)
    ranked = rank.rank(op, LARGE, target, rank.space(op, LARGE, target))
    tried = rank.varied(op, LARGE, target, ranked, 12)
    assert any(map(gemm_persistent.programs_per_sm, tried))
    assert not all(map(gemm_persistent.programs_per_sm, tried))


# Machine code.


def compiled(launch: Launch, asked: Problem, target: Target) -> offline.CompileRequest:
    (wanted,) = rank.requests(registry.get("conv2d"), asked, [launch], target)
    return wanted


@pytest.mark.parametrize("depth", [64, 512])
@pytest.mark.parametrize("target", GPU_TARGETS, ids=lambda target: target.name)
def test_the_largest_tiles_copy_asynchronously_and_do_not_spill(target: Target, depth: int) -> None:
    """Also tiles of a single step, which have nothing to pipeline where programs do not stay."""
    asked = conv(depth, 256, 56, 1, n=32)
    tiles = list(_largest(asked, target))
    assert len(tiles) == (2 if target.capability >= 90 else 1)
    for tile in tiles:
        report = offline.report(compiled(launch_of(asked, tile, target), asked, target))
        assert report.spill_bytes == 0 and report.shared_bytes <= target.shared_bytes, tile
        assert report.count("UTMALDG" if gemm_tma.uses_tma(tile) else "LDGSTS.128"), tile
        assert not report.count("LDG.U16") and report.count("STG.128"), tile


def _largest(asked: Problem, target: Target) -> Iterator[Config]:
    """Of each kind of copies, among those of at most 64 sums per thread."""
    for tma in (False, True):
        tiles = [
            tile
            for tile in registry.get("conv2d").configs(asked, target)
            if gemm_persistent.programs_per_sm(tile) and gemm_tma.uses_tma(tile) is tma
            if sums_of(tile) <= 64 and tile["BLOCK_K"] == 64
        ]
        if tiles:
            yield max(
                tiles, key=lambda t: (t["BLOCK_M"] * t["BLOCK_N"] // t.num_warps, t["BLOCK_K"])
            )


def test_a_programmatic_one_waits_before_it_touches_memory() -> None:
    launch = programmatic_launch.programmatic(launch_of(LARGE, staying(LARGE)[0], SM_90), SM_90)
    sass = offline.disassembly(offline.compile_request(compiled(launch, LARGE, SM_90)))
    found = [each[2].split(".")[0] for each in machine_code.INSTRUCTION.finditer(sass)]
    touches = [at for at, name in enumerate(found) if name in ("LDG", "LDGSTS", "STG")]
    assert found.count("ACQBULK") == 1 and found.index("ACQBULK") < min(touches)


# Files.


def test_a_file_keeps_the_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every batch of its range, and the same plan is made of its graph again."""
    default = product.default

    def stays(asked: Problem, target: Target) -> Config:
        return staying(asked, target)[0] if target.is_gpu else default(asked, target)

    def forward(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(m.conv(x))

    module, inputs = make(forward, (4, 16, 64, 64), conv=nn.Conv2d(16, 64, 1))
    algorithms = (
        each._replace(default=stays) if each.default is default else each
        for each in conv2d.ALGORITHMS
    )
    monkeypatch.setattr(conv2d, "ALGORITHMS", tuple(algorithms))
    exe = convloom.compile(
        module, inputs, target="cuda:sm_90", dtype=torch.float16, dynamic_batch=(1, 4),
        tuning="heuristic", passes=(),
    )  # fmt: skip
    exe.save(tmp_path / "net.loom")
    artifact = open_artifact(tmp_path / "net.loom")
    grids = [call.grid for call in artifact.programs[0].calls]
    (kept,) = [grid for grid in grids if grid.most is not None]
    assert kept.most == kept.programs_at(4) == 132 and kept.programs_at(1) < 132
    assert not rederive.differences(artifact)
