"""Where the Hopper core is chosen, what it refuses, what the model knows of it, and whole networks
by it."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import convloom
import pytest
import torch
from convloom import settings
from convloom.compiler import api
from convloom.compiler.fusion import estimate
from convloom.compiler.graph.ir import CompileTarget, Graph
from convloom.compiler.records import rank
from convloom.errors import InvalidInputError, KernelError, TargetUnavailableError
from convloom.kernels import registry
from convloom.kernels.contract import cost_model
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Config, Problem, W, X
from convloom.kernels.contract.spec import Layout
from convloom.kernels.contract.targets import Target, parse
from convloom.kernels.convolution import grouped
from convloom.kernels.devices import offline
from convloom.kernels.fused.conv_pool import ConvPool
from convloom.kernels.hopper import boxes, core, gluon
from convloom.kernels.pooling.pool_window import MaxPool2d
from convloom.kernels.tile import choice
from convloom.kernels.tile.conv_geometry import Conv2d
from convloom.zoo import build
from torch import nn

from .test_hopper import (
    ADDED,
    COMPILED,
    CONV,
    HALF,
    HALVED,
    SAME,
    SINGLE,
    SM_90,
    averaged,
    conv,
    pooled,
    tile_of,
)

pytestmark = pytest.mark.skipif(gluon.MISSING is not None, reason=str(gluon.MISSING))

LARGE = COMPILED["3x3, residual"]


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLOOM_CORE", "hopper")


def test_nobody_gets_it_who_does_not_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU has run it. What a file names is legal still, unless it is switched off."""
    tile = next(iter(core.tiles(LARGE, SM_90)))
    for setting, reason in (("", None), ("plain", "CONVLOOM_CORE=plain switches the Hopper core")):
        monkeypatch.setenv("CONVLOOM_CORE", setting)
        assert not core.uses_core(CONV.default(LARGE, SM_90))
        assert not any(map(core.uses_core, CONV.configs(LARGE, SM_90)))
        assert core.note(LARGE, CONV.default(LARGE, SM_90), SM_90, ()) == ""
        found = CONV.legal(LARGE, tile, SM_90)
        assert found is None if reason is None else reason in str(found)


def test_settings_that_are_none_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONVLOOM_CORE", "ampere")
    with pytest.raises(InvalidInputError, match="CONVLOOM_CORE: expected plain or hopper, got"):
        settings.read()


