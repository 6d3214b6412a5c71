"""Sums split among programs: right for every split, and the same bits whoever arrives last."""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from convloom.compiler import api
from convloom.compiler.graph.memory import ALIGNMENT
from convloom.compiler.plan.plan import KernelStep
from convloom.compiler.records.choose import Choice, heuristic
from convloom.kernels import registry
from convloom.kernels.contract import cost_model
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Op, Problem, config
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import GPU_TARGETS, Target, parse
from convloom.kernels.devices import emulator, interpreter, offline
from convloom.kernels.devices.emulator import FaultError
from convloom.kernels.fused.conv_sum import ConvSum
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile import choice, split_k
from convloom.kernels.tile.conv_geometry import Conv2d
from convloom.kernels.tile.geometry import Tile
from torch import nn

from . import harness
from .test_offline import conv, reports

SM_90 = parse("cuda:sm_90")
RESIDUAL = (Stage("add"), Stage("relu"))


def image(n: int, c: int, size: int, batch: int | None = None) -> TensorSpec:
    return TensorSpec((n, c, size, size), torch.float32, Layout.NHWC, batch)


def problem(name: str, attributes: object, *inputs: TensorSpec) -> Problem:
    op = registry.get(name)
    (y,) = op.infer(attributes, inputs)
    return harness.problem_for(op, attributes, inputs, RESIDUAL, (y,), pad=3)


def weights(*shape: int) -> TensorSpec:
    return TensorSpec(shape, torch.float32)


PROBLEMS = {
    "3x3": problem("conv2d", Conv2d(padding=(1,) * 4), image(2, 40, 5, 2), weights(48, 40, 3, 3)),
    "1x1": problem("conv2d", Conv2d(), image(2, 300, 5, 2), weights(20, 300, 1, 1)),
    "groups": problem(
        "conv2d", Conv2d((2, 2), (1, 0, 1, 1), groups=2), image(2, 160, 5, 2), weights(36, 80, 3, 3)
    ),
    "two convolutions": problem(
        "conv_sum", ConvSum(second=Conv2d((2, 2))), image(2, 520, 4, 2), weights(24, 520, 1, 1),
        image(2, 72, 8, 2), weights(24, 72, 1, 1),
    ),
    "linear": problem(
        "linear", Linear(), TensorSpec((3, 600), torch.float32, batch=3), weights(40, 600)
    ),
}


def split_configs(asked: Problem) -> list[Config]:
    """The smallest tile of the search space for every split."""
    found: dict[int, Config] = {}
    for tile in registry.get(asked.op).configs(asked, SM_90):
        found[choice.split_of(tile)] = tile
    return [found[count] for count in sorted(found)]


def run(asked: Problem, tile: Config, batch: int) -> torch.Tensor:
    op = registry.get(asked.op)
    specs = [operand.spec for operand in asked.inputs]
    tensors = tuple(harness.make_tensor(spec, at, -1, 1) for at, spec in enumerate(specs))
    residual = harness.make_tensor(asked.output.spec, 9, -1, 1)
    (result,) = harness.run_interpreted(op, asked, tensors, (residual,), tile, batch)
    if batch == specs[0].batch:
        harness.compare(op, asked, (result,), tensors, (residual,))
    return result


@pytest.mark.interpreter
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_split_is_right_and_repeatable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs run in another order: the parts must be added up in their own."""
    asked = PROBLEMS[name]
    batch = asked.inputs[0].spec.batch or 1
    tiles = split_configs(asked)
    assert len(tiles) > 1 and choice.split_of(tiles[-1]) >= 2
    inorder = {tile: run(asked, tile, batch) for tile in tiles}
    smaller = {tile: run(asked, tile, batch - 1) for tile in tiles}
    mixed = random.Random(name)

    def shuffled(*ranges: range) -> list[tuple[int, ...]]:
        every = list(itertools.product(*ranges))
        return mixed.sample(every, len(every))

    monkeypatch.setattr(interpreter, "itertools", SimpleNamespace(product=shuffled))
    for tile in tiles:
        assert torch.equal(run(asked, tile, batch), inorder[tile]), tile
        # A call with fewer samples leaves the others alone, and the semaphores as it found them.
        now = run(asked, tile, batch - 1)
        assert torch.equal(now.nan_to_num(7.0), smaller[tile].nan_to_num(7.0)), tile
        assert now[batch - 1 :].isnan().all()


@triton.jit
def exchange_kernel(workspace, semaphores, y, extras, m, SPLIT: tl.constexpr, TILE: tl.constexpr):
    """The sum of what programs hold in registers: no product's barriers are in between."""
    SIZE: tl.constexpr = TILE.M
    part = tl.program_id(0)
    acc = tl.zeros((SIZE, SIZE), tl.float32) + (part + 1).to(tl.float32)
    if split_k.store_partial(acc, workspace, semaphores, part * 0, part, SPLIT, TILE):
        acc = split_k.reduce_partials(workspace, semaphores, part * 0, SPLIT, TILE)
        tl.store(y + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :], acc)


