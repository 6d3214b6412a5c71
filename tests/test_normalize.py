"""Layer, group, instance and batch statistics: torch's numbers, and no read too many."""

from __future__ import annotations

import re
from typing import Any

import convloom
import pytest
import torch
from convloom.errors import InvalidInputError
from convloom.kernels import registry
from convloom.kernels.contract.op import Problem
from convloom.kernels.contract.spec import Layout, TensorSpec
from convloom.kernels.contract.targets import GPU_TARGETS, parse
from convloom.kernels.normalisation import normalize, statistics
from convloom.kernels.normalisation.normalize import Normalize
from torch import nn

from . import harness, nets

IMAGE, SEQUENCE, VOLUME = (2, 12, 5, 6), (2, 12, 7), (2, 12, 3, 4, 5)
LAYERS: tuple[tuple[nn.Module, tuple[int, ...]], ...] = (
    (nn.GroupNorm(4, 12), IMAGE),
    (nn.GroupNorm(4, 12), SEQUENCE),
    (nn.GroupNorm(1, 12), VOLUME),
    (nn.GroupNorm(12, 12, affine=False), IMAGE),
    (nn.GroupNorm(3, 12), (4, 12)),
    (nn.LayerNorm(6), IMAGE),
    (nn.LayerNorm((12, 5, 6)), IMAGE),
    (nn.LayerNorm(12, bias=False), (4, 12)),
    (nn.RMSNorm((5, 6)), IMAGE),
    (nn.InstanceNorm2d(12), IMAGE),
    (nn.InstanceNorm1d(12, affine=True), SEQUENCE),
    (nn.InstanceNorm2d(12, affine=True, track_running_stats=True), IMAGE),
    (nn.BatchNorm2d(12, track_running_stats=False), IMAGE),
    (nn.BatchNorm1d(12, track_running_stats=False), (4, 12)),
)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("layer", "shape"), LAYERS, ids=[f"{type(m).__name__}-{len(s)}-{i}" for i, (m, s)
                                     in enumerate(LAYERS)]
)  # fmt: skip
def test_layers_are_torchs(layer: nn.Module, shape: tuple[int, ...]) -> None:
    module = nets.randomise(layer).eval()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 3
    by_batch = isinstance(layer, nn.modules.batchnorm._BatchNorm)
    for dtype in (torch.float32, torch.float16):
        exe = convloom.compile(
            module, (x,), target="interpreter", dtype=dtype,
            dynamic_batch=None if by_batch else (1, len(x)),
        )  # fmt: skip
        nets.check(exe(x), module, (x,), dtype)
        if not by_batch:
            nets.check(exe(x[:1]), module, (x[:1],), dtype)


@pytest.mark.interpreter
def test_group_norm_takes_the_activation_along_also_between_1d_convolutions() -> None:
    for conv, shape in ((nn.Conv2d, IMAGE), (nn.Conv1d, SEQUENCE)):
        module = nets.randomise(
            nn.Sequential(conv(12, 8, 3), nn.GroupNorm(2, 8), nn.SiLU(), conv(8, 4, 1))
        ).eval()
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        exe = convloom.compile(module, (x,), target="interpreter")
        ops = [step.op for step in exe.plan.steps if step.op not in ("relayout", "reshape")]
        assert ops == ["conv2d", "normalize", "conv2d"]
        assert [step.op for step in exe.plan.steps].count("relayout") == 2
        nets.check(exe(x), module, (x,))


@pytest.mark.interpreter
@pytest.mark.parametrize("most", [64, statistics.WHOLE], ids=["walked twice", "held"])
def test_a_large_mean_does_not_cancel(most: int) -> None:
    """A deviation of 1 around 10000: E[x²] − E[x]² would leave two digits."""
    op, attributes = registry.get("normalize"), Normalize((1,))
    spec = TensorSpec((3, 700), torch.float32)
    problem = harness.problem_for(op, attributes, (spec,))
    x = 1e4 + torch.randn(spec.shape, generator=torch.Generator().manual_seed(2))
    tile = statistics.tile_of(statistics.walk_of(problem), 64, most)
    assert statistics.walk_of(problem).is_whole(tile) is (most > 64)
    harness.check(op, problem, (x,), tile=tile)