def test_fusions_are_judged_by_the_core_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a process that has planned the same layer without it."""
    graph = Graph()
    graph.goal = CompileTarget(SM_90, HALF)
    times = []
    for setting in ("", "hopper", ""):
        monkeypatch.setenv("CONVLOOM_CORE", setting)
        times.append(estimate.problem_time_us(graph, LARGE))
    assert times[0] == times[2] > times[1]


def test_whoever_asks_gets_the_faster_by_the_model(asked_for: None) -> None:
    for problem in COMPILED.values():
        op = registry.get(problem.op)
        chosen = op.default(problem, SM_90)
        times = {
            tile: cost_model.problem_us(op, problem, SM_90, tile)
            for tile in (chosen, *core.tiles(problem, SM_90))
        }
        assert times[chosen] == min(times.values())
        assert set(core.tiles(problem, SM_90)) <= set(op.configs(problem, SM_90))
    assert core.uses_core(CONV.default(LARGE, SM_90))


def test_a_step_without_waste_takes_the_time_of_its_products(asked_for: None) -> None:
    """512 channels of 3x3: what the model knows of the loop is its tensor cores and L2."""
    problem = conv(SAME, (28, 28), (3, 3), (512, 512), 256)
    tile = next(each for each in core.tiles(problem, SM_90) if each["BLOCK_N"] == 256)
    (launch,) = CONV.launches(problem, tile, SM_90)
    machine = cost_model.machine_for(SM_90)
    cycles = cost_model.tile_cycles(machine, launch, 0.0, HALF, 0.0)
    assert cycles.tensor == pytest.approx(launch.steps * 128 * 256 * 64 * 2 / 4096, rel=1e-3)
    assert cycles.instructions < 0.5 * cycles.tensor and cycles.cache < 1.3 * cycles.tensor
    leaving = replace(launch, most_programs=None)
    work = choice.Work.of(problem, CONV.cost(problem).flops)
    stays_us, leaves_us = (cost_model.launch_us(machine, x, *work) for x in (launch, leaving))
    assert stays_us < leaves_us


def test_whoever_takes_turns_hides_the_ends_of_tiles(asked_for: None) -> None:
    """Four steps and a residual: the end of a tile takes as long as its loop."""
    problem = conv(Conv2d(), (14, 14), (1, 1), (256, 1024), 256, ADDED, "rb")
    machine = cost_model.machine_for(SM_90)
    work = choice.Work.of(problem, CONV.cost(problem).flops)
    times = {}
    for tile in core.tiles(problem, SM_90):
        (launch,) = CONV.launches(problem, tile, SM_90)
        assert launch.hides_ends == (tile[core.BLOCK] == core.IN_TURNS)
        size = tile["BLOCK_M"], tile["BLOCK_N"], tile[core.BLOCK]
        times[size] = cost_model.launch_us(machine, launch, *work)
    for width, most in ((128, 0.8), (64, 1.0)):
        assert times[128, width, core.IN_TURNS] < most * times[128, width, core.SHARED]


@pytest.mark.skipif(gluon.SMALL_VIEWS is not None, reason=str(gluon.SMALL_VIEWS))
def test_a_halo_reads_less(asked_for: None) -> None:
    """64 to 64 channels with weights that stay: the model's L2 traffic is a quarter, and what was
    bound by it is bound by shared memory."""
    problem = conv(SAME, (224, 224), (3, 3), (64, 64), 32)
    tile = CONV.default(problem, SM_90)
    (launch,) = CONV.launches(problem, tile, SM_90)
    assert tile[core.BLOCK] == core.HALO and launch.constexprs["RESIDENT"]
    usual = next(t for t in core.tiles(problem, SM_90) if t["BLOCK_M"] == 256)
    (other,) = CONV.launches(problem, usual, SM_90)
    assert other.kernel is not launch.kernel and launch.l2_bytes < 0.35 * other.l2_bytes
    assert cost_model.bound(CONV, problem, SM_90, tile) == "shared memory"
    dilated = conv(replace(SAME, dilation=(2, 2)), (224, 224), (3, 3), (64, 64), 32)
    assert "a halo is for 3x3 filters" in str(CONV.legal(dilated, tile, SM_90))
    flat = tile_with(tile, BOX_N=16, BOX_H=1, BOX_W=16)
    assert "a halo has two rows at least" in str(CONV.legal(problem, flat, SM_90))


def copied(problem: Problem, tile: Config) -> tuple[bool, bool]:
    """Whether results leave, and a residual arrives, in boxes."""
    (launch,) = registry.get(problem.op).launches(problem, tile, SM_90)
    leaves = launch.constexprs["PIXELS"].copied
    assert leaves == ("y" in launch.boxes) == ("y" not in launch.pointers)
    assert leaves == bool(launch.end_shared)
    return leaves, "residual" in launch.boxes


def test_results_and_a_residual_are_copied_where_boxes_hold_them() -> None:
    plain = conv(SAME, (16, 16), (3, 3), (64, 128), 8)
    added = conv(SAME, (16, 16), (3, 3), (64, 128), 8, ADDED, "rb")
    twice = conv(SAME, (16, 16), (3, 3), (64, 128), 8, ADDED, "rr")
    tile = tile_of(plain, (128, 128), (1, 8, 16))
    y, (residual, bias) = added.output, added.operands
    slice_ = replace(added, operands=(replace(residual, pitch=136, offset=8), bias))
    shifted = replace(added, operands=(replace(residual, offset=4), bias))
    other = replace(residual, spec=residual.spec.with_(dtype=SINGLE))
    dense = replace(residual, spec=residual.spec.with_(layout=Layout.DENSE))
    for problem, expected in (
        (plain, (True, False)),
        (added, (True, True)),
        (slice_, (True, True)),
        (replace(plain, outputs=(replace(y, pitch=136, offset=8),)), (True, False)),
        (replace(plain, outputs=(replace(y, pitch=132),)), (False, False)),
        (conv(SAME, (16, 16), (3, 3), (64, 130), 8), (False, False)),
        (twice, (False, False)),
        (shifted, (False, False)),
        (replace(added, operands=(other, bias)), (False, False)),
        (replace(added, operands=(dense, bias)), (False, False)),
        (pooled(added, MaxPool2d((2, 2), (2, 2))), (False, False)),
    ):
        assert copied(problem, tile) == expected, problem


def test_tiles_leave_memory_for_their_results() -> None:
    """Of each tile size the configuration of most slots, and that whose results are copied."""
    problem = conv(SAME, (56, 56), (3, 3), (256, 256), 32, ADDED, "rb", HALF)
    found = [each for each in core.tiles(problem, SM_90) if each["BLOCK_N"] == 256]
    stages = {each.num_stages: copied(problem, each)[0] for each in found}
    assert stages == {3: True, 4: False}


@pytest.mark.skipif(gluon.SMALL_VIEWS is not None, reason=str(gluon.SMALL_VIEWS))
def test_ends_that_are_copied_take_what_threads_do(asked_for: None) -> None:
    """The copy engine moves results and residual while the next tile is multiplied; what is left
    of an end grows with the residual, as its instructions and bytes of shared memory do."""
    machine, times = cost_model.machine_for(SM_90), {}
    for operands, chain in (("b", (Stage("add"), Stage("relu"))), ("rb", ADDED)):
        problem = conv(SAME, (56, 56), (3, 3), (64, 64), 256, chain, operands)
        tile = tile_of(problem, (256, 64), (4, 8, 8), 3, way=core.HALO)
        (launch,) = CONV.launches(problem, tile, SM_90)
        work = choice.Work.of(problem, CONV.cost(problem).flops)
        by_threads = replace(launch, end_shared=0, end_instructions=0)
        each = [cost_model.launch_us(machine, x, *work) for x in (launch, by_threads)]
        end = work.end_bytes / launch.tiles_at(256)
        cycles = cost_model.tile_cycles(machine, launch, 0.0, HALF, end)
        times[operands] = (*each, cycles.stall, cycles.end)
    assert times["rb"][0] < 1.15 * times["b"][0] < 1.15 * times["b"][1]
    assert times["rb"][0] < 0.85 * times["rb"][1]
    for _, _, stall, end in times.values():
        assert 0.15 * end < stall < 0.25 * end
    # No program is faster than its results and residuals leave and arrive.
    instant = replace(launch, l2_bytes=0, shared_traffic=1, step_instructions=0, steps=0)
    tiles = -(-launch.tiles_at(256) // machine.multiprocessors)
    least = tiles * times["rb"][3] / machine.clock_ghz / 1e3
    assert cost_model.launch_us(machine, instant, 0.0, HALF, work.end_bytes) >= least


@pytest.mark.skipif(gluon.SMALL_VIEWS is not None, reason=str(gluon.SMALL_VIEWS))
@pytest.mark.parametrize("size, images", [(56, 4), (28, 16), (14, 64), (7, 32)])
def test_a_halo_of_several_images_wastes_little(
    size: int, images: int, asked_for: None
) -> None:
    """Rows of 28 pixels are no multiple of 8, those of 16 images are. There is memory for two slots
    beside the results; those of 14x14, four rows for two, leave none for these."""
    problem = conv(SAME, (size, size), (3, 3), (256, 256), 256)
    tile = CONV.default(problem, SM_90)
    assert tile[core.BLOCK] == core.HALO and (tile["BOX_N"], tile.num_stages) == (images, 2)
    assert boxes.waste(problem, boxes.box_of(tile)) == (8 / 7 if size == 7 else 1)
    (launch,) = CONV.launches(problem, tile, SM_90)
    assert launch.boxes["x"].shape_at(3)[:2] == (size, 3)
    assert launch.constexprs["PIXELS"].copied == (size != 14)


def test_what_it_cannot_compute_is_refused_with_a_reason(asked_for: None) -> None:
    good = conv(SAME, (16, 16), (3, 3), (64, 64), 8)
    tile = tile_of(good, (128, 128), (1, 8, 16))
    sm_80 = parse("cuda:sm_80")
    x = good.inputs[0]
    slice_ = replace(good, inputs=(replace(x, pitch=68), good.inputs[1]))
    for problem, config_, target, reason in (
        (good, tile, sm_80, "made for sm_90, not for cuda:sm_80"),
        (conv(replace(SAME, groups=2), (16, 16), (3, 3), (64, 64)), tile, SM_90, "2 groups"),
        (conv(replace(SAME, groups=4), (16, 16), (3, 3), (64, 64)), tile, SM_90, "only they"),
        (conv(replace(SAME, groups=8), (16, 16), (3, 3), (64, 128)), tile, SM_90, "8 groups"),
        (conv(replace(SAME, groups=4), (16, 16), (3, 3), (48, 48)), tile, SM_90, "4 groups"),
        (conv(replace(SAME, stride=(1, 2)), (16, 16), (3, 3), (64, 64)), tile, SM_90, "stride"),
        (conv(HALVED, (15, 16), (3, 3), (64, 64)), tile, SM_90, "15x16 has no halves"),
        (conv(HALVED, (16, 16), (3, 3), (72, 64)), tile, SM_90, "72 channels are not a mu"),
        (conv(SAME, (16, 16), (3, 3), (24, 64)), tile, SM_90, "24 channels; the Hopper core is"),
        (conv(SAME, (16, 16), (3, 3), (36, 64)), tile, SM_90, "the pitch of x, 72 bytes"),
        (slice_, tile, SM_90, "the pitch of x, 136 bytes, is not a multiple of 16"),
        (replace(good, prologue=(Stage("relu"),)), tile, SM_90, "a prologue needs"),
        (conv(SAME, (16, 16), (3, 3), (64, 64), dtype=SINGLE), tile, SM_90, "fp32 accuracy"),
        (good, replace(tile, num_stages=9), SM_90, "bytes of shared memory"),
        (good, replace(tile, num_warps=8), SM_90, "has no tile of"),
        (good, tile_with(tile, BOX_W=8), SM_90, "does not hold BLOCK_M=128"),
    ):
        assert reason in str(CONV.legal(problem, config_, target)), reason
    note = core.note(slice_, CONV.default(slice_, SM_90), SM_90, ())
    assert note == "plain core: TMA: the pitch of x, 136 bytes, is not a multiple of 16"


def tile_with(tile: Config, **sizes: int) -> Config:
    return replace(tile, blocks=tuple({**dict(tile.blocks), **sizes}.items()))


class Net(nn.Module):
    """A layer for the core, and one with too few channels for it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, padding=1)
        self.body = nn.Conv2d(64, 256, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.body(torch.relu(self.stem(x))))