SPLIT, SIZE, WARPS = 3, 32, 4


def exchanged(ptx: str, shared_bytes: int, seed: int) -> torch.Tensor:
    """What a compiled `exchange_kernel` leaves; its semaphore is zero again."""
    workspace = torch.full((SPLIT * SIZE**2,), torch.nan)
    semaphores = torch.zeros(1, dtype=torch.int32)
    y = torch.full((SIZE, SIZE), torch.nan)
    emulator.emulate(
        emulator.parse(ptx), [workspace, semaphores, y, 1], SPLIT, 32 * WARPS, shared_bytes, seed
    )
    assert int(semaphores) == 0
    return y


@pytest.mark.parametrize("generation", [80, 90])
def test_the_semaphore_counts_behind_every_store(generation: int) -> None:
    """Barriers in front of the count, and those behind it up to the first sum that is read back,
    behind which all threads know it, are missed where they are not there (Triton 3.9 makes more of
    them than one of each)."""
    compiled = offline.compile_request(
        offline.CompileRequest(
            kernel=f"{__name__}:exchange_kernel",
            pointers=(("workspace", "*fp32"), ("semaphores", "*i32"), ("y", "*fp32")),
            extras=(),
            constexprs=(("SPLIT", SPLIT), ("TILE", Tile(SIZE, SIZE))),
            num_warps=WARPS,
            num_stages=1,
            capability=generation,
        )
    )
    ptx, shared_bytes = compiled.asm["ptx"], compiled.metadata.shared
    for seed in range(4):
        assert (exchanged(ptx, shared_bytes, seed) == sum(range(1, SPLIT + 1))).all()
    read = re.search(r"cp\.async\.cg|ld\.global\.cg", ptx)
    assert read is not None
    barriers = [found.span() for found in re.finditer(r"bar\.sync\s+0;", ptx[: read.start()])]
    atomic = ptx.index("atom.global")
    for is_behind in (False, True):
        broken, removed = ptx, [span for span in barriers if (span[0] > atomic) == is_behind]
        assert removed
        for start, end in reversed(removed):
            broken = broken[:start] + broken[end:]
        with pytest.raises(FaultError, match=r"lie between|since the last barrier"):
            exchanged(broken, shared_bytes, 0)


def test_batch_1_splits_where_multiprocessors_would_idle() -> None:
    """The deep 3x3 convolutions of ResNet-50, and not the wide ones; no model above batch 1."""
    op = registry.get("conv2d")
    deep, wide = conv(512, 512, 7, 3, n=1), conv(512, 512, 7, 3, n=256)
    tile = op.default(deep, SM_90)
    assert choice.split_of(tile) > 1
    assert choice.split_of(op.default(wide, SM_90)) == 1
    (launch,) = op.launches(deep, tile, SM_90)
    unsplit = op.launches(deep, replace_split(tile, 1), SM_90)[0]
    gpu = cost_model.machine_for(SM_90)
    assert unsplit.grid_at(1)[0] < gpu.multiprocessors < 2 * launch.grid_at(1)[0]
    # Half of the input is not read twice: the programs of a tile share its sums.
    assert launch.l2_bytes < unsplit.l2_bytes
    sums, semaphores = launch.scratch
    assert sums.elements * 4 == launch.combine_bytes * semaphores.elements and semaphores.zeroed


def test_shared_sums_are_shared_evenly() -> None:
    """36 steps of 32 terms among 4 programs, where 18 of 64 would be 5 for the slowest; sums that
    are not shared keep the deeper steps. Both products of a residual block's end are shared."""
    found = choice.candidates(choice.Size(784, 128, 128, torch.float16, taps=9, splits=True), SM_90)
    depths = {(choice.split_of(tile) > 1, tile["BLOCK_K"]) for tile in found
              if tile["BLOCK_M"] == tile["BLOCK_N"] == 64}  # fmt: skip
    assert depths == {(False, 64), (True, 64), (True, 32)}
    half = TensorSpec((1, 512, 7, 7), torch.float16, Layout.NHWC)
    asked = harness.problem_for(registry.get("conv_sum"), ConvSum(), (
        half, TensorSpec((2048, 512, 1, 1), torch.float16),
        replace(half, shape=(1, 1024, 7, 7)), TensorSpec((2048, 1024, 1, 1), torch.float16),
    ))  # fmt: skip
    tile = config(4, 3, BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, GROUP_M=8, SPLIT=4)
    (launch,) = registry.get("conv_sum").launches(asked, tile, SM_90)
    assert launch.steps == 2 + 4 and len(launch.scratch) == 2
    assert launch.l2_bytes == 2 * (512 + 1024) * 128 // 4