def problem_of(attributes: Normalize, *shape: int) -> Problem:
    layout = Layout.NHWC if len(shape) == 4 else Layout.DENSE
    spec = TensorSpec(shape, torch.float16, layout)
    return harness.problem_for(registry.get("normalize"), attributes, (spec,))


READ_ONCE = {
    "layer norm of ConvNeXt": problem_of(Normalize((1,)), 32, 96, 56, 56),
    "layer norm of tokens": problem_of(Normalize((2,)), 32, 196, 768),
    "group norm, 32 groups": problem_of(Normalize((1, 2, 3), 32), 8, 256, 28, 28),
    "group norm, late": problem_of(Normalize((1, 2, 3), 32), 8, 2048, 7, 7),
    "instance norm": problem_of(Normalize((2, 3)), 8, 64, 16, 16),
}


@pytest.mark.parametrize("name", READ_ONCE)
def test_one_read_and_one_write(name: str) -> None:
    """By the launch geometry: each program holds what it normalises, and programs own disjoint
    parts that they read in whole sectors."""
    problem = READ_ONCE[name]
    for target in GPU_TARGETS:
        tile = statistics.default(problem, target)
        (launch,) = normalize.launches(problem, tile, target)
        programs = launch.grid_at(1)[0]
        assert statistics.walk_of(problem).is_whole(tile)
        assert programs * launch.l2_bytes < 1.2 * problem.inputs[0].spec.size_bytes
        assert tile["BLOCK_GROUPS"] * tile["BLOCK_WIDTH"] >= 16
        assert programs >= 32


def test_what_no_program_can_hold_is_read_twice() -> None:
    """Documented: 56x56 pixels of a group of 8 channels are more than the registers hold."""
    problem = problem_of(Normalize((1, 2, 3), 8), 8, 64, 56, 56)
    (launch,) = normalize.launches(problem, statistics.default(problem, parse("cuda:sm_90")), None)
    owned = problem.inputs[0].spec.size_bytes
    assert 2 * owned <= launch.grid_at(1)[0] * launch.l2_bytes


MESSAGES: tuple[tuple[Normalize, TensorSpec, str], ...] = (
    (Normalize(), TensorSpec((2, 3), torch.float32), "() are not ascending dimensions"),
    (Normalize((1, 2)), TensorSpec((2, 3), torch.float32), "are not ascending dimensions"),
    (Normalize((1,), 2), TensorSpec((2, 3), torch.float32), "cannot be split into 2 groups"),
    (Normalize((2,), 3), TensorSpec((2, 3, 4), torch.float32), "cannot be split into 3 groups"),
    (Normalize((0, 1)), TensorSpec((2, 3), torch.float32, batch=2), "is the batch"),
)


@pytest.mark.parametrize(("attributes", "spec", "message"), MESSAGES)
def test_impossible_statistics_are_named(
    attributes: Normalize, spec: TensorSpec, message: str
) -> None:
    with pytest.raises(InvalidInputError, match=re.escape(message)) as raised:
        normalize.infer(attributes, (spec,))
    assert str(raised.value).startswith("normalize: ")


def test_groups_wider_than_a_tile_go_one_by_one() -> None:
    problem = problem_of(Normalize((1, 2, 3), 2), 1, 96, 4, 4)
    tile: Any = statistics.config(
        4, 1, BLOCK_OUTER=1, BLOCK_LENGTH=16, BLOCK_GROUPS=2, BLOCK_WIDTH=16
    )
    reason = str(statistics.legal(problem, tile, GPU_TARGETS[0]))
    assert "several groups at a time, of 48 columns" in reason
