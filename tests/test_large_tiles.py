"""Tiles of up to 256x128 and 8 warps, right in the emulator: races, bounds and numbers.

Two groups of warps share the operands of a product on sm_90. A few pairs of problem and tile run
always; all of them are among the slow tests.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import convloom
import pytest
import torch
from convloom import zoo
from convloom.compiler import api
from convloom.compiler.plan.plan import KernelStep
from convloom.compiler.records import rank
from convloom.compiler.records.choose import Choice, heuristic
from convloom.kernels import registry
from convloom.kernels.contract import epilogue as ep
from convloom.kernels.contract.epilogue import Stage
from convloom.kernels.contract.op import Attributes, Config, Op, Problem, config
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import Target
from convloom.kernels.products.linear import Linear
from convloom.kernels.tile.conv_geometry import Conv2d

from . import harness

SAME = (1, 1, 1, 1)
BIAS = (Stage("add"), Stage("relu"))
RESIDUAL = (Stage("add"), Stage("add"), Stage("relu"))


def conv(
    channels: int, filters: int, attributes: Conv2d, epilogue: tuple[Stage, ...] = BIAS,
    size: int = 3, image: tuple[int, int] = (9, 11), dtype: torch.dtype = torch.float16,
) -> Problem:  # fmt: skip
    """Two images: 198 pixels, which fill no tile, of slices of wider tensors."""
    x = TensorSpec((2, channels, *image), dtype, Layout.NHWC)
    w = TensorSpec((filters, channels // attributes.groups, size, size), dtype)
    return _placed("conv2d", attributes, x, w, (filters, 1, 1), epilogue)


def _placed(
    op: str, attributes: Attributes, x: TensorSpec, w: TensorSpec, bias: tuple[int, ...],
    epilogue: tuple[Stage, ...],
) -> Problem:  # fmt: skip
    (y,) = registry.get(op).infer(attributes, (x, w))
    operands = (TensorSpec(bias, torch.float32), y)[: len(epilogue) - 1]
    return harness.problem_for(registry.get(op), attributes, (x, w), epilogue, operands, pad=8)


def prepared(problem: Problem) -> Problem:
    """With a prologue over the channels."""
    channels = problem.inputs[0].shape[1]
    vector = harness.place(TensorSpec((channels, 1, 1), torch.float16))
    return replace(problem, prologue=(Stage("mul"), Stage("relu")), prologue_operands=(vector,))


def linear() -> Problem:
    x, w = TensorSpec((197, 136), torch.float16), TensorSpec((257, 136), torch.float16)
    return _placed("linear", Linear(), x, w, (257,), BIAS)


PROBLEMS = {
    "3x3": conv(64, 136, Conv2d(padding=SAME)),
    "3x3 residual": conv(64, 136, Conv2d(padding=SAME), RESIDUAL),
    "odd channels": conv(35, 131, Conv2d(padding=SAME)),
    "stride 2": conv(64, 264, Conv2d((2, 2), SAME), image=(23, 19)),
    "dilation": conv(64, 136, Conv2d((1, 1), (2, 2, 2, 2), (2, 2))),
    "groups": conv(128, 264, Conv2d(padding=SAME, groups=2)),
    "5x5 bf16": conv(64, 136, Conv2d(padding=(2, 2, 2, 2)), size=5, dtype=torch.bfloat16),
    "1x1": conv(136, 264, Conv2d(), size=1),
    "1x1 residual": conv(136, 264, Conv2d(), RESIDUAL, size=1),
    "1x1 prologue": prepared(conv(72, 264, Conv2d(), size=1)),
    "3x3 tf32": replace(
        conv(64, 72, Conv2d(padding=SAME), dtype=torch.float32), precision="tf32"
    ),
    "linear": linear(),
}


def tile(m: int, n: int, k: int, warps: int, stages: int, split: int = 1) -> Config:
    return config(
        warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_K=k, GROUP_M=8, SPLIT=split
    )  # fmt: skip


TILES = {
    "sm_90": (
        tile(128, 256, 64, 8, 3), tile(128, 256, 64, 8, 4), tile(256, 128, 64, 8, 4),
        tile(128, 128, 64, 8, 3), tile(128, 128, 64, 4, 3), tile(256, 64, 64, 8, 5),
        tile(256, 64, 32, 8, 3), tile(64, 256, 64, 4, 3), tile(128, 128, 128, 8, 3),
        tile(128, 128, 64, 8, 3, split=2),
    ),
    "sm_80": (
        tile(128, 256, 32, 8, 3), tile(256, 128, 32, 8, 3), tile(128, 128, 64, 8, 3),
        tile(128, 128, 32, 4, 4), tile(128, 64, 64, 8, 3, split=2),
    ),
}  # fmt: skip
FP32_TILES = {
    "sm_90": (tile(128, 128, 32, 8, 3), tile(128, 64, 32, 8, 4)),
    "sm_80": (tile(128, 64, 32, 8, 3), tile(64, 64, 32, 8, 3)),
}
EVERY = [
    (name, generation, each)
    for (name, problem), generation in itertools.product(PROBLEMS.items(), TILES)
    for each in (FP32_TILES if problem.output.spec.dtype is torch.float32 else TILES)[generation]
]
FEW = [
    ("3x3 residual", "sm_90", tile(128, 256, 64, 8, 4)),
    ("odd channels", "sm_90", tile(256, 128, 64, 8, 4)),
    ("1x1 prologue", "sm_90", tile(128, 128, 64, 8, 3, split=2)),
    ("stride 2", "sm_80", tile(128, 256, 32, 8, 3)),
    ("3x3 tf32", "sm_90", tile(128, 128, 32, 8, 3)),
]


def check(name: str, generation: str, chosen: Config) -> None:
    """One problem in one tile, in the emulator, against the reference."""
    problem = PROBLEMS[name]
    op, device = registry.get(problem.op), harness.Emulator(generation)
    assert op.legal(problem, chosen, device.target) is None
    groups = (problem.inputs, problem.operands, problem.prologue_operands)
    inputs, operands, before = (
        tuple(harness.make_tensor(x.spec, 10 * at + seed, -2, 2) for at, x in enumerate(group))
        for seed, group in enumerate(groups)
    )
    results = harness.run_on(device, op, problem, inputs, operands, chosen, before=before)
    if problem.prologue:
        first = ep.apply_reference(problem.prologue, inputs[0].float(), before)
        inputs = (first.to(inputs[0].dtype), *inputs[1:])
    harness.compare(op, problem, results, inputs, operands)


@pytest.mark.parametrize(("name", "generation", "chosen"), FEW, ids=str)
def test_large_tiles_are_right(name: str, generation: str, chosen: Config) -> None:
    check(name, generation, chosen)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "generation", "chosen"), EVERY, ids=str)
def test_every_large_tile_is_right(name: str, generation: str, chosen: Config) -> None:
    check(name, generation, chosen)


def test_the_large_tiles_are_in_the_space_and_are_many() -> None:
    """What is shown right is what the tuner may take."""
    assert len(EVERY) >= 80
    for name, generation, chosen in EVERY:
        problem = PROBLEMS[name]
        target = harness.Emulator(generation).target
        is_deep = chosen["BLOCK_K"] <= problem.inputs[1].shape[1]
        if problem.output.spec.dtype is not torch.float32 and chosen["SPLIT"] == 1 and is_deep:
            assert chosen in rank.space(registry.get(problem.op), problem, target), (name, chosen)


# The tiles that networks get at batch 256, in those networks on small images.

NETWORKS = {
    "resnet18": (64, 12), "resnet50": (64, 20), "vgg_d": (32, 8), "googlenet": (64, 12),
    "mobilenet_v2": (64, 12),
}  # fmt: skip
"""Height of the images, and how many of the large plan's configurations must have been used."""