def test_the_plan_says_which_core_and_why(asked_for: None) -> None:
    x = torch.randn(64, 3, 56, 56)
    made: dict[str, Any] = {"target": "cuda:sm_90", "dtype": HALF}
    _, plan, _ = api.lowered(Net().eval(), (x,), **made, passes="none")
    text = plan.to_text()
    assert "(heuristic; plain core: 3 channels; the Hopper core is for 32 and more)" in text
    assert "(heuristic; Hopper core)" in text
    _, plan, _ = api.lowered(Net().eval(), (x,), **made)
    assert "(heuristic; plain core: stem has no other)" in plan.to_text()


class Branches(nn.Module):
    """Two 1x1 filters that read one image, and two branches that are put side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1024, 128, 1), nn.Conv2d(1024, 128, 1)
        self.left, self.right = (nn.Conv2d(128, 256, 3, padding=1) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = self.left(torch.relu(self.one(x))), self.right(torch.relu(self.two(x)))
        return torch.cat([torch.relu(each) for each in branches], 1)


def test_siblings_and_concatenations_are_its_own(asked_for: None) -> None:
    """Siblings are one product, read and written in parts: results lie where they will be read."""
    made: dict[str, Any] = {"target": "cuda:sm_90", "dtype": HALF}
    _, plan, _ = api.lowered(Branches().eval(), (torch.zeros(256, 1024, 14, 14),), **made)
    steps = [step for step in plan.steps if step.op == "conv2d"]
    assert [core.uses_core(step.config) for step in steps] == [True, True, True], plan.to_text()
    pair, *branches = steps
    assert pair.problem.output.shape[1] == 256
    for at, step in enumerate(branches):
        x, y = step.problem.inputs[0], step.problem.output
        assert (x.pitch, x.offset, y.pitch, y.offset) == (256, 128 * at, 512, 256 * at)


def test_whoever_asks_where_it_cannot_be_is_told(asked_for: None) -> None:
    module, x = Net().eval(), (torch.randn(1, 3, 8, 8),)
    with pytest.raises(TargetUnavailableError, match="CONVLOOM_CORE=hopper: the Hopper core is ma"):
        api.lowered(module, x, target="cuda:sm_80", dtype=HALF)
    api.lowered(module, x, target="interpreter")


def test_windows_are_pooled_where_they_lie_in_one_group(asked_for: None) -> None:
    """The model counts the products of every pixel, and a quarter of the results."""
    problem = pooled(LARGE, MaxPool2d((2, 2), (2, 2)))
    op = registry.get("conv_pool")
    tile = op.default(problem, SM_90)
    assert core.uses_core(tile)
    chosen, alone = (
        cost_model.problem_us(registry.get(each.op), each, SM_90, tile) for each in (problem, LARGE)
    )
    assert 0.85 * alone < chosen < alone
    flat = tile_with(tile, BOX_N=1, BOX_H=2, BOX_W=tile["BLOCK_M"] // 2)
    assert "does not hold whole windows of 2x2" in str(op.legal(problem, flat, SM_90))
    before = replace(problem.attributes.expect(ConvPool), before=(Stage("relu"),))
    prepared = replace(problem, attributes=before)
    assert "a prologue needs" in str(op.legal(prepared, tile, SM_90))
    assert core.note(problem, tile, SM_90, ()) == "Hopper core"


@pytest.mark.skipif(gluon.SMALL_VIEWS is not None, reason=str(gluon.SMALL_VIEWS))
def test_groups_of_few_channels_are_a_halo_of_32(asked_for: None) -> None:
    """As plain Triton packs them; what is read out of L2 is a third."""
    problem = COMPILED["3x3, groups"]
    tile = CONV.default(problem, SM_90)
    assert (tile[core.BLOCK], tile["BLOCK_N"], tile["BLOCK_K"]) == (core.HALO, 32, 32)
    (launch,) = CONV.launches(problem, tile, SM_90)
    assert launch.constexprs["GROUP"] == 4 and launch.pointers == {"x_all": X, "w_all": W}
    assert launch.boxes["x"].shape_at(3) == (56, 3, 56, 128) and launch.boxes["w"].shape[2] == 32
    usual = grouped._default(problem, SM_90)
    (other,) = CONV.launches(problem, usual, SM_90)
    assert launch.l2_bytes / tile["BLOCK_M"] < 0.45 * other.l2_bytes / usual["BLOCK_M"]
    one = COMPILED["3x3, residual"]
    assert "only they" in str(CONV.legal(one, tile_with(tile, BOX_N=4), SM_90))


def test_images_are_averaged_where_they_lie_in_one_group(asked_for: None) -> None:
    """In boxes of 8x8 for 7x7: the model counts the pixels that there are not, and the residual."""
    problem = COMPILED["1x1, averaged"]
    op = registry.get("conv_mean")
    tile = op.default(problem, SM_90)
    assert core.uses_core(tile) and core.note(problem, tile, SM_90, ()) == "Hopper core"
    assert (tile["BOX_H"], tile["BOX_W"]) == (8, 8) and tile[core.BLOCK] != core.HALO
    (launch,) = op.launches(problem, tile, SM_90)
    assert cost_model.padding(launch, tile, problem) == pytest.approx(64 / 49)
    operands = 512 * (tile["BLOCK_M"] + tile["BLOCK_N"])
    assert launch.l2_bytes == 2 * (operands + tile["BLOCK_M"] * tile["BLOCK_N"])
    alone = tile_with(tile, BOX_N=1, BOX_H=tile["BLOCK_M"] // 8)
    assert "does not hold whole images" in str(op.legal(problem, alone, SM_90))
    large = averaged(conv(Conv2d(), (14, 14), (1, 1), (512, 2048), 256))
    assert not core.uses_core(op.default(large, SM_90))
    note = core.note(large, op.default(large, SM_90), SM_90, ())
    assert note == "plain core: no tile of the Hopper core fits"


def test_without_gluon_the_plain_core_is_taken(
    asked_for: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gluon, "MISSING", "this Triton has no Gluon for Hopper (no module)")
    assert "this Triton has no Gluon" in str(core.refusal(LARGE, SM_90))
    assert not core.uses_core(CONV.default(LARGE, SM_90))
    with pytest.raises(TargetUnavailableError, match="CONVLOOM_CORE=hopper: this Triton has no Gl"):
        core.check_asked(SM_90)


def test_with_small_views_there_is_no_halo(
    asked_for: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = conv(SAME, (224, 224), (3, 3), (64, 64), 32)
    monkeypatch.setattr(gluon, "SMALL_VIEWS", None)
    tile = next(each for each in core.tiles(problem, SM_90) if each[core.BLOCK] == core.HALO)
    reason = "Triton 3.8 and newer have no views that are larger than a buffer, and this is 3.9.0"
    monkeypatch.setattr(gluon, "SMALL_VIEWS", reason)
    assert CONV.legal(problem, tile, SM_90) == reason
    assert all(each[core.BLOCK] != core.HALO for each in core.tiles(problem, SM_90))


def any_way(problem: Problem, target: Target, plain: Config, _: object) -> Config:
    """A tile of the core in the last of its ways that can compute a problem; `plain` if none."""
    return max(core.tiles(problem, target), key=lambda tile: tile[core.BLOCK], default=plain)


@pytest.mark.slow
@pytest.mark.parametrize("model, least", [("resnet18", 12), ("resnet50", 24), ("vgg_d", 12)])
def test_a_network_by_the_core_alone_is_right(
    model: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On small images, with every layer that can use the core using it, in each of its ways; of
    VGG-D without the hidden layers of its classifier, which are 120 million weights."""
    monkeypatch.setattr(core, "default", any_way)
    monkeypatch.setattr(boxes, "MOST_WASTE", 64.0)
    net, x = build(model).eval(), torch.randn(2, 3, 32, 32)
    if model == "vgg_d":
        net.classifier = nn.Linear(512 * 7 * 7, 8)
    made = convloom.compile(net, (x,), target="emulator:sm_90", dtype=HALF, tuning="heuristic")
    used = [step for step in made.plan.steps if core.uses_core(step.config)]
    assert len(used) >= least, made.plan.to_text()
    ways = {step.config[core.BLOCK] for step in used}
    assert {core.IN_TURNS, core.HALO} <= ways or gluon.SMALL_VIEWS is not None
    assert model != "vgg_d" or any(step.op == "conv_pool" for step in used)
    exact, found = net.double()(x.double()), made(x).double()
    assert (found - exact).norm() < 0.01 * exact.norm()