def replace_split(tile: Config, count: int) -> Config:
    return replace(tile, blocks=tuple({**dict(tile.blocks), "SPLIT": count}.items()))


def test_the_semaphores_that_steps_share_are_enough_for_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first of two split convolutions has more tiles than the second."""

    def most_tiles(op: Op, problem: Problem, target: Target) -> Choice:
        if op.name != "conv2d":
            return heuristic(op, problem, target)
        tiles = [tile for tile in op.configs(problem, target) if choice.split_of(tile) == 2]
        return Choice(min(tiles, key=lambda tile: tile["BLOCK_M"] * tile["BLOCK_N"]))

    monkeypatch.setattr(api, "heuristic", most_tiles)
    layers = nn.Sequential(nn.Conv2d(256, 1024, 3, padding=1), nn.Conv2d(1024, 256, 3, padding=1))
    plan = api.lowered(
        layers.eval(), (torch.zeros(1, 256, 7, 7),), target="cuda:sm_90", dtype=torch.float16
    )[1]
    asked = [
        (launch.scratch[ref.index], plan.buffers[name])
        for step in plan.steps
        if isinstance(step, KernelStep)
        for launch in step.launches
        for ref, name in step.buffers.items()
        if ref.kind == "scratch"
    ]
    semaphores = [4 * wanted.elements for wanted, _ in asked if wanted.zeroed]
    assert len(semaphores) == 2 and semaphores[0] > ALIGNMENT > semaphores[1]
    for wanted, buffer in asked:
        assert (buffer.kind == "zeroed") == (buffer.name == "zeroed") == wanted.zeroed
        assert buffer.dtype is wanted.dtype
        assert buffer.size_bytes >= wanted.elements * wanted.dtype.itemsize


def test_adding_up_is_in_the_model() -> None:
    """More parts of a larger tile take longer to add up."""
    op, asked = registry.get("conv2d"), conv(512, 512, 7, 3, n=1)
    tile = op.default(asked, SM_90)
    gpu = cost_model.machine_for(SM_90)
    times = [
        cost_model.combine_us(gpu, op.launches(asked, replace_split(tile, count), SM_90)[0])
        for count in (1, 2, 4, 8)
    ]
    assert times[0] == 0.0 and times == sorted(set(times))
    assert split_k.combine_bytes(4, 64, 32) == 4 * 4 * 64 * 32


def test_a_program_waits_for_its_own_first_operands() -> None:
    """Those of a tile of 128x256 take what was fitted, those of a small one their share of that;
    where a launch does not tell its steps, as much as the former."""
    gpu = cost_model.machine_for(SM_90)
    size, firsts = choice.Size(8_192, 8_192, 512, torch.float16), []
    for block in ((128, 256, 8), (32, 32, 4)):
        launch = choice.launch_for_cost_model(size, choice.config_of(size, block, 64, 3, 1))
        firsts.append(cost_model.tile_cycles(gpu, launch, 0.0, torch.float16, 0.0).first)
    assert gpu.fill_cycles + firsts[0] == pytest.approx(2_000, rel=0.01)
    assert firsts[1] == pytest.approx(firsts[0] / 6)
    untold = replace(launch, steps=0, constexprs={})
    found = cost_model.tile_cycles(gpu, untold, 0.0, torch.float16, 0.0)
    assert found.first == cost_model.FIRST_CYCLES == pytest.approx(firsts[0], rel=0.01)


@pytest.mark.parametrize("target", [t for t in GPU_TARGETS if t.capability % 10 == 0], ids=str)
def test_split_convolutions_compile_without_spills(target: object) -> None:
    (report,) = reports(conv(512, 512, 7, 3, n=1), target)  # type: ignore[arg-type]
    assert isinstance(report, offline.KernelReport) and report.spill_bytes == 0
    assert report.count("LDGSTS.128") and report.count("ATOMG")
    assert not report.count("LDG.U16") and not report.count("LDGSTS.32")