def key_of(op: Op, problem: Problem) -> object:
    """A layer, whatever the size of its images."""
    weights = tuple(problem.inputs[index].shape for index in op.packs(problem.attributes))
    return op.name, str(problem.attributes), weights, problem.epilogue


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_defaults_of_large_batches_are_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, least = NETWORKS[name]
    torch.manual_seed(0)
    model = zoo.build(name).eval()
    shape = zoo.entry(name).input_shape
    whole = api.lowered(
        model, (torch.zeros(256, *shape),), target="cuda:sm_90", dtype=torch.float16
    )[1]
    known = {
        key_of(registry.get(step.op), step.problem): step.config
        for step in whole.steps
        if isinstance(step, KernelStep) and "BLOCK_K" in dict(step.config.blocks)
    }
    used = set()

    def choose(op: Op, problem: Problem, target: Target) -> Choice:
        config = known.get(key_of(op, problem))
        if config is None or op.legal(problem, config, target) is not None:
            return heuristic(op, problem, target)
        used.add(key_of(op, problem))
        return Choice(config)

    x = torch.randn(2, shape[0], size, size)
    options = {"dtype": torch.float16, "tuning": "heuristic"}
    expected = convloom.compile(model, (x,), target="reference", **options)(x)
    monkeypatch.setattr(api, "heuristic", choose)
    result = convloom.compile(model, (x,), target="emulator:sm_90", **options)(x)
    assert len(used) >= least, (len(used), len(known))
    scale = expected.abs().max()
    assert (result - expected).abs().max() <= 0.02 * scale, (result - expected).abs().max() / scale