NO_GLUON = """
import os, sys
sys.modules["triton.experimental.gluon.language.nvidia.hopper"] = None
import torch, convloom
net, x = torch.nn.Linear(64, 64).eval(), torch.randn(2, 64)
made = convloom.compile(net, (x,), target="interpreter")
torch.testing.assert_close(made(x), net(x), rtol=1e-4, atol=1e-4)
os.environ["CONVLOOM_CORE"] = "hopper"
try:
    convloom.compile(net, (x,), target="cuda:sm_90")
except convloom.TargetUnavailableError as error:
    assert "this Triton has no Gluon for Hopper" in str(error)
    print("refused")
"""


@pytest.mark.slow
def test_everything_else_works_without_gluon() -> None:
    done = subprocess.run([sys.executable, "-c", NO_GLUON], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


@pytest.mark.slow  # Its worker imports this file.
def test_a_compiler_that_ends_its_process_is_an_error_of_the_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONVLOOM_CACHE_DIR", str(tmp_path))
    tile = next(iter(core.tiles(LARGE, SM_90)))
    (wanted,) = rank.requests(CONV, LARGE, CONV.launches(LARGE, tile, SM_90), SM_90)
    monkeypatch.setattr(offline, "resources", ending)
    with pytest.raises(KernelError, match=r"hopper_kernel does not compile.*ended its proc"):
        offline.compile_request(wanted)


def ending(wanted: Any) -> None:
    """What a compiler does whose assertion fails."""
    os._exit(1)
